"""The queue: which one, who reviews, its filters, and its cases in a list."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import streamlit as st

from mega_core.notebook import VERDICTS
from mega_core.service.reviews import Case, matching, progress
from pages.components import review_desk
from pages.components.review_desk import Sitting
from pages.components.session import owner, service

TABLE = "review_table"


def nothing_yet() -> None:
    """What a review is, and how to get cases for it."""
    desk = service()
    with st.container(border=True):
        st.header("No cases yet", anchor=False)
        st.markdown(
            "Here you go through edits one by one, look at the whole case, and say what went wrong: a verdict, one of "
            "eight failure types, how bad it is, tags and a note. Everything is saved as you go, and everything can "
            "be done from the keyboard.\n\n"
            "Each edit that you make or open becomes a case. A queue of cases can be shared by a link, so that a "
            "second person judges the same cases and you see how far you agree."
        )
        with st.container(horizontal=True):
            if st.button("Make an edit", type="primary", icon=":material/edit_note:", key="review_make"):
                st.switch_page("pages/edit.py")
            if desk.examples():
                st.button(
                    "Add the example runs",
                    icon=":material/playlist_add:",
                    on_click=_add_examples,
                    key="review_examples",
                )


def _add_examples() -> None:
    desk = service()
    for example in desk.examples():
        report = desk.cached(example.digest)
        if report is not None:
            desk.visited(report, owner())


def choose_queue(sitting: Sitting) -> None:
    """Which queue is reviewed."""
    titles = {queue.token: queue.title for queue in service().reviews.queues(owner())}
    known = {**st.session_state.get("review_known", {}), **titles}
    options = ["", *known]
    st.session_state["review_pick"] = sitting.token if sitting.token in options else ""
    st.selectbox(
        "Queue",
        options,
        format_func=lambda token: f"{known[token]} · {token[:4]}" if token else "My runs",
        key="review_pick",
        on_change=_picked,
        help="My runs is yours alone. A shared queue is seen by everybody who has its link.",
    )


def _picked() -> None:
    review_desk.open_queue(str(st.session_state.get("review_pick") or ""))
    st.query_params.pop("run", None)
    st.session_state.pop("run_shown", None)


def name_yourself() -> None:
    """The name that labels of a shared queue carry."""
    st.text_input(
        "Your reviewer name",
        key="review_name",
        max_chars=60,
        placeholder="any name, such as your initials",
        persist_state="session",
        help="Your labels carry it, and everybody with the link sees it. There is no login: who types the same name "
        "writes the same labels.",
    )


def draw(sitting: Sitting) -> tuple[Case, ...]:
    """Filters; the cases they leave."""
    cases, me = sitting.cases, sitting.reviewer
    done = progress(cases, me)
    st.progress(done.share or 0.0, text=f"Reviewed {done.n}/{done.total}")
    text = st.text_input(
        "Find", key="review_text", placeholder="words of the fact", icon=":material/search:", live="300ms",
        type="search", persist_state="session",
    )  # fmt: skip
    unreviewed = st.toggle("Not yet reviewed", key="review_unreviewed", persist_state="session")
    with st.expander("More filters", icon=":material/filter_alt:"):
        method = _filter("Method", (case.run.method for case in cases), "review_method")
        model = _filter("Model", (case.run.model for case in cases), "review_model")
        measured = _filter("Measured outcome", (case.run.verdict for case in cases), "review_measured")
        verdict = _filter("Your verdict", VERDICTS, "review_verdict")
        tag = _filter("Your tag", (tag for case in cases for tag in case.said(me).tags), "review_tag")
    return matching(
        cases, me, text=text or "", model=model, method=method, measured=measured, verdict=verdict, tag=tag,
        unreviewed=unreviewed,
    )  # fmt: skip


def table(sitting: Sitting, shown: tuple[Case, ...], at: Case | None) -> None:
    """The cases as rows; a click opens one, and the open one is marked."""
    if not shown:
        st.info("No case matches. Clear a filter to see more.", icon=":material/filter_alt_off:")
        return
    frame = pd.DataFrame([_row(case, sitting.reviewer) for case in shown])
    rows = [i for i, case in enumerate(shown) if case is at]
    st.session_state[TABLE] = {"selection": {"rows": rows}}
    st.dataframe(
        frame,
        hide_index=True,
        key=TABLE,
        on_select=lambda: _clicked([case.run.digest for case in shown]),
        selection_mode="single-row",
        height=min(38 + 35 * len(frame), 38 + 35 * 14),
        column_config={
            "done": st.column_config.TextColumn("Done", width=44, help="✓ has your verdict or failure type."),
            "fact": st.column_config.TextColumn("Edited to say", width=185),
            "measured": st.column_config.TextColumn("Measured", width=74, help="What the numbers say."),
            "verdict": st.column_config.TextColumn("Yours", width=64),
            "failure": st.column_config.TextColumn("Failure type", width=120),
            "method": st.column_config.TextColumn("Method", width=70),
            "model": st.column_config.TextColumn("Model", width=100),
            "tags": st.column_config.ListColumn("Tags", width=110),
        },
        alt=f"Cases of {sitting.title}",
    )
    if len(shown) < len(sitting.cases):
        st.caption(f"{len(shown)} of {len(sitting.cases)} cases match.")


def _row(case: Case, reviewer: str) -> dict[str, object]:
    said = case.said(reviewer)
    return {
        "done": "✓" if said.judged else "·",
        "fact": f"{case.prompt} {case.run.target_new}",
        "measured": case.run.verdict,
        "verdict": said.verdict,
        "failure": said.failure,
        "method": case.run.method.upper(),
        "model": case.run.model,
        "tags": list(said.tags),
    }


def _clicked(digests: list[str]) -> None:
    rows = st.session_state[TABLE]["selection"]["rows"]
    if rows and rows[0] < len(digests):
        review_desk.go(digests[rows[0]])


def _filter(label: str, values: Iterable[str], key: str) -> str:
    """One of the values that occur, or "" for any."""
    options = sorted({value for value in values if value})
    if st.session_state.get(key) not in options:
        st.session_state.pop(key, None)  # what was chosen in another queue may not occur here
    return st.selectbox(label, options, index=None, placeholder="any", key=key, persist_state="session") or ""
