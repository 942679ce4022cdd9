"""The pages of the app, and the guard that makes every visit go through app.py."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

MARK = str(Path(__file__).with_name("mark.svg"))


def navigation() -> st.Page:
    """Announce every page and return the one asked for. Titles, icons and addresses are fixed here: links outlive
    renamed files.
    """
    # First, and with a file: a page's own named icon would become the tab's, which browsers fetch from another host.
    st.set_page_config(page_title="Edit Anatomy", page_icon=MARK, layout="wide")
    return st.navigation(
        [
            st.Page("pages/start.py", title="Start", icon=":material/home:", url_path="start", default=True),
            st.Page("pages/edit.py", title="Edit trial", icon=":material/edit_note:", url_path="edit"),
            st.Page("pages/runs.py", title="Runs", icon=":material/history:", url_path="runs"),
            st.Page("pages/status.py", title="Status", icon=":material/monitor_heart:", url_path="status"),
        ],
        position="top",
    )


def enter() -> None:
    """First line of every page: start over through app.py when it was left out.

    Until some session of a server has called st.navigation, Streamlit runs a file of pages/ by itself, so the first
    visit after a start would miss title, navigation and error handling when it is a deep link. Announcing the pages
    ends that for the whole server.
    """
    if not st.session_state.get("framed"):
        navigation()
        st.rerun()
