"""A unit of work on a model that is held: edit, ask, judge, undo; lines one by one.

1. The unedited model is asked once per case, and reads the fixed text of the perplexity once.
2. single      each entrant edits the case alone; all of them share the unedited model's answers.
   batch       one entrant edits all cases together; every case is asked under it.
   sequential  one entrant edits case after case (see benchmark.sequence); at every checkpoint all so far are asked.
3. An edit that a method refuses, or fails at, is scored as the unedited model and says why. Where an edited model's
   numbers are not finite, every success is a failure, what is no share is left out, and the alarms say "collapsed".
4. After each entrant no hook, change or prefix may be left; the digest of the weights is looked at so often that it
   costs 2 % of the time. A model that was changed takes back the lines since then and ends the run.
"""

from __future__ import annotations

import gc
import json
import logging
import platform
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from mega_core import alarms, cases
from mega_core.benchmark.plan import Answered, Line, Plan, Scored, finite, without_answers
from mega_core.benchmark.sequence import Edited, restored
from mega_core.cases import Case
from mega_core.changes import Change
from mega_core.errors import ActionableError, BadInput, DirtyModel
from mega_core.evaluation.asking import Told
from mega_core.evaluation.protocols import PROTOCOLS
from mega_core.evaluation.suite import Judged, Questions
from mega_core.events import Cancelled, Reporter, silent
from mega_core.methods import METHODS
from mega_core.models.adapter import ModelAdapter
from mega_core.models.pool import ModelPool
from mega_core.records import EditRequest, MethodRef
from mega_core.settings import Settings
from mega_core.store import Store

log = logging.getLogger(__name__)

COLLAPSED = "collapsed"
NOT_FINITE = "its numbers are not finite"
DIGEST_SHARE = 0.02
SAID = 400
"""Characters kept of an answer."""


@contextmanager
def open_worker(plan: str) -> Iterator[Worker]:
    """A worker for the plan in this JSON, with settings, store and model of its own: for other processes."""
    wanted = Plan.from_plain(json.loads(plan))
    settings = Settings.read()
    store = Store.open(settings.cache_dir / "results", int(settings.store_gb * 2**30))
    pool = ModelPool(settings)
    try:
        with pool.lease(wanted.model) as lm:
            lm.memo = store
            with Worker.on(lm, wanted) as worker:
                yield worker
    finally:
        pool.close()
        store.close()


@dataclass(frozen=True)
class _Unit:
    """Read from its JSON."""

    key: str
    labels: tuple[str, ...]
    indices: tuple[int, ...]
    cases: tuple[Case, ...]
    done: frozenset[str]
    """Keys of lines that are there already."""
    state: Path | None
    """Where a sequence keeps how far it is."""


@dataclass(frozen=True)
class _Asked:
    """A case and what the unedited model says."""

    questions: Questions
    base: Told


@dataclass(frozen=True)
class _Found:
    """What was seen of one entrant on one case."""

    scores: tuple[Scored, ...]
    answers: tuple[Answered, ...]
    refused: str = ""
    alarms: tuple[str, ...] = ()


