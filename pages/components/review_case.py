"""One case: what happened, and the form for what a person says of it."""

from __future__ import annotations

import streamlit as st

from mega_core.notebook import FAILURES, MAX_NOTE, MAX_TAGS, VERDICTS, Run
from mega_core.records import EditRequest, Report
from mega_core.service.reviews import Case
from pages.components import anatomy_map, readings, report_view, request_form, review_desk, run_bar
from pages.components.figure import figure
from pages.components.prepared import spec_of, tables_of
from pages.components.review_desk import Place, Sitting
from pages.components.session import service
from pages.components.text import KINDS, md

VERDICT_KEYS = {"works": "W", "partial": "P", "fails": "F", "unsure": "S"}
SEVERITIES = {1: "1 slight", 2: "2 clear", 3: "3 severe"}
SEVERITY_KEYS = {1: "Shift+1", 2: "Shift+2", 3: "Shift+3"}
FAILURE_HELP = {
    "not applied": "The edit prompt does not say the new object.",
    "partial": "The edit prompt says it, but paraphrases or longer texts do not.",
    "over-generalised": "The new object appears where nobody asked about this fact.",
    "neighbour bleed": "Other subjects lost their own answer.",
    "subject over-attention": "Whatever is asked about the subject, the new object comes.",
    "fluency collapse": "The text repeats itself or is no language any more.",
    "tokenisation": "Pieces of words, blanks or marks are wrong; the fact may still be right.",
    "other": "Say what in the note.",
}
HELP = """
| Key | Does |
| --- | --- |
| J | next case |
| K | previous case |
| W, P, F, S | verdict: works, partial, fails, unsure |
| 1 to 8 | failure type |
| Shift+1, Shift+2, Shift+3 | severity |
| Ctrl+Enter (Cmd+Enter) | save and go to the next case, from the note too |
| U | undo the last change |
| H | this sheet |

The same key again takes an answer back. Tab and Shift+Tab lead to the note and the tags; while you type in a field,
single keys are text.
"""


@st.dialog("Keys", icon=":material/keyboard:")
def help_sheet() -> None:
    """Every key."""
    st.markdown(HELP)


def steps(sitting: Sitting, shown: tuple[Case, ...]) -> None:
    """Previous, next, undo, help."""
    order = [case.run.digest for case in sitting.cases]
    left = {case.run.digest for case in shown}
    with st.container(horizontal=True, gap="small", vertical_alignment="center"):
        st.button(
            "Previous", icon=":material/arrow_back:", shortcut="K", key="review_previous", on_click=review_desk.move,
            args=(order, left, -1),
        )  # fmt: skip
        st.button(
            "Next", icon=":material/arrow_forward:", shortcut="J", key="review_next", on_click=review_desk.move,
            args=(order, left, 1),
        )  # fmt: skip
        st.button(
            "Undo", icon=":material/undo:", shortcut="U", key="review_undo_button", on_click=review_desk.undo,
            args=(sitting.token, sitting.reviewer), disabled=not review_desk.can_undo(sitting),
        )  # fmt: skip
        if st.button("Keys", icon=":material/keyboard:", shortcut="H", key="review_help"):
            help_sheet()


def draw(sitting: Sitting, shown: tuple[Case, ...], case: Case) -> None:
    """The case with its form beside it and its pictures below."""
    report = service().cached(case.run.digest)
    if report is not None:
        run_bar.bar(report, "review")
    else:
        _cleared(case.run)
    facts, form = st.columns([3, 2], gap="medium")
    with form:  # first: a key press shows here
        if sitting.reviewer:
            _form(sitting, shown, case)
        else:
            st.info("Type a reviewer name above to begin: your labels carry it.", icon=":material/badge:")
    with facts:
        if report is not None:
            if len(report.question.requests) > 1:
                st.caption(f"The first of {len(report.question.requests)} edits made together.")
            report_view.answers(report)
    if report is not None:
        _pictures(report)


