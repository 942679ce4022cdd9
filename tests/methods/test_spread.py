"""Spreading over layers against doing it by hand: one row at a time, plain weights, full forwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mega_core.errors import ActionableError, BadInput
from mega_core.events import Advanced, Cancelled, Event, silent
from mega_core.methods import optimise, solve, spread
from mega_core.methods.rome import CONTEXTS
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture
from mega_core.records import EditRequest

REQUESTS = (
    EditRequest("The Eiffel Tower", "{} is in the city of", "Madrid", "Paris"),
    EditRequest("Mount Kenya", "Look at {}", "Rome and Berlin"),
)


def _rows(lm: ModelAdapter) -> list[optimise.Row]:
    contexts = ("{}", *CONTEXTS[:2])
    return [row for i, r in enumerate(REQUESTS) for row in optimise.rows_for(lm, i, r, contexts, ("{} is a",))]


def _at(lm: ModelAdapter, row: optimise.Row, site: Site) -> Tensor:
    """The value at the subject's last token, from the whole text alone."""
    with capture(lm, [site], stop=False) as got, torch.no_grad():
        lm.logits(optimise.tokens.pack(lm.tokenizer, [row.ids]))
    return got[site][0, row.subject].double()


def _soft(layer: int, keys: Tensor, changes: Tensor) -> solve.LowRank:
    """R K^T (I + K K^T)^-1 in full."""
    k, r = keys.double().T, changes.double().T
    matrix = r @ k.T @ torch.linalg.inv(torch.eye(len(k), dtype=k.dtype) + k @ k.T)
    return solve.LowRank(matrix, torch.eye(len(k), dtype=k.dtype))


def _by_hand(
    lm: ModelAdapter,
    order: list[tuple[int, float]],
    goal: Tensor,
    goal_site: Site,
    site: str,
    weights: tuple[float, ...],
) -> tuple[list[Tensor], list[Tensor]]:
    """(updates, keys) per layer; the model is put back."""
    texts = [[row for row in _rows(lm) if row.request == i and row.target] for i in range(len(REQUESTS))]
    saved = {layer: lm.read_weight(layer, site).clone() for layer, _ in order}
    updates, keys = [], []
    for layer, part in order:
        place = Site(layer, spread.INPUT_OF[site])
        key = torch.stack(
            [sum(w * _at(lm, row, place) for w, row in zip(weights, mine, strict=True)) for mine in texts]
        )
        now = torch.stack([_at(lm, mine[0], goal_site) for mine in texts])
        update = _soft(layer, key, part * (goal.double() - now))
        matrix = update.left @ update.right.T
        weight = lm.read_weight(layer, site)
        weight += matrix.to(weight.dtype)
        updates.append(matrix)
        keys.append(key)
    for layer, weight in saved.items():
        lm.read_weight(layer, site).copy_(weight)
    return updates, keys


@pytest.mark.parametrize(
    ("groups", "goal_site", "site", "bare_weight"),
    [
        ([[0, 1, 2]], Site(2, "block_out"), "mlp_down", 0.5),
        ([[2], [0, 1]], Site(2, "mlp"), "mlp_down", None),
        ([[0, 1]], Site(1, "attn"), "attn_out", 0.5),
    ],
)
def test_it_equals_doing_it_by_hand(lm: ModelAdapter, groups, goal_site, site, bare_weight) -> None:
    digest = lm.live_digest()
    goal = torch.randn(2, lm.d_model, generator=torch.Generator().manual_seed(1))
    share: Callable[[int], float] = lambda remaining: 1 / remaining  # noqa: E731
    found, keys = spread.spread(lm, groups, _rows(lm), goal, goal_site, share, _soft, silent, site, bare_weight)
    order = [(layer, 1 / (len(group) - i)) for group in groups for i, layer in enumerate(group)]
    weights = (0.5, 0.25, 0.25) if bare_weight else (1 / 3, 1 / 3, 1 / 3)
    updates, by_hand = _by_hand(lm, order, goal, goal_site, site, weights)
    assert [(m.layer, m.site) for m in found] == [(layer, site) for layer, _ in order]
    for matrix, update, (layer, _), key in zip(found, updates, order, by_hand, strict=True):
        torch.testing.assert_close(matrix.update(torch.device("cpu")).double(), update, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(keys[layer].double(), key, rtol=1e-4, atol=1e-5)
        assert matrix.base_norm == pytest.approx(float(lm.read_weight(layer, site).norm()))
    assert (lm.live_digest(), lm.hook_count(), lm.changes) == (digest, 0, [])


def test_batches_are_bounded_and_change_nothing(tiny_lm, monkeypatch) -> None:
    lm = tiny_lm("llama")
    goal = torch.ones(2, lm.d_model)
    arguments = (lm, [[0, 1]], _rows(lm), goal, Site(1, "block_out"), lambda m: 1.0, _soft)
    whole, _ = spread.spread(*arguments)
    monkeypatch.setattr(spread, "ROWS_AT_ONCE", 1)
    parts, _ = spread.spread(*arguments)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.update(torch.device("cpu")), other.update(torch.device("cpu")))


