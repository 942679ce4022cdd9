"""Several runs beside each other: settings and metrics as a table, and the way to the page that compares methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import streamlit as st

from mega_core.notebook import Entry
from mega_core.records import Report
from mega_core.service import MAX_COMPARED
from pages.components.figure import download
from pages.components.session import service, told
from pages.components.text import csv_bytes, md

PROTOCOLS = {"rome": "ROME protocol", "argmax": "Top answer", "exact": "Exact text"}


def why_not(picked: Sequence[Entry], reports: Mapping[str, Report]) -> str:
    """Why the chosen runs can't stand beside each other on the page of methods; empty when they can."""
    if not 2 <= len(picked) <= MAX_COMPARED:
        return f"Choose 2 to {MAX_COMPARED} runs."
    plans = [reports[entry.run.digest].question for entry in picked if entry.run.digest in reports]
    if len(plans) < len(picked):
        return "The result of one of them has been cleared."
    if any(report.origin for report in reports.values()):
        return "Imported runs are compared in the table below only."
    if len({(plan.requests, plan.model, plan.seed) for plan in plans}) > 1 or len(plans[0].requests) > 1:
        return "They are about different facts, models or seeds: the table below compares them."
    if len({plan.method.name for plan in plans}) < len(plans):
        return "Two of them use one method: the table below compares them."
    return ""


def open_button(picked: Sequence[Entry]) -> None:
    """To the page of methods, where all of these runs are there already; otherwise why not."""
    desk = service()
    reports = _reports(picked) if len(picked) <= MAX_COMPARED else {}
    reason = why_not(picked, reports)
    if st.button(
        "Compare", type="primary", icon=":material/view_column:", disabled=bool(reason), help=reason or None,
        key="runs_compare",
    ):  # fmt: skip
        name = desk.comparisons.save([reports[entry.run.digest].question for entry in picked])
        st.switch_page("pages/compare.py", query_params={"comparison": name})


@st.fragment
@told
def draw(picked: Sequence[Entry]) -> None:
    """Settings and metrics of 2 to 6 runs, a column for each."""
    if len(picked) > MAX_COMPARED:
        st.caption(f"Choose 2 to {MAX_COMPARED} runs to see them beside each other.")
        return
    reports = _reports(picked)
    gone = len(picked) - len(reports)
    st.subheader("Side by side", anchor=False)
    if gone:
        st.caption(f"The result of {gone} of them has been cleared: run the same edit again to compare it.")
    if len(reports) < 2:
        return
    only = st.toggle("Only differences", value=True, key="runs_only_differences", persist_state="session")
    wide = side_by_side(list(reports.values()))
    shown = differing(wide) if only else wide
    if shown.empty:
        st.info("They do not differ in any setting or metric.", icon=":material/equal:")
        return
    st.dataframe(
        shown,
        hide_index=True,
        key=f"runs_side_by_side_{only}",
        column_config={
            "about": st.column_config.TextColumn("About", width=120, pinned=True),
            "what": st.column_config.TextColumn("What", width=190, pinned=True),
        },
        height="content" if len(shown) <= 24 else 640,
        alt="Settings and metrics of the chosen runs, a column for each",
    )
    st.caption(md("Metrics are after the edit. Compare within one protocol, never across: they ask different things."))
    download("CSV", lambda: csv_bytes(wide), "runs-side-by-side.csv", "text/csv", key="runs_side_csv")


def side_by_side(reports: Sequence[Report]) -> pd.DataFrame:
    """Rows about, what; then a column of texts for each run, named by method and run id. Cells without a value are
    empty.
    """
    columns = {f"{r.question.method.name.upper()} · {r.digest[:8]}": _facts(r) for r in reports}
    keys = list(dict.fromkeys(key for facts in columns.values() for key in facts))
    order = ["Edit", "Setting", *PROTOCOLS.values()]
    keys.sort(key=lambda key: order.index(key[0]) if key[0] in order else len(order))
    return pd.DataFrame(
        {
            "about": [about for about, _ in keys],
            "what": [what for _, what in keys],
            **{name: [facts.get(key, "") for key in keys] for name, facts in columns.items()},
        }
    )


def differing(wide: pd.DataFrame) -> pd.DataFrame:
    """The rows in which the runs are not all alike."""
    return wide[wide.drop(columns=["about", "what"]).nunique(axis=1) > 1].reset_index(drop=True)


def _facts(report: Report) -> dict[tuple[str, str], str]:
    question, request = report.question, report.question.requests[0]
    facts = {
        ("Edit", "Subject"): request.subject,
        ("Edit", "Prompt template"): request.template,
        ("Edit", "Original object"): request.target_true or "",
        ("Edit", "New object"): request.target_new,
        ("Edit", "Edits"): str(len(question.requests)),
        ("Edit", "Paraphrases"): str(len(request.paraphrases)),
        ("Edit", "Neighbours"): str(len(request.neighbours)),
        ("Setting", "Model"): question.model.name,
        ("Setting", "Method"): f"{question.method.name}, version {question.method.version}",
        ("Setting", "Seed"): str(question.seed),
        ("Setting", "Views"): ", ".join(question.views),
        ("Setting", "From"): "imported" if report.origin else "here",
        ("Setting", "Weight files"): report.model_digest[:12],
    }
    for name, value in question.method.params:
        facts["Setting", name.replace("_", " ")] = "the model's default" if value is None else str(value)
    metrics = report.frames.get("metrics")
    if metrics is not None:
        for row in metrics[(metrics["state"] == "after") & (metrics["case"] == 0)].itertuples():
            protocol = PROTOCOLS.get(str(row.protocol), str(row.protocol))
            facts[protocol, str(row.metric).replace("_", " ")] = f"{float(row.value):.3f} (n = {row.n})"
    return facts


def _reports(picked: Sequence[Entry]) -> dict[str, Report]:
    desk = service()
    return {entry.run.digest: report for entry in picked if (report := desk.cached(entry.run.digest)) is not None}
