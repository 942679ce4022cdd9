"""What a benchmark found, as tables (pandas), made from plan and lines whenever they are asked for.

1. summary     a row per entrant, protocol and metric: mean over cases with its 95 % interval. In a sequence that of the
               last checkpoint that is complete.
2. retention   the same at every complete checkpoint of a sequence.
3. timing      seconds of preparing, per entrant.
4. answers     a row per prompt.

Rows stand in the order entrants, protocols, metrics. No times are in summary.csv, and its numbers have six significant
digits: it depends on the plan alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd

from mega_core.benchmark import journal
from mega_core.benchmark.plan import Line, Plan
from mega_core.errors import BadInput, StoreError
from mega_core.evaluation.asking import Score
from mega_core.evaluation.protocols import PROTOCOLS
from mega_core.evaluation.protocols.base import Mean, summarise
from mega_core.folders import write_file

PLAN = "plan.json"
SCHEMA_VERSION = 1
MAX_PLAN_BYTES = 256 * 2**20
SUMMARY = ("model", "method", "dataset", "protocol", "metric", "value", "n", "ci_low", "ci_high")
RETENTION = ("method", "step", "protocol", "metric", "value", "n", "ci_low", "ci_high")
TIMING = ("method", "seconds", "total", "edits", "refused", "alarmed", "collapsed", "ask_seconds")
ANSWERS = (
    "method", "case", "step", "protocol", "metric", "prompt", "expected", "said", "value", "counts", "group",
)  # fmt: skip
ALARMS = ("method", "case", "step", "text")
COLLAPSED = "collapsed"
NOTHING = 1e-12
"""Rounding errors of intervals that end at 0 are written as 0."""


@dataclass(frozen=True)
class Results:
    """A plan and the lines there are of it."""

    plan: Plan
    lines: tuple[Line, ...]
    """In the plan's order: entrant by entrant, case by case, step by step."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What plan.json says besides: environment, problems of the dataset, what is left out, command line, times."""
    folder: Path | None = None

    @classmethod
    def of(cls, plan: Plan, found: Mapping[str, Line], about: Mapping[str, Any], folder: Path | None = None) -> Results:
        """The plan's lines among those found."""
        return cls(plan, tuple(found[key] for *_, key in plan.expected() if key in found), about, folder)

    @classmethod
    def load(cls, folder: Path) -> Results:
        """Read a folder of results, finished or not. Raises BadInput when it is none."""
        about = read_about(folder)
        return cls.of(about.pop("plan"), journal.read(folder), about, folder)

    @cached_property
    def total(self) -> int:
        """How many lines the plan asks for."""
        return sum(1 for _ in self.plan.expected())

    @property
    def complete(self) -> bool:
        """Whether every line is there."""
        return len(self.lines) == self.total

    @cached_property
    def _by_entrant(self) -> dict[str, dict[int, list[Line]]]:
        """Label -> step -> lines; in single mode all cases are at step 0."""
        found: dict[str, dict[int, list[Line]]] = {one.label: {} for one in self.plan.entrants}
        for line in self.lines:
            step = 0 if self.plan.mode == "single" else line.step
            found[line.label].setdefault(step, []).append(line)
        if self.plan.mode != "single":
            due = {step: count for count, step in self.plan.checkpoints}
            found = {
                label: {step: lines for step, lines in sorted(steps.items()) if len(lines) == due[step]}
                for label, steps in found.items()
            }
        return found

    def last(self, label: str) -> Sequence[Line]:
        """The lines of an entrant that its summary is made of."""
        steps = self._by_entrant[label]
        return steps[max(steps)] if steps else ()

    # 1.
    @cached_property
    def summary(self) -> pd.DataFrame:
        """Columns SUMMARY."""
        plan = self.plan
        rows = [
            (plan.model.name, entrant.label, plan.dataset, protocol, *mean)
            for entrant in plan.entrants
            for protocol, mean in _means(plan, self.last(entrant.label))
        ]
        return pd.DataFrame(rows, columns=list(SUMMARY))

    # 2.
    @cached_property
    def retention(self) -> pd.DataFrame:
        """Columns RETENTION; empty unless the mode is sequential."""
        rows = [
            (label, step, protocol, *mean)
            for label, steps in self._by_entrant.items()
            for step, lines in steps.items()
            if self.plan.mode == "sequential"
            for protocol, mean in _means(self.plan, lines)
        ]
        return pd.DataFrame(rows, columns=list(RETENTION))

    # 3.
    @cached_property
    def timing(self) -> pd.DataFrame:
        """Columns TIMING: median seconds of preparing a case, their sum, median of asking; `edits` counts cases."""
        rows = []
        for entrant in self.plan.entrants:
            lines = [line for line in self.last(entrant.label) if not line.left_out]
            if entrant.method is None or not lines:
                continue
            seconds = pd.Series([line.seconds for line in lines])
            rows.append(
                (
                    entrant.label, float(seconds.median()), float(seconds.sum()), len(lines),
                    sum(bool(line.refused) and COLLAPSED not in line.alarms for line in lines),
                    sum(bool(line.alarms) for line in lines),
                    sum(COLLAPSED in line.alarms for line in lines),
                    float(pd.Series([line.ask_seconds for line in lines]).median()),
                )
            )  # fmt: skip
        return pd.DataFrame(rows, columns=list(TIMING))

    # 4.
    @cached_property
    def answers(self) -> pd.DataFrame:
        """Columns ANSWERS, at the last step."""
        rows = [
            (line.label, line.case, line.step, *answer)
            for entrant in self.plan.entrants
            for line in self.last(entrant.label)
            for answer in line.answers
        ]
        return pd.DataFrame(rows, columns=list(ANSWERS))

    @cached_property
    def alarms(self) -> pd.DataFrame:
        """Columns ALARMS: every alarm that was raised, at every step."""
        rows = [(line.label, line.case, line.step, text) for line in self.lines for text in line.alarms]
        return pd.DataFrame(rows, columns=list(ALARMS))

    @property
    def refusals(self) -> tuple[tuple[str, str, str], ...]:
        """(label, case, why) of every edit that was refused, and with no label of every case that was left out."""
        found = [(line.label, line.case, line.refused) for line in self.lines if line.refused]
        out = {line.case: line.left_out for line in self.lines if line.left_out}
        return (*(("", case, why) for case, why in out.items()), *dict.fromkeys(found))

    def summary_csv(self) -> str:
        """summary.csv."""
        return _csv(self.summary, ("value", "ci_low", "ci_high"))

    def retention_csv(self) -> str:
        """retention.csv."""
        return _csv(self.retention, ("value", "ci_low", "ci_high"))

    def write(self, folder: Path) -> None:
        """The tables into files, each whole or not at all. Raises StoreError when the disk refuses."""
        buffer = BytesIO()
        self.answers.to_parquet(buffer, index=False, engine="pyarrow", compression="zstd")
        put(folder / "answers.parquet", buffer.getvalue())
        if self.plan.mode == "sequential":
            put(folder / "retention.csv", self.retention_csv().encode())
        put(folder / "summary.csv", self.summary_csv().encode())


