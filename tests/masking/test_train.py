"""Training a mask: the paper's loss to the last gradient, and what it is good for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mega_core.errors import BadInput
from mega_core.events import Advanced, Cancelled, Event
from mega_core.masking import evaluate
from mega_core.masking.edits import bank_of
from mega_core.masking.train import PUBLISHED, TOP, TrainParams, keep_top, losses, prepare, relaxed, train
from mega_core.models.adapter import ModelAdapter
from tests.masking.cases import LAYER, obvious_edit, random_edits
from tests.reference import mask_reference

TinyLm = Callable[[str], ModelAdapter]


@pytest.mark.parametrize("arch", ["gpt2", "gptj", "qwen3"])
def test_loss_and_gradient_are_those_of_a_plain_dense_implementation(tiny_lm: TinyLm, arch: str) -> None:
    lm = tiny_lm(arch)
    edits = random_edits(lm, (0, LAYER, 2))  # below, at and above the mask
    rows = prepare(lm, LAYER, edits)
    shape = lm.read_weight(LAYER, "mlp_down").shape
    theta = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    epoch, params = 7, replace(PUBLISHED, epochs=20)
    ours = losses(rows, range(len(rows.old)), relaxed(theta, params, epoch), params, epoch).total(params, epoch)
    (mine,) = torch.autograd.grad(ours, theta)

    tau, strength, temperature = mask_reference.schedules(epoch, 20)
    again = theta.detach().clone().requires_grad_()
    plain = mask_reference.loss(lm, LAYER, edits, again, tau=tau, strength=strength, temperature=temperature)
    (theirs,) = torch.autograd.grad(plain, again)
    assert float(ours.detach()) == pytest.approx(float(plain.detach()), rel=1e-4)
    assert float((mine - theirs).abs().max()) < 1e-3 * float(theirs.abs().max())


def test_the_schedules_are_the_published_ones() -> None:
    params = TrainParams()
    assert params.tau(0) == 6
    assert params.tau(300) == pytest.approx(6 * 2.718281828459045 ** (-3 * 300 / 301))
    assert (params.strength(0), params.strength(300)) == (1e-6, 60.0)
    assert (params.temperature(0), params.temperature(300)) == (1.643, 4.301)


def test_the_binary_mask_prunes_exactly_its_share() -> None:
    scores = torch.tensor([[3.0, 1.0, 1.0, 0.0], [5.0, 1.0, 4.0, 2.0]])
    assert keep_top(scores, 0.25).tolist() == [[True, False, True, False], [True, True, True, True]]
    assert bool(keep_top(scores, 0.0).all())
    assert not bool(keep_top(scores, 1.0).any())


@pytest.mark.parametrize("params", [replace(TOP, epochs=12), TrainParams(epochs=40, learning_rate=0.1, s_max=0.1)])
def test_training_lowers_the_loss_and_reverses_an_obvious_edit(tiny_lm: TinyLm, params: TrainParams) -> None:
    lm = tiny_lm("gpt2")
    edits = [obvious_edit(lm, name) for name in ("The Eiffel Tower", "Mount Kenya")]
    before = lm.live_digest()
    trained = train(lm, LAYER, prepare(lm, LAYER, edits), params)
    bank, places = bank_of(edits)
    cases = evaluate.cases_of(edits, places)
    unedited, edited = evaluate.answers(lm, cases, None), evaluate.answers(lm, cases, bank)
    masked = evaluate.answers(lm, cases, bank, {LAYER: trained.binary().float()})
    assert bool(evaluate.took(unedited, edited).all())
    assert evaluate.scores(unedited, edited, masked).rsr == 1
    assert trained.history[-1].rest < trained.history[0].rest
    assert float((~trained.binary()).float().mean()) < 0.5
    assert lm.live_digest() == before


def test_the_same_seed_gives_the_same_mask(tiny_lm: TinyLm) -> None:
    lm = tiny_lm("gpt2")
    rows = prepare(lm, LAYER, random_edits(lm))
    params = replace(TOP, epochs=2)
    first, again, other = (train(lm, LAYER, rows, params, seed).theta for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_cancelling_leaves_the_model_clean(tiny_lm: TinyLm) -> None:
    lm = tiny_lm("gpt2")
    rows = prepare(lm, LAYER, random_edits(lm, (LAYER, 2)))
    before = lm.live_digest()

    def stop(event: Event) -> None:
        if isinstance(event, Advanced):
            raise Cancelled

    with pytest.raises(Cancelled):
        train(lm, LAYER, rows, replace(TOP, epochs=5), report=stop)
    assert lm.live_digest() == before
    assert lm.hook_count() == 0


@pytest.mark.parametrize(
    ("field", "value"), [("epochs", 0), ("s_max", 1.0), ("gamma", 0.0), ("forward", "hard"), ("learning_rate", -1.0)]
)
def test_settings_that_can_not_work_are_named(field: str, value: object) -> None:
    with pytest.raises(BadInput, match=f"mask.{field}"):
        replace(PUBLISHED, **{field: value})
