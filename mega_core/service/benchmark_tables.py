"""What the page of benchmarks reads: results as plain tables, each number with its words, and the answers behind it.

Nothing here starts work or loads a model. Tables are made from the lines that are there, so they can be had while a
benchmark runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from mega_core import benchmark as bench
from mega_core import benchmark_report
from mega_core.benchmark.results import ANSWERS
from mega_core.evaluation.protocols import PROTOCOLS

if TYPE_CHECKING:
    from pathlib import Path

SCORES = ("protocol", "metric", "method", "value", "n", "ci_low", "ci_high", "text", "interval", "mark")
BEHIND = ("case", "prompt", "expected", "said", "before", "value", "counts", "failed")
UNEDITED = bench.UNEDITED
MODES: Mapping[str, str] = benchmark_report.MODES
SMALL, GENERAL = benchmark_report.SMALL, benchmark_report.GENERAL


@dataclass(frozen=True, slots=True)
class Scoring:
    """A protocol as it is offered."""

    name: str
    title: str
    summary: str
    paper: str


@dataclass(frozen=True, slots=True)
class Measure:
    """A metric of a protocol as it is shown."""

    protocol: str
    name: str
    title: str
    formula: str
    how: str
    """forced | generated | text, or "" where it is made of several."""
    counted: str
    """Numerator over denominator, in words."""
    unit: str
    better: str
    """higher | lower."""
    headline: bool
    """Whether the verdict speaks of it."""
    leaders: str
    """The methods that are best at it; empty where only the unedited model was measured."""
    verdict: str
    """The rest of the sentence that `leaders` begins."""
    of: tuple[tuple[str, str, int], ...]
    """The metrics whose answers are behind it, itself or those it is made of: name, title and side. Side 1: an answer
    is right when its value is 1; -1: when it is 0; 0: it is no matter of right and wrong."""

    @property
    def judged(self) -> bool:
        """Whether its answers are right or wrong."""
        return any(side for _, _, side in self.of)


@dataclass(frozen=True)
class Tables:
    """What there is of a benchmark, finished or not."""

    name: str
    plan: bench.Plan
    done: int
    total: int
    protocols: tuple[Scoring, ...]
    """Those with numbers."""
    measures: tuple[Measure, ...]
    """Those with numbers, protocol by protocol."""
    scores: pd.DataFrame
    """Columns SCORES; `mark` is best, tied or empty."""
    timing: pd.DataFrame
    """method, seconds (median of preparing a case), total, edits, refused, alarmed, collapsed, ask_seconds."""
    retention: pd.DataFrame
    """method, step, protocol, metric, value, n, ci_low, ci_high; empty unless edits were made in sequence."""
    alarms: pd.DataFrame
    """method, case, step, text."""
    refused: pd.DataFrame
    """method, case, reason."""
    left_out: pd.DataFrame
    """what, reason: methods and protocols that were not measured."""
    problems: pd.DataFrame
    """line, record, reason: records of the dataset that could not be used."""
    about: Mapping[str, Any]
    """What plan.json says besides: started, ended, devices, versions ..."""

    def measure(self, protocol: str, metric: str) -> Measure:
        """Raises KeyError."""
        for one in self.measures:
            if (one.protocol, one.name) == (protocol, metric):
                return one
        raise KeyError(metric)


def scorings() -> tuple[Scoring, ...]:
    """Every protocol."""
    return tuple(Scoring(one.name, one.title, one.summary, one.paper) for one in PROTOCOLS)


def tables(name: str, results: bench.Results) -> Tables:
    """The tables of results."""
    measures: list[Measure] = []
    rows: list[tuple[Any, ...]] = []
    summary = results.summary
    shown = [one for one in scorings() if one.name in set(summary["protocol"])]
    for protocol in shown:
        found = benchmark_report.standing(protocol.name, summary[summary["protocol"] == protocol.name])
        made = {one.name: one.of for one in PROTOCOLS[protocol.name].derived}
        parts = {c.name: (c.name, c.title, benchmark_report.sign(c)) for c in found.columns if not c.derived}
        for column in found.columns:
            counted = f"{column.numerator} / {column.denominator}" if column.numerator else ""
            of = [parts[part] for part in made.get(column.name, (column.name,)) if part in parts]
            measures.append(
                Measure(
                    protocol.name, column.name, column.title, column.formula, column.how, counted, column.unit,
                    column.better, column in found.headlines, *found.said.get(column.name, ("", "")), tuple(of),
                )
            )  # fmt: skip
            cells = found.cells[column.name]
            rows += [
                (
                    protocol.name, column.name, one.label, cell.value, cell.n, cell.low, cell.high, cell.text,
                    cell.interval, found.marks[column.name].get(one.label, ""),
                )
                for one in results.plan.entrants
                if (cell := cells.get(one.label)) is not None
            ]  # fmt: skip
    about = results.about
    left_out = [(one["label"], one["reason"]) for one in about.get("not_measured", ())]
    left_out += [
        (f"{PROTOCOLS[one['protocol']].title if one['protocol'] in PROTOCOLS else one['protocol']}: "
         f"{one['cases']} of the dataset's cases", one["reason"])
        for one in about.get("left_out", ())
    ]  # fmt: skip
    if about.get("apart"):
        left_out.append((f"{about['apart']} cases", "another case asks about their subjects, or they about its"))
    problems = [(one["line"], one["record"], one["text"]) for one in about.get("problems", ())]
    return Tables(
        name=name,
        plan=results.plan,
        done=len(results.lines),
        total=results.total,
        protocols=tuple(shown),
        measures=tuple(measures),
        scores=pd.DataFrame(rows, columns=list(SCORES)),
        timing=results.timing,
        retention=results.retention,
        alarms=results.alarms,
        refused=pd.DataFrame(
            [(label or "every method", case, why) for label, case, why in results.refusals],
            columns=["method", "case", "reason"],
        ),
        left_out=pd.DataFrame(left_out, columns=["what", "reason"]),
        problems=pd.DataFrame(problems, columns=["line", "record", "reason"]),
        about={key: value for key, value in about.items() if key not in ("problems", "left_out", "not_measured")},
    )


def answers(folder: Path, protocol: str = "", metrics: Sequence[str] = (), method: str = "") -> pd.DataFrame:
    """Rows of answers (columns ANSWERS), all of them or those of these metrics by one method and the unedited model.

    Read from answers.parquet where it is as new as the lines, else from the lines. Raises BadInput.
    """
    file, lines = folder / "answers.parquet", folder / "cases.jsonl"
    wanted = [("protocol", "==", protocol), ("metric", "in", list(metrics)), ("method", "in", [method, UNEDITED])]
    try:
        if file.is_file() and file.stat().st_mtime_ns >= lines.stat().st_mtime_ns:
            return pd.read_parquet(file, engine="pyarrow", filters=wanted if method else None)
    except (OSError, ValueError):
        pass  # it is being written, or damaged: the lines have it all
    results = bench.Results.load(folder)
    if not method:
        return results.answers
    rows = [
        (line.label, line.case, line.step, *answer)
        for label in dict.fromkeys((UNEDITED, method))
        if any(one.label == label for one in results.plan.entrants)
        for line in results.last(label)
        for answer in line.answers
        if answer[0] == protocol and answer[1] in metrics
    ]
    return pd.DataFrame(rows, columns=list(ANSWERS))


def behind(folder: Path, measure: Measure, method: str) -> pd.DataFrame:
    """The answers that a number is made of: columns BEHIND, those of a number made of several with a `metric`.

    `before` is what the unedited model said; `failed` is false where answers are no matter of right and wrong.
    """
    return told(answers(folder, measure.protocol, [name for name, _, _ in measure.of], method), measure, method)


def told(found: pd.DataFrame, measure: Measure, method: str) -> pd.DataFrame:
    """As behind(), from rows of answers."""
    own = found[found["method"] == method].reset_index(drop=True)
    side = own["metric"].map({name: side for name, _, side in measure.of}).astype("int64")
    wrong = ((side > 0) & (own["value"] < 1)) | ((side < 0) & (own["value"] > 0))
    counts = own["counts"].astype(bool)
    own = own.assign(
        before=_said_before(found, own),
        counts=counts,
        failed=wrong & counts,
        metric=own["metric"].map({name: title for name, title, _ in measure.of}),
    )
    extra = ["metric"] if len(measure.of) > 1 else []
    return own[[*extra, *BEHIND]]


def _said_before(found: pd.DataFrame, own: pd.DataFrame) -> list[str]:
    """What the unedited model said to each prompt, "" where it was not asked."""
    keys = ["case", "metric", "prompt", "expected"]
    base = found[found["method"] == UNEDITED]
    said = {key[:-1]: key[-1] for key in base[[*keys, "said"]].itertuples(index=False, name=None)}
    return [str(said.get(key, "")) for key in own[keys].itertuples(index=False, name=None)]
