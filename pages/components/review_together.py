"""Reviewing together: share a queue, take labels out and in, and see how far two reviewers agree."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import streamlit as st

from mega_core.errors import ActionableError
from mega_core.notebook import FAILURES, VERDICTS
from mega_core.service.reviews import MAX_IMPORT_BYTES, NONE, Case, agreement, lines, reviewers, rows
from pages.components import review_charts, review_desk
from pages.components.figure import About, download, figure, heading
from pages.components.review_desk import Sitting
from pages.components.session import owner, service, tell
from pages.components.text import csv_bytes, md

ABOUT_AGREEMENT = About(
    "How often two reviewers of this queue give the same answer to the same case.",
    "Agreement = equal answers / cases both judged. Cohen's kappa = (p_o − p_e) / (1 − p_e): p_o is the agreement, p_e "
    "the agreement expected by chance, the sum over answers of the product of how often each of the two gave it "
    "(Cohen 1960). 1 is full agreement, 0 what chance gives, below 0 less than chance. Verdicts count where both gave "
    "one; failure types where both judged the case, and “none” is an answer of its own.",
    "Kappa is not defined when both gave one and the same answer throughout. With few cases it is uncertain, and with "
    "one answer far more frequent than the others it can be low although nearly all answers are equal. Severity, tags "
    "and notes are not compared.",
)
WHAT = {"verdict": "Verdict", "failure": "Failure type"}


@st.dialog("Share a queue", icon=":material/group_add:")
def share(shown: tuple[Case, ...]) -> None:
    """Make a queue of own runs."""
    st.markdown(
        "Everybody who has the queue's link sees these runs, with prompts and results, and can review them. Your own "
        "notes, tags and verdicts stay with you. A run that you delete later stays in the queue until you delete the "
        "queue."
    )
    st.text_input("Title", key="review_share_title", max_chars=200, placeholder="what these cases are")
    everything = f"The {len(shown)} shown" if len(shown) != 1 else "The one shown"
    which = st.radio("Cases", (everything, "Choose"), horizontal=True, key="review_share_which")
    chosen = [case.run.digest for case in shown]
    if which == "Choose":
        names = {case.run.digest: f"{case.prompt} {case.run.target_new} · {case.run.digest[:8]}" for case in shown}
        chosen = st.multiselect("Chosen cases", list(names), format_func=names.__getitem__, key="review_share_cases")
    error = st.session_state.pop("review_share_trouble", None)
    if error is not None:
        tell(error)
    made = st.button(
        "Make the queue", type="primary", icon=":material/group_add:", key="review_share_make", on_click=_make,
        args=(chosen,),
    )  # fmt: skip
    if made and error is None:
        st.rerun()


def _make(chosen: list[str]) -> None:
    try:
        queue = service().reviews.create(st.session_state.get("review_share_title") or "", owner(), chosen)
    except ActionableError as error:
        st.session_state["review_share_trouble"] = error
    else:
        review_desk.open_queue(queue.token)


@st.dialog("Delete this queue?")
def delete(sitting: Sitting) -> None:
    """Ask before deleting."""
    st.markdown(f"**{md(sitting.title)}** goes with the labels of all its reviewers. This can't be undone.")
    with st.container(horizontal=True):
        gone = st.button(
            "Delete", type="primary", icon=":material/delete:", key="review_delete_yes", on_click=_delete,
            args=(sitting.token,),
        )  # fmt: skip
        kept = st.button("Keep", key="review_delete_no")
    if gone or kept:
        st.rerun()


def _delete(token: str) -> None:
    service().reviews.delete(token, owner())
    st.session_state.get("review_known", {}).pop(token, None)
    review_desk.open_queue("")


def actions(sitting: Sitting, shown: tuple[Case, ...]) -> None:
    """Share, link, files, delete: a row of buttons."""
    with st.container(horizontal=True, gap="small", vertical_alignment="bottom"):
        if not sitting.token:
            if st.button("Share as a queue", icon=":material/group_add:", key="review_share", disabled=not shown):
                share(shown)
        else:
            with st.popover("Link", icon=":material/link:", width="content"):
                st.caption("Whoever opens this link can see and review these cases, and read all labels.")
                base = st.context.url.split("?")[0] if st.context.url else ""
                st.code(f"{base}?queue={sitting.token}", language=None, wrap_lines=True)
        with st.popover("Files", icon=":material/download:", width="content"):
            stem = f"review-{sitting.token[:4]}" if sitting.token else "review"
            st.caption("All cases of the queue with the labels of all reviewers, one line per label.")
            download(
                "Labels as JSONL", lambda: lines(sitting.cases, sitting.title), f"{stem}.jsonl",
                "application/x-ndjson", key="review_jsonl",
            )  # fmt: skip
            download("Labels as CSV", lambda: csv_bytes(_flat(sitting)), f"{stem}.csv", "text/csv", key="review_csv")
            if sitting.token:
                _take_in(sitting)
        own = sitting.token and sitting.mine
        if own and st.button("Delete queue", icon=":material/delete:", key="review_delete"):
            delete(sitting)


def _flat(sitting: Sitting) -> pd.DataFrame:
    table = pd.DataFrame(rows(sitting.cases, sitting.title))
    return table.assign(tags=table["tags"].map(", ".join)) if len(table) else table


def _take_in(sitting: Sitting) -> None:
    file = st.file_uploader(
        "Add labels from a JSONL file", type=["jsonl"], max_upload_size=MAX_IMPORT_BYTES // 2**20, key="review_upload",
        help="A file of labels from here or from another machine. Of two labels of one reviewer the later one stays.",
    )  # fmt: skip
    if file is not None and st.button("Add these labels", icon=":material/upload:", key="review_take_in"):
        try:
            written, strange = service().reviews.take_in(sitting.token, file.getvalue())
        except ActionableError as error:
            tell(error)
        else:
            more = f" {strange} are about runs that are not in this queue." if strange else ""
            st.success(f"{written} labels added or renewed.{more} They show with your next step.")


def together(sitting: Sitting) -> None:
    """Agreement of two reviewers of a shared queue."""
    if not sitting.token:
        return
    heading("Agreement of two reviewers", ABOUT_AGREEMENT)
    names = reviewers(sitting.cases)
    if len(names) < 2:
        st.caption("When two people have reviewed cases of this queue, this compares what they said.")
        return
    with st.container(horizontal=True, gap="small", vertical_alignment="bottom"):
        first = st.selectbox("First reviewer", names, key="review_first", width=220)
        others = [name for name in names if name != first]
        if st.session_state.get("review_second") not in others:
            st.session_state.pop("review_second", None)
        second = st.selectbox("Second reviewer", others, key="review_second", width=220)
        what = st.segmented_control(
            "Compare", list(WHAT), format_func=WHAT.__getitem__, default="verdict", required=True, key="review_what"
        )
    found = agreement(sitting.cases, first, second, what or "verdict")
    cards = st.container(horizontal=True, gap="small")
    cards.metric("Both judged", str(found.n), border=True, help="Cases that count here.")
    cards.metric(
        "Agreement", "–" if found.share is None else f"{100 * found.share:.0f} %",
        f"{found.agreed} of {found.n}", delta_color="off", delta_arrow="off", border=True, help="Equal answers.",
    )  # fmt: skip
    kappa = "not defined" if found.kappa is None else f"{found.kappa:.2f}".replace("-", "−")
    cards.metric("Cohen's κ", kappa, border=True, help="Agreement beyond chance: 1 is full, 0 is what chance gives.")
    if found.reason:
        st.caption(f"κ is not defined: {found.reason}.")
    if not found.n:
        return
    left, right = st.columns([1, 1], gap="large")
    with left:
        table = review_charts.pair_table(found.table, (*VERDICTS, *FAILURES, NONE))
        figure(
            "review_pairs",
            review_charts.pairs(table, first, second),
            title=f"{WHAT[what or 'verdict']}s against each other",
            reading=_reading(found.table, first, second),
            table=table.drop(columns="same").rename(
                columns={"first": f"{first} says", "second": f"{second} says", "n": "cases"}
            ),
            file=f"agreement-{what}",
        )
    with right:
        _differ(sitting, first, second, found.differ, what or "verdict")


def _reading(counts: Mapping[tuple[str, str], int], first: str, second: str) -> str:
    apart = {pair: n for pair, n in counts.items() if pair[0] != pair[1]}
    if not apart:
        return "They gave the same answer every time; framed squares are equal answers."
    (a, b), n = max(apart.items(), key=lambda item: (item[1], item[0]))
    return (
        f"Most often apart: {first} says “{a}” where {second} says “{b}” ({n} {'case' if n == 1 else 'cases'}). Framed "
        "squares are equal answers."
    )


def _differ(sitting: Sitting, first: str, second: str, digests: tuple[str, ...], what: str) -> None:
    st.header("Cases judged differently", anchor=False)
    if not digests:
        st.caption("There is none.")
        return
    by_digest = {case.run.digest: case for case in sitting.cases}
    frame = pd.DataFrame(
        [
            {
                "fact": f"{case.prompt} {case.run.target_new}",
                "first": getattr(case.said(first), what) or NONE,
                "second": getattr(case.said(second), what) or NONE,
                "run": digest[:8],
            }
            for digest, case in ((digest, by_digest[digest]) for digest in digests)
        ]
    )
    st.dataframe(
        frame,
        hide_index=True,
        key="review_differ",
        on_select=lambda: _opened(digests),
        selection_mode="single-row",
        column_config={
            "fact": st.column_config.TextColumn("Edited to say", width=260),
            "first": st.column_config.TextColumn(first, width=110),
            "second": st.column_config.TextColumn(second, width=110),
            "run": st.column_config.TextColumn("Run", width=80),
        },
        alt="Cases that the two reviewers judged differently",
    )
    st.caption("Select a row to open the case above.")


def _opened(digests: tuple[str, ...]) -> None:
    picked = st.session_state["review_differ"]["selection"]["rows"]
    if picked and picked[0] < len(digests):
        review_desk.go(digests[picked[0]])
