"""Failure review: Look at failures one by one and say what went wrong."""

import streamlit as st

from pages.components import frame

frame.enter()

st.title("Failure review", anchor=False)
