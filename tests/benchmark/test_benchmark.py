"""Benchmark runs: what is measured, kept, gone on with, and made into tables."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mega_core import benchmark
from mega_core.benchmark import Entrant, Line, Plan, Results, Setup, work
from mega_core.benchmark import plan as plans
from mega_core.benchmark.journal import Journal
from mega_core.benchmark.journal import read as read_journal
from mega_core.benchmark.plan import controls
from mega_core.benchmark.results import read_about
from mega_core.benchmark.run import check_out
from mega_core.benchmark.sequence import Edited, restored
from mega_core.benchmark.work import Worker
from mega_core.cases import Case
from mega_core.changes import DenseDelta, WeightDelta
from mega_core.errors import BadInput, DirtyModel, UnknownName
from mega_core.evaluation import asking
from mega_core.evaluation.protocols import PROTOCOLS
from mega_core.evaluation.suite import Questions
from mega_core.methods import METHODS
from mega_core.methods.base import Method
from mega_core.methods.covariance import Memory
from mega_core.models.adapter import ModelAdapter
from mega_core.records import EditRequest, MethodRef, ModelRef
from mega_core.stack import EditStack
from tests.conftest import ROOT
from tests.methods.test_promises import SETTINGS
from tests.service.toy import TOY, ToyParams, write_catalogue

FACTS = (
    ("France", "The capital of {} is", "Rome", "Paris"),
    ("Spain", "The language of {} is", "Paris", "Madrid"),
    ("Mount Kenya", "The continent of {} is", "Tokyo", "Africa"),
    ("Marie Curie", "{} was a citizen of", "Japan", "Poland"),
    ("Germany", "The city of {} is", "Rome", "Berlin"),
)
PREPARED: list[tuple[str, int]] = []
"""(subject of the first request, requests) of every edit that the toys made."""


def case(number: int, **given: Any) -> Case:
    subject, template, new, true = FACTS[number]
    other = FACTS[(number + 1) % len(FACTS)][0] if given.pop("meets", False) else "Italy"
    request = EditRequest(subject, template, new, true, (f"Say where {subject} is:",), (f"The capital of {other} is",))
    return Case(id=f"c{number}", requests=(request,), **given)


CASES = tuple(case(number) for number in range(4))
MANY = tuple(
    replace(one, id=f"{one.id}-{i}", requests=(replace(one.request, template=template),))
    for i, template in enumerate(("About {} we read", "See {} in", "{} is the home of"))
    for one in CASES
)


def _prepare(lm: Any, requests: Any, params: ToyParams, seed: int, report: Any) -> Any:
    PREPARED.append((requests[0].subject, len(requests)))
    first = requests[0].subject
    if params.fail == "error" and first == "Spain":
        raise BadInput("subject", "is Spain.", "Choose another.")
    if params.fail == "memory" and first == "Spain":
        raise RuntimeError("a defect")
    # Another direction for every subject.
    return TOY.prepare(lm, requests, replace(params, fail="no"), seed + sum(map(ord, first)), report)


def _dirty(lm: Any, requests: Any, params: ToyParams, seed: int, report: Any) -> Any:
    if requests[0].subject == "Spain":
        with torch.no_grad():
            lm.weight(0, "mlp_down").add_(1.0)
    return TOY.prepare(lm, requests, params, seed, report)


def _breaks(lm: Any, requests: Any, params: ToyParams, seed: int, report: Any) -> Any:
    """An edit after which nothing is a number, from the second one on."""
    weight = lm.read_weight(1, "mlp_down")
    value = float("inf") if requests[0].subject == "Spain" else 0.01
    return WeightDelta((DenseDelta(1, "mlp_down", torch.full(weight.shape, value), float(weight.norm())),))


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    PREPARED.clear()
    monkeypatch.setattr(asking, "NEW_TOKENS", 2)  # what is said doesn't matter here
    monkeypatch.setattr(plans, "BESIDE", "")
    for name, prepare in (("toy", _prepare), ("toy2", _prepare), ("dirty", _dirty), ("breaks", _breaks)):
        monkeypatch.setitem(METHODS._entries, name, replace(TOY, name=name, prepare=prepare))


def entrant(name: str, **params: Any) -> Entrant:
    given = {"strength": 0.3, **params} if METHODS[name].params is ToyParams else params
    return Entrant(" ".join([name, *(f"{k}={v}" for k, v in params.items())]), METHODS[name].ref(given))


def setup(lm: ModelAdapter, *names: str | Entrant, cases: Any = CASES, **given: Any) -> Setup:
    methods = [name if isinstance(name, Entrant) else entrant(name) for name in names]
    given = {"protocols": ("rome",), **given}
    return benchmark.set_up(lm.ref, lm.file_digest, methods, "facts", "facts.json", cases, **given)


def opener(lm: ModelAdapter) -> Any:
    def opened(plan: str) -> AbstractContextManager[Worker]:
        return Worker.on(lm, Plan.from_plain(json.loads(plan)))

    return opened


def measured(lm: ModelAdapter, what: Setup, out: Path, **given: Any) -> Results:
    return benchmark.run(what, out, opener(lm), **given)


@pytest.fixture
def gpt2(tiny_lm: Any) -> ModelAdapter:
    return tiny_lm("gpt2")


# What is measured ----------------------------------------------------------------------------------------------------


def test_single_edits_are_scored_as_when_done_by_hand(gpt2, tmp_path):
    what = setup(gpt2, "toy", "toy2", protocols=("rome", "mega"))
    found = measured(gpt2, what, tmp_path / "out")
    assert found.complete
    assert [one.label for one in what.plan.entrants] == ["unedited", "toy", "toy2"]
    lines = {(line.label, line.case): line for line in found.lines}
    for one in CASES:
        questions = Questions.of(gpt2, one, ("rome",))
        base = questions.ask(gpt2)
        for label in ("unedited", "toy"):
            if label == "toy":
                change = _prepare(gpt2, one.requests, METHODS["toy"].read(what.plan.entrants[1].method), 0, _quiet)
                with change.applied(gpt2):
                    told = questions.ask(gpt2, base)
            else:
                told = base
            (judged,) = questions.judge(told, base)
            line = lines[label, one.id]
            rome = [row for row in line.scores if row[0] == "rome"]
            assert [(metric, n) for _, metric, _, n in rome] == [(score.metric, score.n) for score in judged.scores]
            assert [row[2] for row in rome] == near([score.value for score in judged.scores])
            assert [row[1:4] for row in line.answers if row[0] == "rome"] == [
                (row.metric, row.prompt, row.expected) for row in judged.rows
            ]
    assert {line.step for line in found.lines} == {1}
    assert lines["toy", "c0"].scores == lines["toy2", "c0"].scores
    assert lines["toy", "c0"].scores != lines["unedited", "c0"].scores


def near(values: list[float]) -> Any:
    """The same numbers, asked in batches of other company."""
    return pytest.approx(values, abs=1e-6)


def _quiet(event: object) -> None:
    """Hears nothing."""


def test_a_refused_edit_is_scored_as_the_unedited_model_and_says_why(gpt2, tmp_path):
    found = measured(gpt2, setup(gpt2, entrant("toy", fail="error"), entrant("toy2", fail="memory")), tmp_path / "out")
    lines = {(line.label, line.case): line for line in found.lines}
    for label, words in (("toy fail=error", "is Spain"), ("toy2 fail=memory", "failed (RuntimeError: a defect)")):
        refused = lines[label, "c1"]
        assert words in refused.refused
        assert refused.scores == lines["unedited", "c1"].scores
        assert not lines[label, "c0"].refused
    assert found.timing.set_index("method").loc["toy fail=error", "refused"] == 1
    assert ("toy fail=error", "c1", lines["toy fail=error", "c1"].refused) in found.refusals


@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
def test_where_an_edit_leaves_no_room_to_read_it_is_scored_as_unedited(gpt2, tmp_path, mode, monkeypatch):
    """As many facts stated in front of every prompt do."""
    plain = work.alarms.perplexity

    def perplexity(lm):
        if lm.changes:
            raise BadInput("prompt", "too long.", "Shorten it.")
        return plain(lm)

    monkeypatch.setattr(work.alarms, "perplexity", perplexity)
    found = measured(gpt2, setup(gpt2, "toy", mode=mode), tmp_path / "out")
    assert found.complete
    unedited = {line.case: line.scores for line in found.lines if line.label == "unedited"}
    for line in found.lines:
        if line.label == "toy":
            assert "too long" in line.refused
            assert line.scores == unedited[line.case]


@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
def test_a_case_that_the_model_cannot_read_is_left_out_and_told(gpt2, tmp_path, mode):
    far = " ".join("zqx" for _ in range(127))  # more tokens than the model has places
    long = replace(CASES[1], requests=(replace(CASES[1].request, neighbours=(far,)),))
    what = setup(gpt2, "toy", cases=(CASES[0], long, CASES[2]), mode=mode)
    found = measured(gpt2, what, tmp_path / "out")
    assert found.complete
    out = [line for line in found.lines if line.left_out]
    assert {line.case for line in out} == {"c1"}
    assert {line.label for line in out} == {"unedited", "toy"}
    assert all(not line.scores for line in out)
    assert any(label == "" and case == "c1" for label, case, _ in found.refusals)
    assert found.summary["n"].max() == 2
    assert "Spain" not in [subject for subject, _ in PREPARED]


def test_a_model_that_was_changed_ends_the_run_and_takes_its_lines_back(gpt2, tmp_path):
    saved = gpt2.weight(0, "mlp_down").detach().clone()
    try:
        with pytest.raises(DirtyModel, match="dirty"):
            measured(gpt2, setup(gpt2, "toy", "dirty"), tmp_path / "out")
    finally:
        with torch.no_grad():
            gpt2.weight(0, "mlp_down").copy_(saved)
    kept = read_journal(tmp_path / "out")
    there = {(line.label, line.case) for line in kept.values()}
    assert {("unedited", "c0"), ("toy", "c0"), ("dirty", "c0")} <= there
    assert ("dirty", "c1") not in there  # asked on a changed model
    assert not there & {(label, case_) for label in ("unedited", "toy", "dirty") for case_ in ("c2", "c3")}
    again = measured(gpt2, setup(gpt2, "toy", "dirty", cases=CASES[:1]), tmp_path / "new")
    assert again.complete


def test_a_model_of_other_files_is_refused(gpt2, tmp_path):
    what = setup(gpt2, "toy")
    other = replace(what, plan=replace(what.plan, weights="1" * 64))
    with pytest.raises(BadInput, match="files of"):
        measured(gpt2, other, tmp_path / "out")


def test_a_batch_is_one_edit_of_everything(gpt2, tmp_path):
    found = measured(gpt2, setup(gpt2, "toy", mode="batch"), tmp_path / "out")
    assert PREPARED == [("France", 4)]
    assert found.complete
    assert {line.step for line in found.lines} == {4}
    change = _prepare(gpt2, [c.request for c in CASES], METHODS["toy"].read(found.plan.entrants[1].method), 0, _quiet)
    for one, line in zip(CASES, [line for line in found.lines if line.label == "toy"], strict=True):
        questions = Questions.of(gpt2, one, ("rome",))
        base = questions.ask(gpt2)
        with change.applied(gpt2):
            told = questions.ask(gpt2, base)
        (judged,) = questions.judge(told, base)
        assert [row[2] for row in line.scores if row[0] == "rome"] == near([score.value for score in judged.scores])


# Sequences -----------------------------------------------------------------------------------------------------------

FEW = {"steps": 2, "contexts": 2, "prompts": 2, "pool": 8, "k": 2}


def quick(name: str) -> Entrant:
    method: Method[Any] = METHODS[name]
    few = {knob.name: FEW[knob.name] for knob in method.knobs() if knob.name in FEW and knob.kind is int}
    return Entrant(name, method.ref({**SETTINGS.get(name, {}), **few}))


@pytest.mark.parametrize("name", ["rome", "alphaedit", "ft", "mean_shift", "grace", "ike"])
def test_a_sequence_is_an_edit_stack_bit_for_bit(gpt2, tmp_path, name):
    one = quick(name)
    what = setup(gpt2, one, mode="sequential", every=2, cases=CASES[:3])
    found = measured(gpt2, what, tmp_path / "out")
    stack = EditStack.empty(gpt2)
    assert one.method is not None
    for made, case_ in enumerate(CASES[:3], start=1):
        stack = stack.add(gpt2, one.method, case_.requests, 0)
        if made == 1:
            continue
        lines = [line for line in found.lines if line.label == name and line.step == made]
        assert [line.case for line in lines] == [c.id for c in CASES[:made]]
        for asked, line in zip(CASES[:made], lines, strict=True):
            questions = Questions.of(gpt2, asked, ("rome",))
            base = questions.ask(gpt2)
            with stack.applied(gpt2):
                told = questions.ask(gpt2, base)
            (judged,) = questions.judge(told, base)
            assert [row[2] for row in line.scores if row[0] == "rome"] == near([s.value for s in judged.scores])


def test_the_weights_of_a_sequence_are_those_of_the_stack_and_of_its_file(gpt2, tmp_path):
    whole = gpt2.live_digest()
    gpt2.memo = Memory()  # else AlphaEdit's statistics are taken again, and differ in their last bits
    for name in ("rome", "ft", "alphaedit"):
        one, stack = quick(name), EditStack.empty(gpt2)
        assert one.method is not None
        method = METHODS[name]
        for case_ in CASES[:3]:
            stack = stack.add(gpt2, one.method, case_.requests)
        with stack.applied(gpt2):
            wanted = gpt2.live_digest()
        edited = Edited(gpt2)
        with edited.held():
            for case_ in CASES[:2]:
                edited.add(method.prepare(gpt2, case_.requests, method.read(one.method), 0, _quiet), 0.5)
            edited.save(tmp_path / "file", "two")
        assert gpt2.live_digest() == whole
        kept = restored(tmp_path / "file", lambda count: "two" if count == 2 else "other")
        assert kept is not None
        again = Edited(gpt2)
        with again.held():
            again.take_up(kept)
            assert len(gpt2.changes) == 1  # where AlphaEdit finds the earlier keys
            again.add(method.prepare(gpt2, CASES[2].requests, method.read(one.method), 0, _quiet), 0.5)
            assert gpt2.live_digest() == wanted
            assert again.seconds == [0.5] * 3
        assert gpt2.live_digest() == whole
        assert not gpt2.changes
    gpt2.memo = None


def test_a_file_of_a_sequence_that_is_damaged_or_anothers_counts_as_none(gpt2, tmp_path):
    edited, path = Edited(gpt2), tmp_path / "file"
    with edited.held():
        edited.add(_prepare(gpt2, CASES[0].requests, ToyParams(), 0, _quiet), 1.0)
        edited.save(path, "one")
    assert restored(path, lambda count: "one") is not None
    assert restored(path, lambda count: "two") is None
    data = path.read_bytes()
    for other in (data[:-1], data[:50], b"", data[:-3] + b"abc", b"\0" * 100):
        path.write_bytes(other)
        assert restored(path, lambda count: "one") is None
    assert restored(tmp_path / "nowhere", lambda count: "one") is None
    edited.save(tmp_path / "no" / "folder", "one")  # where none is, nothing is kept and nothing fails


def test_dense_differences_are_kept_as_one_sum(gpt2):
    edited = Edited(gpt2)
    with edited.held():
        for _ in range(5):
            edited.add(_breaks(gpt2, CASES[0].requests, ToyParams(), 0, _quiet), 0.0)
        (matrix,) = edited.delta.matrices
        assert torch.allclose(matrix.update(torch.device("cpu")), torch.full(matrix.shape(), 0.05))


def test_a_sequence_ends_where_the_model_collapses(gpt2, tmp_path):
    whole = gpt2.live_digest()
    what = setup(gpt2, "breaks", "toy", mode="sequential", every=1)
    found = measured(gpt2, what, tmp_path / "out")
    assert gpt2.live_digest() == whole
    assert found.complete
    rows = found.retention.set_index(["method", "step", "protocol", "metric"])
    for step in (2, 3, 4):
        assert rows.loc[("breaks", step, "rome", "ES"), "value"] == 0
        assert rows.loc[("breaks", step, "rome", "NS"), "value"] == 0
        assert rows.loc[("breaks", step, "rome", "NS"), "n"] == step
        assert ("breaks", step, "rome", "EM") not in rows.index  # a difference of numbers that are none
        lines = [line for line in found.lines if line.label == "breaks" and line.step == step]
        assert len(lines) == step
        assert all(line.alarms[0] == "collapsed" and "finite" in line.refused for line in lines)
    assert not any(line.alarms[:1] == ("collapsed",) for line in found.lines if line.step == 1)
    assert found.timing.set_index("method").loc["breaks", "collapsed"] == 4
    assert found.timing.set_index("method").loc["toy", "collapsed"] == 0


@pytest.mark.parametrize(
    ("edits", "every", "wanted"),
    [
        ((1, 1, 1, 1, 1), 2, ((2, 2), (4, 4), (5, 5))),
        ((1, 1, 1, 1), 2, ((2, 2), (4, 4))),
        ((3, 1, 2, 1), 2, ((1, 3), (2, 4), (3, 6), (4, 7))),
        ((1, 1, 1), 0, ((3, 3),)),
        ((2, 2), 9, ((2, 4),)),
    ],
)
def test_checkpoints_are_every_so_many_edits_and_at_the_end(edits, every, wanted):
    plan = Plan(None, "", (), "", "", "", tuple("abcde"[: len(edits)]), tuple("abcde"[: len(edits)]), edits, (), (),
                "sequential", every)  # type: ignore[arg-type]  # fmt: skip
    assert plan.checkpoints == wanted
    assert replace(plan, mode="batch").checkpoints == ((len(edits), sum(edits)),)
    assert replace(plan, mode="single").checkpoints == ()
    assert plan.steps_of(0) == tuple(step for _, step in wanted)
    assert plan.steps_of(len(edits) - 1) == (wanted[-1][1],)


# Going on ------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As a signal would."""


