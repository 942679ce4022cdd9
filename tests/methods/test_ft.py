"""Fine-tuning: its gradient is the whole model's, its clamp holds, and the published loss treats objects as bags."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mega_core.changes import PromptPrefix
from mega_core.errors import ActionableError, BadInput
from mega_core.events import Advanced, Cancelled, Event, Note, silent
from mega_core.methods import METHODS, finetune
from mega_core.methods.base import Method
from mega_core.methods.ft import FT, FT_L, FT_M
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site
from mega_core.records import EditRequest
from tests.reference.ft_reference import plain_fine_tuning
from tests.tiny import tiny

TOWER = EditRequest("The Eiffel Tower", "{} is in the city of", "Madrid", "Paris")
KENYA = EditRequest("Mount Kenya", "{} is on the continent of", "Berlin and Rome")
SEE = EditRequest("The Eiffel Tower", "Here we see {}", "Rome and Berlin")
SETTINGS: dict[str, dict[str, Any]] = {
    "one layer": {"layers": "1", "loss": "target"},
    "two layers": {"layers": "0,2", "loss": "target"},
    "the last layer": {"layers": "2", "loss": "target"},
    "as published": {"layers": "0"},
    "contexts": {"layers": "1", "loss": "target", "contexts": 3},
    "kept prompts": {"layers": "1", "loss": "target", "kl_weight": 0.5},
    "decay": {"layers": "1", "loss": "target", "weight_decay": 0.05},
    "clamp": {"layers": "0-1", "loss": "target", "epsilon": 0.004},
}


def _run(method: Method[Any], lm: ModelAdapter, requests: list[EditRequest], report: Any = silent, **given: Any) -> Any:
    return method.prepare(lm, requests, method.read(method.ref(given)), 0, report)


def _plain(lm: ModelAdapter, requests: list[EditRequest], given: dict[str, Any]) -> Any:
    named = dict(given)
    layers = {"0-1": [0, 1], "0,2": [0, 2]}.get(named["layers"]) or [int(named["layers"])]
    named.pop("layers")
    contexts = ("{}", "In fact, {}", "Therefore, {}")[: named.pop("contexts", 1)]
    return plain_fine_tuning(lm, requests, layers, kind=named.pop("loss", "prompt_last"), contexts=contexts, **named)


def _logs(lm: ModelAdapter, request: EditRequest) -> list[float]:
    """log p of each token of the new object, at its own place."""
    row = tokens.with_target(lm.tokenizer, request.prompt, request.target_new)
    with torch.no_grad():
        logs = lm.logits(tokens.pack(lm.tokenizer, [row.ids])).float().log_softmax(-1)[0]
    return [float(logs[row.target_start - 1 + t, token]) for t, token in enumerate(row.target)]


@pytest.mark.parametrize("given", SETTINGS.values(), ids=SETTINGS)
def test_the_first_gradient_is_that_of_the_whole_model(
    lm: ModelAdapter, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[torch.Tensor] = []

    def first_step(parameters: Any, losses: Any, how: Any, report: Any, *, pull: Any, **_: Any) -> tuple[float, ...]:
        with torch.enable_grad():
            gradients = torch.autograd.grad(sum(losses()), parameters)
        found.extend(gradients)
        return (1.0,)

    monkeypatch.setattr(finetune, "descend", first_step)
    _run(FT, lm, [TOWER, KENYA], **given)
    _, wanted, _ = _plain(lm, [TOWER, KENYA], {**given, "steps": 1})
    for got, want in zip(found, wanted.values(), strict=True):
        assert (got - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("given", SETTINGS.values(), ids=SETTINGS)
def test_the_descent_is_that_of_the_matrix_itself(tiny_lm: Any, given: dict[str, Any]) -> None:
    """Adam divides by the gradient, so entries that hardly have one may differ; the matrix may not."""
    more = {**given, "steps": 6, "learning_rate": 0.003}
    for arch in ("gpt2", "gptj", "qwen3"):
        lm = tiny_lm(arch)
        losses: list[float] = []
        change = _run(FT, lm, [TOWER, KENYA], **more)
        wanted, _, losses = _plain(lm, [TOWER, KENYA], more)
        assert losses[-1] < losses[0]
        for matrix, want in zip(change.matrices, wanted.values(), strict=True):
            assert (matrix.difference - want).norm() < 1e-3 * want.norm()


def test_what_is_said_already_is_not_trained(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    given = {"learning_rate": 0.01, "stop_loss": 0.5, "steps": 200}
    notes: list[Event] = []
    with _run(FT_M, lm, [SEE], **given).applied(lm):
        again = _run(FT_M, lm, [SEE], notes.append, **given)
    assert not again.matrices[0].difference.any()
    assert any(isinstance(note, Note) and "already" in note.text for note in notes)


def test_it_ends_at_the_stop_loss(tiny_lm: Any) -> None:
    lm = tiny_lm("qwen2")
    events: list[Event] = []
    given = {"learning_rate": 0.03, "stop_loss": 0.5, "steps": 100}
    change = _run(FT_M, lm, [SEE], events.append, **given)
    taken = sum(isinstance(event, Advanced) for event in events)
    wanted, _, losses = plain_fine_tuning(lm, [SEE], [1], **given)
    assert 0 < taken == len(losses) - 1 < 100
    with change.applied(lm):
        logs = _logs(lm, SEE)
    assert -sum(logs) / len(logs) < 0.5


@pytest.mark.parametrize("epsilon", [0.01, "0.01", "1e-2"])
def test_the_clamp_holds_however_it_is_written(tiny_lm: Any, epsilon: object) -> None:
    """In the published code a clamp that is no float is none."""
    for method in (FT, FT_L, FT_M):
        change = _run(method, tiny_lm("llama"), [TOWER], epsilon=epsilon, learning_rate=0.05, layers="0-1")
        for matrix in change.matrices:
            assert matrix.difference.abs().max() == torch.tensor(0.01)


@pytest.mark.parametrize("epsilon", [1, "1"])
def test_a_whole_number_clamps_too(tiny_lm: Any, epsilon: object) -> None:
    change = _run(FT_L, tiny_lm("gpt2"), [TOWER], epsilon=epsilon, learning_rate=2.0, stop_loss=0)
    assert change.matrices[0].difference.abs().max() == 1


def test_the_edited_matrix_stays_inside_the_clamp(lm: ModelAdapter) -> None:
    before = lm.weight(1, "mlp_down").clone()
    with _run(FT_L, lm, [TOWER], layers="1", epsilon=0.01, learning_rate=0.05).applied(lm):
        moved = (lm.weight(1, "mlp_down") - before).abs().max()
    assert 0.0099 < moved < 0.01 + 1e-6


def test_ft_l_needs_a_clamp_and_ft_does_not() -> None:
    assert FT.read(FT.ref({"epsilon": "none"})).epsilon is None
    with pytest.raises(BadInput, match="ft_l.epsilon"):
        FT_L.ref({"epsilon": None})
    for method in (FT, FT_L, FT_M):
        assert METHODS[method.name] is method
        with pytest.raises(BadInput, match="epsilon"):
            method.ref({"epsilon": 0})


def test_a_bag_of_tokens_at_one_place_is_not_the_object(tiny_lm: Any) -> None:
    """The published loss leaves all tokens but the first where they were: nothing is trained at their places."""
    lm = tiny_lm("qwen2")
    notes: list[Event] = []
    given = {"learning_rate": 0.01, "steps": 100, "layers": "1"}
    bag, whole = (_run(FT, lm, [SEE], notes.append, loss=loss, **given) for loss in ("prompt_last", "target"))
    with whole.applied(lm):
        assert sum(_logs(lm, SEE)) > -1
    with bag.applied(lm):
        assert sum(_logs(lm, SEE)) < -10
    assert sum(isinstance(note, Note) and "loss = target" in note.text for note in notes) == 1


def test_an_object_of_one_token_has_one_loss(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    one = EditRequest("The Eiffel Tower", "{} is in the city of", "Madrid")
    assert len(tokens.with_target(lm.tokenizer, one.prompt, one.target_new).target) == 1
    a, b = (_run(FT, lm, [one], loss=loss, steps=3).matrices[0].difference for loss in ("prompt_last", "target"))
    assert torch.equal(a, b)


def test_padding_and_grouping_change_nothing(lm: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of several requests is the mean of their own, however they are put together."""
    requests = [TOWER, KENYA, SEE]
    site = Site(0, "block_out")

    def loss(chosen: list[EditRequest]) -> float:
        texts = [t for r in chosen for t in finetune.texts_for(lm, r, ("{}",), ("{} is a",), every_token=True)]
        with torch.no_grad(), finetune.groups(lm, texts, [site]) as groups:
            for group in groups:
                group.loss(group.begin[site], 1)  # tells what is kept
            return float(sum(group.loss(1.5 * group.begin[site], 1, 0.3) for group in groups))

    alone = sum(loss([request]) for request in requests) / 3
    assert loss(requests) == pytest.approx(alone, rel=1e-5)
    monkeypatch.setattr(finetune, "TEXTS_AT_ONCE", 2)
    assert loss(requests) == pytest.approx(alone, rel=1e-5)


