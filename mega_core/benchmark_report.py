"""A benchmark run as one HTML page: no network, no script, readable on a phone, in the dark and on paper.

1. The head says what was measured, what the numbers are worth, how to run it again, and a verdict made by rule.
2. Each protocol stands alone: a table of methods by metrics, and a picture per metric. Numbers of two protocols never
   share a table, an axis or an average.
3. Success twice: what teacher forcing says against what greedy generation says.
4. Many edits in sequence: how much of all edits so far holds, and what became of the language.
5. Time; answers that failed, to be read; what was left out; versions and digests.

Rules of the verdict and of the marks (ours): intervals that overlap are not told apart, fewer than FEW cases tell
nothing, and an interval without width is replaced by Wilson's (evaluation/intervals.py). Pictures are Vega-Lite, drawn
here into SVG; their texts and grids take the page's colours, their marks are mid-tones that stand out on light and
dark. All text from people and models is escaped, isolated from the direction of the text around it, and its hidden
characters are spelled out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import isfinite, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any
from typing import Protocol as Interface

import pandas as pd
from markupsafe import Markup

from mega_core import __version__
from mega_core.documents import element, templates, visible
from mega_core.evaluation import intervals
from mega_core.evaluation.protocols import PROTOCOLS

if TYPE_CHECKING:
    from jinja2 import Template

    from mega_core.records import MethodRef, ModelRef

UNEDITED = "unedited"
OURS = "ours"
FEW = 5
"""Fewer cases than this tell no methods apart, whatever their intervals (ours)."""
LARGE_GAP = 0.15
"""Forced success this far above generated success is said in words (ours)."""
READ_AT_MOST = 20
"""Failed questions shown per method."""
SOFT = 3
"""The rank of metrics at which an answer fails that is merely worded otherwise."""
LIST_AT_MOST = 200
TEXT_AT_MOST = 600
MAX_BYTES = 3_000_000
STEPS_AT_MOST, DRAWN_AT_MOST = 12, 50
"""Checkpoints of a sequence in a table and in a picture; retention.csv has them all."""
HEADLINES = {
    OURS: ("efficacy_contains", "paraphrase_contains", "neighbourhood_contains"),
    "mquake": ("edit", "instance", "multihop"),
}
"""What the verdict speaks of where a protocol has no number made of several (ours)."""
BEHIND_AT_MOST = 20
"""With more methods than this, a retention picture shows its own line only."""

NEW, GREY, FORCED, BROKEN = "#12998a", "#78838f", "#8a6fd8", "#d24d57"
FONT = "Helvetica, Arial, Liberation Sans, sans-serif"
MODES = {
    "single": "each edit alone on the unedited model, then undone",
    "batch": "all edits made together, then every case asked",
    "sequential": "one edit after the other, all kept; every case so far asked at each checkpoint",
}
KINDS = {"forced": "teacher-forced", "generated": "generated text", "text": "text", "": ""}
SMALL = (
    "These are numbers of a small model that knows a few thousand facts and little else: they compare methods under "
    "equal conditions and say nothing about large models."
)
GENERAL = (
    "These numbers hold for this model, these cases and these settings; another model may order methods otherwise."
)


class Entrant(Interface):
    """A method as it was entered; benchmark.Entrant is one."""

    @property
    def label(self) -> str:
        """Its name in every table."""
        ...

    @property
    def method(self) -> MethodRef | None:
        """None for the unedited model."""
        ...


class Plan(Interface):
    """What the page reads of a plan; benchmark.Plan is one."""

    @property
    def model(self) -> ModelRef:
        """Catalogue name, revision, dtype."""
        ...

    @property
    def weights(self) -> str:
        """Digest of the weights' files."""
        ...

    @property
    def entrants(self) -> Sequence[Entrant]:
        """What was compared, the unedited model first."""
        ...

    @property
    def dataset(self) -> str:
        """Its name."""
        ...

    @property
    def source(self) -> str:
        """Where it came from."""
        ...

    @property
    def cases_digest(self) -> str:
        """Digest of the cases."""
        ...

    @property
    def ids(self) -> Sequence[str]:
        """The cases."""
        ...

    @property
    def edits(self) -> Sequence[int]:
        """How many edits each case makes."""
        ...

    @property
    def protocols(self) -> Sequence[str]:
        """Names in PROTOCOLS."""
        ...

    @property
    def mode(self) -> str:
        """A name in MODES."""
        ...

    @property
    def every(self) -> int:
        """Edits between checkpoints; 0: none."""
        ...

    @property
    def seed(self) -> int:
        """Of everything drawn."""
        ...


