"""Multi-hop: Does an edited fact carry through a chain of facts?"""

import streamlit as st

from pages.components import frame

frame.enter()

st.title("Multi-hop", anchor=False)