@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
def test_a_run_that_is_killed_again_and_again_gives_the_same_summary(gpt2, tmp_path, mode, monkeypatch):
    what = setup(gpt2, "toy", "toy2", mode=mode, every=2 if mode == "sequential" else 0)
    wanted = measured(gpt2, what, tmp_path / "whole")
    edits = len(PREPARED)
    PREPARED.clear()
    out, add = tmp_path / "out", Journal.add
    for times in range(60):
        left = [3]

        def killed(self: Journal, text: str, left: list[int] = left) -> Line | None:
            line = add(self, text)
            left[0] -= line is not None
            if not left[0]:
                raise Killed
            return line

        monkeypatch.setattr(Journal, "add", killed)
        try:
            found = measured(gpt2, what, out, resume=times > 0)
            break
        except Killed:
            assert gpt2.hook_count() == 0
            assert not gpt2.changes
            with (out / "cases.jsonl").open("ab") as file:
                file.write(b'{"key":"torn')
    assert found.complete
    assert times >= 3
    for name in ("summary.csv", "answers.parquet", *(["retention.csv"] if mode == "sequential" else [])):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    text = (out / "cases.jsonl").read_text().splitlines()
    assert len(text) == len({Line.read(line).key for line in text}) == wanted.total
    if mode == "single":
        assert len(PREPARED) == edits  # nothing is edited twice
    if mode == "sequential":
        assert len(PREPARED) <= edits + 2 * times  # at most `every` edits are lost
    assert not (out / "state").exists()