def html(
    plan: Plan,
    summary: pd.DataFrame,
    timing: pd.DataFrame,
    retention: pd.DataFrame,
    answers: pd.DataFrame,
    left_out: Sequence[Sequence[str]] = (),
    problems: Sequence[Sequence[str]] = (),
    environment: Mapping[str, object] | None = None,
    *,
    alarms: pd.DataFrame | None = None,
) -> str:
    """The whole page; the same values give the same text.

    summary      model, method, dataset, protocol, metric, value, n, ci_low, ci_high
    timing       method, seconds (median per edit), total, edits, refused
    retention    method, step, protocol, metric, value, n, ci_low, ci_high; empty unless edits were made in sequence
    answers      method, case, step, protocol, metric, prompt, expected, said, value, counts, group
    alarms       method, case, step, text
    left_out     what was not measured, and why: a method, a case or both, then the reason
    problems     records the dataset left out: where, and why
    environment  "date", "command" (a text or its words), "small_model" (True: the page says what that means), and
                 anything else that is worth showing, as "versions" or "digests", one level of mappings deep
    """
    environment = dict(environment or {})
    alarms = pd.DataFrame(columns=["method", "case", "step", "text"]) if alarms is None else alarms
    draw = _Drawer()
    methods = _methods(plan, summary, timing)
    protocols = [
        _protocol(name, summary[summary["protocol"] == name], methods, draw) for name in _protocols(plan, summary)
    ]
    twice = _twice(summary, methods, draw)
    page: dict[str, Any] = {
        "plan": plan,
        "version": __version__,
        "date": _date(str(environment.pop("date", ""))),
        "command": _command(environment.pop("command", "")),
        "worth": SMALL if environment.pop("small_model", False) else GENERAL,
        "mode": MODES.get(plan.mode, plan.mode),
        "edited": [name for name in methods if name != UNEDITED],
        "verdicts": [(one["title"], one["verdicts"]) for one in protocols if one["verdicts"]],
        "warnings": _warnings(plan, twice, alarms, timing, left_out, problems, summary),
        "protocols": protocols,
        "twice": twice,
        "sequence": _sequence(retention, alarms, methods, draw),
        "timing": _timing(timing, methods),
        "left_out": _listed(left_out),
        "problems": _listed(problems),
        "refused": _refused(timing),
        "alarms": _alarms(plan, alarms, methods),
        "environment": _environment(environment),
        "methods": _entered(plan),
        "few": FEW,
    }
    failures = _failures(plan, answers, methods)
    template = _template()
    for most, pictures in (*((n, True) for n in (READ_AT_MOST, 10, 5, 2, 0)), (2, False)):
        text = template.render(page, failures=[one.cut(most) for one in failures], most=most, pictures=pictures)
        if len(text.encode()) <= MAX_BYTES:
            break
    return text


# What stands where ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Column:
    """A metric as the page writes it."""

    name: str
    title: str
    formula: str = ""
    how: str = ""
    numerator: str = ""
    denominator: str = ""
    unit: str = "share"
    better: str = "higher"
    derived: bool = False


def _columns(protocol: str) -> list[_Column]:
    """What the protocol says of its metrics, the numbers made of several first; nothing for a protocol not known."""
    if protocol not in PROTOCOLS:
        return []
    known = PROTOCOLS[protocol]
    made = [_Column(one.name, one.title, one.formula, derived=True) for one in known.derived]
    plain = [
        _Column(one.name, one.title, one.formula, one.how, one.numerator, one.denominator, one.unit, one.better)
        for one in known.metrics
    ]
    return [*made, *plain]


def _shown_columns(protocol: str, frame: pd.DataFrame) -> list[_Column]:
    there = list(dict.fromkeys(frame["metric"]))
    known = _columns(protocol)
    names = {column.name for column in known}
    strange = []
    for name in there:
        if name not in names:
            values = frame.loc[frame["metric"] == name, "value"].dropna()
            share = bool(((values >= 0) & (values <= 1)).all())
            strange.append(_Column(name, name, unit="share" if share else "ratio"))
    return [column for column in known if column.name in there] + strange


def _methods(plan: Plan, summary: pd.DataFrame, timing: pd.DataFrame) -> list[str]:
    """Labels in the plan's order, the unedited model first, then whatever else was measured."""
    planned = [entrant.label for entrant in plan.entrants]
    found = [str(name) for name in dict.fromkeys([*planned, *summary["method"], *timing["method"]])]
    measured = set(summary["method"]) | set(timing["method"])
    kept = [name for name in found if name in measured and name != UNEDITED]
    return ([UNEDITED] if UNEDITED in measured else []) + kept


def _protocols(plan: Plan, summary: pd.DataFrame) -> list[str]:
    there = set(summary["protocol"])
    return [str(name) for name in dict.fromkeys([*plan.protocols, *summary["protocol"]]) if name in there]


def _title(protocol: str) -> str:
    return PROTOCOLS[protocol].title if protocol in PROTOCOLS else protocol


# Numbers --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Cell:
    """One number with its interval, for one method and metric."""

    value: float
    low: float
    high: float
    n: int
    unit: str = "share"

    @property
    def bounded(self) -> bool:
        return isfinite(self.low) and isfinite(self.high)

    @property
    def text(self) -> str:
        return _number(self.value, self.unit)

    @property
    def interval(self) -> str:
        if not self.bounded:
            return ""
        if self.unit == "share":
            return f"{100 * self.low:.1f}–{100 * self.high:.1f}"
        return f"{_number(self.low, self.unit)} to {_number(self.high, self.unit)}"

    @property
    def judged(self) -> tuple[float, float]:
        """The interval that methods are told apart by. Drawing from cases that are all alike gives one without width,
        however few they are: Wilson's stands for it, and what is no share can't be told apart.
        """
        if self.low < self.high:
            return self.low, self.high
        if self.unit == "share" and 0 <= self.value <= 1:
            return intervals.wilson(self.value * self.n, self.n)
        return float("-inf"), float("inf")

    @property
    def words(self) -> str:
        return f"{self.text} ({self.interval})" if self.interval else self.text

    @property
    def exact(self) -> str:
        between = f", 95 % interval {self.low:.6g} to {self.high:.6g}" if self.bounded else ""
        return f"{self.value:.6g}{between}, n = {self.n}"

    def apart(self, other: _Cell) -> bool:
        """Whether the intervals have nothing in common, and both rest on enough cases."""
        if min(self.n, other.n) < FEW or not (self.bounded and other.bounded):
            return False
        (low, high), (other_low, other_high) = self.judged, other.judged
        return low > other_high or other_low > high


def _number(value: float, unit: str) -> str:
    if not isfinite(value):
        return "–"
    if unit == "share":
        return f"{100 * value:.1f}\u00a0%"
    if unit == "difference":
        return f"{value:+.3f}".replace("-", "−")
    if unit == "ratio" and abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:.3g}".replace("-", "−")