@pytest.mark.parametrize("groups", [[[3]], [[-1]], [[2, 0]], [[]], []])
def test_layers_that_are_not_there_or_lie_above_the_goal_are_refused(tiny_lm, groups) -> None:
    lm = tiny_lm("gpt2")
    with pytest.raises(BadInput) as caught:
        spread.spread(lm, groups, _rows(lm), torch.zeros(2, 32), Site(1, "block_out"), lambda m: 1.0, _soft)
    assert caught.value.field == "layers"


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_whatever_stops_it_the_model_is_as_before(tiny_lm, stop_at: int) -> None:
    lm = tiny_lm("gptj")
    digest, grad = lm.live_digest(), torch.is_grad_enabled()

    def stop(event: Event) -> None:
        if isinstance(event, Advanced) and event.done == stop_at:
            raise Cancelled

    arguments = (lm, [[0, 1]], _rows(lm), torch.ones(2, 32), Site(1, "block_out"), lambda m: 1.0)
    with pytest.raises(Cancelled):
        spread.spread(*arguments, _soft, stop)
    with pytest.raises(ActionableError, match="layer 0 is not finite"):
        spread.spread(*arguments, lambda layer, k, r: solve.LowRank(r.T * float("nan"), k.T))
    assert (lm.live_digest(), lm.hook_count(), lm.changes) == (digest, 0, [])
    assert torch.is_grad_enabled() is grad


def test_goals_without_a_bare_prompt_are_a_mistake(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    rows = [row for row in _rows(lm) if not row.bare]
    with pytest.raises(ValueError, match="bare prompts"):
        spread.spread(lm, [[0]], rows, torch.zeros(2, 32), Site(1, "block_out"), lambda m: 1.0, _soft)


@pytest.mark.parametrize(
    ("text", "layers"), [("3-5,7", (3, 4, 5, 7)), (" 2 ", (2,)), ("4, 1-2,2", (1, 2, 4)), ("0-7", tuple(range(8)))]
)
def test_layers_are_read_from_text(text: str, layers: tuple[int, ...]) -> None:
    assert spread.parse_layers(text, 8, "memit.layers") == layers


@pytest.mark.parametrize(
    ("text", "words"),
    [("3-9", "layer 9"), ("8", "layer 8"), ("5-3", "backwards"), ("", "no layer"), ("1,,2", "no layer"), ("a", "'a'")]
    + [("-1", "'-1'"), ("0-999999999999", "999999999999"), ("1.5", "1.5")],
)
def test_layers_that_cannot_be_read_are_named(text: str, words: str) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        spread.parse_layers(text, 8, "memit.layers")
    assert caught.value.field == "memit.layers"


def test_the_default_ends_at_a_third_of_the_depth() -> None:
    assert spread.default_layers(48) == (12, 13, 14, 15, 16)
    assert spread.default_layers(8) == (2, 3)
    assert spread.default_layers(3) == (0, 1)
    assert spread.default_layers(1) == (0,)
