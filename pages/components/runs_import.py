"""Bringing a run along: a file is checked, kept apart from what was computed here, and listed."""

from __future__ import annotations

import streamlit as st

from mega_core.errors import ActionableError
from mega_core.evaluation.text import verdict
from pages.components.run_badges import imported_badge
from pages.components.session import owner, service, show_run, tell, told
from pages.components.text import md

LIMIT_MB = 5


@st.fragment
@told
def draw() -> None:
    """The form; after an import, what came."""
    with st.expander("Import a run", icon=":material/upload_file:", key="runs_import", expanded=_waiting()):
        st.caption(
            f"A run.json that this app exported, here or elsewhere, up to {LIMIT_MB} MB. It can be looked at without "
            "its model. It is checked field by field, kept apart from results computed here, and marked as imported."
        )
        file = st.file_uploader("run.json", type=["json"], max_upload_size=LIMIT_MB, key="runs_file")
        if file is not None and st.session_state.get("runs_file_done") != file.file_id:
            st.session_state["runs_file_done"] = file.file_id
            st.session_state["runs_imported"] = st.session_state["runs_refused"] = None
            try:
                report = service().sharing.take(file.getvalue(), owner())
            except ActionableError as error:
                st.session_state["runs_refused"] = error
            else:
                st.session_state["runs_imported"] = report.digest
                st.rerun()
        if file is None:
            st.session_state["runs_imported"] = st.session_state["runs_refused"] = None
        if st.session_state.get("runs_refused") is not None:
            tell(st.session_state["runs_refused"])
        _arrived()


def _waiting() -> bool:
    return bool(st.session_state.get("runs_imported") or st.session_state.get("runs_refused"))


def _arrived() -> None:
    digest = st.session_state.get("runs_imported")
    report = service().cached(digest) if digest else None
    if report is None:
        return
    with st.container(border=True):
        imported_badge(report)
        st.markdown(f"**{md(verdict(report))}** {md(report.question.requests[0].sentence)}")
        if st.button("Open this run", type="primary", icon=":material/open_in_new:", key="runs_open_imported"):
            show_run(report.digest)
            st.switch_page("pages/edit.py", query_params={"run": report.digest})