def _cells(frame: pd.DataFrame, unit: str) -> dict[str, _Cell]:
    """method -> its number, from rows of one protocol and metric (and one step)."""
    return {
        str(row.method): _Cell(float(row.value), float(row.ci_low), float(row.ci_high), int(row.n), unit)
        for row in frame.itertuples()
        if isfinite(float(row.value))
    }


def _leaders(cells: Mapping[str, _Cell], better: str) -> list[str]:
    """The best method first, then those that can't be told apart from it; the unedited model doesn't compete."""
    edited = {name: cell for name, cell in cells.items() if name != UNEDITED}
    if not edited:
        return []
    sign = 1 if better == "higher" else -1
    ordered = sorted(edited, key=lambda name: -sign * edited[name].value)
    best = edited[ordered[0]]
    return [ordered[0], *(name for name in ordered[1:] if not best.apart(edited[name]))]


def _names(names: Sequence[str], most: int = 5) -> str:
    """ "a, b and c"; the rest is counted."""
    if len(names) > most + 1:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _verdict(column: _Column, cells: Mapping[str, _Cell]) -> tuple[str, str] | None:
    """Which method is best at this metric: the names, and the rest of one or two sentences."""
    leaders = _leaders(cells, column.better)
    if not leaders:
        return None
    edited = [name for name in cells if name != UNEDITED]
    best = cells[leaders[0]]
    fewest = min(cells[name].n for name in edited)
    base = f" Unedited: {cells[UNEDITED].text}." if UNEDITED in cells else ""
    if len(edited) == 1:
        return leaders[0], f"has {best.words}.{base}"
    if fewest < FEW:
        few = f"{fewest} case{'s' if fewest != 1 else ''}"
        return leaders[0], f"has the best number, {best.words}, but {few} are too few to tell methods apart.{base}"
    if len(leaders) == 1:
        return leaders[0], f"is best, {best.words}; no other interval reaches it.{base}"
    if len(leaders) == len(edited):
        span = sorted(cells[name].value for name in edited)
        least, most = _number(span[0], best.unit), _number(span[-1], best.unit)
        numbers = f"{least} each" if least == most else f"{least} to {most}, intervals overlap"
        return _names(leaders), f"can't be told apart: {numbers}.{base}"
    rest = f"{_names(leaders[1:])} can't be told apart from it."
    return leaders[0], f"has the best number, {best.words}; {rest}{base}"


def _headlines(protocol: str, columns: Sequence[_Column]) -> list[_Column]:
    """The metrics that the verdict speaks of: those of HEADLINES, the numbers made of several, or three shares."""
    chosen = [column for column in columns if column.name in HEADLINES.get(protocol, ())]
    made = [column for column in columns if column.derived]
    return chosen or made[:2] or [column for column in columns if column.unit == "share"][:3]


# 2. -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Standing:
    """One protocol's numbers, and what may be said of them."""

    columns: Sequence[_Column]
    """Its metrics that were measured, in order."""
    cells: Mapping[str, Mapping[str, _Cell]]
    """Metric -> method -> its number."""
    marks: Mapping[str, Mapping[str, str]]
    """Metric -> method -> "best", or "tied" with the best; empty where nothing can be told apart."""
    said: Mapping[str, tuple[str, str]]
    """Metric -> the methods that are best at it, and the rest of the sentence."""
    headlines: Sequence[_Column]
    """The metrics that the verdict speaks of."""


def standing(protocol: str, frame: pd.DataFrame) -> Standing:
    """What the rows of one protocol in a summary say."""
    columns = _shown_columns(protocol, frame)
    table = {column.name: _cells(frame[frame["metric"] == column.name], column.unit) for column in columns}
    marks: dict[str, dict[str, str]] = {}
    for column in columns:
        cells = table[column.name]
        leaders = _leaders(cells, column.better)
        edited = [method for method in cells if method != UNEDITED]
        told_apart = len(leaders) < len(edited) and column.unit != "bits"  # more entropy is not better text
        marks[column.name] = dict.fromkeys(leaders, "best" if len(leaders) == 1 else "tied") if told_apart else {}
    said = {c.name: verdict for c in columns if (verdict := _verdict(c, table[c.name]))}
    return Standing(columns, table, marks, said, [c for c in _headlines(protocol, columns) if c.name in said])


def _protocol(name: str, frame: pd.DataFrame, methods: Sequence[str], draw: _Drawer) -> dict[str, Any]:
    found = standing(name, frame)
    columns, table, marks = found.columns, found.cells, found.marks
    present = [method for method in methods if any(method in cells for cells in table.values())]
    counts = {metric: {cell.n for cell in cells.values()} for metric, cells in table.items()}
    rows = [
        {
            "method": method,
            "base": method == UNEDITED,
            "cells": [(table[c.name].get(method), marks[c.name].get(method, "")) for c in columns],
        }
        for method in present
    ]
    known = next((one for one in PROTOCOLS if one.name == name), None)
    charts = [
        (column, draw.dots(name, column, {m: table[column.name][m] for m in present if m in table[column.name]}))
        for column in columns
    ]
    return {
        "name": name,
        "title": _title(name),
        "summary": known.summary if known else "",
        "paper": known.paper if known else "",
        "notes": known.notes if known else "",
        "columns": [(c, next(iter(counts[c.name])) if len(counts[c.name]) == 1 else None) for c in columns],
        "rows": rows,
        "marked": any(marks.values()),
        "verdicts": [(column, *found.said[column.name]) for column in found.headlines],
        "charts": [chart for column, chart in charts if column.unit == "share"],
        "more": [chart for column, chart in charts if column.unit != "share"],
        "how": KINDS,
    }


