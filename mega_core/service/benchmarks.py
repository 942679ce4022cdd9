"""Benchmarks: planned, measured here or in the background, and read again."""

from __future__ import annotations

import json
import logging
import math
import platform
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mega_core import __version__, folders
from mega_core import benchmark as bench
from mega_core.cases import Case
from mega_core.datasets import FORMATS, Dataset
from mega_core.datasets import load as load_dataset
from mega_core.datasets import read as read_dataset
from mega_core.errors import ActionableError, BadInput, Busy, StoreError, UnknownName, UnsupportedMethod
from mega_core.events import Cancelled, Event, Reporter, silent
from mega_core.methods.base import METHODS, Method
from mega_core.records import Inspection
from mega_core.service import benchmark_tables
from mega_core.service.benchmark_tables import Measure, Scoring, Tables

if TYPE_CHECKING:
    import pandas as pd

    from mega_core.benchmark.run import Glance
    from mega_core.benchmark.work import Worker
    from mega_core.executors import Executor
    from mega_core.service.core import Core
    from mega_core.settings import ModelEntry

log = logging.getLogger(__name__)

BENCHMARKS = "benchmarks"
"""Owner of what runs in the background for everybody."""
LET_PASS = 0.6
"""Seconds between two units of a benchmark while others ask: longer than a waiting job takes to notice."""
MAX_UPLOAD = 5 * 2**20
"""Bytes of a dataset that a person may bring through the browser."""
KEPT_UPLOADS = 50
FILES = ("report.html", "plan.json")
"""What file() hands out as it stands."""
Setup = bench.Setup
"""What plan() gives and start() takes."""
NAME, UPLOAD = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{64}")
PACE, FAILURE = "pace.json", "failure.json"


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
    small: bool = False
    """Whether its model is a small one that ships with the project."""
    eta_seconds: float | None = None
    """Until it is done, by its pace since it was started; None while that can't be said."""

    @property
    def live(self) -> bool:
        """It waits or runs."""
        return self.state in ("queued", "running")


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a benchmark would measure, before it is started."""

    cases: int
    edits: int
    methods: tuple[str, ...]
    """Labels, the unedited model among them."""
    protocols: tuple[str, ...]
    measurements: int
    left_out: tuple[tuple[str, str, int], ...]
    """Protocol, reason, how many cases."""
    unsupported: tuple[tuple[str, str], ...]
    """Label and reason."""
    problems: tuple[tuple[int, str, str], ...]
    """Line, record and reason of each record that could not be used."""
    apart: int
    """Cases passed over because another one asks about their subjects."""
    seconds: float | None
    """How long about, for the methods with an estimate; None when there is none."""
    unknown: tuple[str, ...]
    """Labels without an estimate."""
    known_as: str
    """Name of the same benchmark in all(), if it is there; else empty."""


class Benchmarks:
    """Benchmark runs of this machine."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._sweeps: dict[str, tuple[str, int]] = {}
        """Name -> its job, and how many measurements there were when it was started."""
        self._glances: dict[str, tuple[tuple[tuple[int, int], ...], Glance]] = {}
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
        new = not folder.exists()
        keep_setup(setup, folder)
        done = self._glance(folder).done
        try:
            job = self._core.start(
                lambda report: self._sweep(setup, folder, report),
                owner=BENCHMARKS,
                key=f"benchmark:{name}",
                lane=f"benchmark of {setup.plan.model.name}",  # its own: it leases the model unit by unit
                method="benchmark",
                kind="benchmark",
                timeout_seconds=math.inf,
            )
        except Busy as error:
            if new:
                shutil.rmtree(folder, ignore_errors=True)
            raise Busy(
                "One benchmark runs and another one waits: there is no room for a third.",
                "Wait for one of them, or stop it.",
            ) from error
        with self._lock:
            self._sweeps.setdefault(name, (job, done))
            if self._sweeps[name][0] != job:
                self._sweeps[name] = (job, done)
        return name

    def resume(self, name: str) -> str:
        """Go on with one that was stopped. Raises BadInput when there is none of this name, or it is damaged."""
        from mega_core.benchmark.run import kept_setup

        return self.start(kept_setup(self._folder_of(name)))

    def stop(self, name: str) -> None:
        """Stop it soon; what is measured stays. Harmless on one that doesn't run."""
        with self._lock:
            sweep = self._sweeps.get(name)
        if sweep is not None:
            self._core.jobs.cancel(sweep[0], BENCHMARKS)

    def all(self) -> tuple[Sweep, ...]:
        """Those started here, the newest first: how far each is. Damaged ones are passed over."""
        found = []
        for folder in self._folder.iterdir() if self._folder.is_dir() else ():
            if not NAME.fullmatch(folder.name):
                continue
            try:
                found.append(self._look(folder))
            except BadInput:
                continue
        return tuple(sorted(found, key=lambda one: (one.started or "9", one.name), reverse=True))

    def of(self, name: str) -> bench.Results:
        """What there is of one of all(). Raises BadInput when there is none of this name."""
        return bench.Results.load(self._folder_of(name))

    # What a page shows -----------------------------------------------------------------------------------------------

    def scorings(self) -> tuple[Scoring, ...]:
        """Every protocol."""
        return benchmark_tables.scorings()

    def formats(self) -> tuple[tuple[str, str], ...]:
        """(name, title) of every format that an uploaded dataset may have."""
        return tuple((one.name, one.title) for one in FORMATS if one.name != "builtin")

    def upload(self, data: bytes, name: str, format: str = "auto") -> tuple[str, Dataset]:
        """Keep a dataset that a person brought; its id, for uploaded(), and what was read.

        Raises BadInput on what can't be read, or is larger than MAX_UPLOAD, StoreError when the disk refuses.
        """
        if len(data) > MAX_UPLOAD:
            raise BadInput("dataset", f"is larger than {MAX_UPLOAD // 2**20} MB.", "Split the file.")
        found = read_dataset(data, name, format)
        mark = sha256(data).hexdigest()
        try:
            self._uploads.mkdir(parents=True, exist_ok=True)
            folders.write_file(self._uploads / f"{mark}.json", data)
            kept = sorted(self._uploads.glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
            for old in kept[KEPT_UPLOADS:]:
                old.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError("The file could not be kept.", "Free some space, then choose it again.") from error
        return mark, found

    def uploaded(self, mark: str, name: str, format: str = "auto") -> Dataset:
        """A dataset that was brought earlier. Raises BadInput when it is not there any more."""
        file = self._uploads / f"{mark}.json"
        if not UPLOAD.fullmatch(mark) or not file.is_file():
            raise BadInput("dataset", "the uploaded file is not here any more.", "Choose it again.")
        return read_dataset(file.read_bytes(), name, format)

    def outlook(self, setup: bench.Setup, seconds: Mapping[str, float | None]) -> Outlook:
        """What a benchmark would measure. `seconds` has a method's time for a question, where none was measured."""
        plan, measured = setup.plan, self._paces(setup.plan.model.name)
        asked = sum(len(plan.steps_of(index)) for index in range(len(plan.ids)))
        total, unknown = 0.0, []
        for one in plan.entrants:
            pace = measured.get(one.label)
            if pace is None and one.method is not None:
                known = seconds.get(one.method.name)
                pace = None if known is None else (known, 0.0)
            if pace is not None:
                total += len(plan.ids) * pace[0] + asked * pace[1]
            elif one.method is not None:
                unknown.append(one.label)
        name = plan.digest[:32]
        return Outlook(
            cases=len(plan.ids),
            edits=sum(plan.edits),
            methods=tuple(one.label for one in plan.entrants),
            protocols=plan.protocols,
            measurements=asked * len(plan.entrants),
            left_out=setup.left_out,
            unsupported=setup.unsupported,
            problems=setup.problems,
            apart=setup.apart,
            seconds=total if len(unknown) < len(plan.entrants) - 1 else None,
            unknown=tuple(unknown),
            known_as=name if (self._folder / name).is_dir() else "",
        )

    def sweep(self, name: str) -> Sweep:
        """One of all(). Raises BadInput when there is none of this name, or it is damaged."""
        return self._look(self._folder_of(name))

    def tables(self, name: str) -> Tables:
        """The numbers there are of one of all(). Raises BadInput."""
        folder = self._folder_of(name)
        if not (folder / bench.PLAN).is_file():
            from mega_core.benchmark.run import kept_setup

            return benchmark_tables.tables(name, bench.Results.of(kept_setup(folder).plan, {}, {}, folder))
        return benchmark_tables.tables(name, bench.Results.load(folder))

    def behind(self, name: str, measure: Measure, method: str) -> pd.DataFrame:
        """The answers that a number of tables() is made of (columns: benchmark_tables.BEHIND). Raises BadInput."""
        return benchmark_tables.behind(self._folder_of(name), measure, method)

    def answers(self, name: str) -> pd.DataFrame:
        """All answers. Raises BadInput."""
        return benchmark_tables.answers(self._folder_of(name))

    def case(self, name: str, case: str) -> Case:
        """One case of a benchmark. Raises BadInput."""
        from mega_core.benchmark.run import kept_setup

        for one in kept_setup(self._folder_of(name)).cases:
            if one.id == case:
                return one
        raise BadInput("case", f"there is no case {case[:40]!r} in this benchmark.", "Choose one of the table.")

    def question(self, name: str, method: str, case: str, edit: int = 0) -> Inspection:
        """One edit of a case as a question of its own, by an entrant; the unedited model stands for the first method.

        Raises BadInput.
        """
        found, plan = self.case(name, case), self.sweep(name).plan
        edited = [one for one in plan.entrants if one.method is not None]
        chosen = next((one for one in edited if one.label == method), edited[0])
        if chosen.method is None or not 0 <= edit < len(found.requests):
            raise BadInput("edit", "there is no such edit in this case.", "Choose one of the list.")
        return Inspection(plan.model, chosen.method, (found.requests[edit],), seed=plan.seed)

    def file(self, name: str, file: str) -> bytes:
        """A file of FILES. Raises BadInput while there is none yet, UnknownName for another name."""
        if file not in FILES:
            raise UnknownName("file", file, FILES)
        try:
            return (self._folder_of(name) / file).read_bytes()
        except OSError as error:
            raise BadInput("file", f"{file} is not there yet.", "It is written when the benchmark ends.") from error

    def files(self, name: str) -> tuple[str, ...]:
        """Those of FILES that are there. Raises BadInput."""
        return tuple(file for file in FILES if (self._folder_of(name) / file).is_file())

    # Inside ----------------------------------------------------------------------------------------------------------

    def _look(self, folder: Path) -> Sweep:
        """How far a benchmark is. Raises BadInput when it is damaged or there is none."""
        seen = self._glance(folder)
        with self._lock:
            sweep = self._sweeps.get(folder.name)
        view = None
        try:
            view = None if sweep is None else self._core.jobs.snapshot(sweep[0], BENCHMARKS)
        except ActionableError:  # over and forgotten
            with self._lock:
                self._sweeps.pop(folder.name, None)
        state, error, eta = "done" if seen.done >= seen.total else "stopped", "", None
        if view is not None and not view.over:
            state = view.state
            made = seen.done - sweep[1] if sweep is not None else 0
            eta = view.seconds / made * (seen.total - seen.done) if made > 0 else None
        elif view is not None and view.error is not None:
            state, error = "failed", f"{view.error.what} {view.error.next_step}".strip()
        elif told := _failure(folder):  # lines that don't count are lines too: what is done says nothing then
            state, error = "failed", told
        entry = self._core.settings.models.get(seen.plan.model.name)
        return Sweep(
            folder.name, folder, seen.plan, seen.done, seen.total, state, seen.started, error,
            entry is not None and entry.embedded, eta,
        )  # fmt: skip

    def _glance(self, folder: Path) -> Glance:
        """How far a run is; looked at again when one of its files has changed."""
        from mega_core.benchmark.journal import NAME as LINES
        from mega_core.benchmark.run import SETUP, glance

        seen = tuple(_stamp(folder / name) for name in (bench.PLAN, LINES, SETUP))
        with self._lock:
            stamp, found = self._glances.get(folder.name, (None, None))
        if found is None or stamp != seen:
            found = glance(folder)
            with self._lock:
                self._glances[folder.name] = (seen, found)
        return found

    def _paces(self, model: str) -> dict[str, tuple[float, float]]:
        """Label -> seconds of preparing and of asking a case, as earlier benchmarks of this model took here."""
        found: dict[str, tuple[float, float]] = {}
        for file in self._folder.glob(f"*/{PACE}") if self._folder.is_dir() else ():
            try:
                plain = json.loads(file.read_bytes())
                if plain["model"] == model:
                    found |= {str(label): (float(own), float(asked)) for label, own, asked in plain["paces"]}
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return found

    @property
    def _uploads(self) -> Path:
        return self._core.settings.cache_dir / "uploads"

    @property
    def _folder(self) -> Path:
        return self._core.settings.cache_dir / "benchmarks"

    def _folder_of(self, name: str) -> Path:
        if not NAME.fullmatch(name):
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
        (folder / FAILURE).unlink(missing_ok=True)
        try:
            results = self._measure(setup, folder, opened, Local(), there, (), tell)
        except Cancelled:
            raise
        except Exception as error:  # whoever comes back next morning has to find out why
            told = str(error) if isinstance(error, ActionableError) else f"It failed ({type(error).__name__})."
            _keep(folder / FAILURE, {"error": told})
            raise
        paces = results.timing[["method", "seconds", "ask_seconds"]].itertuples(index=False, name=None)
        _keep(folder / PACE, {"model": plan.model.name, "paces": [list(one) for one in paces]})
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


def _keep(file: Path, plain: Mapping[str, Any]) -> None:
    """A small file of our own; a disk that refuses costs nobody the benchmark."""
    try:
        folders.write_file(file, json.dumps(plain).encode())
    except OSError as error:
        log.warning("%s could not be written: %s", file, error)


def _failure(folder: Path) -> str:
    """Why the benchmark of this folder failed the last time, or an empty text."""
    try:
        return str(json.loads((folder / FAILURE).read_bytes())["error"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _stamp(file: Path) -> tuple[int, int]:
    """When a file was changed last, and its size."""
    try:
        found = file.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


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
