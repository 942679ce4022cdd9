"""The comparison itself: how each method stands, metrics, what the models say, where it happened, at what cost."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pandas as pd
import streamlit as st

from mega_core.jobs import JobView
from mega_core.records import EditRequest, Inspection
from mega_core.summary import outcome, percent
from pages.components import compare_charts, compare_form, compare_tables, readings
from pages.components.compare_tables import BASE, PROTOCOL_WORDS, PROTOCOLS, Column
from pages.components.figure import About, download, figure, heading
from pages.components.frame import PAGES
from pages.components.report_view import outcome_badge
from pages.components.session import owner, service, told
from pages.components.text import KINDS, MODULES, csv_bytes, marked, md, seconds, signed, word_diff

LINKS = ("edit", "anatomy")
WAYS = {"new": "Toward the new object", "true": "Toward the original object", "difference": "Difference"}
ABOUT_SAYS = About(
    "What the base model and the model edited by each method write after each prompt.",
    "Greedy continuations: always the likeliest token. Words that the base model did not say stand in «»; ✎ marks a "
    "text that differs from the base model's.",
    "A continuation can change in unimportant words while the object stays, and the other way round: see the metrics.",
)
ABOUT_MAPS = About(
    "How each method changes what every layer's attention and MLP adds to the log-probability of the object, after the "
    "edit prompt: blue toward it, orange away from it. A ring marks the places where the method acts.",
    "Contribution after the edit minus contribution before it, in nats. All methods share one colour scale while it is "
    "locked; unlocked, a method's colours are shares of its own largest change.",
    "Attribution is not causation. Only the object's first token is explained, and what acts behind the last norm "
    "does not show.",
)
ABOUT_NEXT = About(
    "How likely the next token after the edit prompt is to begin the new and the original object.",
    "Softmax over the whole vocabulary at the last token of the prompt, one forward pass for each method.",
    "Only first tokens: two objects that begin alike have the same bar.",
)
ABOUT_COST = About(
    "How long each run took on this machine, and what the method changes.",
    "Seconds of the whole run: the looks before and after are in it. Norm: Frobenius, over all places together; "
    "relative: the largest, against the unedited matrix, or for steering against the activation's usual norm.",
    "The first run after a start is slower. Norms of different kinds of change can't be compared.",
)


def columns_of(plans: Sequence[Inspection], job: JobView | None) -> list[Column]:
    """How every method of a comparison stands now."""
    desk = service()
    titles = {info.name: info.title for info in desk.methods(plans[0].model.name)}
    failed: dict[str, str] = st.session_state.get("compare_failed", {})
    asked: list[str] = st.session_state.get("compare_asked", [])
    step = answered(job) if job is not None else -1
    columns = []
    for plan in plans:
        digest = desk.digest(plan)
        report = desk.cached(digest)
        why = ""
        if report is not None:
            state = "done"
        elif job is not None:
            state = "working" if asked[step : step + 1] == [digest] and job.state == "running" else "waiting"
        else:
            why = failed.get(digest, "")
            state = "failed" if why else "missing"
        columns.append(Column(titles.get(plan.method.name, plan.method.name), plan, digest, state, report, why))
    return columns


def answered(job: JobView) -> int:
    """How many methods of the job are behind it."""
    return next((stage.done for stage in job.stages if stage.name == "methods"), 0)


def done(view: JobView) -> None:
    """The job is over: remember which methods failed, and why."""
    result = service().result(view.id, owner())
    if isinstance(result, dict):
        st.session_state["compare_failed"] = {digest: why for digest, why in result.items() if why}


@st.fragment(run_every=1.0)
@told
def watch(job_id: str, seen: int) -> None:
    """Draw the whole page anew when a method has been answered."""
    view = service().job(job_id, owner())
    if not view.over and answered(view) != seen:
        st.rerun()


def draw(plans: Sequence[Inspection], job: JobView | None) -> None:
    """Everything about a comparison."""
    columns = columns_of(plans, job)
    request = plans[0].requests[0]
    original = f", :gray[was {md(request.target_true)}]" if request.target_true else ""
    st.header(f"{md(request.prompt)} {md(request.target_new)}", anchor=False)
    st.caption(f"On {md(plans[0].model.name)}, seed {plans[0].seed}{original}")
    blind = st.toggle(
        "Blind labels A, B, C",
        key="compare_blind",
        help="Hides which method is which, in a shuffled order, until you switch it off.",
    )
    names = columns
    if blind:
        seed = st.session_state.setdefault("compare_blind_seed", random.SystemRandom().randrange(2**31))
        columns = compare_tables.blinded(columns, seed)
    elif "compare_blind_seed" in st.session_state:
        seed = st.session_state.pop("compare_blind_seed")
        letters = compare_tables.blinded(names, seed)
        pairs = ", ".join(f"{c.label} was {next(n.label for n in names if n.digest == c.digest)}" for c in letters)
        st.info(f"Revealed: {md(pairs)}.", icon=":material/visibility:")
    _cards(columns, blind=blind)
    missing = [column for column in names if column.state in ("missing", "failed")]
    if missing and job is None:
        what = f"{len(missing)} of {len(names)} methods have no result here"
        with st.container(border=True):
            st.markdown(f"{what}: they failed, were cancelled, or this link comes from elsewhere.")
            st.button(
                "Run the missing ones", icon=":material/play_arrow:", key="compare_missing",
                on_click=compare_form.run_missing, args=(list(plans),),
            )  # fmt: skip
    there = [column for column in columns if column.report is not None]
    if not there:
        return
    if len(there) == 1:
        st.caption("With one method there is nothing to compare yet; its numbers are below.")
    _metrics(there)
    _texts(there, request, blind=blind)
    _maps(there, request)
    _objects(there, request)
    if blind:
        st.caption(":material/visibility_off: Times and what was changed would tell the methods: shown when revealed.")
    else:
        _costs(there)


def _cards(columns: Sequence[Column], *, blind: bool) -> None:
    row = st.container(horizontal=True, gap="small")
    for column in columns:
        with row.container(border=True, width=165, gap="small"):
            st.markdown(f"**{md(column.label)}**")
            if column.report is not None:
                found = outcome(column.report)
                outcome_badge(found.kind)
                st.caption(f"New: {percent(found.prob_before)} → {percent(found.prob_after)}".replace(" %", "\u00a0%"))
                if not blind:
                    _links(column)
            elif column.state == "failed":
                st.markdown(":red[:material/error: Failed]")
                st.caption(md(column.why))
            elif column.state == "working":
                st.markdown(":material/progress_activity: Working")
                st.caption("Its column appears when it is done.")
            elif column.state == "waiting":
                st.markdown(":material/hourglass_empty: Waiting")
                st.caption("Its turn comes.")
            else:
                st.markdown(":material/help: No result here")


def _links(column: Column, pages: Sequence[str] = LINKS) -> None:
    for page in PAGES:
        if page.name in pages:
            st.page_link(page.file, label=page.title, icon=page.icon, query_params={"run": column.digest})


@st.fragment
@told
def _metrics(columns: Sequence[Column]) -> None:
    protocol = st.session_state.get("compare_protocol") or next(iter(PROTOCOLS))
    protocol = protocol if protocol in PROTOCOLS else next(iter(PROTOCOLS))
    table = compare_tables.metric_rows(columns, protocol)
    formulas = "; ".join(f"{row['metric']}: {row['how']}" for _, row in table.iterrows())
    heading(
        "Metrics",
        About(
            PROTOCOL_WORDS[protocol],
            f"{formulas}. n is the number of prompts.",
            "One protocol at a time: equal names hide different formulas. A handful of prompts of one edit says little "
            "about a method in general.",
        ),
    )
    st.segmented_control(
        "Protocol", list(PROTOCOLS), default=protocol, format_func=lambda name: PROTOCOLS[name],
        key="compare_protocol", required=True, persist_state="session",
    )  # fmt: skip
    if table.empty:
        st.caption("This protocol needs an original object, and the edit names none.")
        return
    labels = [column.label for column in columns]
    shown = pd.DataFrame({"metric": table["metric"]})
    for name in (BASE, *labels):
        values = table[name] if name in table else pd.Series([None] * len(table))
        shown[name] = [
            "–" if pd.isna(value) else f"{value:.3f}{' best' if name in best else ''}"
            for value, best in zip(values, table["best"], strict=True)
        ]
    shown = shown.assign(n=table["n"], better=table["better"], how=table["how"])

    def bold(values: pd.Series) -> list[str]:
        return ["font-weight: bold" if str(value).endswith(" best") else "" for value in values]

    st.dataframe(
        shown.style.apply(bold, subset=labels),
        hide_index=True,
        column_config={
            "metric": st.column_config.TextColumn("Metric", pinned=True, help="How each is counted: last column."),
            BASE: st.column_config.TextColumn(BASE, help="The unedited model; it takes no part in best."),
            "n": st.column_config.NumberColumn("n", help="Prompts"),
            "better": "Direction",
            "how": st.column_config.TextColumn("How it is counted", width="large"),
        },
        height="content",
        key="compare_metrics",
        alt=f"Metrics by method, protocol {PROTOCOLS[protocol]}",
    )
    st.caption(md(_metric_words(table, len(labels))))
    download(
        "CSV", lambda: csv_bytes(shown), f"comparison-metrics-{protocol}.csv", "text/csv", key="compare_metrics_csv"
    )


def _metric_words(table: pd.DataFrame, methods: int) -> str:
    """Who is best how often."""
    won: dict[str, int] = {}
    if methods < 2:
        return "The numbers of one method; none is called best."
    for best in table["best"]:
        for label in best:
            won[label] = won.get(label, 0) + 1
    if not won:
        return "All methods have the same values here."
    top = max(won.values())
    names = " and ".join(label for label, count in won.items() if count == top)
    told = sum(bool(best) for best in table["best"])
    return f"{names}: best, or level with the best, in {top} of the {told} metrics that differ between methods."


@st.fragment
@told
def _texts(columns: Sequence[Column], request: EditRequest, *, blind: bool) -> None:
    table = compare_tables.says(columns)
    if table.empty:
        return
    heading("What the models write", ABOUT_SAYS)
    only = st.toggle("Only rows that differ", key="compare_differ", persist_state="session")
    differing = int(table["differs"].sum())
    shown = (table[table["differs"]] if only else table).reset_index(drop=True)
    labels = [column.label for column in columns]
    st.caption(
        f"{differing} of {len(table)} prompts are answered differently by the base model or a method. Select a row to "
        "read it in full."
    )
    if shown.empty:
        return
    cells = pd.DataFrame(
        {"prompt": shown["prompt"], "kind": shown["prompt_kind"].map(KINDS), BASE: shown[BASE].str.strip()}
    )
    for label in labels:
        cells[label] = [
            compare_tables.bracketed(base, text) if base == text else f"✎ {compare_tables.bracketed(base, text)}"
            for base, text in zip(shown[BASE], shown[label], strict=True)
        ]
    wide = {label: st.column_config.TextColumn(label, width=230) for label in labels}
    event: Any = st.dataframe(
        cells,
        hide_index=True,
        column_config={
            "prompt": st.column_config.TextColumn("Prompt", pinned=True, width=150),
            "kind": st.column_config.TextColumn("Kind", width=100),
            BASE: st.column_config.TextColumn(BASE, width=200),
            **wide,
        },
        on_select="rerun",
        selection_mode="single-row",
        key="compare_texts",
        alt="Continuations of every prompt by the base model and each method",
    )
    rows = event["selection"]["rows"]
    row = shown.iloc[rows[0] if rows and 0 <= rows[0] < len(shown) else 0]
    st.markdown(f"**{KINDS.get(row['prompt_kind'], 'Prompt')}:** {md(row['prompt'])} …")
    cards = st.container(horizontal=True, gap="small")
    for label, text in ((BASE, row[BASE]), *((label, row[label]) for label in labels)):
        with cards.container(border=True, width=250, gap="small"):
            st.caption(md(label))
            st.markdown(marked(word_diff(row[BASE], text)[1], "green") or ":gray[(nothing)]")
            column = next((one for one in columns if one.label == label), None)
            if column is not None and not blind:
                _links(column, ("edit",))
    download("CSV", lambda: csv_bytes(table), "comparison-texts.csv", "text/csv", key="compare_texts_csv")


@st.fragment
@told
def _maps(columns: Sequence[Column], request: EditRequest) -> None:
    st.header("Where in the network", anchor=False)
    ways = {name: word for name, word in WAYS.items() if name == "new" or request.target_true}
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        way = st.segmented_control(
            "Change", list(ways), default="new", format_func=lambda name: ways[name], key="compare_way",
            required=True, persist_state="session",
        )  # fmt: skip
        locked = st.toggle("Lock colour scale", value=True, key="compare_locked", persist_state="session")
    way = way if way in ways else "new"
    cells = compare_tables.changes(columns, way)
    if cells.empty:
        st.caption("No contributions were computed for these runs.")
        return
    if not locked:
        st.warning(
            "Scales differ: each method's colours are shares of its own largest change, printed in its label.",
            icon=":material/warning:",
        )
    labels = [column.label for column in columns]
    best = cells.loc[cells["value"].abs().idxmax()]
    parts = [
        f"{label}: {compare_tables.place_of(mine.loc[mine['value'].abs().idxmax()])}, "
        f"{signed(float(mine.loc[mine['value'].abs().idxmax(), 'value']))} nats"
        for label in labels
        if len(mine := cells[cells["method"] == label])
    ]
    what = readings.explained(way, request)
    figure(
        "compare_maps",
        compare_charts.method_maps(cells, labels, locked=bool(locked)),
        title=f"Largest change toward {what}: {best['method']}, {compare_tables.place_of(best)}",
        reading=f"Largest change of each. {'; '.join(parts)}. A ring marks where the method acts.",
        table=cells.assign(module=cells["module"].map(MODULES))[
            ["method", "layer", "module", "value", "share", "edited"]
        ],
        file=f"comparison-maps-{way}",
        about=ABOUT_MAPS,
        columns={"value": st.column_config.NumberColumn("Change, nats", format="%+.3f")},
        level=3,
    )


def _objects(columns: Sequence[Column], request: EditRequest) -> None:
    table = compare_tables.next_objects(columns)
    if table.empty:
        return
    new = table[(table["who"] == "new object") & (table["method"] != BASE)]
    top = new.loc[new["prob"].idxmax()]
    low = new.loc[new["prob"].idxmin()]
    span = "" if len(new) < 2 else f", least by {low['method']} ({low['percent']})"
    base = table[(table["who"] == "new object") & (table["method"] == BASE)]["percent"]
    figure(
        "compare_next",
        compare_charts.object_bars(table),
        title="How likely each object is next",
        reading=f"“{request.target_new}” is made most likely by {top['method']} ({top['percent']}){span}; the base "
        f"model gives it {base.iloc[0] if len(base) else 'nothing'}.",
        table=table,
        file="comparison-next-tokens",
        about=ABOUT_NEXT,
        columns={"prob": st.column_config.NumberColumn("Probability", format="percent")},
    )


def _costs(columns: Sequence[Column]) -> None:
    table = compare_tables.costs(columns)
    slow = table.loc[table["seconds"].idxmax()]
    fast = table.loc[table["seconds"].idxmin()]
    took = f"{fast['method']}: {seconds(fast['seconds'])}."
    if len(table) > 1:
        took = (
            f"{fast['method']} was quickest ({seconds(fast['seconds'])}), {slow['method']} slowest "
            f"({seconds(slow['seconds'])})."
        )
    still = list(table[table["weights"] == 0]["method"])
    config: dict[str, Any] = {
        "method": st.column_config.TextColumn("Method", pinned=True),
        "seconds": st.column_config.NumberColumn("Seconds in all", format="%.2f"),
        "edit_seconds": st.column_config.NumberColumn("Seconds for the edit", format="%.2f"),
        "changed": "Changes",
        "where": "Layers",
        "weights": st.column_config.NumberColumn("Weights touched", format="localized"),
        "norm": st.column_config.NumberColumn("Norm of change", format="%.3f"),
        "relative": st.column_config.NumberColumn("Relative", format="percent"),
    }
    figure(
        "compare_seconds",
        compare_charts.second_bars(table),
        title="What it took, and what was changed",
        reading=took + (f" No weight is changed by {', '.join(still)}." if still else ""),
        table=table,
        file="comparison-costs",
        about=ABOUT_COST,
        columns=config,
    )
    st.dataframe(table, hide_index=True, column_config=config, key="compare_costs", alt="Time and change by method")


def nothing_yet() -> None:
    """What will appear here."""
    with st.container(border=True):
        st.header("What you will see here", anchor=False)
        st.markdown(
            ":material/view_column: **One column for each method**, filled as it finishes\n\n"
            ":material/leaderboard: **Metrics by protocol**, the best named\n\n"
            ":material/compare: **What each edited model says**, differing words marked\n\n"
            ":material/grid_on: **Where each method acts**, all on one colour scale\n\n"
            ":material/timer: **What it took**: seconds, and what was changed"
        )
        st.caption("Choose an edit and some methods, then press Compare these methods.")
