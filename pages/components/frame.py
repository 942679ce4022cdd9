"""The pages of the app, and the guard that makes every visit go through app.py."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

MARK = str(Path(__file__).with_name("mark.svg"))
STYLE = Path(__file__).with_name("frame.css")
HEAD_START = 0.1
"""Seconds for the browser to draw what it was sent, before the rest of a page follows."""
HEAD_START_ENDS = 0.25
"""Seconds after the beginning of a page: a server that has much to do is no faster than the browser, and won't wait."""


@dataclass(frozen=True, slots=True)
class PageInfo:
    """One page: its file is pages/<name>.py."""

    name: str
    title: str
    icon: str
    section: str

    @property
    def file(self) -> str:
        """For st.switch_page and st.page_link."""
        return f"pages/{self.name}.py"

    @property
    def address(self) -> str:
        """Its path on the server; the first page is the root."""
        return "/" if self is PAGES[0] else f"/{self.name}"


PAGES = (
    PageInfo("start", "Start", ":material/home:", "Try"),
    PageInfo("edit", "Edit trial", ":material/edit_note:", "Try"),
    PageInfo("compare", "Compare methods", ":material/view_column:", "Try"),
    PageInfo("anatomy", "Anatomy", ":material/troubleshoot:", "Inspect"),
    PageInfo("contrast", "Success against failure", ":material/balance:", "Inspect"),
    PageInfo("multihop", "Multi-hop", ":material/route:", "Inspect"),
    PageInfo("mask", "One mask", ":material/shield:", "Inspect"),
    PageInfo("benchmark", "Benchmark", ":material/leaderboard:", "Evaluate"),
    PageInfo("review", "Failure review", ":material/rate_review:", "Evaluate"),
    PageInfo("runs", "Runs", ":material/history:", "Evaluate"),
    PageInfo("learn", "Learn", ":material/school:", "About"),
    PageInfo("status", "Status", ":material/monitor_heart:", "About"),
)


def navigation() -> st.Page:
    """Announce every page and return the one asked for. Titles, icons and addresses are fixed here: links outlive
    renamed files.
    """
    # First, and with a file: a page's own named icon would become the tab's, which browsers fetch from another host.
    st.set_page_config(page_title="Edit Anatomy", page_icon=MARK, layout="wide")
    pages = {
        info.name: st.Page(info.file, title=info.title, icon=info.icon, url_path=info.name, default=info is PAGES[0])
        for info in PAGES
    }
    st.session_state["page_begun"] = time.monotonic()
    chosen = st.navigation(list(pages.values()), position="hidden")
    st.html(STYLE)
    _menu(pages)
    if st.session_state.get("page_drawn") != chosen.url_path:
        st.session_state["page_drawn"] = chosen.url_path
        st.session_state.pop("head_start", None)
    return chosen


def _menu(pages: Mapping[str, st.Page]) -> None:
    """The list of pages in the sidebar. Our own, because the sections of Streamlit's are no list to a screen reader."""
    with st.sidebar.container(gap="small"):
        for section in dict.fromkeys(info.section for info in PAGES):
            with st.container(gap="xxsmall"):
                st.caption(section)
                for info in PAGES:
                    if info.section == section:
                        st.page_link(pages[info.name], label=info.title, icon=info.icon, width="stretch")


def head_start(what: str) -> None:
    """Let the browser draw what it was sent before the rest of the page follows; once for each visit and `what`.

    A browser draws all it has got in one go, and a picture after everything else: without this, what a person came for
    shows when the whole page does.
    """
    if st.session_state.get("head_start") != what:
        st.session_state["head_start"] = what
        left = st.session_state.get("page_begun", 0.0) + HEAD_START_ENDS - time.monotonic()
        time.sleep(max(0.0, min(HEAD_START, left)))


def enter() -> None:
    """First line of every page: start over through app.py when it was left out.

    Until some session of a server has called st.navigation, Streamlit runs a file of pages/ by itself, so the first
    visit after a start would miss title, navigation and error handling when it is a deep link. Announcing the pages
    ends that for the whole server.
    """
    if not st.session_state.get("framed"):
        navigation()
        st.rerun()
