"""A run as one HTML page: no network, no script, readable on a phone, in the dark and on paper.

Pictures are drawn here into SVG; each has its numbers behind it. All text of people and models is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from markupsafe import Markup

from mega_core import __version__, documents
from mega_core.evaluation.text import verdict
from mega_core.records import Report
from mega_core.summary import outcome, percent
from pages.components import pictures, words
from pages.components.charts import ROLE_NAMES
from pages.components.prepared import tables_of
from pages.components.report_view import OUTCOME_HELP, OUTCOMES
from pages.components.run_pictures import Picture, pictures_of
from pages.components.text import KINDS, MODULES, STATES, seconds

if TYPE_CHECKING:
    from jinja2 import Template

ROWS_AT_MOST = 120
"""Of one table; run.json and the tables have them all."""
LONG = 24
"""Letters from which on a text may wrap."""
_WORDS: dict[str, dict[str, str]] = {
    "state": STATES, "prompt_kind": KINDS, "module": MODULES, "candidate": ROLE_NAMES, "role": ROLE_NAMES,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A picture of the page with its numbers."""

    title: str
    reading: str
    svg: Markup
    table: _Table


@dataclass(frozen=True, slots=True)
class _Table:
    """A table as texts."""

    columns: tuple[str, ...]
    kinds: tuple[str, ...]
    """How a column is set: "number", "text", or "long" for sentences."""
    rows: tuple[tuple[str, ...], ...]
    hidden: int
    """Rows that are left out."""


def html(report: Report) -> str:
    """The whole page; the same report gives the same text."""
    question, request = report.question, report.question.requests[0]
    tables = tables_of(report.digest, report)
    kind = outcome(report).kind
    metrics = report.frames.get("metrics", pd.DataFrame())
    change = report.frames.get("weight_change", pd.DataFrame())
    page: dict[str, Any] = {
        "version": __version__,
        "report": report,
        "claimed": report.origin or report.digest,
        "request": request,
        "others": question.requests[1:],
        "verdict": verdict(report),
        "outcome": OUTCOMES[kind][0],
        "outcome_help": OUTCOME_HELP[kind],
        "numbers": _numbers(tables["evidence"]),
        "prompts": _evidence(tables["evidence"]),
        "texts": tables["generations"].to_dict(orient="records"),
        "kinds": KINDS,
        "pictures": [_drawn(f"p{i}", picture) for i, picture in enumerate(pictures_of(report), start=1)],
        "metrics": _metrics(metrics) if len(metrics) else None,
        "change": _table(change) if len(change) else None,
        "took": seconds(sum(report.timing.values())),
        "timing": [(stage.replace("_", " "), f"{value:.2f} s") for stage, value in report.timing.items()],
        "glossary": [(name, words.GLOSSARY[name]) for name in ("Paraphrase", "Neighbour", "Contribution", "Margin")],
        "limits": words.LIMITS,
    }
    return _template().render(page)


def _drawn(name: str, picture: Picture) -> _Drawn:
    svg = pictures.drawn(picture.spec, name, picture.title, picture.reading)
    return _Drawn(picture.title, picture.reading, svg, _table(picture.table))


def _numbers(evidence: pd.DataFrame) -> list[tuple[str, str, str]]:
    """The cards: what, after the edit, before it."""
    found = []
    edit = evidence[evidence["prompt_kind"] == "edit"].iloc[0]
    for candidate, label in (("new", "New object"), ("true", "Original object")):
        if f"p_{candidate}_after" in evidence:
            after, before = (float(edit[f"p_{candidate}_{state}"]) for state in ("after", "before"))
            found.append((label, percent(after), f"before {percent(before)}"))
    for kind, label in (("paraphrase", "Paraphrases say it"), ("neighbourhood", "Neighbours kept")):
        mine = evidence[evidence["prompt_kind"] == kind]
        if len(mine):
            after, before = int(mine["passed_after"].sum()), int(mine["passed_before"].sum())
            found.append((label, f"{after} / {len(mine)}", f"before {before} / {len(mine)}"))
    return found


def _evidence(evidence: pd.DataFrame) -> _Table:
    shown = evidence.assign(rule=evidence["passed"].map({True: "✓ holds", False: "✗ does not hold"}))
    names = {"p_new": "new", "p_true": "original"}
    chances = {
        f"{column}_{state}": f"{name}, {state}"
        for column, name in names.items()
        for state in ("before", "after")
        if f"{column}_{state}" in shown
    }
    for column in chances:
        shown[column] = [percent(float(value)) for value in shown[column]]
    return _table(
        shown[["rule", "prompt_kind", "prompt", *chances]].rename(columns=chances), numeric=tuple(chances.values())
    )


def _metrics(metrics: pd.DataFrame) -> _Table:
    wide = metrics.pivot_table(
        index=["case", "protocol", "metric", "n"], columns="state", values="value", aggfunc="first", sort=False
    )
    wide = wide.reindex(columns=["before", "after"]).reset_index()
    return _table(wide if wide["case"].nunique() > 1 else wide.drop(columns="case"))


def _table(frame: pd.DataFrame, numeric: Sequence[str] = ()) -> _Table:
    columns = [
        [_cell(str(column), value) for value in frame[column].head(ROWS_AT_MOST).astype(object)]
        for column in frame.columns
    ]
    kinds = []
    for column, cells in zip(frame.columns, columns, strict=True):
        if str(column) in numeric or (frame[column].dtype.kind in "if" and column not in ("layer", "case", "index")):
            kinds.append("number")
        else:
            kinds.append("long" if max(map(len, cells), default=0) > LONG else "text")
    return _Table(
        tuple(STATES.get(str(column), str(column).replace("_", " ")) for column in frame.columns),
        tuple(kinds),
        tuple(zip(*columns, strict=True)),
        max(0, len(frame) - ROWS_AT_MOST),
    )


def _cell(column: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−") if isfinite(value) else "–" if value != value else str(value)
    return _WORDS.get(column, {}).get(str(value), str(value))


@lru_cache(1)
def _template() -> Template:
    return documents.templates(Path(__file__).parent).get_template("run_report.html.jinja")
