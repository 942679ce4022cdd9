"""One mask: One binary mask that undoes edits."""

import streamlit as st

from pages.components import frame

frame.enter()

st.title("One mask", anchor=False)
