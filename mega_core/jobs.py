"""Long work, one question at a time per model: a bounded queue, progress, cancel, timeouts.

1. `submit` puts a question in the lane of its model; a lane is one worker thread, so a model never has two users.
2. The same digest asked twice is worked once: the second asker attaches to the first one's work with an own job.
3. The worker calls `run(question, report)`. Each event that `run` reports updates the progress, and is the point where
   a cancelled or overdue job stops: the reporter raises, and the exception leaves through every context manager.
4. `snapshot` gives a frozen view for the page to draw; finished jobs are kept for a while, then forgotten.

A cancel or timeout shows at once, also while `run` is between two events: the job is over for the person, and the lane
takes its next question when the thread has come back. Nothing here knows models or torch.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from mega_core.errors import ActionableError, Busy, TimedOut, UnknownName
from mega_core.events import Advanced, Cancelled, Event, Finished, Note, Reporter, Started

log = logging.getLogger(__name__)

Q = TypeVar("Q")
R = TypeVar("R")

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
MAX_STAGES, MAX_NOTES = 64, 20
STUCK_SECONDS = 10.0
"""A stopped question that has not come back after this long blocks its lane: better say so than let others queue."""


class UnknownJob(UnknownName):
    """No job of this id, or none of this owner: the two are not told apart."""

    def __init__(self, job_id: str) -> None:
        ActionableError.__init__(
            self,
            f"There is no job {job_id[:80]!r}.",
            "It may be over and forgotten, or from before the app was started anew: ask the question again.",
        )
        self.kind, self.name = "job", job_id


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may wait, run and be remembered."""

    queued: int = 8
    """Questions waiting, over all models."""
    per_owner_running: int = 1
    per_owner_queued: int = 1
    timeout_seconds: float = 900.0
    """For one question, counted from its start."""
    kept: int = 64
    """Finished jobs remembered, with their results."""
    kept_seconds: float = 1800.0
    idle_seconds: float = 60.0
    """After this long without work a lane's thread ends; the next question starts another."""
    attached: int = 64
    """Jobs that may share one piece of work."""


@dataclass(frozen=True, slots=True)
class StageView:
    """One stage of the work so far."""

    name: str
    seconds: float
    done: int
    total: int | None
    """Steps, None when unknown."""
    finished: bool


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed, in words for the person."""

    what: str
    next_step: str
    error_id: str
    """What to tell the operator, who finds it in the log; empty for errors the person can mend."""
    code: str


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as it was at one moment."""

    id: str
    digest: str
    model: str
    method: str
    state: str
    """queued | running | done | failed | cancelled."""
    ahead: int
    """How many questions come first; 0 once running."""
    stages: tuple[StageView, ...]
    notes: tuple[str, ...]
    fraction: float | None
    """0 to 1 and never falling; None while nothing like it has been run before."""
    eta_seconds: float | None
    """Until the answer; None while that can't be said."""
    seconds: float
    """Since the start of the work; 0 while queued."""
    error: JobError | None = None
    kind: str = ""
    """What sort of work, for whoever shows it: edit, ask, compare ..."""

    @property
    def over(self) -> bool:
        """Nothing will change any more."""
        return self.state in (DONE, FAILED, CANCELLED)


# What is going on (all of it guarded by Jobs._changed) ------------------------------------------------------------


@dataclass(slots=True)
class _Stage:
    name: str
    total: int | None
    started: float
    done: int = 0
    ended: float | None = None


@dataclass(slots=True, eq=False)
class _Work(Generic[Q]):
    """One question being answered, for one or several jobs."""

    question: Q
    digest: str
    model: str
    method: str
    kind: str = ""
    jobs: list[_Job] = field(default_factory=list)
    started: float | None = None
    stages: OrderedDict[str, _Stage] = field(default_factory=OrderedDict)
    notes: list[str] = field(default_factory=list)
    fraction: float = 0.0
    stop: bool = False
    stopped: float = 0.0
    timed_out: bool = False
    seconds: float | None = None
    """Its own limit; None: that of all questions."""


@dataclass(slots=True, eq=False)
class _Job:
    """One person's handle on a piece of work."""

    id: str
    owner: str
    work: _Work | None
    view: JobView | None = None
    """Set when over; the work is then let go."""
    result: object = None
    ended: float = 0.0