# 3. -------------------------------------------------------------------------------------------------------------------

_KINDS = ("efficacy", "paraphrase", "neighbourhood")


def _twice(summary: pd.DataFrame, methods: Sequence[str], draw: _Drawer) -> dict[str, Any]:
    """Forced, contained in the text, and exactly the text, by kind of prompt; what to say where they part."""
    frame = summary[summary["protocol"] == OURS]
    columns = {column.name: column for column in _columns(OURS)}
    charts: list[_Chart] = []
    said: list[dict[str, Any]] = []
    for kind in _KINDS:
        forced, contains, exact = (
            _cells(frame[frame["metric"] == f"{kind}_{how}"], "share") for how in ("forced", "contains", "exact")
        )
        three = {m: (forced[m], contains[m], exact.get(m)) for m in methods if m in forced and m in contains}
        if not three:
            continue
        column = columns.get(f"{kind}_forced")
        subject = _stem_title(column.title) if column else kind
        charts.append(draw.dumbbell(OURS, subject, three))
        for above in (True, False):
            apart = [
                (method, f"{by_force.text} forced, {by_text.text} in the text", abs(by_force.value - by_text.value))
                for method, (by_force, by_text, _) in three.items()
                if method != UNEDITED
                and abs(by_force.value - by_text.value) >= LARGE_GAP
                and (by_force.value > by_text.value) == above
                and by_force.apart(by_text)
            ]
            if apart:
                apart.sort(key=lambda one: -one[2])
                said.append({"what": subject, "above": above, "methods": apart})
    return {"charts": charts, "said": said}


def _stem_title(title: str) -> str:
    """ "Efficacy, forced" -> "Efficacy"."""
    return re.sub(r"[,:(]?\s*\(?(teacher[- ])?forced\)?\s*$", "", title, flags=re.IGNORECASE).strip() or title


# 4. -------------------------------------------------------------------------------------------------------------------


def _sequence(
    retention: pd.DataFrame, alarms: pd.DataFrame, methods: Sequence[str], draw: _Drawer
) -> list[dict[str, Any]]:
    """A group of pictures for what the verdict reads first of our protocol, another for perplexity; a table for what
    it reads first of every other protocol.
    """
    first_alarm = {str(method): int(rows["step"].min()) for method, rows in alarms.groupby("method", sort=False)}
    names = [str(name) for name in dict.fromkeys(retention["protocol"])]
    drawn = OURS if OURS in names else next(iter(names), "")
    found = []
    for protocol in sorted(names, key=lambda name: name != drawn):
        own = retention[retention["protocol"] == protocol]
        columns = _shown_columns(protocol, own)
        for column in [
            *(_headlines(protocol, columns) or columns)[:1],
            *(one for one in columns if one.unit == "ratio"),
        ]:
            curves = _by_method(own, column.name, methods)
            forced = _by_method(own, column.name.replace("_contains", "_forced"), methods) if protocol == OURS else {}
            forced = {} if column.name.replace("_contains", "_forced") == column.name else forced
            pictures = protocol == drawn or column.unit == "ratio"
            found.append(
                {
                    "protocol": _title(protocol),
                    "column": column,
                    "charts": draw.curves(protocol, column, curves, forced, first_alarm) if pictures else [],
                    "forced": bool(forced),
                    "table": _steps(curves, column.unit),
                }
            )
    return found


def _by_method(retention: pd.DataFrame, metric: str, methods: Sequence[str]) -> dict[str, pd.DataFrame]:
    rows = retention[retention["metric"] == metric]
    curves = {method: rows[rows["method"] == method].sort_values("step") for method in methods}
    return {method: curve for method, curve in curves.items() if len(curve)}


def _spread(steps: Sequence[int], most: int) -> list[int]:
    """At most so many of them, evenly, first and last among them."""
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)] if len(steps) > most else [*steps]


def _steps(curves: Mapping[str, pd.DataFrame], unit: str) -> dict[str, Any]:
    """The curves as numbers: at most STEPS_AT_MOST checkpoints, first and last among them."""
    steps = sorted({int(step) for curve in curves.values() for step in curve["step"]})
    steps = _spread(steps, STEPS_AT_MOST)
    rows = []
    for method, curve in curves.items():
        cells = {int(row.step): _Cell(row.value, row.ci_low, row.ci_high, row.n, unit) for row in curve.itertuples()}
        rows.append((method, [cells.get(step) for step in steps]))
    return {"steps": steps, "rows": rows}


# 5. -------------------------------------------------------------------------------------------------------------------


def _timing(timing: pd.DataFrame, methods: Sequence[str]) -> list[dict[str, Any]]:
    by_name = {str(row.method): row for row in timing.itertuples()}
    shown = [by_name[method] for method in methods if method in by_name and method != UNEDITED]
    longest = max((float(row.seconds) for row in shown if isfinite(float(row.seconds))), default=0.0)
    return [
        {
            "method": str(row.method),
            "seconds": _seconds(float(row.seconds)),
            "exact": f"{float(row.seconds):.6g} s",
            "total": _seconds(float(row.total)),
            "edits": int(row.edits),
            "refused": int(row.refused),
            "width": f"{100 * float(row.seconds) / longest:.1f}" if longest and isfinite(float(row.seconds)) else "0",
        }
        for row in shown
    ]


def _seconds(value: float) -> str:
    if not isfinite(value):
        return "–"
    if value < 1:
        return f"{1000 * value:.0f} ms" if value >= 0.0005 else "< 1 ms"
    if value < 100:
        return f"{value:.1f} s"
    minutes = value / 60
    return f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


