from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import pytest
import torch

from mega_core import pipeline
from mega_core.attribution import VIEWS
from mega_core.changes import MatrixDelta, WeightDelta
from mega_core.errors import BadInput, OutOfMemory, UnknownName, UnsupportedMethod
from mega_core.evaluation import looks
from mega_core.events import Advanced, Cancelled, Event, Finished, Note, Reporter, Started, silent, stage
from mega_core.methods.base import Method, knob
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, intervene
from mega_core.records import EditRequest, Inspection, Report
from mega_core.registry import Registry

FRANCE = EditRequest(
    "France",
    "The capital of {} is",
    "Rome",
    "Paris",
    paraphrases=("In France",),
    neighbours=("The capital of Spain is",),
)


@dataclass(frozen=True)
class NudgeParams:
    """What the tests' method can be told."""

    layer: int = knob(1, "the layer", low=0, high=2)
    strength: float = knob(1.0, "how much", low=0, high=100)


def nudge(lm: ModelAdapter, requests: Sequence[EditRequest], params: NudgeParams, seed: int, report: Reporter) -> Any:
    """A rank-one change in a random direction."""
    with stage(report, "nudge", total=2) as step:
        noise = torch.Generator().manual_seed(seed)
        left = torch.randn(lm.d_model, 1, generator=noise) * params.strength
        step()
        right = torch.randn(lm.d_mlp, 1, generator=noise)
        step()
    report(Note("nudged"))
    weight = lm.read_weight(params.layer, "mlp_down")
    return WeightDelta((MatrixDelta(params.layer, "mlp_down", left, right, float(weight.norm())),))


NUDGE: Method[NudgeParams] = Method(
    "nudge", "Nudge", "Changes a matrix.", "weights", "", NudgeParams, nudge, lambda spec: None
)


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Registry[Method[Any]]:
    registry: Registry[Method[Any]] = Registry("method")
    registry.add("nudge", NUDGE)
    monkeypatch.setattr(pipeline, "METHODS", registry)
    return registry


@pytest.fixture
def gpt2(tiny_lm: Callable[[str], ModelAdapter]) -> ModelAdapter:
    return tiny_lm("gpt2")


def ask(lm: ModelAdapter, method: Method[Any] = NUDGE, **more: Any) -> Inspection:
    params = more.pop("params", {})
    return Inspection(**{"model": lm.ref, "method": method.ref(params), "requests": (FRANCE,), **more})


class Dict(dict[str, bytes]):
    def put(self, key: str, value: bytes) -> None:
        self[key] = value


@pytest.mark.usefixtures("methods")
def test_a_question_becomes_a_report(lm: ModelAdapter) -> None:
    events: list[Event] = []
    plan = ask(lm)
    digest, hooks = lm.live_digest(), lm.hook_count()
    report = pipeline.inspect(plan, lm, events.append)
    assert report.question == plan
    assert report.digest == plan.key(lm.file_digest)
    assert set(report.frames) == {
        "answers", "next_tokens", "generations", "metrics", "tokens", "module_scores", "module_totals", "weight_change",
        "weight_spectrum",
    }  # fmt: skip
    for name in ("answers", "next_tokens", "generations", "metrics", "module_scores", "module_totals"):
        frame = report.frames[name]
        assert list(frame["state"].unique()) == ["before", "after"]
        counts = frame["state"].value_counts()
        assert counts["before"] == counts["after"] or name == "next_tokens", name
    before, after = (g.reset_index(drop=True) for _, g in report.frames["answers"].groupby("state", sort=False))
    assert not before["logprob"].equals(after["logprob"])
    assert report.receipt.restored
    assert report.receipt.weights_digest_before == report.receipt.weights_digest_after == digest == lm.live_digest()
    assert report.receipt.hooks_left == lm.hook_count() == hooks == 0
    assert tuple(report.timing) == pipeline.STAGES
    assert all(seconds >= 0 for seconds in report.timing.values())
    assert report.notes[0] == "nudged"
    assert any("changed by" in note for note in report.notes)  # a nudge of six times the matrix is a sign of damage
    assert {"torch", "transformers", "python", "device", "edit-anatomy"} <= set(report.environment)
    stages = [event.stage for event in events if isinstance(event, Started) and event.stage in pipeline.STAGES]
    assert tuple(stages) == pipeline.STAGES
    ended = [event.stage for event in events if isinstance(event, Finished) and event.stage in pipeline.STAGES]
    assert ended == stages
    assert Advanced("before", 2, 2) in events
    assert Advanced("nudge", 2, 2) in events


@pytest.mark.usefixtures("methods")
def test_a_report_survives_its_bytes(gpt2: ModelAdapter) -> None:
    report = pipeline.inspect(ask(gpt2), gpt2)
    data = report.to_bytes()
    again = Report.from_bytes(data)
    assert again.to_bytes() == data
    assert again.question == report.question
    assert again.question.key(gpt2.file_digest) == report.digest