def test_more_cases_later_measure_only_what_is_new(gpt2, tmp_path):
    few, all_ = (setup(gpt2, "toy", limit=limit) for limit in (2, None))
    measured(gpt2, few, tmp_path / "out")
    PREPARED.clear()
    found = measured(gpt2, all_, tmp_path / "out", resume=True)
    assert [subject for subject, _ in PREPARED] == ["Mount Kenya", "Marie Curie"]
    assert found.complete
    assert len(read_about(tmp_path / "out")["plan"].ids) == 4
    measured(gpt2, all_, tmp_path / "once")
    assert (tmp_path / "out" / "summary.csv").read_bytes() == (tmp_path / "once" / "summary.csv").read_bytes()
    with pytest.raises(BadInput, match="number of cases: 4 there, 2 now"):
        measured(gpt2, few, tmp_path / "out", resume=True)


def test_more_cases_later_in_a_sequence_keep_the_checkpoints_there_are(gpt2, tmp_path):
    few, all_ = (setup(gpt2, "toy", limit=limit, mode="sequential", every=2) for limit in (3, None))
    measured(gpt2, few, tmp_path / "out")
    found = measured(gpt2, all_, tmp_path / "out", resume=True)
    measured(gpt2, all_, tmp_path / "once")
    assert found.complete
    for name in ("summary.csv", "retention.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "the seed: 0 there, 1 now"),
        ({"protocols": ("rome", "mega")}, "the protocols"),
        ({"mode": "batch"}, "the mode: single there, batch now"),
        ({"cases": CASES[1:]}, "the number of cases"),
        ({"cases": (case(4), *CASES[1:])}, "the case 'c0'"),
    ],
)
def test_a_folder_of_another_plan_is_refused_in_words(gpt2, tmp_path, change, words):
    measured(gpt2, setup(gpt2, "toy", cases=CASES), tmp_path / "out")
    other = setup(gpt2, "toy", **change)
    for resume in (False, True):
        with pytest.raises(BadInput, match=words):
            check_out(tmp_path / "out", other.plan, resume)


