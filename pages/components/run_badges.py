"""Badges that say where a run comes from."""

from __future__ import annotations

import streamlit as st

from mega_core.records import Report

IMPORTED_HELP = (
    "This run came from a file: its numbers were not computed here. Making the same edit here gives a run of its own."
)


def imported_badge(report: Report) -> None:
    """ "imported, was 359f71df": for a run that came from a file, with the digest that the file claims."""
    if report.origin:
        st.badge(
            f"imported, was {report.origin[:8]}", icon=":material/upload_file:", color="violet", help=IMPORTED_HELP
        )
