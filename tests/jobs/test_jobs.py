"""The queue: order, sharing, cancel, timeouts, crashes, limits, progress."""

from __future__ import annotations

import gc
import logging
import math
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import pytest

from mega_core.errors import ActionableError, BadInput, Busy, UnknownName
from mega_core.events import Note, Reporter, stage
from mega_core.jobs import Jobs, Limits


@dataclass(frozen=True)
class Ask:
    """A question for the fake runs below."""

    name: str
    seconds: float = 0.0


class Gate:
    """A run that goes on only when told, and remembers what it did."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.started: list[str] = []
        self.active: set[str] = set()
        self.overlaps = 0

    def __call__(self, ask: Ask, report: Reporter) -> str:
        self.started.append(ask.name)
        with stage(report, "work", total=10_000) as step:
            while not self.open.is_set():
                step()
                time.sleep(0.005)
        return f"answer to {ask.name}"


@contextmanager
def jobs_of(run: Callable[[Ask, Reporter], Any], **limits: Any) -> Iterator[Jobs[Ask, Any]]:
    jobs: Jobs[Ask, Any] = Jobs(run, Limits(**limits))
    try:
        yield jobs
    finally:
        assert jobs.close(timeout=10)


def ask(jobs: Jobs[Ask, Any], name: str, owner: str = "ann", model: str = "small", method: str = "rome") -> str:
    return jobs.submit(Ask(name), owner=owner, digest=name, model=model, method=method)


def until(test: Callable[[], object], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


def test_a_question_is_answered() -> None:
    def run(question: Ask, report: Reporter) -> str:
        with stage(report, "load"):
            pass
        with stage(report, "edit", total=4) as step:
            for _ in range(4):
                step()
        report(Note("used the fallback"))
        return question.name.upper()

    with jobs_of(run) as jobs:
        job = ask(jobs, "q")
        view = jobs.wait(job, 5)
        assert view.state == "done"
        assert view.over
        assert jobs.result(job) == "Q"
        assert [(s.name, s.done, s.total, s.finished) for s in view.stages] == [
            ("load", 0, None, True),
            ("edit", 4, 4, True),
        ]
        assert view.notes == ("used the fallback",)
        assert (view.fraction, view.eta_seconds, view.ahead, view.error) == (1.0, 0.0, 0, None)
        assert (view.id, view.digest, view.model, view.method) == (job, "q", "small", "rome")
        assert len(job) == 32
        assert int(job, 16)
        with pytest.raises(FrozenInstanceError):
            view.state = "queued"  # type: ignore[misc]


def test_progress_while_it_runs_and_place_in_the_queue() -> None:
    gate = Gate()
    with jobs_of(gate) as jobs:
        first, second, third = (ask(jobs, n, owner=n) for n in ("a", "b", "c"))
        until(lambda: jobs.snapshot(first).stages and jobs.snapshot(first).stages[0].done > 2)
        view = jobs.snapshot(first)
        assert view.state == "running"
        assert not view.over
        assert view.seconds > 0
        assert view.fraction is None  # nothing like it was run before
        assert view.eta_seconds is None
        assert [jobs.snapshot(j).ahead for j in (first, second, third)] == [0, 1, 2]
        assert jobs.load() == (1, 2)
        with pytest.raises(Busy, match="isn't there yet"):
            jobs.result(first)
        gate.open.set()
        assert [jobs.wait(j, 5).state for j in (first, second, third)] == ["done"] * 3
        assert gate.started == ["a", "b", "c"]


def test_one_question_per_model_at_a_time_and_models_side_by_side() -> None:
    active: dict[str, int] = {}
    most: dict[str, int] = {}
    both = threading.Barrier(2, timeout=5)

    def run(question: Ask, report: Reporter) -> None:
        model = question.name[0]
        active[model] = active.get(model, 0) + 1
        most[model] = max(most.get(model, 0), active[model])
        if question.name.endswith("0"):
            both.wait()  # breaks unless x0 and y0 run at the same time
        time.sleep(0.01)
        active[model] -= 1

    with jobs_of(run) as jobs:
        ids = [ask(jobs, f"{m}{i}", owner=f"{m}{i}", model=m) for i in range(4) for m in "xy"]
        assert {jobs.wait(j, 5).state for j in ids} == {"done"}
        assert most == {"x": 1, "y": 1}


def test_the_same_digest_is_worked_once_and_each_asker_has_a_job() -> None:
    gate = Gate()
    with jobs_of(gate) as jobs:
        ann = ask(jobs, "q", owner="ann")
        until(lambda: gate.started)
        bob = ask(jobs, "q", owner="bob")
        assert ask(jobs, "q", owner="ann") == ann  # a double click
        assert bob != ann
        assert jobs.snapshot(bob).state == "running"
        assert jobs.cancel(ann).state == "cancelled"
        time.sleep(0.05)
        assert jobs.snapshot(bob).state == "running"  # bob still waits, so the work goes on
        gate.open.set()
        assert jobs.wait(bob, 5).state == "done"
        assert jobs.result(bob) == "answer to q"
        assert jobs.snapshot(ann).state == "cancelled"
        assert gate.started == ["q"]
        assert jobs.wait(ask(jobs, "q", owner="ann"), 5).state == "done"  # what is over is asked anew
        assert gate.started == ["q", "q"]


def test_work_stops_when_the_last_asker_cancels() -> None:
    gate = Gate()
    with jobs_of(gate) as jobs:
        ann, bob = ask(jobs, "q", owner="ann"), ask(jobs, "q", owner="bob")
        until(lambda: gate.started)
        jobs.cancel(ann)
        jobs.cancel(bob)
        until(lambda: jobs.load() == (0, 0), 1.0)


def test_cancel_is_quick() -> None:
    gate = Gate()
    slowest = 0.0
    with jobs_of(gate) as jobs:
        for i in range(10):
            job = ask(jobs, f"q{i}")
            until(lambda i=i: len(gate.started) == i + 1)  # type: ignore[misc]
            begun = time.monotonic()
            assert jobs.cancel(job).state == "cancelled"
            until(lambda: jobs.load() == (0, 0), 1.0)
            slowest = max(slowest, time.monotonic() - begun)
            assert jobs.cancel(job).state == "cancelled"
            with pytest.raises(ActionableError, match="cancelled"):
                jobs.result(job)
    assert slowest < 1.0


def test_a_queued_job_is_cancelled_at_once() -> None:
    gate = Gate()
    with jobs_of(gate) as jobs:
        ask(jobs, "a", owner="a")
        until(lambda: gate.started)
        second, third = ask(jobs, "b", owner="b"), ask(jobs, "c", owner="c")
        assert jobs.cancel(second).state == "cancelled"
        assert jobs.snapshot(third).ahead == 1
        assert jobs.load() == (1, 1)
        gate.open.set()
        assert jobs.wait(third, 5).state == "done"
        assert gate.started == ["a", "c"]


def test_cancel_shows_even_while_the_run_says_nothing() -> None:
    release = threading.Event()
    silent_runs: list[str] = []

    def run(question: Ask, report: Reporter) -> str:
        silent_runs.append(question.name)
        release.wait(10)
        return "too late"

    with jobs_of(run) as jobs:
        first = ask(jobs, "a")
        until(lambda: silent_runs)
        assert jobs.cancel(first).state == "cancelled"
        second = ask(jobs, "b")
        assert (jobs.snapshot(second).state, jobs.snapshot(second).ahead) == ("queued", 1)
        release.set()
        assert jobs.wait(second, 5).state == "done"
        assert jobs.snapshot(first).state == "cancelled"


def test_a_stuck_lane_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mega_core.jobs.STUCK_SECONDS", 0.05)
    release = threading.Event()
    begun = threading.Event()

    def run(question: Ask, report: Reporter) -> None:
        begun.set()
        release.wait(10)

    with jobs_of(run) as jobs:
        job = ask(jobs, "a")
        assert begun.wait(5)
        jobs.cancel(job)
        time.sleep(0.1)
        with pytest.raises(Busy, match="still being stopped"):
            ask(jobs, "b")
        release.set()
        until(lambda: jobs.load() == (0, 0))
        assert jobs.wait(ask(jobs, "b"), 5).state == "done"


def test_errors_for_the_person_are_shown_as_they_are() -> None:
    def run(question: Ask, report: Reporter) -> None:
        raise BadInput("subject", "has no token.", "Write it out.")

    with jobs_of(run) as jobs:
        job = ask(jobs, "q")
        error = jobs.wait(job, 5).error
        assert error is not None
        assert (error.what, error.next_step, error.error_id, error.code) == (
            "subject: has no token.",
            "Write it out.",
            "",
            "bad_input",
        )
        with pytest.raises(ActionableError, match="no token"):
            jobs.result(job)


@pytest.mark.parametrize(
    "error", [RuntimeError("secret at /home/x"), MemoryError(), SystemExit(3), KeyboardInterrupt(), AssertionError()]
)
def test_other_errors_show_an_id_only_and_the_lane_lives_on(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def run(question: Ask, report: Reporter) -> str:
        if question.name == "bad":
            raise error
        return "fine"

    with jobs_of(run) as jobs, caplog.at_level(logging.ERROR, logger="mega_core.jobs"):
        view = jobs.wait(ask(jobs, "bad"), 5)
        assert view.state == "failed"
        assert view.error is not None
        assert "secret" not in repr(view)
        assert "Traceback" not in repr(view)
        assert view.error.error_id
        assert view.error.error_id in view.error.next_step
        assert view.error.error_id in caplog.text
        assert type(error).__name__ in caplog.text
        assert jobs.wait(ask(jobs, "good"), 5).state == "done"


def test_a_failed_run_keeps_nothing_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mega_core.jobs.log.disabled", True)  # pytest's own handler keeps every traceback it is shown

    class Heavy:
        pass

    alive: list[weakref.ref[Heavy]] = []

    def run(question: Ask, report: Reporter) -> None:
        heavy = Heavy()
        alive.append(weakref.ref(heavy))
        raise ValueError(question.name)

    gc.disable()
    try:
        with jobs_of(run) as jobs:
            jobs.wait(ask(jobs, "q"), 5)
            until(lambda: alive[0]() is None, 2.0)
    finally:
        gc.enable()


def test_a_run_that_reports_stops_at_its_timeout() -> None:
    gate = Gate()
    with jobs_of(gate, timeout_seconds=0.2) as jobs:
        job = ask(jobs, "q")
        view = jobs.wait(job, 3)
        assert view.state == "failed"
        assert view.error is not None
        assert view.error.code == "timed_out"
        assert "0.2 s " in view.error.what
        assert 0.2 <= view.seconds < 2
        until(lambda: jobs.load() == (0, 0), 1.0)


def test_a_question_may_have_a_limit_of_its_own_or_none() -> None:
    gate = Gate()
    with jobs_of(gate, timeout_seconds=0.1) as jobs:
        job = jobs.submit(Ask("q"), owner="amy", digest="q", model="m", method="toy", timeout_seconds=math.inf)
        time.sleep(0.3)
        assert jobs.snapshot(job).state == "running"
        gate.open.set()
        assert jobs.wait(job, 5).state == "done"
    with jobs_of(Gate()) as jobs:
        job = jobs.submit(Ask("q"), owner="amy", digest="q", model="m", method="toy", timeout_seconds=0.2)
        view = jobs.wait(job, 3)
        assert view.error is not None
        assert view.error.code == "timed_out"
        assert "0.2 s " in view.error.what


def test_a_run_that_is_silent_is_seen_to_time_out_too() -> None:
    release = threading.Event()

    def run(question: Ask, report: Reporter) -> str:
        release.wait(10)
        return "too late"

    with jobs_of(run, timeout_seconds=0.1) as jobs:
        job = ask(jobs, "q")
        assert jobs.wait(job, 3).error.code == "timed_out"  # type: ignore[union-attr]
        release.set()
        until(lambda: jobs.load() == (0, 0))
        assert jobs.snapshot(job).state == "failed"


def test_one_person_has_one_running_and_one_waiting() -> None:
    gate = Gate()
    with jobs_of(gate) as jobs:
        first, second = ask(jobs, "a"), ask(jobs, "b")
        with pytest.raises(Busy, match="limit for one person"):
            ask(jobs, "c")
        other = ask(jobs, "d", owner="bob")
        assert ask(jobs, "a") == first
        jobs.cancel(second)
        third = ask(jobs, "c")
        gate.open.set()
        assert {jobs.wait(j, 5).state for j in (first, other, third)} == {"done"}


def test_a_second_model_waits_for_its_owner_but_not_for_others() -> None:
    gate = Gate()
    with jobs_of(gate) as jobs:
        ask(jobs, "a", model="x")
        until(lambda: gate.started)  # each model has a thread of its own: which takes its question first is open
        mine = ask(jobs, "b", model="y")
        theirs = ask(jobs, "c", owner="bob", model="y")
        until(lambda: sorted(gate.started) == ["a", "c"])
        assert jobs.snapshot(mine).state == "queued"
        gate.open.set()
        assert jobs.wait(mine, 5).state == "done"
        assert jobs.wait(theirs, 5).state == "done"


def test_a_full_queue_refuses_with_a_reason() -> None:
    gate = Gate()
    with jobs_of(gate, queued=3) as jobs:
        ask(jobs, "running", owner="zero")
        until(lambda: gate.started)
        for i in range(3):
            ask(jobs, f"q{i}", owner=f"o{i}")
        with pytest.raises(Busy, match="3 questions are already waiting") as caught:
            ask(jobs, "more", owner="late")
        assert caught.value.next_step
        attached = ask(jobs, "q1", owner="late")  # sharing an answer needs no place
        elsewhere = ask(jobs, "free", owner="other", model="idle")  # nor does a model that is free
        gate.open.set()
        assert jobs.wait(attached, 5).state == "done"
        assert jobs.wait(elsewhere, 5).state == "done"


def test_ids_that_are_not_there_and_ids_of_others() -> None:
    with jobs_of(lambda question, report: 1) as jobs:
        job = ask(jobs, "q", owner="ann")
        jobs.wait(job, 5)
        for call in (jobs.snapshot, jobs.result, jobs.cancel):
            for wrong in ("", "0" * 32, "../x", None, 5, job.upper() + "0"):
                with pytest.raises(UnknownName, match="job"):
                    call(wrong)  # type: ignore[arg-type]
            with pytest.raises(UnknownName, match="ask the question again"):
                call(job, "bob")
        assert jobs.snapshot(job, "ann").state == "done"
        assert jobs.result(job, "ann") == 1


def test_what_is_remembered_is_bounded() -> None:
    with jobs_of(lambda question, report: bytes(1000), kept=5) as jobs:
        ids = []
        for i in range(20):
            ids.append(ask(jobs, f"q{i}"))
            jobs.wait(ids[-1], 5)
        assert len(jobs.of_owner("ann")) == 5
        assert len(jobs._jobs) == 5
        assert jobs.result(ids[-1])
        with pytest.raises(UnknownName):
            jobs.snapshot(ids[0])


def test_what_is_over_is_forgotten_after_a_while() -> None:
    with jobs_of(lambda question, report: 1, kept_seconds=0.05) as jobs:
        job = ask(jobs, "q")
        jobs.wait(job, 5)
        time.sleep(0.1)
        with pytest.raises(UnknownName):
            jobs.snapshot(job)


def test_idle_threads_end_and_start_again() -> None:
    with jobs_of(lambda question, report: question.name, idle_seconds=0.05) as jobs:
        jobs.wait(ask(jobs, "a"), 5)
        until(lambda: not jobs._threads, 2)
        assert jobs.wait(ask(jobs, "b"), 5).state == "done"


def test_closing_cancels_everything() -> None:
    gate = Gate()
    jobs: Jobs[Ask, str] = Jobs(gate)
    ids = [ask(jobs, n, owner=n) for n in "abc"]
    until(lambda: gate.started)
    begun = time.monotonic()
    assert jobs.close(timeout=5)
    assert time.monotonic() - begun < 1.0
    assert {jobs.snapshot(j).state for j in ids} == {"cancelled"}
    with pytest.raises(Busy, match="shutting down"):
        ask(jobs, "late")
    assert jobs.close()


def test_leaving_cancels_all_of_a_person() -> None:
    gate = Gate()
    with jobs_of(gate) as jobs:
        ask(jobs, "a"), ask(jobs, "b")
        other = ask(jobs, "c", owner="bob")
        assert jobs.cancel_owner("ann") == 2
        assert jobs.cancel_owner("ann") == 0
        gate.open.set()
        assert jobs.wait(other, 5).state == "done"


class Clock:
    """Time that passes only when a run says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def paced(clock: Clock, sleep: float, look: Callable[[], None]) -> Callable[[Ask, Reporter], None]:
    """One second of loading, then twenty steps of `sleep` seconds; `look` is called at every step."""

    def run(question: Ask, report: Reporter) -> None:
        with stage(report, "load"):
            clock.now += 1.0
            look()
        with stage(report, "edit", total=20) as step:
            for _ in range(20):
                clock.now += sleep
                step()
                look()

    return run


