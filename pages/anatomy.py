"""Anatomy: Where in the network an edit acts."""

import streamlit as st

from pages.components import anatomy_ask, anatomy_views, frame, progress, run_bar

frame.enter()

st.title("Anatomy", anchor=False)
st.caption(
    "Where in the network an edit acts: layers, heads and neurons before and after it, and whether each does what its "
    "score says."
)
report = run_bar.opened("look inside")
if report is not None:
    run_bar.bar(report, "anatomy")
    anatomy_views.draw(report)
progress.draw(anatomy_ask.SLOT, anatomy_ask.done)  # at the end: there it stays in view wherever on the page one is
progress.failure(anatomy_ask.SLOT)
