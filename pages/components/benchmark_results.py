"""The results of one benchmark, finished or not: one protocol at a time, each number with its interval and the answers
behind it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pandas as pd
import streamlit as st

from mega_core.errors import ActionableError
from mega_core.service import Sweep
from mega_core.service.benchmark_tables import GENERAL, MODES, SMALL, UNEDITED, Measure, Tables
from pages.components import benchmark_answers, benchmark_charts
from pages.components.benchmark_answers import sentence
from pages.components.figure import ROWS_SHOWN, About, download, figure, heading
from pages.components.session import service, tell
from pages.components.text import csv_bytes, md

KEYS = {"protocol": "bench_protocol", "metric": "bench_metric", "method": "bench_method"}
"""Part of a link -> the widget that holds it."""
HOW = {
    "forced": "read off probabilities, the answer's earlier tokens given",
    "generated": "read off the text that greedy generation gives",
    "text": "read off a text",
    "": "made of several metrics",
}
FIGURE_SPACE = "\u2007"
FIRST = "ours"


def draw(sweep: Sweep) -> None:
    """Everything there is of this benchmark."""
    done = _pinned(sweep)
    try:
        tables = _tables(sweep.name, done)
    except ActionableError as error:
        tell(error)
        return
    st.caption(f"{SMALL if sweep.small else GENERAL} Mode {md(sweep.plan.mode)}: {MODES.get(sweep.plan.mode, '')}.")
    if tables.scores.empty:
        st.info(
            "No numbers yet. They appear here, one protocol at a time, as soon as the first cases are measured."
            if sweep.state != "done"
            else "Nothing was measured: the reasons are below.",
            icon=":material/hourglass_top:",
        )
    else:
        _partial(sweep, tables)
        measure, method = _chosen(tables)
        _table(tables, measure)
        _pictures(tables, measure, method)
        benchmark_answers.draw(tables, measure, method)
    if tables.done:
        _rest(tables)
    _downloads(sweep, tables)


@st.cache_data(max_entries=8, show_spinner="Reading the results …")
def _tables(name: str, done: int) -> Tables:
    """Kept by name and how much is measured: reading thousands of lines takes seconds."""
    del done
    return service().benchmarks.tables(name)


def _pinned(sweep: Sweep) -> int:
    """How many measurements the numbers on screen are made of: while it runs they change when the person wants it."""
    if not sweep.live:
        return sweep.done
    pinned: dict[str, int] = st.session_state.setdefault("bench_pinned", {})
    if not pinned.get(sweep.name):
        pinned[sweep.name] = sweep.done
    return pinned[sweep.name]


def _partial(sweep: Sweep, tables: Tables) -> None:
    """Say that not all is measured yet."""
    if tables.done >= tables.total:
        return
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.badge("partial", icon=":material/incomplete_circle:", color="orange")
        st.caption(
            f"From {tables.done:,} of {tables.total:,} measurements: methods may rest on different cases, so compare "
            "them by their n.",
            width="content",
        )
        if sweep.live:
            st.button(
                "Show the newest numbers", icon=":material/refresh:", key="bench_newest", on_click=_unpin,
                args=(sweep.name,),
            )  # fmt: skip


def _unpin(name: str) -> None:
    st.session_state.get("bench_pinned", {}).pop(name, None)


# What is looked at ---------------------------------------------------------------------------------------------------


def _chosen(tables: Tables) -> tuple[Measure, str]:
    """The metric and the method that are looked at: from the link, from the widgets, else the first."""
    _from_link(tables.name)
    titles = {one.name: one for one in tables.protocols}
    _settle("bench_protocol", list(titles), FIRST)
    heading("Results")
    st.segmented_control(
        "Protocol: numbers of two are never mixed", list(titles), format_func=lambda name: titles[name].title,
        key="bench_protocol", required=True, on_change=_mine, args=("bench_protocol",),
    )  # fmt: skip
    protocol = titles[st.session_state["bench_protocol"]]
    st.caption(f"{md(protocol.summary)} *{md(protocol.paper)}*")
    measures = {one.name: one for one in tables.measures if one.protocol == protocol.name}
    headline = next((one.name for one in measures.values() if one.headline), next(iter(measures)))
    _settle("bench_metric", list(measures), headline)
    measure = measures[st.session_state["bench_metric"]]
    methods = list(tables.scores.loc[_rows(tables, measure), "method"])
    edited = next((name for name in methods if name != UNEDITED), methods[0])
    _settle("bench_method", methods, edited)
    for one in measures.values():
        if one.headline and one.leaders:
            st.markdown(f"**{md(one.title)}:** {md(one.leaders)} {md(one.verdict)}")
    return measure, str(st.session_state["bench_method"])


def _from_link(name: str) -> None:
    """Take over what the address says, on arrival only: a quick click carries the address from before the last one."""
    if st.session_state.get("bench_shown") != name:
        for part, key in KEYS.items():
            _mine(key)
            if asked := st.query_params.get(part, ""):
                st.session_state[key] = str(asked)
    st.session_state["bench_shown"] = name


def _settle(key: str, options: list[str], first: str) -> None:
    """See to it that a widget holds one of its options. What nobody chose follows the results as they come in: while
    few are there, the best first choice may not be among them.
    """
    proposed: dict[str, str] = st.session_state.setdefault("bench_proposed", {})
    now = st.session_state.get(key)
    if now not in options or now == proposed.get(key):
        proposed[key] = first if first in options else options[0]
        if proposed[key] != now:
            st.session_state[key] = proposed[key]


def _choose(key: str, value: str) -> None:
    _mine(key)
    st.session_state[key] = value


def _mine(key: str) -> None:
    """The person chose: no proposal replaces it any more."""
    st.session_state.get("bench_proposed", {}).pop(key, None)


def _into_link() -> None:
    for part, key in KEYS.items():
        st.query_params[part] = str(st.session_state[key])


def _rows(tables: Tables, measure: Measure) -> Any:
    scores = tables.scores
    return (scores["protocol"] == measure.protocol) & (scores["metric"] == measure.name)


# The numbers ---------------------------------------------------------------------------------------------------------


def _table(tables: Tables, measure: Measure) -> None:
    """Methods by metrics; choosing a cell opens the answers behind it."""
    measures = [one for one in tables.measures if one.protocol == measure.protocol]
    scores = tables.scores[tables.scores["protocol"] == measure.protocol]
    labels = [one.label for one in tables.plan.entrants if one.label in set(scores["method"])]
    shown, weights, config = {"Method": labels}, {}, {}
    config["Method"] = st.column_config.TextColumn("Method", pinned=True, width=130)
    for one in measures:
        own = scores[scores["metric"] == one.name].set_index("method")
        same = own["n"].nunique() == 1
        column = f"{one.title} (n {int(own['n'].iloc[0])})" if same else one.title
        wide = max(len(text) for text in own["text"])
        shown[column] = [_cell(own.loc[label], wide, with_n=not same) if label in own.index else "" for label in labels]
        weights[column] = [label in own.index and own.loc[label, "mark"] != "" for label in labels]
        config[column] = st.column_config.TextColumn(
            column,
            width=215,
            help=" ".join(md(sentence(part)) for part in (one.formula, HOW.get(one.how, ""), one.counted) if part),
        )
    frame = pd.DataFrame(shown)
    bold = pd.DataFrame({name: ["font-weight: bold" if best else "" for best in weights.get(name, [False] * len(frame))]
                         for name in frame.columns})  # fmt: skip
    columns = dict(zip(list(frame.columns)[1:], [one.name for one in measures], strict=True))
    st.dataframe(
        frame.style.apply(lambda _: bold, axis=None),
        hide_index=True,
        column_config=config,
        key="bench_table",
        on_select=lambda: _cell_chosen(labels, columns),
        selection_mode="single-cell",
        height=min(35 * (len(labels) + 1) + 3, 670),
        alt=f"{measure.protocol}: methods by metrics, with 95 % intervals",
    )
    st.caption(
        "Value, 95 % interval in brackets, n cases. **Bold**: “best”, where no other method's interval reaches it, "
        "or “tied”, where it can't be told apart from the best. Choose a cell, or choose below, to open the answers "
        "behind it."
    )
    titles = {one.name: one.title for one in measures}
    methods = list(tables.scores.loc[_rows(tables, measure), "method"])
    with st.container(horizontal=True, gap="small"):
        st.selectbox(
            "Metric", list(titles), format_func=lambda name: titles[name], key="bench_metric", on_change=_mine,
            args=("bench_metric",),
        )  # fmt: skip
        st.selectbox("Method", methods, key="bench_method", on_change=_mine, args=("bench_method",))
    _into_link()


def _cell(row: Any, wide: int, *, with_n: bool) -> str:
    """A number as a cell says it, padded so that texts sort as their numbers do."""
    text = str(row["text"]).rjust(wide, FIGURE_SPACE)
    interval = f" ({row['interval']})" if row["interval"] else ""
    n = f" n {int(row['n'])}" if with_n else ""
    return f"{text}{interval}{n} {row['mark']}".rstrip()


def _cell_chosen(labels: list[str], columns: dict[str, str]) -> None:
    cells = st.session_state.get("bench_table", {}).get("selection", {}).get("cells", [])
    for row, column in cells:
        if 0 <= row < len(labels):
            _choose("bench_method", labels[row])
        if column in columns:
            _choose("bench_metric", columns[column])


def _dot_chosen() -> None:
    picked = st.session_state.get("bench_dots", {}).get("selection", {}).get(benchmark_charts.PICK, [])
    if picked:
        _choose("bench_method", str(picked[0].get("method", "")))


# The pictures --------------------------------------------------------------------------------------------------------


def _pictures(tables: Tables, measure: Measure, method: str) -> None:
    scores = tables.scores.loc[_rows(tables, measure), ["method", "value", "n", "ci_low", "ci_high"]]
    scores = scores.replace([float("inf"), float("-inf")], float("nan"))
    words = {"unit": measure.unit, "better": measure.better, "title": measure.title, "chosen": method}
    formula = " ".join(sentence(part) for part in (measure.formula, HOW.get(measure.how, ""), measure.counted))
    about = About(
        f"{measure.title} of every method, with its 95 % interval over cases.",
        f"{formula} Means over cases; Wilson's interval where every case is 0 or 1, else by drawing cases anew.",
        "Intervals that overlap are not told apart. Numbers of another protocol are something else under a like name.",
    )
    stem = f"benchmark-{tables.name[:8]}-{measure.protocol}-{measure.name}"
    timed = scores.merge(tables.timing[["method", "seconds"]], on="method")
    timed = timed[timed["seconds"] > 0]
    beside = tables.plan.mode != "sequential" and len(timed) > 1
    left, right = st.columns([3, 2], gap="large") if beside else (st.container(), None)
    with left:
        figure(
            "bench_dots",
            benchmark_charts.dots(scores, **words),
            title=f"{measure.title}, method by method",
            reading=f"{measure.leaders} {measure.verdict}".strip(),
            table=benchmark_charts.ordered(scores, measure.better).drop(columns="base"),
            file=stem,
            about=about,
            level=3,
            on_select=_dot_chosen,
            selection=benchmark_charts.PICK,
        )
    if right is not None:
        with right:
            figure(
                "bench_time", benchmark_charts.against_time(timed, **words), title="Score against time",
                reading=_time_reading(timed), table=timed, file=f"{stem}-time", level=3,
                about=About(
                    "The same numbers over the median seconds that preparing an edit took.",
                    "Named: methods that no other one beats in both.",
                    "Times are of this machine, with whatever else ran on it.",
                ),
            )  # fmt: skip
    if tables.plan.mode == "sequential":
        _retention(tables, measure, method, stem)


def _time_reading(timed: pd.DataFrame) -> str:
    quick, slow = timed.loc[timed["seconds"].idxmin()], timed.loc[timed["seconds"].idxmax()]
    return (
        f"{quick['method']} is the quickest, {quick['seconds']:.2g} s an edit; "
        f"{slow['method']} takes {slow['seconds']:.2g} s."
    )


def _retention(tables: Tables, measure: Measure, method: str, stem: str) -> None:
    rows = tables.retention
    rows = rows[(rows["protocol"] == measure.protocol) & (rows["metric"] == measure.name)]
    rows = rows[["method", "step", "value", "n", "ci_low", "ci_high"]].replace(
        [float("inf"), float("-inf")], float("nan")
    )
    if rows.empty:
        return
    own = rows[rows["method"] == method].sort_values("step")
    reading = "No complete checkpoint of this method yet."
    if len(own):
        first, last = own.iloc[0], own.iloc[-1]
        texts = [f"{100 * v:.0f} %" if measure.unit == "share" else f"{v:.3g}" for v in (first["value"], last["value"])]
        reading = f"{method}: {texts[0]} after {int(first['step'])} edits, {texts[1]} after {int(last['step'])}."
    figure(
        "bench_retention", benchmark_charts.retention(rows, unit=measure.unit, title=measure.title, chosen=method),
        title=f"{measure.title} as edits add up", reading=reading, table=rows, file=f"{stem}-retention", level=3,
        about=About(
            "All cases edited so far, asked again at each checkpoint; the chosen method in colour with its 95 % band.",
            "The same metric over the cases edited by then.",
            "Later checkpoints ask more cases, so n grows along the line.",
        ),
    )  # fmt: skip


# What else there is --------------------------------------------------------------------------------------------------


def _rest(tables: Tables) -> None:
    """Alarms, what was refused or left out, and what the dataset's file had wrong."""
    parts = (
        ("Signs of damage", "alarms", tables.alarms, "No alarm was raised: no change was unusually large, none broke "
         "the model's text."),
        ("Refused edits and cases left out", "refused", tables.refused, "No edit was refused, no case left out."),
        ("Not measured", "left_out", tables.left_out, "Everything that was asked for was measured."),
        ("Records of the dataset that could not be used", "problems", tables.problems, "Every record was used."),
    )  # fmt: skip
    heading("What else to know")
    if tables.done < tables.total:
        st.caption("So far; not all is measured.")
    for title, key, frame, nothing in parts:
        if frame.empty:
            st.caption(f":material/check: {nothing}")
            continue
        opened = st.expander(f"{title}: {len(frame):,}", icon=":material/flag:", key=f"bench_{key}", on_change="rerun")
        if opened.open:
            with opened:
                if "method" in frame and len(frame) > ROWS_SHOWN:
                    counts = frame["method"].value_counts().items()
                    st.caption(f"By method: {md(', '.join(f'{method} {count:,}' for method, count in counts))}.")
                st.dataframe(frame.head(ROWS_SHOWN), hide_index=True, alt=title)
                if len(frame) > ROWS_SHOWN:
                    st.caption(f"The first {ROWS_SHOWN} of {len(frame):,}; the CSV has them all.")
                download(
                    f"{title} (CSV)", partial(csv_bytes, frame), f"benchmark-{tables.name[:8]}-{key}.csv", "text/csv",
                    key=f"bench_{key}_csv",
                )  # fmt: skip


