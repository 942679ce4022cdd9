"""Success against failure: What edits that work have in common."""

import streamlit as st

from pages.components import frame

frame.enter()

st.title("Success against failure", anchor=False)
