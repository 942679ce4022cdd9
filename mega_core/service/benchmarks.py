"""Benchmarks: planned, measured here or in the background, and read again."""

from __future__ import annotations

import logging
import math
import platform
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mega_core import __version__, folders
from mega_core import benchmark as bench
from mega_core.datasets import Dataset
from mega_core.datasets import load as load_dataset
from mega_core.errors import ActionableError, BadInput, UnsupportedMethod
from mega_core.events import Event, Reporter, silent
from mega_core.methods.base import METHODS, Method

if TYPE_CHECKING:
    from mega_core.benchmark.work import Worker
    from mega_core.executors import Executor
    from mega_core.service.core import Core
    from mega_core.settings import ModelEntry

log = logging.getLogger(__name__)

BENCHMARKS = "benchmarks"
"""Owner of what runs in the background for everybody."""
LET_PASS = 0.6
"""Seconds between two units of a benchmark while others ask: longer than a waiting job takes to notice."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """A benchmark that was started in the background."""

    name: str
    folder: Path
    plan: bench.Plan
    done: int
    """Measurements there are, of `total`."""
    total: int
    state: str
    """queued | running | done | stopped | failed."""
    started: str
    """When, ISO 8601."""
    error: str = ""


class Benchmarks:
    """Benchmark runs of this machine."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._sweeps: dict[str, str] = {}
        self._lock = threading.Lock()

    def plan(
        self,
        model: str,
        methods: Sequence[str],
        dataset: str | Path | Dataset,
        *,
        format: str = "auto",
        limit: int | None = None,
        protocols: Sequence[str] = (),
        mode: str = "single",
        every: int = 0,
        seed: int = 0,
        params: Mapping[str, Mapping[str, object]] | None = None,
        control: bool = False,
        apart: bool = False,
    ) -> bench.Setup:
        """What a benchmark would measure, and what it leaves out; loads no model.

        `methods` ("all",): every one, and those that can't edit this model are noted. `control` adds each method's own
        controls. Raises UnknownName, BadInput, UnsupportedMethod for a method that was named, ModelUnavailable.
        """
        entry = self._core.settings.model(model)
        self._core.asked(model, next(iter(METHODS)).name, (), seed)  # refuses a seed that is none
        everyone = tuple(methods) == ("all",)
        entrants: list[bench.Entrant] = []
        unsupported: list[tuple[str, str]] = []
        for name in METHODS.names() if everyone else methods:
            method = METHODS[name]
            own = self._entrants(method, entry, (params or {}).get(name, {}), control)
            if reason := self._core.unsupported(method, entry):
                if not everyone:
                    raise UnsupportedMethod(
                        f"{method.title} can't edit {entry.name}: {reason}", "Choose another method or model."
                    )
                unsupported += [(one.label, reason) for one in own]
            else:
                entrants += own
        if not entrants:
            raise BadInput("methods", "names none that can edit this model.", "For example: rome,memit, or all.")
        if isinstance(dataset, Dataset):
            data = dataset
        else:
            builtin = str(dataset).split(":")[0] == "builtin"
            data = load_dataset(
                dataset, format, limit=_read(limit, apart) if builtin else None, hub_cache=self._core.settings.hub_cache
            )
        return bench.set_up(
            entry.ref(),
            self._core.weights(entry),
            entrants,
            data.name,
            data.source,
            data.cases,
            protocols=protocols,
            mode=mode,
            every=every,
            seed=seed,
            limit=limit,
            apart=apart,
            problems=[(one.line, one.record, one.text) for one in data.problems],
            unsupported=unsupported,
        )

    def run(
        self,
        setup: bench.Setup,
        out: Path,
        *,
        executor: Executor | None = None,
        resume: bool = False,
        command: Sequence[str] = (),
        report: Reporter = silent,
    ) -> bench.Results:
        """Measure what is missing in the folder `out`, in this thread or where the executor does it; tables and page.

        Raises BadInput when the folder holds something else, or the same without `resume`; else as the work does, and
        then what is measured is written all the same.
        """
        from mega_core.executors import Local

        executor = executor or Local()

        @contextmanager
        def here(plan: str) -> Iterator[Worker]:
            with self._core.held(setup.plan.model, report) as lm:
                from mega_core.benchmark.work import Worker

                with Worker.on(lm, setup.plan) as worker:
                    yield worker

        opened = here if executor == Local() else _open_worker()
        return self._measure(setup, out, opened, executor, resume, command, report)

    def _measure(
        self, setup: bench.Setup, out: Path, opened: Any, executor: Executor, resume: bool,
        command: Sequence[str], report: Reporter,
    ) -> bench.Results:  # fmt: skip
        entry = self._core.settings.model(setup.plan.model.name)
        about = {
            "command": list(command),
            "small_model": entry.embedded,
            "executor": executor.name,
            "versions": _versions(),
        }
        return bench.run(
            setup, out, opened, executor=executor, resume=resume, about=about, report=report, write=_write_page
        )

    def start(self, setup: bench.Setup) -> str:
        """Measure in the background, in the cache; its name, for all(). One that is there is gone on with.

        It has no time limit, outlasts the browser, and lets other questions have the model between two units of work.
        After a restart `resume` goes on. Raises Busy while another one runs and one waits.
        """
        from mega_core.benchmark.run import keep_setup

        name = setup.plan.digest[:32]
        folder = self._folder / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        keep_setup(setup, folder)
        job = self._core.start(
            lambda report: self._sweep(setup, folder, report),
            owner=BENCHMARKS,
            key=f"benchmark:{name}",
            lane=f"benchmark of {setup.plan.model.name}",  # its own: it leases the model unit by unit
            method="benchmark",
            kind="benchmark",
            timeout_seconds=math.inf,
        )
        with self._lock:
            self._sweeps[name] = job
        return name

    def resume(self, name: str) -> str:
        """Go on with one that was stopped. Raises BadInput when there is none of this name, or it is damaged."""
        from mega_core.benchmark.run import kept_setup

        return self.start(kept_setup(self._folder_of(name)))

    def stop(self, name: str) -> None:
        """Stop it soon; what is measured stays. Harmless on one that doesn't run."""
        with self._lock:
            job = self._sweeps.get(name)
        if job is not None:
            self._core.jobs.cancel(job, BENCHMARKS)

    def all(self) -> tuple[Sweep, ...]:
        """Those started here, the newest first: how far each is. Damaged ones are passed over."""
        from mega_core.benchmark.run import glance

        found = []
        for folder in self._folder.iterdir() if self._folder.is_dir() else ():
            try:
                seen = glance(folder)
            except BadInput:
                continue
            with self._lock:
                job = self._sweeps.get(folder.name)
            view = None
            try:
                view = None if job is None else self._core.jobs.snapshot(job, BENCHMARKS)
            except ActionableError:  # over and forgotten
                with self._lock:
                    self._sweeps.pop(folder.name, None)
            state = "done" if seen.done >= seen.total else "stopped"
            error = ""
            if view is not None and not view.over:
                state = view.state
            elif view is not None and view.error is not None:
                state, error = "failed", f"{view.error.what} {view.error.next_step}".strip()
            found.append(Sweep(folder.name, folder, seen.plan, seen.done, seen.total, state, seen.started, error))
        return tuple(sorted(found, key=lambda one: one.started, reverse=True))

    def of(self, name: str) -> bench.Results:
        """What there is of one of all(). Raises BadInput when there is none of this name."""
        return bench.Results.load(self._folder_of(name))

    @property
    def _folder(self) -> Path:
        return self._core.settings.cache_dir / "benchmarks"

    def _folder_of(self, name: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{32}", name):
            raise BadInput("benchmark", f"there is none named {name[:40]!r}.", "Choose one of the list.")
        return self._folder / name

    def _sweep(self, setup: bench.Setup, folder: Path, report: Reporter) -> Path:
        """A benchmark in the background: the model is leased unit by unit."""
        from mega_core.benchmark.run import STAGE
        from mega_core.executors import Local

        plan = setup.plan

        @contextmanager
        def opened(_: str) -> Iterator[Callable[[str], Iterator[str]]]:
            running: list[Any] = []

            def work(unit: str) -> Iterator[str]:
                if self._core.jobs.load()[0] > 1:
                    time.sleep(LET_PASS)  # somebody else's turn
                with self._core.held(plan.model, silent) as lm:
                    from mega_core.benchmark.work import Worker

                    with Worker.on(lm, plan, tell) as worker:
                        yield from worker(unit)

            def watched(unit: str) -> Iterator[str]:
                running.append(work(unit))
                yield from running[-1]

            try:
                yield watched
            finally:
                for one in running:
                    one.close()

        last: list[Event] = []

        def tell(event: Event) -> None:
            if getattr(event, "stage", "") == STAGE:
                last[:] = [event]
            if last:
                report(last[0])  # also while a method is at work: that is where a stop is noticed

        there = (folder / bench.PLAN).is_file()
        self._measure(setup, folder, opened, Local(), there, (), tell)
        return folder

    def results(self, folder: Path) -> bench.Results:
        """What a folder of results holds, finished or not. Raises BadInput when it is none."""
        return bench.Results.load(folder)

    def _entrants(
        self, method: Method[Any], entry: ModelEntry, given: Mapping[str, object], control: bool
    ) -> list[bench.Entrant]:
        """A method as it takes part in a benchmark: with what was given, and, if wanted, with each of its controls."""
        own = entry.defaults.get(method.name)
        found: list[bench.Entrant] = []
        for extra in ({}, *(bench.controls(method) if control else ())):
            asked = {**given, **extra}
            label = " ".join([method.name, *(f"{name}={value}" for name, value in asked.items())])
            one = bench.Entrant(label, method.ref(asked, own))
            if all(one.method != other.method for other in found):
                found.append(one)
        return found


def _open_worker() -> Any:
    """What other processes import to work on a benchmark."""
    from mega_core.benchmark.work import open_worker

    return open_worker


def _versions() -> dict[str, str]:
    """Of what makes the numbers."""
    names = ("torch", "transformers", "tokenizers", "numpy", "pandas")
    return {"edit-anatomy": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}


def _read(limit: int | None, apart: bool) -> int | None:
    """How many built-in cases are looked at; some of them may be passed over."""
    return limit if limit is None or limit < 1 or not apart else min(4 * limit, 1000)


def _write_page(results: bench.Results) -> None:
    """report.html; what can't be drawn costs nobody the numbers."""
    from mega_core import benchmark_report

    if results.folder is None:
        return
    about = results.about
    left_out: list[tuple[str, ...]] = [(one["label"], one["reason"]) for one in about.get("not_measured", ())]
    left_out += [(one["protocol"], f"{one['cases']} cases", one["reason"]) for one in about.get("left_out", ())]
    left_out += [(label or "every method", f"case {case}", why) for label, case, why in results.refusals]
    problems = [(f"line {one['line']}", one["record"], one["text"]) for one in about.get("problems", ())]
    shown = {
        "date": about.get("started", ""),
        "command": about.get("command", ""),
        "small_model": bool(about.get("small_model")),
        "versions": about.get("versions", {}),
        "device": ", ".join(about.get("devices", ())),
        "executor": about.get("executor", ""),
    }
    try:
        text = benchmark_report.html(
            results.plan, results.summary, results.timing, results.retention, results.answers, left_out, problems,
            shown, alarms=results.alarms,
        )  # fmt: skip
        folders.write_file(results.folder / "report.html", text.encode())
    except Exception as error:  # noqa: BLE001 - see above
        log.exception("The page of %s could not be made: %s", results.folder, error)