def test_the_same_plan_needs_resume_and_another_method_is_another_plan(gpt2, tmp_path):
    what = setup(gpt2, "toy")
    measured(gpt2, what, tmp_path / "out")
    with pytest.raises(BadInput, match="Add --resume"):
        check_out(tmp_path / "out", what.plan, False)
    check_out(tmp_path / "out", what.plan, True)
    with pytest.raises(BadInput, match="a method: toy .* there, toy2 .* now"):
        check_out(tmp_path / "out", setup(gpt2, "toy2").plan, True)
    with pytest.raises(BadInput, match="number of methods: 1 there, 2 now"):
        check_out(tmp_path / "out", setup(gpt2, "toy", "toy2").plan, True)
    with pytest.raises(BadInput, match="no results"):
        check_out(tmp_path / "nowhere", what.plan, True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(BadInput, match="not empty"):
        check_out(tmp_path / "other", what.plan, False)


def test_partial_results_are_written_and_can_be_read(gpt2, tmp_path, monkeypatch):
    what, add = setup(gpt2, "toy"), Journal.add
    seen: list[Results] = []

    def one(self: Journal, text: str) -> Line | None:
        if len(self.keys) == 3:
            raise KeyboardInterrupt
        return add(self, text)

    monkeypatch.setattr(Journal, "add", one)
    with pytest.raises(KeyboardInterrupt):
        measured(gpt2, what, tmp_path / "out", write=seen.append)
    found = Results.load(tmp_path / "out")
    assert (len(found.lines), found.total, found.complete) == (3, 8, False)
    assert found.lines == seen[0].lines
    assert (tmp_path / "out" / "summary.csv").read_text() == found.summary_csv()
    assert found.about["ended"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are made by fork")
def test_five_kills_at_random_moments_leave_no_trace_in_the_summary(tmp_path):
    write_catalogue(tmp_path, little="gpt2")
    env = {**os.environ, "MEGA_MODELS": str(tmp_path / "models.toml"), "MEGA_DEVICE": "cpu",
           "MEGA_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}  # fmt: skip
    words = [sys.executable, "-m", "tests.benchmark.kill"]
    with subprocess.Popen(words, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None

        def start(mode: str, folder: Path) -> int:
            parent.stdin.write(f"{mode} {folder}\n")
            parent.stdin.flush()
            return int(parent.stdout.readline())

        for mode in ("single", "sequential"):
            whole, out = tmp_path / f"{mode}-whole", tmp_path / mode
            start(mode, whole)
            assert parent.stdout.readline() == "0\n"
            draw, journal = random.Random(mode), out / "cases.jsonl"
            for _ in range(5):
                size = journal.stat().st_size if journal.exists() else 0
                child, until = start(mode, out), time.monotonic() + 20
                while not (journal.exists() and journal.stat().st_size > size) and time.monotonic() < until:
                    time.sleep(0.002)
                time.sleep(draw.uniform(0, 0.03))
                os.kill(child, signal.SIGKILL)
                assert parent.stdout.readline() == "9\n"
            start(mode, out)
            assert parent.stdout.readline() == "0\n"
            for name in ("summary.csv", *(["retention.csv"] if mode == "sequential" else [])):
                assert (out / name).read_bytes() == (whole / name).read_bytes()
        parent.stdin.close()


# Keeping -------------------------------------------------------------------------------------------------------------


def line(key: str = "k", **given: Any) -> Line:
    return Line(**{"key": key, "label": "toy", "case": "1", "mode": "single", "step": 1, "of": "u", **given})


def test_a_line_is_read_as_it_was_written():
    one = line(
        seconds=0.25, refused="überrascht\n", alarms=("a", "b"), scores=(("rome", "ES", 1.0, 1),),
        answers=(("rome", "ES", "a prompt", "x", "y", 0.5, True, 3),), device="cpu",
    )  # fmt: skip
    assert "\n" not in one.text()
    assert Line.read(one.text()) == one


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", "[]", "nonsense", "[" * 5000, json.dumps({**json.loads(line().text()), "step": "1"}),
        json.dumps({**json.loads(line().text()), "step": True}),
        json.dumps({**json.loads(line().text()), "scores": [["rome", "ES", 1.0]]}),
        json.dumps({**json.loads(line().text()), "answers": [1]}),
        json.dumps({**json.loads(line().text()), "clean": 1}),
    ],
)  # fmt: skip
def test_what_is_no_line_is_refused(text):
    with pytest.raises(ValueError):
        Line.read(text)


def test_the_journal_drops_a_torn_line_and_writes_no_key_twice(tmp_path):
    with Journal(tmp_path) as kept:
        assert kept.add(line("a").text()) is not None
        assert kept.add(line("a", seconds=9.0).text()) is None
        kept.add(line("b").text())
    whole = (tmp_path / "cases.jsonl").read_bytes()
    with (tmp_path / "cases.jsonl").open("ab") as file:
        file.write(b"nonsense\n" + line("c").text().encode()[:40])
    with Journal(tmp_path) as kept:
        assert kept.keys == {"a", "b"}
        kept.add(line("c").text())
    assert (tmp_path / "cases.jsonl").read_bytes() == whole + b"nonsense\n" + line("c").text().encode() + b"\n"
    assert read_journal(tmp_path)["a"].seconds == 0.0


def test_a_line_of_a_changed_model_takes_back_an_earlier_one(tmp_path):
    with Journal(tmp_path) as kept:
        kept.add(line("a").text())
        kept.add(line("a", clean=False).text())
        assert kept.keys == set()
        kept.add(line("a", seconds=2.0).text())
    assert read_journal(tmp_path)["a"].seconds == 2.0
    with Journal(tmp_path) as kept:
        assert kept.keys == {"a"}


# Plans ---------------------------------------------------------------------------------------------------------------


def test_a_plan_is_read_as_it_was_written(gpt2):
    plan = setup(gpt2, "toy", entrant("toy2", layer=2), mode="sequential", every=2).plan
    again = Plan.from_plain(json.loads(json.dumps(plan.as_plain())))
    assert again == plan
    assert again.digest == plan.digest
    assert list(again.expected()) == list(plan.expected())


def test_a_key_changes_with_everything_that_decides_the_line(gpt2):
    plan = setup(gpt2, "toy", entrant("toy", layer=2), mode="sequential", every=2).plan
    keys = [key for *_, key in plan.expected()]
    assert len(keys) == len(set(keys)) == 3 * (2 + 4)
    first = plan.key("toy", 0, 2)
    others = [
        replace(plan, weights="1" * 64), replace(plan, seed=1), replace(plan, mode="batch"),
        replace(plan, versions=(2,)), replace(plan, protocols=("mega",)),
        replace(plan, marks=("x", *plan.marks[1:])), replace(plan, marks=(plan.marks[0], "x", *plan.marks[2:])),
        replace(plan, entrants=(plan.entrants[0], Entrant("toy", replace(plan.entrants[1].method, version=7)))),
    ]  # fmt: skip
    for other in others:
        assert other.key("toy", 0, 2) != first
    assert plan.key("toy", 0, 4) != first
    assert replace(plan, marks=(*plan.marks[:2], "x", "y")).key("toy", 0, 2) == first  # edited later
    assert replace(plan, every=1).key("toy", 0, 2) == first


def test_cases_that_meet_are_passed_over(gpt2):
    # c0 asks about Spain (c1's subject); c1 about Mount Kenya (c2's).
    cases = (case(0, meets=True), case(1, meets=True), case(2), case(3))
    what = setup(gpt2, "toy", cases=cases, apart=True)
    assert what.plan.ids == ("c0", "c2", "c3")
    assert what.apart == 1
    reversed_ = setup(gpt2, "toy", cases=cases[::-1], apart=True)
    assert reversed_.plan.ids == ("c3", "c2", "c0")
    assert setup(gpt2, "toy", cases=cases, apart=True, limit=2).plan.ids == ("c0", "c2")


def test_protocols_without_anything_to_ask_are_not_chosen_and_left_out_cases_are_told(gpt2, monkeypatch):
    monkeypatch.setattr(plans, "BESIDE", "ours")
    what = setup(gpt2, "toy", protocols=())
    assert "rome" in what.plan.protocols
    assert "ripple" not in what.plan.protocols
    assert "ours" in what.plan.protocols
    assert setup(gpt2, "toy").plan.protocols == ("rome", "ours")  # always beside the others
    bare = Case("bare", (replace(CASES[0].request, target_true=None),))
    told = setup(gpt2, "toy", cases=(*CASES, bare))
    assert ("rome", PROTOCOLS["rome"].needs(bare), 1) in told.left_out


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"mode": "all"}, UnknownName), ({"every": 2}, BadInput), ({"limit": 0}, BadInput), ({"cases": ()}, BadInput),
        ({"protocols": ("rom",)}, UnknownName), ({"protocols": ("rome", "rome")}, BadInput),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(gpt2, given, error):
    with pytest.raises(error):
        setup(gpt2, "toy", **given)


def test_a_method_twice_is_refused(gpt2):
    with pytest.raises(BadInput, match="twice"):
        setup(gpt2, "toy", "toy")


def test_controls_are_the_choices_of_the_knob_and_the_open_gate():
    mega = METHODS["mega"]
    choices = {knob.name: knob for knob in mega.knobs()}["control"].choices
    assert {"gate": "always"} in list(controls(mega))
    assert {next(iter(one.values())) for one in controls(mega)} - {"always"} <= set(choices)
    assert list(controls(METHODS["rome"])) == []


# Tables --------------------------------------------------------------------------------------------------------------


def _results(lines: tuple[Line, ...], **given: Any) -> Results:
    plan = Plan(
        model=ModelRef("m"), weights="w",
        entrants=(Entrant("unedited"), Entrant("toy", MethodRef("toy"))), dataset="d, e",
        source="s", cases_digest="", ids=("1", "2"), marks=("m1", "m2"), edits=(1, 1), protocols=("rome",),
        versions=(1,), **given,
    )  # fmt: skip
    found = {plan.key(one.label, int(one.case) - 1, one.step): one for one in lines}
    return Results.of(plan, found, {})


def test_the_summary_is_means_over_cases_in_a_fixed_order(gpt2):
    def scored(label: str, case_: str, es: float, em: float) -> Line:
        return line(label=label, case=case_, scores=(("rome", "EM", em, 1), ("rome", "ES", es, 1)), seconds=0.5)

    lines = (scored("toy", "2", 0.0, 0.25), scored("toy", "1", 1.0, 0.5), scored("unedited", "1", 0.0, -0.5),
             scored("unedited", "2", 0.0, -1 / 3))  # fmt: skip
    found = _results(lines)
    rows = [text.split(",") for text in found.summary_csv().splitlines()]
    assert rows[0] == ["model", "method", "dataset", "protocol", "metric", "value", "n", "ci_low", "ci_high"]
    # Wilson 1927 for 0 and 1 of 2: by hand, z^2 = 3.841459.
    assert ",".join(rows[1]) == 'm,unedited,"d, e",rome,ES,0,2,0,0.65762'
    assert ",".join(rows[3]).startswith('m,toy,"d, e",rome,ES,0.5,2,0.0945')
    assert [(row[1], row[-5], row[-4]) for row in rows[1:]] == [
        ("unedited", "ES", "0"), ("unedited", "EM", "-0.416667"), ("toy", "ES", "0.5"), ("toy", "EM", "0.375"),
    ]  # fmt: skip
    assert found.timing.iloc[0].to_dict() == {
        "method": "toy", "seconds": 0.5, "total": 1.0, "edits": 2, "refused": 0, "alarmed": 0, "collapsed": 0,
        "ask_seconds": 0.0,
    }  # fmt: skip


def test_the_summary_of_a_sequence_is_its_last_whole_checkpoint(gpt2):
    def scored(case_: str, step: int, value: float) -> Line:
        return line(label="toy", case=case_, step=step, mode="sequential", scores=(("rome", "ES", value, 1),))

    some = (scored("1", 1, 1.0), scored("1", 2, 0.0))
    sequence = {"mode": "sequential", "every": 1}
    assert _results(some, **sequence).summary["value"].tolist() == [1.0]  # the second checkpoint lacks a case
    found = _results((*some, scored("2", 2, 0.0)), **sequence)
    assert found.summary["value"].tolist() == [0.0]
    assert found.retention[["method", "step", "value"]].values.tolist() == [["toy", 1, 1.0], ["toy", 2, 0.0]]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "[" * 5000, '{"schema_version": 1}', '{"schema_version": 9}',
             '{"schema_version": 1, "plan": {"model": []}}']
)  # fmt: skip
def test_a_folder_that_is_none_is_refused(tmp_path, text):
    with pytest.raises(BadInput):
        Results.load(tmp_path)
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(BadInput):
        Results.load(tmp_path)


def test_plan_json_names_what_was_measured_and_no_machine(gpt2, tmp_path):
    what = replace(setup(gpt2, "toy"), problems=((3, "r", "bad"),), unsupported=(("ike", "no"),))
    measured(gpt2, what, tmp_path / "out", about={"command": ["python"]})
    plain = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plain["problems"] == [{"line": 3, "record": "r", "text": "bad"}]
    assert plain["not_measured"] == [{"label": "ike", "reason": "no"}]
    assert plain["schema_version"] == 1
    assert plain["started"] <= plain["ended"]
    assert plain["devices"]
    assert str(tmp_path) not in json.dumps(plain)


@pytest.fixture(autouse=True)
def _nothing_left(tiny_lm: Any) -> Iterator[None]:
    yield
    assert not tiny_lm("gpt2").changes
