"""The run that a page is about: a bar that names it and leads to the other pages, and a way to choose one."""

from __future__ import annotations

import streamlit as st

from mega_core.errors import ActionableError
from mega_core.records import Report
from pages.components.frame import PAGES
from pages.components.prepared import headline_of
from pages.components.report_view import outcome_badge
from pages.components.run_badges import imported_badge
from pages.components.session import owner, service, show_run, shown_run
from pages.components.text import md

LEADS_TO = ("edit", "anatomy", "compare", "multihop", "review")
"""Pages that can be about a run; each understands ?run=."""
RECENT = 30


def opened(purpose: str) -> Report | None:
    """The report of the run that this page is about. Without one, says so and draws a way to choose; None then.

    `purpose` ends the sentence "Choose a run to ...". Never starts work.
    """
    asked = shown_run()
    report = service().cached(asked) if asked else None
    if report is not None:
        st.session_state["run_shown"] = report.digest
        return report
    if asked is not None:
        _unknown(asked)
    _choose(purpose)
    return None


def bar(report: Report, here: str) -> None:
    """What the run is, and links to the same run on other pages."""
    request = report.question.requests[0]
    with st.container(border=True, gap="small"):
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            outcome_badge(headline_of(report.digest, report)[0])
            st.badge(md(report.question.method.name.upper()), color="gray")
            st.badge(md(report.question.model.name), color="gray")
            st.badge(f"run {report.digest[:8]}", icon=":material/tag:", color="gray")
            imported_badge(report)
        original = f", :gray[was {md(request.target_true)}]" if request.target_true else ""
        st.markdown(f"{md(request.prompt)} **{md(request.target_new)}**{original}")
        with st.container(horizontal=True, gap="small"):
            for page in PAGES:
                if page.name in LEADS_TO and page.name != here:
                    st.page_link(page.file, label=page.title, icon=page.icon, query_params={"run": report.digest})


def _unknown(digest: str) -> None:
    if not digest:
        st.warning("The link's run id is damaged: it should have 64 characters.", icon=":material/link_off:")
    else:
        st.warning(
            "This run is not stored here: it was made elsewhere or has been cleared. Running the same edit again gives "
            "the same numbers.",
            icon=":material/link_off:",
        )


def _choose(purpose: str) -> None:
    """Own runs and the shipped examples, in a list."""
    desk = service()
    labels: dict[str, str] = {}
    for entry in desk.runs(session=owner(), limit=RECENT):
        run = entry.run
        if desk.cached(run.digest) is not None:
            fact = f"{run.template.replace('{}', run.subject)} {run.target_new}"
            labels[run.digest] = f"{fact} ({run.method.upper()}, {run.model}, {run.verdict or 'no verdict'})"
    for example in desk.examples():
        try:
            labels.setdefault(example.digest, f"Example: {example.title} ({example.outcome})")
        except ActionableError:
            continue
    with st.container(border=True):
        st.header(f"Choose a run to {purpose}", anchor=False)
        if labels:
            chosen = st.selectbox(
                "Run",
                list(labels),
                index=None,
                format_func=lambda digest: f"{labels[digest]} · {digest[:8]}",
                placeholder="one of your runs, or an example",
                key="run_chosen",
            )
            if chosen:
                show_run(chosen)
                st.rerun()
        else:
            st.caption("There is none yet.")
        st.page_link("pages/edit.py", label="Make an edit", icon=":material/edit_note:")
