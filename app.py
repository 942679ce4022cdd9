"""The frame around every page: title, navigation, and the last resort for errors."""

import streamlit as st

from pages.components import callbacks, frame

callbacks.keep_whole()
page = frame.navigation()
st.logo(frame.MARK, size="large")
st.session_state["framed"] = True
try:
    page.run()
except Exception as error:  # a rerun or a stop is a BaseException and passes
    # Not above: it needs the service, whose modules take a second to read. The first page draws its heading before.
    from pages.components.session import tell

    tell(error)
