"""Benchmark: Many edits, many methods, measured."""

import streamlit as st

from pages.components import benchmark_form, benchmark_list, benchmark_results, frame

frame.enter()

name = benchmark_list.in_address()
sweep = benchmark_list.opened(name)

st.title("Benchmark", anchor=False)
if sweep is None:
    st.caption(
        "Measure methods on many edits under published protocols: each number comes with its 95 % interval and opens "
        "the answers behind it. A benchmark goes on without your browser, and everybody on this machine sees it."
    )
    benchmark_list.unknown(name)
    benchmark_form.draw()
    benchmark_list.draw()
else:
    benchmark_list.draw_one(sweep)
    benchmark_results.draw(sweep)
