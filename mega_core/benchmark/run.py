"""One benchmark run: what is missing goes to an executor as units of work, lines come back and are kept, tables follow.

1. A folder with another plan is refused, naming the first difference; one with this plan, or with this plan and fewer
   cases, is gone on with when asked to.
2. Units: single, a case with the entrants it still lacks; else an entrant. They carry what they need as JSON.
3. Every line is kept the moment it comes. Whatever ends the run, tables of what is there are written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from mega_core import folders
from mega_core.benchmark import journal
from mega_core.benchmark.journal import Journal
from mega_core.benchmark.plan import Line, Plan, Setup, extended, mark_of
from mega_core.benchmark.results import PLAN, Results, put, read_about, write_about
from mega_core.cases import from_plain
from mega_core.errors import BadInput
from mega_core.events import Advanced, Event, Reporter, Started, silent
from mega_core.executors import STAGE as UNITS
from mega_core.executors import Executor, Local, OpenWorker
from mega_core.keys import digest
from mega_core.records import as_plain

STAGE = "benchmark"
STATE = "state"


def check_out(out: Path, plan: Plan, resume: bool) -> None:
    """Raises BadInput unless results of this plan can go into this folder (step 1)."""
    if not (out / PLAN).is_file():
        if (out / SETUP).is_file():
            return
        if resume and not out.is_dir():
            raise BadInput("out", f"there are no results in {out}.", "Leave --resume out.")
        folders.check_new(out, "out")
        return
    there: Plan = read_about(out)["plan"]
    if there != plan and not extended(there, plan):
        raise BadInput(
            "out", f"{out} holds another benchmark; what differs is {there.difference(plan)}.", "Name another folder."
        )
    if not resume:
        more = "fewer cases" if there != plan else "this benchmark"
        raise BadInput("out", f"{out} holds {more} already.", "Add --resume to go on with it, or name another folder.")


def run(
    setup: Setup,
    out: Path,
    open_worker: OpenWorker,
    *,
    executor: Executor | None = None,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    report: Reporter = silent,
    write: Callable[[Results], None] | None = None,
) -> Results:
    """Measure what is missing and write the tables; `write` is called with the results, whole or not, at the end.

    `about` is what plan.json says besides the plan. Raises BadInput as check_out does, Busy when another process is at
    it, DirtyModel when a method left the model changed, and whatever the reporter raises.
    """
    plan, executor = setup.plan, executor or Local()
    check_out(out, plan, resume)
    out.mkdir(exist_ok=True)
    with folders.alone(out, "out"):
        (out / STATE).mkdir(exist_ok=True)
        said = {**_about(setup), **(about or {}), **_times(out)}
        write_about(out, plan, said)
        lines: dict[str, Line] = journal.read(out)
        try:
            with Journal(out) as kept:
                units = list(units_of(setup, kept.keys, out / STATE))
                progress = _Progress(plan, lines, report)

                def take(unit: str, text: str) -> None:
                    line = kept.add(text)
                    if line is None:
                        return
                    if line.clean:
                        lines[line.key] = line
                    else:
                        lines.pop(line.key, None)
                    progress.took(line)

                executor.run(open_worker, json.dumps(plan.as_plain()), units, take, progress.passed_on)
        finally:
            results = Results.of(plan, lines, {**said, **_ended(lines)}, out)
            write_about(out, plan, results.about)
            results.write(out)
            if results.complete:
                _clear(out / STATE)
            if write is not None:
                write(results)
    return results


SETUP = "setup.json"


class Glance(NamedTuple):
    """How far a run is, without its lines."""

    plan: Plan
    done: int
    total: int
    started: str


def glance(folder: Path) -> Glance:
    """Lines are counted, not read. Raises BadInput when the folder holds no results."""
    if not (folder / PLAN).is_file() and (folder / SETUP).is_file():
        plan = kept_setup(folder).plan
        return Glance(plan, 0, sum(1 for _ in plan.expected()), "")
    about = read_about(folder)
    file, done = folder / journal.NAME, 0
    if file.is_file():
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                done += block.count(b"\n")
    total = sum(1 for _ in about["plan"].expected())
    return Glance(about["plan"], min(done, total), total, str(about.get("started", "")))


def keep_setup(setup: Setup, folder: Path) -> None:
    """Plan and cases, so that a run can be gone on with when nobody has its dataset any more. Raises StoreError."""
    folder.mkdir(exist_ok=True)
    if not (folder / SETUP).is_file():
        plain = {"plan": setup.plan.as_plain(), "cases": as_plain(setup.cases), **_about(setup)}
        put(folder / SETUP, json.dumps(plain, ensure_ascii=False, allow_nan=False).encode())


def kept_setup(folder: Path) -> Setup:
    """What keep_setup wrote. Raises BadInput when it is not there, or damaged."""
    try:
        plain = json.loads((folder / SETUP).read_bytes())
        plan, found = Plan.from_plain(plain["plan"]), tuple(from_plain(case) for case in plain["cases"])
        if tuple(mark_of(case) for case in found) != plan.marks:
            raise ValueError("the cases are others")
        return Setup(
            plan,
            found,
            tuple((one["line"], one["record"], one["text"]) for one in plain["problems"]),
            tuple((one["protocol"], one["reason"], one["cases"]) for one in plain["left_out"]),
            tuple((one["label"], one["reason"]) for one in plain["not_measured"]),
            int(plain["apart"]),
        )
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise BadInput(
            "benchmark", f"{folder.name} can't be read ({type(error).__name__}).", "Start it anew."
        ) from error


def units_of(setup: Setup, done: set[str], state: Path | None) -> Iterator[tuple[str, str]]:
    """(key, JSON) of every unit with something missing (step 2)."""
    plan = setup.plan
    labels = [one.label for one in plan.entrants]
    if plan.mode == "single":
        for index, case in enumerate(setup.cases):
            (step,) = plan.steps_of(index)
            missing = [label for label in labels if plan.key(label, index, step) not in done]
            if missing:
                yield _unit(plan.marks[index], missing, [index], [as_plain(case)], [], None)
        return
    plain = [as_plain(case) for case in setup.cases]
    for label in labels:
        keys = [plan.key(label, index, step) for index in range(len(plain)) for step in plan.steps_of(index)]
        there = [key for key in keys if key in done]
        if len(there) < len(keys):
            name = digest([plan.sequence(label, 0), plan.every])[:32]
            file = state / f"{name}.bin" if state is not None and plan.mode == "sequential" else None
            yield _unit(name, [label], range(len(plain)), plain, there, file)


def _unit(
    key: str, labels: Sequence[str], indices: Sequence[int], cases: Sequence[Any], done: Sequence[str],
    state: Path | None,
) -> tuple[str, str]:  # fmt: skip
    plain = {
        "key": key,
        "labels": list(labels),
        "indices": list(indices),
        "cases": list(cases),
        "done": list(done),
        "state": "" if state is None else str(state.absolute()),
    }
    return key, json.dumps(plain)


class _Progress:
    """Tells how many lines there are; the executor's own count of units is not passed on."""

    def __init__(self, plan: Plan, lines: Mapping[str, Line], report: Reporter) -> None:
        keys = [key for *_, key in plan.expected()]
        self.total, self.done = len(keys), sum(key in lines for key in keys)
        self.report = report
        report(Started(STAGE, self.total))
        report(Advanced(STAGE, self.done, self.total))

    def took(self, line: Line) -> None:
        self.done += 1 if line.clean else -1
        self.report(Advanced(STAGE, self.done, self.total))

    def passed_on(self, event: Event) -> None:
        if getattr(event, "stage", "") != UNITS:
            self.report(event)
        else:
            self.report(Advanced(STAGE, self.done, self.total))


def _about(setup: Setup) -> dict[str, Any]:
    return {
        "problems": [{"line": line, "record": record, "text": text} for line, record, text in setup.problems],
        "left_out": [{"protocol": name, "reason": reason, "cases": n} for name, reason, n in setup.left_out],
        "not_measured": [{"label": label, "reason": reason} for label, reason in setup.unsupported],
        "apart": setup.apart,
    }


def _times(out: Path) -> dict[str, Any]:
    """When it was begun, and how often it was gone on with."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    if not (out / PLAN).is_file():
        return {"started": now, "resumed": [], "ended": ""}
    there = read_about(out)
    return {"started": str(there.get("started", now)), "resumed": [*there.get("resumed", []), now][-100:], "ended": ""}


def _ended(lines: Mapping[str, Line]) -> dict[str, Any]:
    devices = sorted({line.device for line in lines.values() if line.device})
    return {"ended": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()), "devices": devices}


def _clear(folder: Path) -> None:
    for file in folder.glob("*.bin"):
        file.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
