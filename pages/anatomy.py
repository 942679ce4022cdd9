"""Anatomy: Where in the network an edit acts."""

import streamlit as st

from pages.components import frame

frame.enter()

st.title("Anatomy", anchor=False)
