"""What leaves with a run: its link, and its files, each made when its button is pressed."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from mega_core.records import MAX_FILE_BYTES, Report
from pages.components import run_files
from pages.components.text import md


def draw(report: Report) -> None:
    """A popover with the link to a run and its files.

    It doesn't ask for a rerun when it opens or closes: a click on another page closes it too, and a rerun of this
    page asked for by that click would arrive during the other page's and empty it.
    """
    stem = run_files.stem(report)
    key = report.digest[:8]
    with st.popover("Export", icon=":material/download:", width="content", key=f"export_{key}"):
        st.markdown("**Link to this run**")
        st.code(link(report), language=None, wrap_lines=True)
        st.caption("It opens the run on this machine. Opening it never starts work.")
        st.markdown("**Files**")
        for name, label, mime, icon, make in _FILES:
            st.download_button(
                label,
                data=_made(make, report),
                file_name=f"{stem}{name}",
                mime=mime,
                icon=icon,
                on_click="ignore",
                width="stretch",
                key=f"export_{name}_{key}",
            )
        st.caption(
            "run.json can be imported on the Runs page of any copy of this app, also without the model "
            f"(up to {MAX_FILE_BYTES // 2**20} MB). The report is one page that needs no network."
        )
        if report.origin:
            st.caption(f":material/info: {md('This run was imported: its numbers were not computed here.')}")


def link(report: Report) -> str:
    """The address of a run on the edit page, with this server's own name."""
    base = st.context.url.split("?")[0].rstrip("/") if st.context.url else ""
    root = base.rsplit("/", 1)[0] if base.count("/") > 2 else base
    return f"{root}/edit?run={report.digest}"


def _made(make: Callable[[Report], bytes], report: Report) -> Callable[[], bytes]:
    return lambda: make(report)


_FILES: tuple[tuple[str, str, str, str, Callable[[Report], bytes]], ...] = (
    (".json", "run.json: everything", "application/json", ":material/data_object:", run_files.run_json),
    ("-tables.zip", "Tables: CSV and Parquet", "application/zip", ":material/table:", run_files.tables_zip),
    ("-charts.zip", "Charts: PNG and SVG", "application/zip", ":material/image:", run_files.charts_zip),
    (".html", "Report: one HTML file", "text/html", ":material/article:", run_files.report_html),
)