def test_estimates_after_a_first_run_are_right_for_a_second_like_it() -> None:
    clock, seen = Clock(), []
    jobs: Jobs[Ask, None] = Jobs(lambda q, r: run(q, r), clock=clock)
    run = paced(clock, 0.2, lambda: None)
    assert jobs.wait(ask(jobs, "first"), 10).seconds == pytest.approx(5.0)
    run = paced(clock, 0.2, lambda: seen.append([view for view in jobs.of_owner("ann") if not view.over][0]))
    jobs.wait(ask(jobs, "second"), 10)
    assert len(seen) == 21
    for view in seen:
        assert view.fraction == pytest.approx(min(view.seconds / 5.0, 0.99), abs=0.011)
        assert view.seconds + (view.eta_seconds or 0) == pytest.approx(5.0, abs=0.06)
    assert jobs.wait(ask(jobs, "other method", method="memit"), 10).state == "done"
    assert jobs.close()


def test_estimates_follow_a_run_that_is_slower_than_the_last() -> None:
    clock, seen = Clock(), []
    jobs: Jobs[Ask, None] = Jobs(lambda q, r: run(q, r), clock=clock)
    run = paced(clock, 0.2, lambda: None)
    jobs.wait(ask(jobs, "fast"), 10)
    run = paced(clock, 1.0, lambda: seen.append([view for view in jobs.of_owner("ann") if not view.over][0]))
    jobs.wait(ask(jobs, "slow"), 10)  # 21 seconds instead of 5
    fractions = [view.fraction for view in seen]
    assert fractions == sorted(fractions)
    for view in seen[10:]:
        assert 3.0 < view.seconds + view.eta_seconds < 30.0
        assert abs(view.seconds + view.eta_seconds - 21.0) < 12.0
    assert seen[-3].seconds + seen[-3].eta_seconds == pytest.approx(21.0, abs=1.5)
    assert jobs.close()


