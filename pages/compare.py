"""Compare methods: One edit, several methods side by side."""

import streamlit as st

from pages.components import frame

frame.enter()

st.title("Compare methods", anchor=False)
