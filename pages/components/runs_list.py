"""The list of runs: filters, order, pages of rows, and which rows are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import pandas as pd
import streamlit as st

from mega_core.notebook import MAX_PAGE, VERDICTS, Entry
from pages.components.session import owner, service
from pages.components.text import csv_bytes

ROWS = 200
"""On one page of the list."""
SORTED_AT_MOST = 2000
"""The newest runs among which the list is put in order."""
ORDERS = {
    "Newest first": ("when", False),
    "Oldest first": ("when", True),
    "Fact": ("fact", True),
    "Method": ("method", True),
    "Model": ("model", True),
    "Measured": ("measured", True),
    "Longest first": ("seconds", False),
}
COLUMNS = {
    "when": st.column_config.DatetimeColumn("When", format="distance", width=125),
    "fact": st.column_config.TextColumn("Edited to say", width=290),
    "method": st.column_config.TextColumn("Method", width=80),
    "model": st.column_config.TextColumn("Model", width=105),
    "measured": st.column_config.TextColumn(
        "Measured", width=85, help="What the numbers say: works, leaks, narrow or fails."
    ),
    "source": st.column_config.TextColumn("From", width=76, help="Made here, or imported from a file."),
    "verdict": st.column_config.TextColumn("Yours", width=75, help="Your own verdict."),
    "tags": st.column_config.ListColumn("Tags", width=110),
    "note": st.column_config.TextColumn("Note", width=140),
    "seconds": st.column_config.NumberColumn("Took", format="%.1f s", width=70),
    "run": st.column_config.TextColumn("Run", width=80, help="The first characters of the run id."),
}


def nothing_yet() -> None:
    """What will be here, and how to begin."""
    with st.container(border=True):
        st.header("No runs yet", anchor=False)
        st.markdown("Each edit you run or open is listed here with its verdict, to annotate, compare and export.")
        with st.container(horizontal=True):
            if st.button("Make an edit", type="primary", icon=":material/edit_note:"):
                st.switch_page("pages/edit.py")
            if st.button("Open an example", icon=":material/home:", key="runs_examples"):
                st.switch_page("pages/start.py")


def find() -> list[Entry]:
    """The runs that match the filters, in the chosen order; says so when there is none."""
    desk = service()
    if "runs_text" not in st.session_state and (asked := st.query_params.get("q", "")):
        st.session_state["runs_text"] = asked[:200]
    choices = desk.run_choices(owner())
    with st.container(horizontal=True, vertical_alignment="bottom", key="runs_filters"):
        text = st.text_input(
            "Find", key="runs_text", placeholder="words of the fact", icon=":material/search:", live="300ms",
            type="search", max_chars=200, persist_state="session",
        )  # fmt: skip
        model = _choose("Model", choices.get("model", ()), "runs_model", 190)
        method = _choose("Method", choices.get("method", ()), "runs_method", 150)
        tag = _choose("Tag", choices.get("tag", ()), "runs_tag", 150)
        verdict = _choose("Verdict", tuple(dict.fromkeys((*VERDICTS, "leaks", "narrow"))), "runs_verdict", 150)
        order = st.selectbox("Order", list(ORDERS), key="runs_order", width=170, persist_state="session")
    filters = {"text": text or "", "model": model, "method": method, "tag": tag, "verdict": verdict, "session": owner()}
    found: list[Entry] = []
    while len(found) < SORTED_AT_MOST:
        more = desk.runs(**filters, limit=MAX_PAGE, offset=len(found))
        found += more
        if len(more) < MAX_PAGE:
            break
    if not found:
        st.info("No run matches. Clear a filter to see more.", icon=":material/filter_alt_off:")
        return []
    column, ascending = ORDERS.get(order, ORDERS["Newest first"])
    if order != "Newest first":
        rows = rows_of(found)
        found = [found[i] for i in rows.sort_values(column, ascending=ascending, kind="stable").index]
    return _page(found)


def table(entries: Sequence[Entry]) -> list[Entry]:
    """Draw the list; the entries whose rows are chosen."""
    rows = rows_of(entries)
    event = st.dataframe(
        rows,
        hide_index=True,
        key=table_key(entries),
        on_select="rerun",
        selection_mode="multi-row",
        column_config=COLUMNS,
        height="content" if len(rows) <= 12 else 460,
        alt="Your runs",
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        st.download_button(
            "This list as CSV", data=lambda: list_csv(entries), file_name="runs.csv", mime="text/csv",
            icon=":material/table:", on_click="ignore", key="runs_csv",
        )  # fmt: skip
        st.caption(f"{len(rows)} run{'' if len(rows) == 1 else 's'} shown.")
    return [entries[row] for row in event["selection"]["rows"] if row < len(entries)]


def table_key(entries: Sequence[Entry]) -> str:
    """Of the list's widget: another list is another widget, so that no choice is taken for that of other rows."""
    return f"runs_table_{sha256(''.join(entry.run.digest for entry in entries).encode()).hexdigest()[:8]}"


def rows_of(entries: Sequence[Entry]) -> pd.DataFrame:
    """The list as it is shown."""
    mine, imported = owner(), service().sharing.imported()
    return pd.DataFrame([_row(entry, mine, entry.run.digest in imported) for entry in entries])


def list_csv(entries: Sequence[Entry]) -> bytes:
    """The list as CSV, with whole run ids."""
    rows = rows_of(entries)
    whole = rows.assign(tags=rows["tags"].map(", ".join), run=[entry.run.digest for entry in entries])
    return csv_bytes(whole)


def fact(entry: Entry) -> str:
    """The edited sentence."""
    return f"{entry.run.template.replace('{}', entry.run.subject)} {entry.run.target_new}"


def _row(entry: Entry, mine: str, imported: bool) -> dict[str, object]:
    run = entry.run
    more = f" (+ {run.edits - 1} more)" if run.edits > 1 else ""
    return {
        "when": run.created,
        "fact": fact(entry) + more,
        "method": run.method.upper(),
        "model": run.model,
        "measured": run.verdict,
        "source": "imported" if imported else "here",
        "verdict": next((v.verdict for v in entry.verdicts if v.author == mine), ""),
        "tags": list(entry.tags),
        "note": next((note.text for note in entry.notes if note.author == mine), ""),
        "seconds": run.seconds,
        "run": run.digest[:8],
    }


def _choose(label: str, options: Sequence[str], key: str, width: int) -> str:
    return st.selectbox(label, options, index=None, placeholder="any", key=key, width=width) or ""


def _page(found: list[Entry]) -> list[Entry]:
    """One page of many rows."""
    if len(found) <= ROWS:
        return found
    starts = list(range(0, len(found), ROWS))
    start = st.selectbox(
        "Rows",
        starts,
        format_func=lambda first: f"{first + 1} to {min(first + ROWS, len(found))} of {len(found)}",
        key=f"runs_page_{len(starts)}",
        width=220,
    )
    return found[start : start + ROWS]
