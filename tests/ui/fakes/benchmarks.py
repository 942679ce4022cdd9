"""What the pages see of `service.benchmarks`: results made by hand from real plans and lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from mega_core.benchmark import Entrant, Line, Results, Setup, set_up
from mega_core.cases import Case
from mega_core.datasets import Dataset, read
from mega_core.errors import BadInput
from mega_core.records import EditRequest, Inspection, MethodRef, ModelRef
from mega_core.service import Sweep, benchmark_tables
from mega_core.service.benchmark_tables import Measure, Scoring, Tables
from mega_core.service.benchmarks import Outlook

EVIL = "![x](http://evil.example/a.png) <b>Tower</b> :smile:"
NAMES = ("ours", "rome")
SINGLE, SEQUENCE = "1" * 32, "2" * 32
RIGHT = {"unedited": 0, "rome": 6, "ft_m": 3}
"""How many of the six cases a method answers as edited."""


def cases(count: int = 6, evil: bool = False) -> tuple[Case, ...]:
    """Edits of capitals; the last may hold markdown."""
    found = [
        Case(
            id=str(i),
            requests=(
                EditRequest(f"Land {i}", "The capital of {} is", "Rome", f"City {i}", (f"Land {i} is ruled from",),
                            (f"The capital of Land {i + 1} is",)),
            ),
        )
        for i in range(1, count + 1)
    ]  # fmt: skip
    if evil:
        found[-1] = Case(id=EVIL, requests=(EditRequest(EVIL, "{} is in", "Rome", "Paris"),))
    return tuple(found)


def setup(
    model: str = "atlas-gpt2",
    methods: Sequence[str] = ("rome", "ft_m"),
    *,
    dataset: str = "builtin:reported",
    chosen: Sequence[Case] = cases(),
    **how: Any,
) -> Setup:
    """A real plan."""
    entrants = [Entrant(name, MethodRef(name, 1, (("steps", 20),))) for name in methods]
    how.setdefault("protocols", NAMES)
    return set_up(ModelRef(model), "0" * 64, entrants, dataset, dataset, chosen, **how)


def lines(made: Setup, part: float = 1.0, *, refused: str = "", alarm: str = "") -> dict[str, Line]:
    """What measuring would have found: the first RIGHT cases of a method succeed."""
    found = {}
    every = list(made.plan.expected())
    for label, index, step, key in every[: int(part * len(every))]:
        value = float(index < RIGHT.get(label, 1))
        case = made.cases[index]
        scores, answers = [], []
        for protocol, metric in (("ours", "efficacy_contains"), ("ours", "neighbourhood_kl"), ("rome", "ES"),
                                 ("rome", "PS"), ("rome", "NS")):  # fmt: skip
            if protocol not in made.plan.protocols:
                continue
            one = 0.2 * index if metric == "neighbourhood_kl" else value
            scores.append((protocol, metric, one, 1))
            said = " Rome." if value else f" {case.request.target_true}, <b>bold</b> {EVIL}"
            answers.append((protocol, metric, case.request.prompt, case.request.target_new, said, one, True, 0))
        found[key] = Line(
            key=key, label=label, case=case.id, mode=made.plan.mode, step=step, of="u", seconds=0.5 + len(label) / 10,
            ask_seconds=0.1, refused=refused if label == "ft_m" and index == 0 else "",
            alarms=(alarm,) if alarm and label == "ft_m" and index == 1 else (), scores=tuple(scores),
            answers=tuple(answers),
        )  # fmt: skip
    return found


def results(made: Setup, part: float = 1.0, about: Mapping[str, Any] | None = None, **more: Any) -> Results:
    """Results as a folder would hold them."""
    return Results.of(made.plan, lines(made, part, **more), about or {})


@dataclass
class FakeBenchmarks:
    """Frozen answers: put benchmarks in with `add`."""

    sweeps: dict[str, Sweep] = field(default_factory=dict)
    found: dict[str, Results] = field(default_factory=dict)
    setups: dict[str, Setup] = field(default_factory=dict)
    broken: Exception | None = None
    """Raised by plan()."""
    busy: Exception | None = None
    """Raised by start() and resume()."""
    planned: list[dict[str, Any]] = field(default_factory=list)
    started: list[Setup] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    reads: int = 0
    """How often tables were made."""

    def add(
        self, name: str, made: Setup, state: str = "done", part: float = 1.0, error: str = "",
        about: Mapping[str, Any] | None = None, **more: Any,
    ) -> None:  # fmt: skip
        held = results(made, part, about, **more)
        self.setups[name], self.found[name] = made, held
        self.sweeps[name] = Sweep(
            name, Path("none"), made.plan, len(held.lines), held.total, state, "2026-03-04T05:06:07+00:00", error,
            small=True, eta_seconds=42.0 if state == "running" else None,
        )  # fmt: skip

    def all(self) -> tuple[Sweep, ...]:
        return tuple(self.sweeps.values())

    def sweep(self, name: str) -> Sweep:
        if name not in self.sweeps:
            raise BadInput("benchmark", "there is none of this name.", "Choose one of the list.")
        return self.sweeps[name]

    def scorings(self) -> tuple[Scoring, ...]:
        return benchmark_tables.scorings()

    def formats(self) -> tuple[tuple[str, str], ...]:
        return (("counterfact", "CounterFact"), ("table", "Your own table"))

    def upload(self, data: bytes, name: str, format: str = "auto") -> tuple[str, Dataset]:
        found = read(data, name, format)
        self.uploads["f" * 64] = data
        return "f" * 64, found

    def uploaded(self, mark: str, name: str, format: str = "auto") -> Dataset:
        return read(self.uploads[mark], name, format)

    def plan(self, model: str, methods: Sequence[str], dataset: Any, **how: Any) -> Setup:
        if self.broken is not None:
            raise self.broken
        self.planned.append({"model": model, "methods": methods, "dataset": dataset, **how})
        data = dataset if isinstance(dataset, Dataset) else None
        names = ("rome", "ft_m") if tuple(methods) == ("all",) else tuple(methods)
        return setup(
            model, names, dataset=data.name if data else dataset, chosen=data.cases if data else cases(),
            protocols=how["protocols"] or NAMES, mode=how["mode"], every=how["every"], seed=how["seed"],
            limit=how["limit"], problems=[(p.line, p.record, p.text) for p in data.problems] if data else (),
            unsupported=(("pmet", "attention and MLP run in parallel here"),) if tuple(methods) == ("all",) else (),
        )  # fmt: skip

    def outlook(self, made: Setup, seconds: Mapping[str, float | None]) -> Outlook:
        plan = made.plan
        known = [seconds.get(one.method.name) for one in plan.entrants if one.method is not None]
        return Outlook(
            len(plan.ids), sum(plan.edits), tuple(one.label for one in plan.entrants), plan.protocols,
            len(plan.ids) * len(plan.entrants), made.left_out, made.unsupported, made.problems, made.apart,
            sum(len(plan.ids) * one for one in known if one), (), "",
        )  # fmt: skip

    def start(self, made: Setup) -> str:
        if self.busy is not None:
            raise self.busy
        self.started.append(made)
        self.add(SINGLE, made, "running", 0.0)
        return SINGLE

    def resume(self, name: str) -> str:
        if self.busy is not None:
            raise self.busy
        self.resumed.append(name)
        self.sweeps[name] = replace(self.sweeps[name], state="running", error="")
        return name

    def stop(self, name: str) -> None:
        self.stopped.append(name)
        self.sweeps[name] = replace(self.sweeps[name], state="stopped")

    def tables(self, name: str) -> Tables:
        self.reads += 1
        return benchmark_tables.tables(name, self.found[name])

    def behind(self, name: str, measure: Measure, method: str) -> pd.DataFrame:
        answers = self.found[name].answers
        wanted = [metric for metric, _, _ in measure.of]
        answers = answers[(answers["protocol"] == measure.protocol) & answers["metric"].isin(wanted)]
        return benchmark_tables.told(answers, measure, method)

    def answers(self, name: str) -> pd.DataFrame:
        return self.found[name].answers

    def case(self, name: str, case: str) -> Case:
        return next(one for one in self.setups[name].cases if one.id == case)

    def question(self, name: str, method: str, case: str, edit: int = 0) -> Inspection:
        plan = self.setups[name].plan
        chosen = next(one.method for one in plan.entrants if one.label == method and one.method is not None)
        return Inspection(plan.model, chosen, (self.case(name, case).requests[edit],), seed=plan.seed)

    def files(self, name: str) -> tuple[str, ...]:
        return ("report.html", "plan.json") if self.sweeps[name].state == "done" else ()

    def file(self, name: str, file: str) -> bytes:
        return b"<!doctype html>"