def test_several_requests_are_all_learned(lm: ModelAdapter) -> None:
    requests = [SEE, EditRequest("Mount Kenya", "Look at {}", "Berlin"), EditRequest("Japan", "Tokyo is in {}", "Rome")]
    before = [sum(_logs(lm, request)) for request in requests]
    with _run(FT_M, lm, requests, learning_rate=0.03, steps=40).applied(lm):
        assert all(sum(_logs(lm, request)) > old + 2 for old, request in zip(before, requests, strict=True))


def test_kept_prompts_hold_their_answers(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    keep = lm.encode(["The Eiffel Tower is a"])
    moved = []
    with torch.no_grad():
        before = lm.last_logits(keep).log_softmax(-1)[0]
        for weight in (0.0, 20.0):
            with _run(FT_M, lm, [SEE], kl_weight=weight, learning_rate=0.01).applied(lm):
                after = lm.last_logits(keep).log_softmax(-1)[0]
            moved.append(float((before.exp() * (before - after)).sum()))
    assert moved[1] < 0.5 * moved[0]


def test_decay_pulls_to_where_it_is_told(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    weight = lm.read_weight(1, "mlp_down")
    given = {"learning_rate": 0.01, "weight_decay": 10.0, "steps": 40}
    zero, original, free = (
        _run(FT_M, lm, [TOWER], **{**given, **more}).matrices[0].difference
        for more in ({}, {"decay_towards": "original"}, {"weight_decay": 0.0})
    )
    assert original.norm() < free.norm()
    assert (weight + zero).norm() < 0.9 * weight.norm()


def test_a_prompt_in_front_is_not_trained_on(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    alone = _run(FT_M, lm, [TOWER], steps=2).matrices[0].difference
    with PromptPrefix("Paris is in Spain. ").applied(lm):
        behind = _run(FT_M, lm, [TOWER], steps=2).matrices[0].difference
        assert lm.prefix is not None
    assert torch.equal(alone, behind)
    assert lm.prefix is None


def test_summary_says_what_changed(tiny_lm: Any) -> None:
    lm = tiny_lm("gptj")
    table = _run(FT_M, lm, [TOWER], layers="0,2", steps=2).summary()
    assert table["layer"].tolist() == [0, 2]
    assert set(table["kind"]) == {"weights"}
    assert (table["norm"] > 0).all()
    assert set(table["parameters"]) == {lm.d_model * lm.d_mlp}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_trained_in_full_precision(dtype: torch.dtype) -> None:
    """Steps far below a half number's resolution add up, and the gradient is near the full one."""
    full, half = tiny("qwen2"), tiny("qwen2")
    half.model.to(dtype)
    wanted, found = (_run(FT_M, lm, [SEE], learning_rate=1e-5, steps=3).matrices[0].difference for lm in (full, half))
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.9
    before = _logs(half, SEE)
    with _run(FT_M, half, [SEE], learning_rate=0.03).applied(half):
        assert sum(_logs(half, SEE)) > sum(before) + 5
    assert _logs(half, SEE) == before


@pytest.mark.parametrize("at", [1, 4])
def test_cancelling_leaves_the_model_identical(at: int) -> None:
    lm = tiny("llama")
    digest = lm.live_digest()

    def stop(event: Event) -> None:
        if isinstance(event, Advanced) and event.done == at:
            raise Cancelled

    with pytest.raises(Cancelled):
        _run(FT_M, lm, [TOWER], stop, layers="0-1")
    assert (lm.live_digest(), lm.hook_count(), lm.prefix) == (digest, 0, None)
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert torch.is_grad_enabled()


def test_a_step_too_large_is_an_error_a_person_can_act_on(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    with torch.no_grad():
        saved = lm.model.transformer.ln_f.weight.clone()
        lm.model.transformer.ln_f.weight.fill_(float("inf"))
    try:
        with pytest.raises(ActionableError, match="learning rate"):
            _run(FT_M, lm, [TOWER])
    finally:
        with torch.no_grad():
            lm.model.transformer.ln_f.weight.copy_(saved)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"layers": "99"}, "layers"),
        ({"layers": "two"}, "layers"),
        ({"layers": "2-1"}, "layers"),
        ({"kl_weight": 1, "kl_prompts": "no place"}, "kl_prompts"),
    ],
)
def test_params_that_do_not_fit_are_refused_by_name(tiny_lm: Any, given: dict[str, Any], field: str) -> None:
    with pytest.raises(BadInput) as caught:
        _run(FT, tiny_lm("gpt2"), [TOWER], **given)
    assert caught.value.field == f"ft.{field}"