@pytest.mark.usefixtures("methods")
def test_the_same_question_has_the_same_numbers(gpt2: ModelAdapter) -> None:
    first, second = (pipeline.inspect(ask(gpt2, seed=3), gpt2).frames for _ in range(2))
    other = pipeline.inspect(ask(gpt2, seed=4), gpt2).frames
    for name, frame in first.items():
        pd.testing.assert_frame_equal(frame, second[name], check_exact=True)
    assert not first["answers"].equals(other["answers"])


@pytest.mark.usefixtures("methods")
def test_a_change_of_nothing_changes_no_number(gpt2: ModelAdapter) -> None:
    report = pipeline.inspect(ask(gpt2, params={"strength": 0}), gpt2)
    for name in ("answers", "next_tokens", "generations", "metrics", "module_scores", "module_totals"):
        states = [g.drop(columns="state").reset_index(drop=True) for _, g in report.frames[name].groupby("state")]
        pd.testing.assert_frame_equal(*states, check_exact=True)


# The memo of the unedited model's looks ----------------------------------------------------------------------------


def test_a_second_method_on_the_same_fact_starts_warm(
    gpt2: ModelAdapter, methods: Registry[Method[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(NUDGE, name="other", title="Other")
    methods.add("other", other)
    memo = Dict()
    cold = pipeline.inspect(ask(gpt2), gpt2, memo=memo)
    assert len(memo) == 2  # evaluation and one view
    asked: list[str] = []
    original = looks.look

    def counted(lm: ModelAdapter, requests: Any, state: str, report: Reporter) -> Any:
        asked.append(state)
        return original(lm, requests, state, report)

    monkeypatch.setattr(looks, "look", counted)
    kept = dict(memo)
    warm = pipeline.inspect(ask(gpt2, other, params={"layer": 2}, seed=9), gpt2, memo=memo)
    assert asked == ["after"]
    assert dict(memo) == kept
    for name in ("answers", "generations", "module_scores", "module_totals"):
        before = [r.frames[name][r.frames[name]["state"] == "before"] for r in (cold, warm)]
        pd.testing.assert_frame_equal(*before, check_exact=True)


@pytest.mark.usefixtures("methods")
def test_another_fact_model_or_version_does_not_meet_in_the_memo(
    gpt2: ModelAdapter, tiny_lm: Callable[[str], ModelAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    memo = Dict()
    pipeline.inspect(ask(gpt2), gpt2, memo=memo)
    pipeline.inspect(ask(gpt2, requests=(replace(FRANCE, neighbours=()),)), gpt2, memo=memo)
    assert len(memo) == 4
    llama = tiny_lm("llama")
    pipeline.inspect(ask(llama), llama, memo=memo)
    assert len(memo) == 6
    monkeypatch.setattr(looks, "VERSION", looks.VERSION + 1)
    pipeline.inspect(ask(gpt2), gpt2, memo=memo)
    assert len(memo) == 7


@pytest.mark.usefixtures("methods")
def test_a_damaged_memo_is_looked_at_again(gpt2: ModelAdapter) -> None:
    memo = Dict()
    first = pipeline.inspect(ask(gpt2), gpt2, memo=memo)
    good = dict(memo)
    for key, value in good.items():
        memo[key] = value[: len(value) // 2]
    second = pipeline.inspect(ask(gpt2), gpt2, memo=memo)
    pd.testing.assert_frame_equal(first.frames["answers"], second.frames["answers"])
    assert dict(memo) == good


@pytest.mark.usefixtures("methods")
def test_a_model_without_a_file_digest_is_never_remembered(gpt2: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt2, "file_digest", "")
    memo = Dict()
    pipeline.inspect(ask(gpt2), gpt2, memo=memo)
    assert not memo


# What can't be asked -----------------------------------------------------------------------------------------------


def test_questions_that_do_not_fit_are_refused_before_any_work(
    gpt2: ModelAdapter, methods: Registry[Method[Any]]
) -> None:
    def never(event: Event) -> None:
        raise RuntimeError("work began")

    methods.add("picky", replace(NUDGE, name="picky", title="Picky", needs=lambda spec: "it has too few legs"))
    plan = ask(gpt2)
    for wrong, error, words in (
        (replace(plan, method=replace(plan.method, name="nugde")), UnknownName, "nudge"),
        (replace(plan, method=replace(plan.method, name="picky")), UnsupportedMethod, "too few legs"),
        (replace(plan, method=replace(plan.method, version=2)), BadInput, "version 2"),
        (replace(plan, method=replace(plan.method, params=(("layer", 99),))), BadInput, "out of range"),
        (replace(plan, views=("module_score",)), UnknownName, "module_scores"),
        (replace(plan, model=replace(plan.model, dtype="float16")), BadInput, "float16"),
    ):
        with pytest.raises(error, match=words):
            pipeline.inspect(wrong, gpt2, never)


# Failures: whatever happens, the model is as it was ------------------------------------------------------------------


class Boom(Exception):
    pass


def raiser(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


@dataclass(frozen=True)
class BreaksOnEntry:
    """Fails after it changed the model, before it is fully applied."""

    inner: WeightDelta
    error: BaseException

    @contextmanager
    def applied(self, lm: ModelAdapter) -> Iterator[None]:
        with self.inner.applied(lm), intervene(lm, {Site(0, "mlp"): lambda value: value * 2}):
            raise self.error
            yield

    def summary(self) -> pd.DataFrame:
        return self.inner.summary()


ERRORS = {
    "defect": (lambda: Boom("here"), Boom),
    "cancelled": (Cancelled, Cancelled),
    "stopped": (KeyboardInterrupt, KeyboardInterrupt),
    "accelerator memory": (lambda: torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory),
    "memory": (MemoryError, OutOfMemory),
    "cpu memory": (lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."), OutOfMemory),
    "another runtime error": (lambda: RuntimeError("shapes"), RuntimeError),
}


@pytest.mark.parametrize("place", ["before", "prepare", "apply", "after", "view after", "restore"])
@pytest.mark.parametrize("kind", ERRORS)
def test_failing_leaves_the_model_as_it_was(
    gpt2: ModelAdapter, methods: Registry[Method[Any]], monkeypatch: pytest.MonkeyPatch, place: str, kind: str
) -> None:
    make, expected = ERRORS[kind]
    error = make()
    original_look, original_view = looks.look, VIEWS["module_scores"].look
    fail_look = {"before": "before", "after": "after"}.get(place)

    def look(lm: ModelAdapter, requests: Any, state: str, report: Reporter) -> Any:
        if state == fail_look:
            raise error
        return original_look(lm, requests, state, report)

    def view(self: Any, recording: Any, params: Any, state: str, report: Reporter) -> Any:
        if state == "after" and place == "view after":
            with intervene(recording.lm, {Site(1, "attn"): lambda value: value + 1}):
                raise error
        return original_view(recording, params, state, report)

    def prepare(lm: ModelAdapter, requests: Any, params: NudgeParams, seed: int, report: Reporter) -> Any:
        change = nudge(lm, requests, params, seed, report)
        return BreaksOnEntry(change, error) if place == "apply" else change

    monkeypatch.setattr(looks, "look", look)
    monkeypatch.setattr(type(VIEWS["module_scores"]), "look", view)
    failing = replace(NUDGE, name="failing", prepare=raiser(error) if place == "prepare" else prepare)
    methods.add("failing", failing)
    if place == "restore":
        monkeypatch.setattr(pipeline, "_receipt", raiser(error))
    digest, memo = gpt2.live_digest(), Dict()
    with pytest.raises(expected) as caught:
        pipeline.inspect(ask(gpt2, failing), gpt2, silent, memo)
    if expected is OutOfMemory:
        stage_name = {"prepare": "edit", "apply": "edit", "view after": "after"}.get(place, place)
        assert f"stage: {stage_name}" in str(caught.value)
        assert caught.value.__cause__ is error
    assert gpt2.live_digest() == digest
    assert gpt2.hook_count() == 0
    monkeypatch.undo()


def test_cancelling_at_any_event_leaves_the_model_as_it_was(gpt2: ModelAdapter, methods: Registry[Method[Any]]) -> None:
    events: list[Event] = []
    pipeline.inspect(ask(gpt2), gpt2, events.append)
    digest = gpt2.live_digest()
    for stop_at in range(len(events)):
        left = iter(range(stop_at))

        def reporter(event: Event, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise Cancelled

        with pytest.raises(Cancelled):
            pipeline.inspect(ask(gpt2), gpt2, reporter)
        assert gpt2.live_digest() == digest, events[stop_at]
        assert gpt2.hook_count() == 0


def test_a_change_that_does_not_restore_is_told(methods: Registry[Method[Any]]) -> None:
    from tests.tiny import tiny

    lm = tiny("gpt2")  # not the shared one: it comes back changed

    class Careless:
        @contextmanager
        def applied(self, lm: ModelAdapter) -> Iterator[None]:
            with torch.no_grad():
                lm.weight(0, "mlp_down").add_(0.5)
            yield

        def summary(self) -> pd.DataFrame:
            return WeightDelta(()).summary()

        def pack(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
            return WeightDelta(()).pack()

    methods.add("careless", replace(NUDGE, name="careless", prepare=lambda *_: Careless()))
    report = pipeline.inspect(ask(lm, methods["careless"]), lm)
    assert not report.receipt.restored
    assert report.receipt.weights_digest_before != report.receipt.weights_digest_after
    assert any("not given back" in note for note in report.notes)


def test_a_frame_that_two_views_fill_has_the_rows_of_both(gpt2: ModelAdapter, methods: Registry[Method[Any]]) -> None:
    plan = replace(ask(gpt2), views=("attention_neurons?read=2&top=3", "neurons?read=2&top=3"))
    for memo in (None, Dict()):
        found = pipeline.inspect(plan, gpt2, silent, memo).frames["neuron_tokens"]
        assert set(zip(found["state"], found["kind"], strict=True)) == {
            (state, kind) for state in ("before", "after") for kind in ("ffn", "attn")
        }