@dataclass(frozen=True)
class _Failures:
    """The failed answers of one method, those to be read first at the front."""

    method: str
    counted: tuple[tuple[str, int, int], ...]
    """(metric, how many failed, of how many)."""
    rows: tuple[dict[str, Any], ...]
    total: int
    """How many questions failed, each counted once, whatever number of metrics it is behind."""
    hidden: int = field(default=0)

    def cut(self, most: int) -> _Failures:
        return _Failures(self.method, self.counted, self.rows[:most], self.total, self.total - len(self.rows[:most]))


def _failures(plan: Plan, answers: pd.DataFrame, methods: Sequence[str]) -> list[_Failures]:
    """Shares that are not whole, per method: one entry per question, each kind of question taking its turn."""
    columns = {(str(name), c.name): c for name in dict.fromkeys(answers["protocol"]) for c in _columns(str(name))}
    counted = answers[answers["counts"].astype(bool)] if len(answers) else answers
    kinds = pd.MultiIndex.from_frame(counted[["protocol", "metric"]].astype(str))
    signs = {kind: sign(columns.get(kind)) for kind in kinds.unique()}
    side = kinds.map(signs).to_numpy(dtype="int64")
    wrong = ((side > 0) & (counted["value"] < 1)) | ((side < 0) & (counted["value"] > 0))
    counted = counted.assign(wrong=wrong)[side != 0]
    before = _said_before(answers)
    found = []
    for method in methods:
        own = counted[counted["method"] == method]
        if method == UNEDITED or own.empty:
            continue
        if plan.mode == "sequential":
            own = own[own["step"] == own["step"].max()]
        failed = own[own["wrong"]]
        if failed.empty:
            continue
        of = own.groupby(["protocol", "metric"], sort=False)["wrong"].agg(["sum", "size"])
        counts = tuple(
            (_metric_title(columns, str(protocol), str(metric)), int(wrong), int(size))
            for (protocol, metric), wrong, size in zip(of.index, of["sum"], of["size"], strict=True)
            if wrong
        )
        questions = _questions(failed, columns, before)
        found.append(_Failures(method, counts, tuple(_in_turn(questions)[:READ_AT_MOST]), len(questions)))
    return found


def sign(column: _Column | None) -> int:
    """1: an answer is right when its value is 1; -1: when it is 0; 0: it is no matter of right and wrong."""
    if column is None:
        return 1
    if column.unit != "share" or column.how == "text":
        return 0
    return 1 if column.better == "higher" else -1


def _rank(column: _Column | None) -> int:
    """Which metric speaks for a question that several failed at: a text that should hold the answer speaks first, what
    merely is not the same letter by letter last.
    """
    if column is None or column.how != "generated":
        return 2
    if column.name.endswith(("_exact", "_kept")):
        return SOFT
    return 0 if column.name.endswith("_contains") else 1


def _metric_title(columns: Mapping[tuple[str, str], _Column], protocol: str, metric: str) -> str:
    column = columns.get((protocol, metric))
    return f"{_title(protocol)}: {column.title if column else metric}"


def _said_before(answers: pd.DataFrame) -> dict[tuple[str, str, str, str], str]:
    """(case, protocol, metric, prompt) -> what the unedited model said."""
    own = answers[answers["method"] == UNEDITED] if len(answers) else answers
    return {
        (str(case), str(protocol), str(metric), str(prompt)): str(said)
        for case, protocol, metric, prompt, said in zip(
            own["case"], own["protocol"], own["metric"], own["prompt"], own["said"], strict=True
        )
    }


def _questions(
    failed: pd.DataFrame,
    columns: Mapping[tuple[str, str], _Column],
    before: Mapping[tuple[str, str, str, str], str],
) -> list[dict[str, Any]]:
    """One entry per case and prompt; where several metrics failed there, the one with generated text speaks."""
    by_question: dict[tuple[str, str], dict[str, Any]] = {}
    for row in failed.sort_values(["value"], kind="stable").itertuples():
        rank = _rank(columns.get((str(row.protocol), str(row.metric))))
        title = _metric_title(columns, str(row.protocol), str(row.metric))
        key = (str(row.case), str(row.prompt))
        entry = by_question.setdefault(key, {"rank": 9, "metrics": []})
        entry["metrics"].append(title)
        if rank < entry["rank"]:
            told = before.get((str(row.case), str(row.protocol), str(row.metric), str(row.prompt)))
            entry |= {
                "rank": rank,
                "kind": title,
                "case": str(row.case),
                "prompt": _clip(str(row.prompt)),
                "expected": _clip(str(row.expected)),
                "said": _clip(str(row.said)),
                "before": None if told is None else _clip(told),
                "same": told is not None and told == str(row.said),
                "share": _number(float(row.value), "share") if 0 < row.value < 1 else "",
            }
            by_question[key] = entry
    for entry in by_question.values():
        also = [title for title in dict.fromkeys(entry["metrics"]) if title != entry["kind"]]
        entry["also"] = _names(also, most=3) if also else ""
    return list(by_question.values())


