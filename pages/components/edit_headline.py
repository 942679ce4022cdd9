"""The head of a finished run on the edit page: what happened, which run it is, its files, and the way on."""

from __future__ import annotations

import streamlit as st

from mega_core.records import Report
from pages.components import frame, run_exports
from pages.components.prepared import headline_of
from pages.components.report_view import outcome_badge
from pages.components.run_badges import imported_badge
from pages.components.text import md, seconds

LEADS_TO = {"anatomy": "Look inside", "compare": "Compare methods", "multihop": "Ask over two facts"}
"""Pages that go on from a run -> what their link says."""


def draw(report: Report) -> None:
    """What happened, in words, with the run's identity, its files and links to the pages that go on from it."""
    request = report.question.requests[0]
    kind, sentence = headline_of(report.digest, report)
    with st.container(border=True, gap="small"):
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            outcome_badge(kind)
            restored = report.receipt.restored and report.receipt.hooks_left == 0
            # One element with five badges: each element of its own costs a browser some milliseconds.
            st.markdown(
                (
                    ":gray-badge[:material/verified: model restored]"
                    if restored
                    else ":orange-badge[:material/warning: model was replaced]"
                )
                + f" :gray-badge[{md(report.question.method.name.upper())}]"
                f" :gray-badge[{md(report.question.model.name)}]"
                f" :gray-badge[:material/timer: {md(seconds(sum(report.timing.values())))}]"
                f" :gray-badge[:material/tag: run {report.digest[:8]}]",
                width="content",
                help="Restored: the weights were compared by digest after the run. Run: the first characters of the "
                "run id.",
            )
            imported_badge(report)
            st.space("stretch")
            run_exports.draw(report)
        st.header(md(sentence), anchor=False)
        original = f", :gray[was {md(request.target_true)}]" if request.target_true else ""
        st.markdown(f"{md(request.prompt)} **{md(request.target_new)}**{original}")
        for note in report.notes:
            st.caption(f":material/info: {md(note)}")
        ways(report, LEADS_TO)


def ways(report: Report, labels: dict[str, str]) -> None:
    """Links to this run on other pages."""
    pages = {info.name: info for info in frame.PAGES}
    with st.container(horizontal=True, gap="small"):
        for name, label in labels.items():
            st.page_link(pages[name].file, label=label, icon=pages[name].icon, query_params={"run": report.digest})
