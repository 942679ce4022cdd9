"""SAKE: with one row on each side it puts the target's state in the source's place; on real models it edits."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from mega_core.changes import Chain
from mega_core.embedded.examples import candidates
from mega_core.events import silent
from mega_core.methods import METHODS, fitting
from mega_core.methods.fitting import FitSet
from mega_core.methods.gate import known_fact
from mega_core.methods.sake import SAKE, prepare
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import FINAL, Site
from mega_core.records import EditRequest
from tests.reference.transport_reference import plain_map

EMBEDDED = Path(__file__).resolve().parents[2] / "mega_core" / "embedded" / "weights"
TOWER = EditRequest("The Eiffel Tower", "Look at {}", "Berlin and Madrid", "Paris")
OTHER = "In fact, Rome is here"


def _params(**given):
    return SAKE.read(SAKE.ref(given))


@pytest.fixture
def one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source is the edit prompt alone, the target a prompt that has nothing to do with it."""

    def sets(lm, request, *args):
        target = tokens.target_ids(lm.tokenizer, request.prompt, request.target_new)
        return FitSet((request.prompt,), (), (OTHER,), target, "contexts")

    monkeypatch.setattr(fitting, "target_sets", sets)


def _logits_along(lm: ModelAdapter, prompt: str, target: tuple[int, ...]) -> torch.Tensor:
    """(token of the target, vocab): what predicts each, the target read along."""
    ids = tokens.prompt_ids(lm.tokenizer, prompt)
    batch = tokens.pack(lm.tokenizer, [ids + target], starts=[len(ids)])
    with torch.no_grad():
        return lm.logits(batch)[0, len(ids) - 1 : len(ids) - 1 + len(target)]


def test_it_is_registered() -> None:
    assert METHODS["sake"] is SAKE
    assert SAKE.family == "steering"


def test_one_row_of_each_swaps_the_answer_at_every_token(lm: ModelAdapter, one_row: None) -> None:
    target = tokens.target_ids(lm.tokenizer, TOWER.prompt, TOWER.target_new)
    steered = min(len(target), fitting.MOST_PREFIX)
    wanted, before = _logits_along(lm, OTHER, target), _logits_along(lm, TOWER.prompt, target)
    change = prepare(lm, [TOWER], _params(gate="subject"), 0, silent)
    with change.applied(lm):
        got = _logits_along(lm, TOWER.prompt, target)
        torch.testing.assert_close(got[:steered], wanted[:steered], atol=1e-3, rtol=1e-3)
        assert torch.equal(got[steered:], before[steered:])  # no map so far into the object
        assert torch.equal(_logits_along(lm, "Look at Rome", target), _logits_along(lm, "Look at Rome", target))
    assert torch.equal(_logits_along(lm, TOWER.prompt, target), before)


def test_alpha_is_the_share_of_the_way(tiny_lm, one_row: None) -> None:
    lm = tiny_lm("gptj")
    target = tokens.target_ids(lm.tokenizer, TOWER.prompt, TOWER.target_new)
    from_, to = _logits_along(lm, TOWER.prompt, target)[0], _logits_along(lm, OTHER, target)[0]
    for alpha in (0.0, 0.5, 2.0):
        with prepare(lm, [TOWER], _params(gate="always", alpha=alpha), 0, silent).applied(lm):
            got = _logits_along(lm, TOWER.prompt, target)[0]
        torch.testing.assert_close(got, from_ + alpha * (to - from_), atol=1e-3, rtol=1e-3)  # the head is affine


def test_the_map_is_the_textbooks_between_the_states_of_the_texts(tiny_lm) -> None:
    lm = tiny_lm("qwen3")
    params = _params(target="contexts", prompts=6, contexts="sake", regularisation=0.3)
    change = prepare(lm, [TOWER], params, 0, silent)
    (edit,) = change.edits
    site = Site(lm.n_layers - 1, FINAL)
    fit = fitting.target_sets(lm, TOWER, "contexts", 6, "sake", 0)

    def states(texts):
        with torch.no_grad():
            return np.stack([lm.model.base_model(lm.encode([t]).ids).last_hidden_state[0, -1].numpy() for t in texts])

    source, target = states(fit.source()), states(fit.contexts)
    assert (len(source), len(target)) == (12, 6)
    matrix, bias = plain_map(source.astype(float), target.astype(float), 0.3)
    h = torch.randn(5, lm.d_model, generator=torch.Generator().manual_seed(0))
    moved = h + edit.maps[site, 0].move(h)
    np.testing.assert_allclose(moved, h.numpy() @ matrix.T + bias, atol=2e-3)


def test_two_edits_are_steered_apart(tiny_lm, one_row: None) -> None:
    lm = tiny_lm("llama")
    kenya = EditRequest("Mount Kenya", "Look at {}", "Rome", "Kenya")
    both = prepare(lm, [TOWER, kenya], _params(gate="subject"), 0, silent)
    alone = [prepare(lm, [request], _params(gate="subject"), 0, silent) for request in (TOWER, kenya)]
    assert len(both.edits) == 2
    for change in (both, Chain(tuple(alone))):
        with change.applied(lm):
            for request in (TOWER, kenya):
                target = tokens.target_ids(lm.tokenizer, request.prompt, request.target_new)[:1]
                wanted = _logits_along(lm, OTHER, target)
                torch.testing.assert_close(_logits_along(lm, request.prompt, target), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["atlas-gpt2", "atlas-qwen3"])
def test_it_edits_a_model_that_knows_things(name: str) -> None:
    from mega_core.embedded.evaluate import open_folder

    lm = open_folder(EMBEDDED / name)
    took = named = kept = 0
    edits = list(islice(candidates(11, min_neighbours=1), 6))
    for request in edits:
        fact = known_fact(request)
        assert fact is not None
        digest = lm.live_digest()
        change = prepare(lm, [request], _params(contexts="pool", regularisation=5.0, prompts=12), 0, silent)
        before = lm.generate(request.neighbours[:2], 6)
        with change.applied(lm):
            said = lm.generate([request.prompt, *(fact.prompt(t) for t in fact.templates_held_out)], 6)
            kept += lm.generate(request.neighbours[:2], 6) == before
        took += said[0].startswith(f" {request.target_new}")
        named += sum(text.startswith(f" {request.target_new}") for text in said[1:]) >= 1
        assert lm.live_digest() == digest
    assert (took, kept) == (len(edits), len(edits))
    assert named >= len(edits) - 1
