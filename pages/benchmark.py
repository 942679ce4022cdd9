"""Benchmark: Many edits, many methods, measured."""

import streamlit as st

from pages.components import frame

frame.enter()

st.title("Benchmark", anchor=False)