def test_estimates_for_those_who_wait() -> None:
    clock, gate = Clock(), Gate()
    jobs: Jobs[Ask, Any] = Jobs(lambda q, r: run(q, r), clock=clock)
    run: Callable[[Ask, Reporter], Any] = paced(clock, 0.2, lambda: None)
    jobs.wait(ask(jobs, "first"), 10)
    run = gate
    ask(jobs, "running")
    until(lambda: gate.started)
    second, third = ask(jobs, "b", owner="b"), ask(jobs, "c", owner="c")
    assert jobs.snapshot(second).eta_seconds == pytest.approx(10.0, abs=0.1)
    assert jobs.snapshot(third).eta_seconds == pytest.approx(15.0, abs=0.1)
    new = ask(jobs, "d", owner="d", method="never run")
    assert jobs.snapshot(new).eta_seconds is None
    assert jobs.close()


def test_a_stage_that_comes_twice_is_one_line() -> None:
    def run(question: Ask, report: Reporter) -> None:
        for _ in range(3):
            with stage(report, "look", total=5) as step:
                for _ in range(5):
                    step()

    with jobs_of(run) as jobs:
        (only,) = jobs.wait(ask(jobs, "q"), 5).stages
        assert (only.name, only.done, only.total, only.finished) == ("look", 15, 15, True)