@dataclass(slots=True)
class _Pace:
    """Moving means of how long a method takes on a model, in seconds."""

    total: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def learn(self, total: float, stages: dict[str, float]) -> None:
        self.count += 1
        weight = max(0.3, 1 / self.count)  # the first few count alike, later ones forget slowly
        self.total += weight * (total - self.total)
        seen = {name: self.stages.get(name, seconds) for name, seconds in stages.items()}
        self.stages = {name: seen[name] + weight * (seconds - seen[name]) for name, seconds in stages.items()}


class Jobs(Generic[Q, R]):
    """Answers questions in the background. Safe to use from many threads."""

    def __init__(
        self,
        run: Callable[[Q, Reporter], R],
        limits: Limits | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self.limits = limits or Limits()
        self._clock = clock
        self._changed = threading.Condition()
        self._lanes: dict[str, deque[_Work[Q]]] = {}
        self._running: dict[str, _Work[Q]] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._active: dict[str, _Work[Q]] = {}
        self._jobs: dict[str, _Job] = {}
        self._over: OrderedDict[str, _Job] = OrderedDict()
        self._paces: OrderedDict[tuple[str, str], _Pace] = OrderedDict()
        self._closed = False

    # For the service ----------------------------------------------------------------------------------------------

    def submit(
        self,
        question: Q,
        *,
        owner: str,
        digest: str,
        model: str,
        method: str,
        kind: str = "",
        timeout_seconds: float | None = None,
    ) -> str:
        """Queue a question and return the id of the job, 32 random hex characters that only its owner should know.

        `timeout_seconds` is a limit of its own; None takes that of all questions, math.inf sets none.
        Raises Busy when the queue is full, when this owner has as much going on as one person may, or after close().
        The same owner asking the same digest again gets the job they have.
        """
        with self._changed:
            self._settle()
            if self._closed:
                raise Busy("The app is shutting down.", "Ask again when it is back.")
            work = self._active.get(digest)
            if work is not None:
                mine = next((job for job in work.jobs if job.owner == owner), None)
                if mine is not None:
                    return mine.id
            self._check_owner(owner)
            if work is None:
                work = self._enqueue(question, digest, model, method, kind)
                work.seconds = timeout_seconds
            elif len(work.jobs) >= self.limits.attached:
                raise Busy("Very many people are waiting for this same answer.", "Ask again when it is there.")
            job = _Job(secrets.token_hex(16), owner, work)
            work.jobs.append(job)
            self._jobs[job.id] = job
            self._changed.notify_all()
            return job.id

    def snapshot(self, job_id: str, owner: str | None = None) -> JobView:
        """The job now. Raises UnknownName for an id that isn't there, or isn't this owner's when one is given."""
        with self._changed:
            self._settle()
            job = self._find(job_id, owner)
            return job.view or self._view(job)

    def result(self, job_id: str, owner: str | None = None) -> R:
        """What `run` returned. Raises Busy while the job isn't over and ActionableError when it brought no result."""
        with self._changed:
            self._settle()
            job = self._find(job_id, owner)
            view = job.view or self._view(job)
            if view.error is not None:
                raise ActionableError(view.error.what, view.error.next_step)
            if view.state == CANCELLED:
                raise ActionableError("This job was cancelled.", "Ask again to get the answer.")
            if view.state != DONE:
                raise Busy("The answer isn't there yet.", "Wait for the job to finish.")
            return job.result  # type: ignore[return-value]

    def cancel(self, job_id: str, owner: str | None = None) -> JobView:
        """End a job. Its work stops too, unless others wait for the same answer. Harmless on a job that is over."""
        with self._changed:
            self._settle()
            job = self._find(job_id, owner)
            if job.view is None:
                self._end(job, CANCELLED)
            return job.view or self._view(job)

    def cancel_owner(self, owner: str) -> int:
        """End every job of a person who has left; returns how many there were."""
        with self._changed:
            mine = [job for job in self._jobs.values() if job.owner == owner and job.view is None]
            for job in mine:
                self._end(job, CANCELLED)
            return len(mine)

    def of_owner(self, owner: str) -> list[JobView]:
        """The jobs of a person that are remembered, oldest first."""
        with self._changed:
            self._settle()
            return [job.view or self._view(job) for job in self._jobs.values() if job.owner == owner]

    def wait(self, job_id: str, timeout: float | None = None) -> JobView:
        """Block until the job is over or the time is up, and return the view then. For scripts, not for pages."""
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while True:
                self._settle()
                job = self._find(job_id, None)
                left = None if until is None else until - time.monotonic()
                if job.view is not None or (left is not None and left <= 0):
                    return job.view or self._view(job)
                self._changed.wait(min(0.5, left) if left is not None else 0.5)

    def load(self) -> tuple[int, int]:
        """How many questions run and how many wait, for the status page."""
        with self._changed:
            return len(self._running), sum(map(len, self._lanes.values()))

    def close(self, timeout: float = 10.0) -> bool:
        """Cancel everything and stop the workers. False when one did not come back in time."""
        with self._changed:
            self._closed = True
            for job in [job for job in self._jobs.values() if job.view is None]:
                self._end(job, CANCELLED)
            threads = list(self._threads.values())
            self._changed.notify_all()
        until = time.monotonic() + timeout
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    # Queueing -----------------------------------------------------------------------------------------------------

    def _enqueue(self, question: Q, digest: str, model: str, method: str, kind: str) -> _Work[Q]:
        running = self._running.get(model)
        if running is not None and running.stop and self._clock() - running.stopped > STUCK_SECONDS:
            raise Busy(
                f"An earlier question to {model} is still being stopped.",
                "Try again in a minute, or choose another model.",
            )
        waiting = sum(map(len, self._lanes.values()))
        # A lane that is free takes the question at once, so that one doesn't count as waiting.
        if waiting >= self.limits.queued and (running is not None or self._lanes.get(model)):
            raise Busy(f"{waiting} questions are already waiting, which is the limit.", "Try again in a minute.")
        work = _Work(question, digest, model, method, kind)
        self._active[digest] = work
        self._lanes.setdefault(model, deque()).append(work)
        if model not in self._threads:
            thread = threading.Thread(target=self._work, args=(model,), name=f"jobs-{model}", daemon=True)
            self._threads[model] = thread
            thread.start()
        return work

    def _check_owner(self, owner: str) -> None:
        mine = sum(job.owner == owner and job.view is None for job in self._jobs.values())
        if mine >= self.limits.per_owner_running + self.limits.per_owner_queued:
            raise Busy(
                f"You already have {mine} questions going on, which is the limit for one person.",
                "Wait for one to finish, or cancel one.",
            )

    def _next(self, model: str) -> _Work[Q] | None:
        """The next question of a lane, passing over those whose owners all have enough running elsewhere."""
        lane = self._lanes.get(model, ())
        running: dict[str, int] = {}
        for work in self._running.values():
            for job in work.jobs:
                running[job.owner] = running.get(job.owner, 0) + 1
        for work in lane:
            if any(running.get(job.owner, 0) < self.limits.per_owner_running for job in work.jobs):
                return work
        return None

    def _work(self, model: str) -> None:
        """The life of one lane's thread."""
        if hasattr(os, "setpriority"):  # pages are drawn before edits are computed
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
        while True:
            with self._changed:
                idle_until = time.monotonic() + self.limits.idle_seconds
                while (work := self._next(model)) is None:
                    left = idle_until - time.monotonic()
                    if self._closed or (left <= 0 and not self._lanes.get(model)):
                        self._threads.pop(model, None)
                        self._lanes.pop(model, None)
                        return
                    self._changed.wait(1.0 if self._lanes.get(model) else max(0.05, min(left, 5.0)))
                self._lanes[model].remove(work)
                work.started = self._clock()
                self._running[model] = work
                self._changed.notify_all()
            self._answer(work)

    def _answer(self, work: _Work[Q]) -> None:
        result: object = None
        error: BaseException | None = None
        try:
            result = self._run(work.question, self._reporter(work))
        except BaseException as caught:  # also SystemExit: a lane outlives whatever a question does to it
            error = caught
        with self._changed:
            self._settle()  # a run that came back too late without an event has timed out all the same
            if self._running.get(work.model) is work:
                del self._running[work.model]
            self._active_drop(work)
            if error is None:
                self._learn(work)
            state, reason = (DONE, None) if error is None else self._judge(work, error)
            for job in list(work.jobs):
                job.result = result
                self._end(job, state, reason)
            self._changed.notify_all()
        # The exception knows this frame and the frame knows the exception: untied, or the tensors of the run's frames
        # would stay alive until the garbage collector comes by.
        del error

    def _judge(self, work: _Work[Q], error: BaseException) -> tuple[str, JobError | None]:
        """What an exception means for those who wait."""
        if isinstance(error, Cancelled):
            return CANCELLED, None
        if isinstance(error, ActionableError):
            log.info("A job on %s failed: %s", work.model, error)
            return FAILED, JobError(error.what, error.next_step, "", error.code)
        error_id = secrets.token_hex(4)
        log.error("A job on %s with %s failed, error id %s.", work.model, work.method, error_id, exc_info=error)
        return FAILED, JobError(
            "Something went wrong inside while working on this question.",
            f"Try again; if it happens again, give the operator the error id {error_id}.",
            error_id,
            "internal",
        )

    # Events -------------------------------------------------------------------------------------------------------

    def _reporter(self, work: _Work[Q]) -> Reporter:
        def report(event: Event) -> None:
            with self._changed:
                self._settle()
                if work.timed_out:
                    raise TimedOut(*self._timeout_words(work))
                if work.stop:
                    raise Cancelled()
                self._note(work, event)

        return report

    def _note(self, work: _Work[Q], event: Event) -> None:
        now = self._clock()
        if isinstance(event, Note):
            work.notes.append(event.text[:500])
            del work.notes[:-MAX_NOTES]
            return
        stage = work.stages.get(event.stage)
        if stage is None:
            if len(work.stages) >= MAX_STAGES:
                return
            stage = work.stages[event.stage] = _Stage(event.stage, None, now)
        if isinstance(event, Started):
            # The same stage again (a second look, say) goes on where it was: its time and its total grow.
            if stage.ended is not None:
                stage.started = now - (stage.ended - stage.started)
                stage.total = None if stage.total is None or event.total is None else stage.done + event.total
                stage.ended = None
            else:
                stage.total = event.total
        elif isinstance(event, Advanced):
            again = stage.total is not None and event.total is not None and stage.total > event.total
            stage.done = event.done + (stage.total - event.total if again else 0)  # type: ignore[operator]
            stage.total = stage.total if again or event.total is None else event.total
        elif isinstance(event, Finished):
            stage.ended = now
            stage.done = stage.total if stage.total is not None else stage.done

    # Ending -------------------------------------------------------------------------------------------------------

    def _end(self, job: _Job, state: str, error: JobError | None = None) -> None:
        """Freeze a job. Its work is stopped when nobody waits for it any more."""
        view, work = self._view(job), job.work
        job.view = JobView(
            id=view.id,
            digest=view.digest,
            model=view.model,
            method=view.method,
            state=state,
            ahead=0,
            stages=view.stages,
            notes=view.notes,
            fraction=1.0 if state == DONE else view.fraction,
            eta_seconds=0.0 if state == DONE else None,
            seconds=view.seconds,
            error=error,
            kind=view.kind,
        )
        job.work, job.ended = None, self._clock()
        if state != DONE:
            job.result = None
        self._over[job.id] = job
        if work is not None:
            work.jobs.remove(job)
            if not work.jobs:
                work.stop, work.stopped = True, self._clock()
                self._active_drop(work)  # a new asker must not attach to work that is being stopped
                lane = self._lanes.get(work.model)
                if lane is not None and work in lane:
                    lane.remove(work)
        self._forget()
        self._changed.notify_all()

    def _active_drop(self, work: _Work[Q]) -> None:
        if self._active.get(work.digest) is work:
            del self._active[work.digest]

    def _settle(self) -> None:
        """Do what time alone brings: end the overdue, forget the old."""
        now = self._clock()
        for work in list(self._running.values()):
            if work.started is not None and not work.stop and now - work.started > self._limit(work):
                work.timed_out = True
                log.warning("A job on %s with %s is overdue and is being stopped.", work.model, work.method)
                for job in list(work.jobs):
                    self._end(job, FAILED, JobError(*self._timeout_words(work), "", TimedOut.code))
        self._forget()

    def _forget(self) -> None:
        now = self._clock()
        while self._over:
            job = next(iter(self._over.values()))
            if len(self._over) <= self.limits.kept and now - job.ended <= self.limits.kept_seconds:
                return
            del self._over[job.id]
            self._jobs.pop(job.id, None)

    def _limit(self, work: _Work) -> float:
        return self.limits.timeout_seconds if work.seconds is None else work.seconds

    def _timeout_words(self, work: _Work) -> tuple[str, str]:
        return (
            f"This question took longer than {self._limit(work):g} s and was stopped.",
            "Choose a smaller model, fewer steps or fewer views.",
        )

    # Looking ------------------------------------------------------------------------------------------------------

    def _find(self, job_id: str, owner: str | None) -> _Job:
        job = self._jobs.get(job_id) if isinstance(job_id, str) else None
        if job is None or (owner is not None and job.owner != owner):
            raise UnknownJob(str(job_id))
        return job

    def _view(self, job: _Job) -> JobView:
        work = job.work
        if work is None:
            raise RuntimeError("a job that is over has no work to look at")
        now = self._clock()
        running = work.started is not None
        ahead = 0 if running else self._ahead(work)
        stages = tuple(
            StageView(s.name, (s.ended or now) - s.started, s.done, s.total, s.ended is not None)
            for s in work.stages.values()
        )
        fraction, left = self._progress(work)
        eta = left if running else self._queue_eta(work)
        return JobView(
            id=job.id,
            digest=work.digest,
            model=work.model,
            method=work.method,
            state=RUNNING if running else QUEUED,
            ahead=ahead,
            stages=stages,
            notes=tuple(work.notes),
            fraction=fraction,
            eta_seconds=eta,
            seconds=now - work.started if work.started is not None else 0.0,
            kind=work.kind,
        )

    def _ahead(self, work: _Work) -> int:
        lane = list(self._lanes.get(work.model, ()))
        return (lane.index(work) if work in lane else 0) + (work.model in self._running)

    def _progress(self, work: _Work) -> tuple[float | None, float | None]:
        """The fraction done and the seconds left, from earlier runs of this method on this model and from this one."""
        pace = self._paces.get((work.model, work.method))
        if pace is None or pace.total <= 0:
            return None, None
        if work.started is None:
            return 0.0, pace.total
        now = self._clock()
        elapsed = now - work.started
        behind = sum(pace.stages.get(s.name, 0.0) * _share(s, pace, now) for s in work.stages.values())
        known = sum(pace.stages.values())
        share = behind / known if known > 0.05 * pace.total else elapsed / pace.total
        work.fraction = max(work.fraction, min(share, 0.99))
        by_mean = max(pace.total - elapsed, 0.0)
        by_pace = elapsed * (1 - work.fraction) / work.fraction if work.fraction > 0 else by_mean
        # Early on a run's own pace says little, so the mean leads; later the pace does.
        return work.fraction, (1 - work.fraction) * by_mean + work.fraction * by_pace

    def _queue_eta(self, work: _Work) -> float | None:
        lane = list(self._lanes.get(work.model, ()))
        before = lane[: lane.index(work) + 1] if work in lane else [work]
        running = self._running.get(work.model)
        parts = [self._progress(other)[1] for other in ([running] if running else []) + before]
        return None if any(part is None for part in parts) else math.fsum(part for part in parts if part is not None)

    def _learn(self, work: _Work[Q]) -> None:
        key = (work.model, work.method)
        pace = self._paces.setdefault(key, _Pace())
        self._paces.move_to_end(key)
        while len(self._paces) > 256:
            self._paces.popitem(last=False)
        now = self._clock()
        stages = {s.name: (s.ended or now) - s.started for s in work.stages.values()}
        pace.learn(now - (work.started or now), stages)


def _share(stage: _Stage, pace: _Pace, now: float) -> float:
    """How much of a stage is behind us: its steps where it counts them, else its time against the mean."""
    if stage.ended is not None:
        return 1.0
    if stage.total:
        return min(stage.done / stage.total, 1.0)
    mean = pace.stages.get(stage.name, 0.0)
    return min((now - stage.started) / mean, 0.95) if mean > 0 else 0.0
