"""Learn: The anatomy of an edit in eight steps."""

import streamlit as st

from pages.components import frame

frame.enter()

st.title("Learn", anchor=False)