def test_many_stages_and_notes_are_bounded() -> None:
    def run(question: Ask, report: Reporter) -> None:
        for i in range(300):
            with stage(report, f"s{i}"):
                report(Note(f"n{i}" * 1000))

    with jobs_of(run) as jobs:
        view = jobs.wait(ask(jobs, "q"), 5)
        assert view.state == "done"
        assert len(view.stages) == 64
        assert len(view.notes) == 20
        assert all(len(note) <= 500 for note in view.notes)


def test_two_hundred_jobs_with_random_cancels() -> None:
    """Every job ends; what is done has its own answer; no model ever has two users; nothing stays behind."""
    rng = random.Random(7)
    inside: dict[str, int] = {"x": 0, "y": 0, "z": 0}
    clashes: list[str] = []

    def run(question: Ask, report: Reporter) -> str:
        model = question.name.split("-")[0]
        inside[model] += 1
        if inside[model] != 1:
            clashes.append(question.name)
        try:
            with stage(report, "edit", total=5) as step:
                for _ in range(5):
                    time.sleep(question.seconds)
                    step()
            if question.name.endswith("7"):
                raise RuntimeError("crash")
            return question.name
        finally:
            inside[model] -= 1

    outcomes: dict[str, int] = {"done": 0, "failed": 0, "cancelled": 0}
    lock = threading.Lock()

    with jobs_of(run, queued=8, kept=500) as jobs:

        def person(me: int) -> None:
            dice = random.Random(me)
            for i in range(25):
                model = dice.choice("xyz")
                number = dice.randrange(1000) if i % 3 else me * 1000 + i
                name = f"{model}-{number}"
                while True:
                    try:
                        question = Ask(name, dice.uniform(0, 0.004))
                        job = jobs.submit(question, owner=f"p{me}", digest=name, model=model, method="m")
                        break
                    except Busy:
                        time.sleep(0.005)
                if dice.random() < 0.3:
                    time.sleep(dice.uniform(0, 0.02))
                    jobs.cancel(job)
                view = jobs.wait(job, 30)
                assert view.over
                with lock:
                    outcomes[view.state] += 1
                if view.state == "done":
                    assert jobs.result(job) == name
                if view.state == "failed":
                    assert name.endswith("7")

        problems: list[BaseException] = []

        def guarded(me: int) -> None:
            try:
                person(me)
            except BaseException as error:
                problems.append(error)

        people = [threading.Thread(target=guarded, args=(n,)) for n in range(8)]
        rng.shuffle(people)
        for thread in people:
            thread.start()
        for thread in people:
            thread.join(60)
        assert not problems
        assert not clashes
        assert sum(outcomes.values()) == 200
        assert min(outcomes.values()) > 0
        until(lambda: jobs.load() == (0, 0))
        assert not jobs._active
        assert all(job.work is None for job in jobs._jobs.values())
