"""The frame around every page: title, navigation, and the last resort for errors."""

import streamlit as st

from pages.components import frame, session

page = frame.navigation()
st.logo(frame.MARK, size="large")
st.session_state["framed"] = True
try:
    page.run()
except Exception as error:  # a rerun or a stop is a BaseException and passes
    session.tell(error)