def _downloads(sweep: Sweep, tables: Tables) -> None:
    desk = service().benchmarks
    heading("Files")
    stem = f"benchmark-{sweep.name[:8]}"
    there = desk.files(sweep.name)
    with st.container(horizontal=True, gap="small"):
        if not tables.scores.empty:
            numbers = ["protocol", "metric", "method", "value", "n", "ci_low", "ci_high"]
            about = {"model": sweep.plan.model.name, "dataset": sweep.plan.dataset}
            download(
                "Summary (CSV)", lambda: csv_bytes(tables.scores[numbers].assign(**about)), f"{stem}-summary.csv",
                "text/csv", key="bench_summary_csv",
            )  # fmt: skip
            download(
                "Answers (CSV)", lambda: csv_bytes(desk.answers(sweep.name)), f"{stem}-answers.csv", "text/csv",
                key="bench_answers_csv",
            )  # fmt: skip
        for file, label, mime in (
            ("report.html", "Report (HTML)", "text/html"), ("plan.json", "Plan (JSON)", "application/json"),
        ):  # fmt: skip
            if file in there:
                download(label, partial(desk.file, sweep.name, file), f"{stem}-{file}", mime, key=f"bench_{file}")
    if "report.html" not in there:
        st.caption("The report, one page to read and pass on, is written when the benchmark ends or is stopped.")