def _in_turn(questions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One of each kind, then the next of each; sorted by kind what stands at the front."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for question in sorted(questions, key=lambda one: one["rank"]):
        kinds.setdefault(question["kind"], []).append(question)
    turns = [
        kind[i]
        for soft in (False, True)
        for i in range(READ_AT_MOST)
        for kind in kinds.values()
        if i < len(kind) and (kind[i]["rank"] == SOFT) == soft
    ]
    order = {kind: i for i, kind in enumerate(kinds)}
    return sorted(turns[:READ_AT_MOST], key=lambda one: order[one["kind"]])


def _clip(text: str) -> str:
    return text if len(text) <= TEXT_AT_MOST else f"{text[: TEXT_AT_MOST - 1]}…"


# What else is said ----------------------------------------------------------------------------------------------------


def _warnings(
    plan: Plan,
    twice: Mapping[str, Any],
    alarms: pd.DataFrame,
    timing: pd.DataFrame,
    left_out: Sequence[Sequence[str]],
    problems: Sequence[Sequence[str]],
    summary: pd.DataFrame,
) -> list[str]:
    """What to keep in mind before trusting a number, each with where to read on."""
    found = []
    fewest = int(summary.loc[summary["n"] > 0, "n"].min()) if (summary["n"] > 0).any() else 0
    if 0 < fewest < 30:
        found.append(f"Some numbers rest on {fewest} case{'s' if fewest != 1 else ''} only; read the intervals.")
    inflated = list(dict.fromkeys(method for one in twice["said"] if one["above"] for method, *_ in one["methods"]))
    if inflated:
        found.append(f"Teacher forcing flatters {_names(inflated)}: the models say it less often than it suggests.")
    if len(alarms):
        damaged = []
        for name, rows in alarms.groupby("method", sort=False):
            if plan.mode == "sequential":
                first = int(rows["step"].min())
                damaged.append(f"{name} (from {first} edit{'s' if first != 1 else ''} on)")
            else:
                damaged.append(f"{name} ({rows['case'].nunique()} of {len(plan.ids)} cases)")
        found.append(f"Signs of damage: {_names(damaged)}.")
    refused = [f"{row.method} ({int(row.refused)})" for row in timing.itertuples() if int(row.refused)]
    if refused:
        found.append(f"Edits refused, and scored as if nothing had been done: {_names(refused)}.")
    if left_out:
        found.append(f"Left out or refused, with the reasons below: {len(left_out)}.")
    if problems:
        found.append(f"{len(problems)} record{'s' if len(problems) != 1 else ''} of the dataset could not be used.")
    return found


def _listed(rows: Iterable[Sequence[str]]) -> dict[str, Any]:
    """Rows of (what..., why), at most LIST_AT_MOST of them."""
    found = [[row] if isinstance(row, str) else [str(part) for part in row] for row in rows]
    shown = [(" · ".join(part for part in row[:-1] if part), _clip(row[-1])) for row in found if row]
    return {"rows": shown[:LIST_AT_MOST], "total": len(shown), "hidden": max(0, len(shown) - LIST_AT_MOST)}


def _refused(timing: pd.DataFrame) -> list[tuple[str, int, int]]:
    return [(str(row.method), int(row.refused), int(row.edits)) for row in timing.itertuples() if int(row.refused)]


def _alarms(plan: Plan, alarms: pd.DataFrame, methods: Sequence[str]) -> dict[str, Any]:
    """Where each alarm was raised. Edits that are kept raise theirs for all cases at once: those are said once."""
    order = [*methods, *(name for name in dict.fromkeys(alarms["method"]) if name not in methods)]
    rows = []
    for method in order:
        for row in alarms[alarms["method"] == method].itertuples():
            after = f"after {int(row.step)} edit{'s' if int(row.step) != 1 else ''}"
            rows.append((f"{method}, {f'case {row.case}' if plan.mode == 'single' else after}", str(row.text)))
    return _listed(dict.fromkeys(rows))


def _date(text: str) -> str:
    """An ISO time as a person reads it."""
    return re.sub(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(:\d\d(\.\d+)?)?(\+00:00|Z)?$", r"\1 \2 UTC", text)


def _command(command: object) -> str:
    if isinstance(command, str):
        return command
    import shlex

    return shlex.join(str(word) for word in command) if isinstance(command, Sequence) else str(command)


def _environment(environment: Mapping[str, object]) -> list[tuple[str, str]]:
    rows = []
    for name, value in environment.items():
        if isinstance(value, Mapping):
            prefix = "" if name == "versions" else f"{name}, "
            rows += [(f"{prefix}{key}", str(inner)) for key, inner in value.items()]
        elif isinstance(value, str) or not isinstance(value, Sequence):
            rows.append((str(name), str(value)))
        else:
            rows.append((str(name), ", ".join(str(inner) for inner in value)))
    return [(name.replace("_", " "), _clip(value)) for name, value in rows]


def _entered(plan: Plan) -> list[tuple[str, str]]:
    rows = []
    for entrant in plan.entrants:
        method = entrant.method
        params = ", ".join(f"{key}={value}" for key, value in method.params) if method else ""
        told = f"{method.name}, version {method.version}" if method else "the model as it is"
        rows.append((entrant.label, f"{told}: {params}" if params else told))
    return rows


# Text -----------------------------------------------------------------------------------------------------------------


@lru_cache(1)
def _template() -> Template:
    return templates(Path(__file__).parent).get_template("benchmark_report.html.jinja")


# Pictures -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Chart:
    """A drawn picture, its heading, and which protocol its numbers are of."""

    protocol: str
    heading: str
    note: str
    svg: Markup


_AXIS = {"domain": False, "ticks": False, "gridOpacity": 0.6, "labelFontSize": 11, "titleFontSize": 11}
_ALL_LABELS = {"labelOverlap": False, "labelFlush": False}
_CONFIG = {
    "font": FONT,
    "background": None,
    "view": {"stroke": None},
    "aria": True,
    "padding": {"left": 2, "top": 4, "right": 10, "bottom": 2},
    "axis": {"titleFontWeight": "normal", "labelColor": GREY, "titleColor": GREY, "gridColor": "#c4ccd4"},
}
WIDE, ROW = 340, 21


class _Drawer:
    """Draws Vega-Lite into SVG that can stand in a page beside others."""

    def __init__(self) -> None:
        self.count = 0

    def dots(self, protocol: str, column: _Column, cells: Mapping[str, _Cell]) -> _Chart:
        """A dot and its interval per method; hollow and dashed is the unedited model."""
        rows = [
            {
                "method": _plain(method),
                "value": cell.value,
                "low": cell.low if cell.bounded else None,
                "high": cell.high if cell.bounded else None,
                "said": f"{_plain(method)}: {cell.words}, n = {cell.n}",
                "base": method == UNEDITED,
            }
            for method, cell in cells.items()
        ]
        x = {"type": "quantitative", "scale": _scale(column.unit, rows), "axis": _value_axis(column.unit)}
        y = _method_axis(rows)
        shade = {"condition": {"test": "datum.base", "value": GREY}, "value": NEW}
        said = {"field": "said"}
        layers: list[dict[str, Any]] = [
            {
                "transform": [{"filter": "isValid(datum.low)"}],
                "mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.75, "aria": False},
                "encoding": {"x": {"field": "low", **x}, "x2": {"field": "high"}, "y": y, "color": shade},
            },
            {
                "transform": [{"filter": "!datum.base"}],
                "mark": {"type": "point", "filled": True, "size": 62, "opacity": 1, "color": NEW},
                "encoding": {"x": {"field": "value", **x}, "y": y, "description": said},
            },
            {
                "transform": [{"filter": "datum.base"}],
                "mark": {"type": "point", "filled": False, "size": 62, "opacity": 1, "color": GREY, "strokeWidth": 1.8},
                "encoding": {"x": {"field": "value", **x}, "y": y, "description": said},
            },
        ]
        if any(row["base"] for row in rows):
            rule = {"type": "rule", "strokeDash": [3, 3], "color": GREY, "opacity": 0.8, "aria": False}
            rule_layer = {
                "transform": [{"filter": "datum.base"}],
                "mark": rule,
                "encoding": {"x": {"field": "value", **x}},
            }
            layers.insert(0, rule_layer)
        told = "; ".join(str(row["said"]) for row in rows)
        room = 0 if column.unit == "share" else 14  # the axis has a title
        return self._chart(protocol, column.title, "", rows, layers, ROW * len(rows) + room, told)

    def dumbbell(self, protocol: str, subject: str, three: Mapping[str, tuple[_Cell, _Cell, _Cell | None]]) -> _Chart:
        """A hollow diamond is forced, a dot is contained in the text, a bar is exactly the text; a line joins them."""
        rows = [
            {
                "method": _plain(method),
                "forced": forced.value,
                "contains": contains.value,
                "exact": exact.value if exact else None,
                "said": f"{_plain(method)}: forced {forced.words}, text contains it {contains.words}"
                + (f", text is it {exact.words}" if exact else ""),
            }
            for method, (forced, contains, exact) in three.items()
        ]
        x = {"type": "quantitative", "scale": {"domain": [0, 1]}, "axis": _value_axis("share")}
        y = _method_axis(rows)
        dot = {"type": "point", "filled": True, "size": 62, "opacity": 1, "color": NEW}
        bar = {"type": "tick", "color": NEW, "thickness": 2.5, "height": 11, "opacity": 1}
        hollow = {
            "type": "point",
            "shape": "diamond",
            "filled": False,
            "size": 90,
            "opacity": 1,
            "color": FORCED,
            "strokeWidth": 1.8,
        }
        layers: list[dict[str, Any]] = [
            {
                "mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.6, "color": GREY, "aria": False},
                "encoding": {"x": {"field": "forced", **x}, "x2": {"field": low}, "y": y},
            }
            for low in ("contains", "exact")
        ]
        layers[1]["transform"] = [{"filter": "isValid(datum.exact)"}]
        layers += [
            {
                **({"transform": [{"filter": "isValid(datum.exact)"}]} if name == "exact" else {}),
                "mark": mark,
                "encoding": {"x": {"field": name, **x}, "y": y, "description": {"field": "said"}},
            }
            for name, mark in (("exact", bar), ("contains", dot), ("forced", hollow))
        ]
        told = "; ".join(str(row["said"]) for row in rows)
        return self._chart(protocol, subject, "", rows, layers, ROW * len(rows), told)

    def curves(
        self,
        protocol: str,
        column: _Column,
        curves: Mapping[str, pd.DataFrame],
        forced: Mapping[str, pd.DataFrame],
        alarm: Mapping[str, int],
    ) -> list[_Chart]:
        """A picture per method: its line and band, dashed the forced one, the other methods thin behind it, the
        unedited model dotted, and a cross where an alarm began.
        """
        every = {method: _points(curve, column.unit) for method, curve in curves.items()}
        beside = {method: _points(curve, column.unit) for method, curve in forced.items()}
        values = [point for points in (*every.values(), *beside.values()) for point in points]
        if not values:
            return []
        scale = _scale(column.unit, values)
        top = scale["domain"][1]
        last = max(point["step"] for point in values)
        x = {
            "field": "step",
            "type": "quantitative",
            "scale": {"domain": [0, last], "nice": False},
            "axis": {**_AXIS, "title": "edits so far", "tickCount": 4, "format": "d", "grid": False},
        }
        y = {"type": "quantitative", "scale": scale, "axis": _value_axis(column.unit)}

        def line(points: Sequence[Mapping[str, Any]], detail: str = "", **look: Any) -> dict[str, Any]:
            encoding = {"x": x, "y": {"field": "value", **y}, **({"detail": {"field": detail}} if detail else {})}
            mark = {"type": "line", "color": GREY, "aria": False, **look}
            return {"data": {"values": list(points)}, "mark": mark, "encoding": encoding}

        charts = []
        for method, own in every.items():
            if method == UNEDITED or not own:
                continue
            layers = []
            if len(every) <= BEHIND_AT_MOST:
                others = [m for m in every if m not in (method, UNEDITED)]
                behind = [{**point, "of": i} for i, other in enumerate(others) for point in every[other]]
                layers.append(line(behind, "of", strokeWidth=1, opacity=0.35))
            layers += [
                line(every.get(UNEDITED, []), strokeWidth=1.5, strokeDash=[2, 3]),
                {
                    "transform": [{"filter": "isValid(datum.low)"}],
                    "mark": {"type": "area", "color": NEW, "opacity": 0.2, "aria": False},
                    "encoding": {"x": x, "y": {"field": "low", **y}, "y2": {"field": "high"}},
                },
                line(beside.get(method, []), strokeWidth=1.8, strokeDash=[5, 3], color=FORCED),
                line(own, strokeWidth=2, color=NEW),
                {
                    "mark": {"type": "point", "filled": True, "size": 26, "opacity": 1, "color": NEW},
                    "encoding": {"x": x, "y": {"field": "value", **y}, "description": {"field": "said"}},
                },
            ]
            note = f"{own[-1]['text']} after {own[-1]['step']}"
            told = f"{_plain(method)}: " + ", ".join(point["said"] for point in own)
            if method in alarm:
                began = f"first alarm after {alarm[method]} edit{'s' if alarm[method] != 1 else ''}"
                sign = [{"step": alarm[method], "value": top, "said": began}]
                rule = {"type": "rule", "strokeDash": [2, 2], "strokeWidth": 1.5, "color": BROKEN, "aria": False}
                cross = {"type": "point", "shape": "cross", "angle": 45, "filled": True, "size": 70, "color": BROKEN}
                layers += [
                    {"data": {"values": sign}, "mark": rule, "encoding": {"x": x}},
                    {
                        "data": {"values": sign},
                        "mark": {**cross, "opacity": 1},
                        "encoding": {"x": x, "y": {"field": "value", **y}, "description": {"field": "said"}},
                    },
                ]
                note += f"; {began}"
                told += f"; {began}"
            charts.append(self._chart(protocol, method, note, own, layers, 120, told, wide=250, of=column.title))
        return charts

    def _chart(
        self,
        protocol: str,
        heading: str,
        note: str,
        rows: Sequence[Mapping[str, Any]],
        layers: Sequence[Mapping[str, Any]],
        height: int,
        told: str,
        wide: int = WIDE,
        of: str = "",
    ) -> _Chart:
        spec = {
            "$schema": "https://vega.github.io/schema/vega-lite/v5.20.1.json",
            "data": {"values": list(rows)},
            "layer": list(layers),
            "width": wide,
            "height": height + 34,
            "autosize": {"type": "fit", "contains": "padding"},
            "config": _CONFIG,
        }
        self.count += 1
        name = f"{_title(protocol)}, {of + ': ' if of else ''}{heading}"
        return _Chart(protocol, heading, note, _svg(spec, f"c{self.count}", name, told))


def _points(curve: pd.DataFrame, unit: str) -> list[dict[str, Any]]:
    """A curve for a picture; ratios are kept above 0, where a logarithm can show them."""
    found = []
    shown = set(_spread([int(step) for step in curve["step"]], DRAWN_AT_MOST))
    for row in curve[curve["step"].isin(shown)].itertuples():
        cell = _Cell(float(row.value), float(row.ci_low), float(row.ci_high), int(row.n), unit)
        if not isfinite(cell.value):
            continue
        least = 1e-3 if unit == "ratio" else float("-inf")
        found.append(
            {
                "step": int(row.step),
                "value": max(cell.value, least),
                "low": max(cell.low, least) if cell.bounded else None,
                "high": max(cell.high, least) if cell.bounded else None,
                "text": cell.text,
                "said": f"after {int(row.step)}: {cell.words}",
            }
        )
    return found


def _plain(text: str) -> str:
    """A label for a picture: on one line, hidden characters spelled out."""
    return visible(" ".join(text.split()))


def _scale(unit: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if unit == "share":
        return {"domain": [0, 1]}
    values = [float(row[key]) for row in rows for key in ("value", "low", "high") if _known(row.get(key))]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if unit == "ratio" and low > 0:
        low, high = min(low, 0.95), max(high, 1.05)
        room = 10 ** (0.04 * log10(high / low))
        return {"type": "log", "domain": [low / room, high * room], "nice": False}
    low, high = min(low, 0.0), max(high, 0.0)
    room = 0.04 * ((high - low) or 1.0)
    return {"domain": [low - room * (low < 0), high + room], "nice": False}


def _known(value: object) -> bool:
    return isinstance(value, int | float) and isfinite(value)


def _value_axis(unit: str) -> dict[str, Any]:
    if unit == "share":
        return {**_AXIS, "title": None, "format": ".0%", "values": [0, 0.25, 0.5, 0.75, 1], **_ALL_LABELS}
    title = {"nats": "nats", "bits": "bits", "difference": "difference of probabilities", "ratio": "ratio, log"}
    shape = {"format": "~g"} if unit == "ratio" else {}
    return {**_AXIS, "title": title.get(unit, unit), "tickCount": 4, **shape}


def _method_axis(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    axis = {**_AXIS, "title": None, "labelFontSize": 11.5, "labelLimit": 118, "labelPadding": 10, "grid": False}
    return {"field": "method", "type": "nominal", "sort": None, "scale": {"paddingInner": 0.2}, "axis": axis}


def _svg(spec: Mapping[str, Any], name: str, title: str, told: str) -> Markup:
    """The picture as an element of the page. `name` begins the ids of title and description."""
    import vl_convert

    return element(vl_convert.vegalite_to_svg(dict(spec), vl_version="5.20", allowed_base_urls=[]), name, title, told)