class Worker:
    """Units to lines; see `on`."""

    def __init__(self, lm: ModelAdapter, plan: Plan, report: Reporter = silent) -> None:
        if lm.file_digest != plan.weights:
            raise BadInput(
                "model",
                f"the files of {lm.name} ({lm.file_digest[:12]}) are not the plan's ({plan.weights[:12]}).",
                "Start anew in another folder.",
            )
        self.lm = lm
        self.plan = plan
        self.report = report
        self.device = f"{lm.device.type} ({_device_name(lm.device)})"
        self._perplexity = alarms.perplexity(lm)
        self._guard = _Guard(lm)
        self._asked: dict[int, _Asked | str] = {}
        self._running: Generator[Line, None, None] | None = None

    @classmethod
    @contextmanager
    def on(cls, lm: ModelAdapter, plan: Plan, report: Reporter = silent) -> Iterator[Worker]:
        """A worker on a model that is held. `report` hears what methods say, and may stop them with Cancelled."""
        worker = cls(lm, plan, report)
        try:
            yield worker
        finally:
            worker.close()

    def __call__(self, unit: str) -> Iterator[str]:
        """The lines of a unit, each as soon as it is known."""
        plain = json.loads(unit)
        self._running = self._work(
            _Unit(
                key=plain["key"],
                labels=tuple(plain["labels"]),
                indices=tuple(plain["indices"]),
                cases=tuple(cases.from_plain(case) for case in plain["cases"]),
                done=frozenset(plain["done"]),
                state=Path(plain["state"]) if plain["state"] else None,
            )
        )
        for line in self._running:
            yield line.text()

    def close(self) -> None:
        """Undo what a unit that was stopped half way has applied."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _work(self, unit: _Unit) -> Generator[Line, None, None]:
        mode = {"single": self._single, "batch": self._batch, "sequential": self._sequential}[self.plan.mode]
        with closing(mode(unit)) as lines:
            for line in lines:
                self._guard.made(line)
                yield line
                if self.plan.mode == "single":
                    yield from self._checked()
        yield from self._checked(thoroughly=True)

    def _checked(self, thoroughly: bool = False) -> Iterator[Line]:
        """Step 4: the lines that don't count, then DirtyModel; nothing where all is well."""
        problem = self._guard.problem(thoroughly)
        if problem:
            labels = ", ".join(dict.fromkeys(line.label for line in self._guard.lines))
            for line in self._guard.lines:
                yield replace(line, clean=False, answers=())
            raise DirtyModel(f"{problem} on {self.lm.name} after: {labels}.", "Their lines since then don't count.")

    # 2. --------------------------------------------------------------------------------------------------------------

    def _single(self, unit: _Unit) -> Generator[Line, None, None]:
        (index,), (case,) = unit.indices, unit.cases
        asked = self._ask_base(index, case, keep=False)
        for label in unit.labels:
            method, start = self.plan.entrant(label).method, perf_counter()
            if isinstance(asked, str):
                yield self._line(unit, label, index, len(case.requests), left_out=asked)
                continue
            if method is None:
                yield self._line(unit, label, index, len(case.requests), self._base(asked))
                continue
            change = self._prepare(method, case.requests)
            ready = perf_counter()
            if isinstance(change, str):
                found = self._base(asked, change)
            else:
                with change.applied(self.lm):
                    signs = self._signs(change, case.requests)
                    found = self._base(asked, signs) if isinstance(signs, str) else self._under(asked, *signs)
            del change
            yield self._line(unit, label, index, len(case.requests), found, ready - start, perf_counter() - ready)

    def _batch(self, unit: _Unit) -> Generator[Line, None, None]:
        (label,), ((_, step),) = unit.labels, self.plan.checkpoints
        method, asked = self.plan.entrant(label).method, self._all(unit)
        requests = [r for index, case in zip(unit.indices, unit.cases, strict=True)
                    if not isinstance(asked[index], str) for r in case.requests]  # fmt: skip
        start = perf_counter()
        change = None if method is None else self._prepare(method, requests)
        share = (perf_counter() - start) / max(1, len(requests))
        if change is None or isinstance(change, str):
            yield from self._lines(unit, label, step, asked, None, change or "", share)
            return
        with change.applied(self.lm):
            signs = self._signs(change, requests)
            why, seen = (signs, None) if isinstance(signs, str) else ("", signs)
            yield from self._lines(unit, label, step, asked, seen, why, share)

    def _sequential(self, unit: _Unit) -> Generator[Line, None, None]:
        (label,), plan = unit.labels, self.plan
        method, asked = plan.entrant(label).method, self._all(unit)
        if method is None:
            for count, step in plan.checkpoints:
                yield from self._lines(unit, label, step, asked, None, "", 0.0, count)
            return
        with Edited(self.lm).held() as edited:
            begun = self._go_on(unit, label, edited)
            for count, step in plan.checkpoints:
                if count < begun or (count == begun and self._is_done(unit, label, count, step)):
                    continue
                while not edited.collapsed and edited.count < count:
                    index = edited.count
                    edited.add(*self._next(method, unit.cases[index], asked[index]))
                if edited.collapsed:
                    yield from self._lines(
                        unit, label, step, asked, (float("inf"), (COLLAPSED,)), "", 0.0, count, edited
                    )
                    continue
                self._keep(unit, label, edited)
                with edited.others_applied():
                    requests = [r for case in unit.cases[:count] for r in case.requests]
                    signs = self._signs(edited, requests)
                    why, seen = (signs, None) if isinstance(signs, str) else ("", signs)
                    for line in self._lines(unit, label, step, asked, seen, why, 0.0, count, edited):
                        edited.collapsed |= COLLAPSED in line.alarms
                        yield line
                if edited.collapsed:
                    self._keep(unit, label, edited)
        if unit.state is not None:
            unit.state.unlink(missing_ok=True)

    def _next(self, method: MethodRef, case: Case, asked: _Asked | str) -> tuple[Change | str, float]:
        """The next case's change, or why there is none, and its seconds."""
        start = perf_counter()
        change = asked if isinstance(asked, str) else self._prepare(method, case.requests)
        return change, perf_counter() - start

    def _keep(self, unit: _Unit, label: str, edited: Edited) -> None:
        if unit.state is not None:
            edited.save(unit.state, self.plan.sequence(label, edited.count))

    def _go_on(self, unit: _Unit, label: str, edited: Edited) -> int:
        """Take up what an earlier run kept, if its lines are all there; how many cases it had edited."""
        if unit.state is None or not unit.state.is_file():
            return 0
        kept = restored(unit.state, lambda count: self.plan.sequence(label, count))
        earlier = () if kept is None else (point for point in self.plan.checkpoints if point[0] < kept.count)
        if kept is None or not all(self._is_done(unit, label, *point) for point in earlier):
            return 0
        edited.take_up(kept)
        return edited.count

    def _is_done(self, unit: _Unit, label: str, count: int, step: int) -> bool:
        return all(self.plan.key(label, index, step) in unit.done for index in unit.indices[:count])

    # 1. and 3. -------------------------------------------------------------------------------------------------------

    def _ask_base(self, index: int, case: Case, keep: bool) -> _Asked | str:
        """The case with the unedited model's answers, or why the model can't read it."""
        if index in self._asked:
            return self._asked[index]
        try:
            questions = Questions.of(self.lm, case, self.plan.protocols)
            found: _Asked | str = _Asked(questions, self._told(questions, None, self._perplexity, ()))
        except BadInput as error:
            found = str(error)
        if keep:
            self._asked[index] = found
        return found

    def _all(self, unit: _Unit) -> list[_Asked | str]:
        return [self._ask_base(index, case, keep=True) for index, case in zip(unit.indices, unit.cases, strict=True)]

    def _told(self, questions: Questions, base: Told | None, perplexity: float, raised: tuple[str, ...]) -> Told:
        return replace(questions.ask(self.lm, base), perplexity=perplexity, raised=raised)

    def _prepare(self, method: MethodRef, requests: Sequence[EditRequest]) -> Change | str:
        """The change, or why there is none (step 3)."""
        entry = METHODS[method.name]
        try:
            return entry.prepare(self.lm, requests, entry.read(method), self.plan.seed, self.report)
        except ActionableError as error:
            return str(error)
        except Cancelled:
            raise
        except (MemoryError, torch.OutOfMemoryError):
            gc.collect()
            return "There was not enough memory for this edit."
        except Exception as error:  # noqa: BLE001 - one method's defect must not cost the others their night
            log.exception("%s failed on %r", method.name, requests[0].prompt[:80])
            return f"It failed ({type(error).__name__}: {str(error)[:200]})."

    def _signs(self, change: Any, requests: Sequence[EditRequest]) -> tuple[float, tuple[str, ...]] | str:
        """Perplexity now, and the alarms that the change raises; or why the model can't read anything now: many facts
        stated in front of every prompt leave no room for it."""
        try:
            after = alarms.perplexity(self.lm)
        except BadInput as error:
            return str(error)
        found = alarms.alarms(self.lm, change, requests, before=self._perplexity, after=after)
        return after, tuple(sign.text for sign in found if sign.raised)

    def _under(self, asked: _Asked, perplexity: float, raised: tuple[str, ...]) -> _Found:
        """A case under the change that is applied."""
        if COLLAPSED in raised:
            return self._collapsed(asked, raised)
        try:
            told = self._told(asked.questions, asked.base, perplexity, raised)
        except BadInput as error:  # a text in front of it makes a prompt too long
            return self._base(asked, str(error))
        except ActionableError:
            return self._collapsed(asked, raised)
        return _Found(*_plain(asked.questions.judge(told, asked.base)), "", raised)

    def _base(self, asked: _Asked, refused: str = "") -> _Found:
        return _Found(*_plain(asked.questions.judge(asked.base, asked.base)), refused)

    def _collapsed(self, asked: _Asked, raised: tuple[str, ...]) -> _Found:
        scores, answers = _plain(asked.questions.judge(asked.base, asked.base))
        failed = tuple((protocol, metric, worst, n) for protocol, metric, _, n in scores
                       if (worst := _worst(protocol, metric)) is not None)  # fmt: skip
        said = tuple(
            (protocol, metric, prompt, expected, "", worst, counts, group)
            for protocol, metric, prompt, expected, _, _, counts, group in answers
            if (worst := _worst(protocol, metric)) is not None
        )
        return _Found(failed, said, NOT_FINITE, (COLLAPSED, *(text for text in raised if text != COLLAPSED)))

    def _lines(
        self,
        unit: _Unit,
        label: str,
        step: int,
        asked: Sequence[_Asked | str],
        signs: tuple[float, tuple[str, ...]] | None,
        refused: str,
        seconds: float,
        count: int | None = None,
        edited: Edited | None = None,
    ) -> Iterator[Line]:
        """Every case so far at one step; `signs` None: as the unedited model."""
        for index, one in zip(unit.indices[:count], asked, strict=False):
            if self.plan.key(label, index, step) in unit.done:
                continue
            start = perf_counter()
            if isinstance(one, str):
                yield self._line(unit, label, index, step, left_out=one)
                continue
            found = self._base(one, refused) if signs is None else self._under(one, *signs)
            own = seconds * self.plan.edits[index]
            if edited is not None and index < edited.count:
                own = edited.seconds[index]
                found = replace(found, refused=found.refused or edited.refused[index])
            yield self._line(unit, label, index, step, found, own, perf_counter() - start)

    def _line(
        self,
        unit: _Unit,
        label: str,
        index: int,
        step: int,
        found: _Found = _Found((), ()),  # noqa: B008 - a constant
        seconds: float = 0.0,
        ask_seconds: float = 0.0,
        left_out: str = "",
    ) -> Line:
        line = Line(
            key=self.plan.key(label, index, step),
            label=label,
            case=self.plan.ids[index],
            mode=self.plan.mode,
            step=step,
            of=unit.key,
            seconds=round(seconds, 6),
            ask_seconds=round(ask_seconds, 6),
            refused=found.refused,
            left_out=left_out,
            alarms=found.alarms,
            device=self.device,
            scores=found.scores,
            answers=found.answers,
        )
        return line if step == self.plan.steps_of(index)[-1] else without_answers(line)