def read_about(folder: Path) -> dict[str, Any]:
    """plan.json, its plan as a Plan. Raises BadInput when there is none, or it is damaged or of another version."""
    path = folder / PLAN
    try:
        if not path.is_file():
            raise BadInput("out", f"there are no results in {folder}.", "Name a folder that bench wrote.")
        if path.stat().st_size > MAX_PLAN_BYTES:
            raise ValueError("too large")
        plain = json.loads(path.read_bytes())
        if plain["schema_version"] != SCHEMA_VERSION:
            raise BadInput("out", f"{path} has schema {str(plain['schema_version'])[:20]}.", "Use its own version.")
        return {**plain, "plan": Plan.from_plain(plain["plan"])}
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise BadInput("out", f"{path} can't be read ({type(error).__name__}).", "Name another folder.") from error


def write_about(folder: Path, plan: Plan, about: Mapping[str, Any]) -> None:
    """plan.json."""
    plain = {"schema_version": SCHEMA_VERSION, **about, "plan": plan.as_plain()}
    put(folder / PLAN, (json.dumps(plain, ensure_ascii=False, allow_nan=False, indent=1) + "\n").encode())


def put(path: Path, data: bytes) -> None:
    """A file whole or not at all. Raises StoreError."""
    try:
        write_file(path, data)
    except OSError as error:
        raise StoreError(
            f"{path} could not be written ({error.strerror or type(error).__name__}).",
            "Free some space, then go on with --resume.",
        ) from error


def _means(plan: Plan, lines: Sequence[Line]) -> Iterator[tuple[str, Mean]]:
    for protocol in plan.protocols:
        cases = [
            [Score(metric, value, n) for name, metric, value, n in line.scores if name == protocol] for line in lines
        ]
        asked = [case for case in cases if case]
        if asked and protocol in PROTOCOLS:
            for mean in summarise(PROTOCOLS[protocol], asked):
                yield protocol, mean


def _csv(frame: pd.DataFrame, numbers: Sequence[str]) -> str:
    shown = frame.copy()
    for name in numbers:
        shown[name] = [f"{value if abs(value) > NOTHING else 0:.6g}" for value in shown[name]]
    return str(shown.to_csv(index=False, lineterminator="\n"))
