"""The answers behind a number: what was asked, expected and said, case by case; one of them as a run of its own."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from mega_core.service.benchmark_tables import UNEDITED, Measure, Tables
from pages.components.figure import ROWS_SHOWN, download, heading
from pages.components.request_form import draft_of_plan, lay_down
from pages.components.session import forget_run, service, told
from pages.components.text import clip, csv_bytes, md

RESULT = {True: "✗ wrong", False: "✓ right"}


def draw(tables: Tables, measure: Measure, method: str) -> None:
    """The table of answers behind one number, and the case that is chosen in it."""
    heading("Answers behind the number")
    _answers(tables, measure, method)


@st.cache_data(max_entries=24, show_spinner="Reading the answers …")
def _behind(name: str, done: int, _measure: Measure, protocol: str, metric: str, method: str) -> pd.DataFrame:
    """Kept by texts: a table of thousands of answers is read once."""
    del done, protocol, metric
    return service().benchmarks.behind(name, _measure, method)


@st.fragment
@told
def _answers(tables: Tables, measure: Measure, method: str) -> None:
    scores = tables.scores
    found = scores[
        (scores["protocol"] == measure.protocol) & (scores["metric"] == measure.name) & (scores["method"] == method)
    ]
    if found.empty:
        st.caption("This method has no such number.")
        return
    number = found.iloc[0]
    interval = f" ({number['interval']})" if number["interval"] else ""
    st.markdown(
        f"**{md(method)} · {md(measure.title)}: {md(number['text'])}** {md(interval)}, n = {int(number['n'])} cases"
    )
    parts = ", ".join(title for _, title, _ in measure.of)
    st.caption(
        f"{md(sentence(measure.formula))} "
        + (f"Made of: {md(parts)}." if len(measure.of) > 1 else f"{md(sentence(measure.counted))}")
    )
    rows = _behind(tables.name, tables.done, measure, measure.protocol, measure.name, method)
    if rows.empty:
        st.info("No answer is kept behind this number yet.", icon=":material/hourglass_top:")
        return
    shown = _filtered(rows, measure)
    if shown.empty:
        st.info("No answer matches. Clear the search or the filter to see more.", icon=":material/filter_alt_off:")
        return
    case = _table(shown, measure)
    if case is not None:
        _case(tables, measure, method, case, rows)


def sentence(text: str) -> str:
    """A phrase as a sentence; nothing stays nothing."""
    return f"{text[0].upper()}{text[1:].rstrip('.')}." if text else ""


def _filtered(rows: pd.DataFrame, measure: Measure) -> pd.DataFrame:
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        only = st.toggle(
            f"Only failures ({int(rows['failed'].sum()):,} of {int(rows['counts'].sum()):,})",
            key="bench_failures",
            disabled=not measure.judged,
            help=None if measure.judged else "This metric has no right and wrong, only more and less.",
        )
        text = st.text_input(
            "Find in case, prompt and answers", key="bench_find", icon=":material/search:", live="300ms", type="search"
        )
    if only and measure.judged:
        rows = rows[rows["failed"]]
    for word in (text or "").casefold().split():
        hit = pd.Series(False, index=rows.index)
        for column in ("case", "prompt", "expected", "said"):
            hit |= rows[column].astype(str).str.casefold().str.contains(word, regex=False)
        rows = rows[hit]
    return rows


def _table(rows: pd.DataFrame, measure: Measure) -> str | None:
    """The table; the case that is chosen in it, or in the list beside it."""
    result = [
        "does not count" if not counts else RESULT[failed] if measure.judged else "counts"
        for counts, failed in zip(rows["counts"], rows["failed"], strict=True)
    ]
    shown = rows.assign(result=result).drop(columns=["counts", "failed"]).head(ROWS_SHOWN)
    first = ["case", "result"]
    shown = shown[[*first, *(column for column in shown.columns if column not in first)]]
    cases = list(dict.fromkeys(str(case) for case in rows["case"]))
    if st.session_state.get("bench_case") not in cases:
        st.session_state["bench_case"] = None

    def chosen() -> None:
        picked = st.session_state.get("bench_answers", {}).get("selection", {}).get("rows", [])
        if picked and 0 <= picked[0] < len(shown):
            st.session_state["bench_case"] = str(shown["case"].iloc[picked[0]])

    st.dataframe(
        shown,
        hide_index=True,
        key="bench_answers",
        height=min(36 * (len(shown) + 1) + 3, 400),
        on_select=chosen,
        selection_mode="single-row",
        column_config={
            "case": st.column_config.TextColumn("Case", width=60, pinned=True),
            "result": st.column_config.TextColumn("Result", width=90),
            "metric": st.column_config.TextColumn("Metric", width=150),
            "prompt": st.column_config.TextColumn("Prompt", width=330),
            "expected": st.column_config.TextColumn("Expected", width=140),
            "said": st.column_config.TextColumn("Said", width=200),
            "before": st.column_config.TextColumn("Unedited said", width=200),
            "value": st.column_config.NumberColumn("Value", format="%.4g", width=70),
        },
        alt=f"Answers behind {measure.title}",
    )
    if len(rows) > ROWS_SHOWN:
        st.caption(f"The first {ROWS_SHOWN} of {len(rows):,} answers; search, or download them all.")
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        st.selectbox("Case", cases, index=None, placeholder="choose a row, or a case here", key="bench_case", width=320)
        download(
            "These answers (CSV)", lambda: csv_bytes(rows), f"answers-{measure.protocol}-{measure.name}.csv",
            "text/csv", key="bench_behind_csv",
        )  # fmt: skip
    case: str | None = st.session_state["bench_case"]
    return case


@st.cache_data(max_entries=64, show_spinner=False)
def _edits(name: str, case: str) -> tuple[tuple[str, str, str], ...]:
    """Prompt, new and original object of each edit of a case."""
    found = service().benchmarks.case(name, case)
    return tuple((one.prompt, one.target_new, one.target_true or "") for one in found.requests)


def _case(tables: Tables, measure: Measure, method: str, case: str, rows: pd.DataFrame) -> None:
    """One case: what was edited, each answer in full, and the way to try it as a run."""
    edits = _edits(tables.name, case)
    with st.container(border=True, gap="small"):
        st.subheader(md(f"Case {case}"), anchor=False)
        for prompt, new, true in edits:
            was = f", :gray[was {md(true)}]" if true else ""
            st.markdown(f"Edit: {md(prompt)} **{md(new)}**{was}")
        for row in rows[rows["case"].astype(str) == case].head(6).itertuples():
            st.markdown(f"Asked: {md(row.prompt)}")
            st.caption(
                f"Expected {md(row.expected) or 'nothing in particular'} · said **{md(clip(str(row.said), 300))}** · "
                f"unedited said {md(clip(str(row.before), 300)) or 'nothing'} · value {row.value:.4g}"
            )
        index = 0
        if len(edits) > 1:
            index = st.selectbox(
                "Edit to open",
                range(len(edits)),
                format_func=lambda i: f"{i + 1}: {clip(f'{edits[i][0]} {edits[i][1]}', 80)}",
                key="bench_edit",
            )
        if st.button("Open as a run", icon=":material/edit_note:", key="bench_as_run"):
            plan = service().benchmarks.question(tables.name, method, case, index)
            forget_run()
            lay_down(draft_of_plan(plan))
            st.switch_page("pages/edit.py")
        by = " by the first method" if method == UNEDITED else ""
        st.caption(f"Fills the form of Edit trial with this edit{by} and its parameters. Nothing starts by itself.")