# Inside --------------------------------------------------------------------------------------------------------------


class _Guard:
    """Whether the model is as it was (step 4)."""

    def __init__(self, lm: ModelAdapter) -> None:
        start = perf_counter()
        self.lm = lm
        self.whole = lm.live_digest()
        self.cost = perf_counter() - start
        self.looked = perf_counter()
        self.lines: list[Line] = []
        """Since the last look at the weights."""

    def made(self, line: Line) -> None:
        """Remember a line until the weights are looked at."""
        self.lines.append(without_answers(line))

    def problem(self, thoroughly: bool) -> str:
        """In words, "" where there is none."""
        lm = self.lm
        if lm.hook_count():
            return f"{lm.hook_count()} hooks were left"
        if lm.changes or lm.prefix is not None or lm.readers:
            return "a change was left"
        if thoroughly or perf_counter() - self.looked > self.cost / DIGEST_SHARE:
            if lm.live_digest() != self.whole:
                return "changed weights were found"
            self.looked = perf_counter()
            self.lines.clear()
        return ""


def _plain(judged: Sequence[Judged]) -> tuple[tuple[Scored, ...], tuple[Answered, ...]]:
    scores = tuple((one.protocol, s.metric, finite(s.value), s.n) for one in judged for s in one.scores)
    answers = tuple(
        (one.protocol, row.metric, row.prompt, row.expected[:SAID], row.said[:SAID], finite(row.value),
         bool(row.counts), row.group)
        for one in judged for row in one.rows
    )  # fmt: skip
    return scores, answers


def _worst(protocol: str, metric: str) -> float | None:
    """The value of a failure; None for what is no share."""
    found = PROTOCOLS[protocol].metric(metric)
    if found.unit != "share":
        return None
    return 0.0 if found.better == "higher" else 1.0


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