def _form(sitting: Sitting, shown: tuple[Case, ...], case: Case) -> None:
    said = case.said(sitting.reviewer)
    place = sitting.place(case.run.digest)
    with st.container(border=True, key="review_form"):
        st.header("Your review", anchor=False)
        saved = review_desk.saved_at(place)
        st.caption(f":material/cloud_done: saved {saved}" if saved else "Saved as you go.")
        review_desk.trouble()
        with st.container(gap="xsmall"):
            st.markdown("**Verdict**")
            for verdict in VERDICTS:
                _answer(place, "verdict", verdict, verdict, said.verdict, VERDICT_KEYS[verdict])
        with st.container(gap="xsmall"):
            st.markdown("**Failure type**")
            for number, failure in enumerate(FAILURES, start=1):
                _answer(place, "failure", failure, failure, said.failure, str(number), FAILURE_HELP[failure])
        with st.container(gap="xsmall"):
            st.markdown("**Severity**")
            for severity, words in SEVERITIES.items():
                _answer(place, "severity", severity, words, said.severity, SEVERITY_KEYS[severity])
        # A field is filled by its own value, not through the session's state: the state is the server's, and a browser
        # that drew another case in between may have forgotten it. The field would come back empty.
        note, tags = place.key("note"), place.key("tags")
        st.text_area(
            "Note", said.note, key=note, height=100, max_chars=MAX_NOTE, on_change=review_desk.take,
            args=(place, "note", note),
        )  # fmt: skip
        known = {tag for one in sitting.cases for tag in one.said(sitting.reviewer).tags}
        st.multiselect(
            "Tags", sorted(known | set(said.tags) | set(st.session_state.get(tags, ()))), said.tags, key=tags,
            accept_new_options=True, max_selections=MAX_TAGS, placeholder="choose or type", on_change=review_desk.take,
            args=(place, "tags", tags),
        )  # fmt: skip
        st.button(
            "Save & next", type="primary", icon=":material/done_all:", shortcut="Ctrl+Enter", key="review_save_next",
            on_click=review_desk.move, width="stretch",
            args=([one.run.digest for one in sitting.cases], {one.run.digest for one in shown}, 1),
        )  # fmt: skip


def _answer(
    place: Place, part: str, value: str | int, label: str, chosen: str | int, shortcut: str, about: str = ""
) -> None:
    """One of several answers: pressing it says it, pressing it again takes it back."""
    yes = value == chosen
    st.button(
        label.capitalize(),
        icon=":material/check_circle:" if yes else ":material/circle:",
        type="primary" if yes else "secondary",
        shortcut=shortcut,
        help=about or None,
        # The same for every case: while a page is drawn anew the browser holds old elements beside new ones, and a key
        # press would reach both. The case it belongs to is in the callback's arguments.
        key=f"review_{part}_{value}",
        on_click=review_desk.choose,
        args=(place, part, value),
        width="stretch",
    )


def _pictures(report: Report) -> None:
    """Every prompt with its margin, and where in the network the change is."""
    data = tables_of(report.digest, report)
    request = report.question.requests[0]
    evidence, cells = data["evidence"], data["cells"]
    short = report.digest[:12]
    if not evidence.empty:
        title, sentence = readings.of_evidence(evidence, "p_true_after" in evidence)
        figure(
            "review_evidence",
            spec_of(report.digest, "evidence", _report=report),
            title=title,
            reading=f"{sentence} Hollow: base model, filled: edited model.",
            table=evidence.assign(prompt_kind=evidence["prompt_kind"].map(KINDS)),
            file=f"evidence-{short}",
            about=report_view.ABOUT_EVIDENCE,
        )
    if not cells.empty:
        candidate = "difference" if request.target_true else "new"
        title, sentence = readings.of_module_map(cells, candidate, request)
        figure(
            "review_map",
            spec_of(report.digest, "map", candidate, _report=report),
            title=title,
            reading=sentence,
            table=cells[cells["candidate"] == candidate],
            file=f"layers-{short}",
            about=anatomy_map.ABOUT_MAP,
        )


def _cleared(run: Run) -> None:
    """A case whose report is no longer stored."""
    with st.container(border=True, gap="small"):
        with st.container(horizontal=True, gap="small"):
            st.badge(md(run.method.upper()), color="gray")
            st.badge(md(run.model), color="gray")
            st.badge(f"run {run.digest[:8]}", icon=":material/tag:", color="gray")
        was = f", :gray[was {md(run.target_true)}]" if run.target_true else ""
        st.markdown(f"{md(run.template.replace('{}', run.subject))} **{md(run.target_new)}**{was}")
        st.warning(
            "The pictures and texts of this run are not stored here any more. What was said of it is kept. Making the "
            "same edit again brings them back.",
            icon=":material/inventory_2:",
        )
        if st.button("Fill the edit form", icon=":material/edit_note:", key="review_refill"):
            request = EditRequest(run.subject, run.template, run.target_new, run.target_true or None)
            draft = request_form.draft_of_request(request)
            request_form.lay_down({**draft, "edit_model": run.model, "edit_method": run.method})
            st.session_state.pop("run_shown", None)
            st.switch_page("pages/edit.py")
