"""What MEMIT promises: the closed form of its paper layer by layer, many facts at once, and all of it undone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mega_core.changes import WeightDelta
from mega_core.errors import BadInput
from mega_core.events import Advanced, Cancelled, Event, silent
from mega_core.methods import METHODS, covariance, optimise
from mega_core.methods.memit import MEMIT, prepare
from mega_core.methods.rome import CONTEXTS
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture
from mega_core.records import EditRequest
from tests.reference.closed_forms import memit_update
from tests.reference.rome_reference import naive_second_moment
from tests.tiny import tiny

TOWER = EditRequest("The Eiffel Tower", "{} is in the city of", "Madrid", "Paris")
# Where the subject ends the prompt, the new value is read directly, so that random weights can say anything.
THREE = (
    EditRequest("The Eiffel Tower", "Here we see {}", "Madrid"),
    EditRequest("Mount Kenya", "Look at {}", "Berlin"),
    EditRequest("Marie Curie", "A letter from {}", "Rome and Tokyo"),
)
STRONG = {"learning_rate": 0.3, "clamp": 30.0, "weight_decay": 0.0, "steps": 40, "contexts": 2, "mom2_weight": 0.01}


def _params(**given: Any) -> Any:
    return MEMIT.read(MEMIT.ref(given))


def _log_prob(lm: ModelAdapter, request: EditRequest) -> float:
    row = tokens.with_target(lm.tokenizer, request.prompt, request.target_new)
    with torch.no_grad():
        logs = lm.logits(tokens.pack(lm.tokenizer, [row.ids])).float().log_softmax(-1)[0]
    return float(sum(logs[row.target_start - 1 + t, token] for t, token in enumerate(row.target)))


def _at_subject(lm: ModelAdapter, request: EditRequest, site: Site, context: str = "{}") -> torch.Tensor:
    template = context.replace("{}", request.template)
    at = tokens.subject_last(lm.tokenizer, template, request.subject)
    with capture(lm, [site]) as got:
        lm.forward(lm.encode([template.replace("{}", request.subject)]))
    return got[site][0, at].double()


def _update(change: WeightDelta, index: int) -> np.ndarray:
    return change.matrices[index].update(torch.device("cpu")).double().numpy()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_each_of_several_targets_rises_and_all_is_undone(lm: ModelAdapter, n: int) -> None:
    requests, digest = THREE[:n], lm.live_digest()
    before = [_log_prob(lm, request) for request in requests]
    change = prepare(lm, requests, _params(**STRONG), 0, silent)
    assert [(m.layer, m.site, m.rank()) for m in change.matrices] == [(0, "mlp_down", n), (1, "mlp_down", n)]
    assert {layer: keys.shape for layer, keys in change.keys.items()} == {0: (n, lm.d_mlp), 1: (n, lm.d_mlp)}
    with change.applied(lm):
        for old, request in zip(before, requests, strict=True):
            assert _log_prob(lm, request) > old + 2
    assert (lm.live_digest(), lm.hook_count(), lm.changes) == (digest, 0, [])


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gptj"])
def test_the_updates_are_the_papers(tiny_lm, arch: str) -> None:
    """Layer 1 is solved on the model whose layer 0 is edited, with what is still missing there."""
    lm = tiny_lm(arch)
    requests = (TOWER, THREE[1])
    contexts = ("{}", *CONTEXTS[:2])
    change = prepare(
        lm, requests, _params(layers="0,1", steps=3, shrinkage=0.1, mom2_weight=0.5, contexts=3), 0, silent
    )
    rows = [row for i, r in enumerate(requests) for row in optimise.rows_for(lm, i, r, contexts, ("{} is a",))]
    found = optimise.find_values(
        lm, 1, rows, optimise.Search(steps=3, clamp=0.75, reference="residual", stop_probability=0.99)
    )
    goal = (found.residual + found.delta).double()
    texts = covariance.covariance_texts(lm, covariance.tokens_for("quick", lm.d_mlp))
    statistics = {
        layer: covariance.shrink(torch.from_numpy(naive_second_moment(lm, layer, texts)), 0.1).numpy()
        for layer in (0, 1)
    }
    for index, (layer, share) in enumerate(((0, 0.5), (1, 1.0))):
        with WeightDelta(change.matrices[:index]).applied(lm):
            site = Site(layer, "mlp_down_in")
            read = [[_at_subject(lm, request, site, context) for context in contexts] for request in requests]
            keys = torch.stack([bare / 2 + (one + other) / 4 for bare, one, other in read])
            now = torch.stack([_at_subject(lm, r, Site(1, "block_out")) for r in requests])
        wanted = memit_update(statistics[layer], keys.T.numpy(), (share * (goal - now)).T.numpy(), 0.5)
        assert np.abs(_update(change, index) - wanted).max() < 2e-3 * np.abs(wanted).max()


def test_with_a_small_lambda_the_stream_arrives_at_its_goal(lm: ModelAdapter) -> None:
    given = {**STRONG, "mom2_weight": 1e-6, "contexts": 1, "layers": "0-2", "steps": 5}
    rows = [row for i, r in enumerate(THREE) for row in optimise.rows_for(lm, i, r, ("{}",), ("{} is a",))]
    search = optimise.Search(5, 0.3, 30.0, "residual", weight_decay=0.0, stop_probability=0.99)
    found = optimise.find_values(lm, 2, rows, search)
    with prepare(lm, THREE, _params(**given), 0, silent).applied(lm):
        now = torch.stack([_at_subject(lm, request, Site(2, "block_out")) for request in THREE])
    goal = (found.residual + found.delta).double()
    assert (now - goal).norm() < 0.02 * found.delta.norm()


def test_a_larger_lambda_moves_less(tiny_lm) -> None:
    lm = tiny_lm("qwen3")
    norms = [
        prepare(lm, [TOWER], _params(steps=3, mom2_weight=weight), 0, silent).summary()["norm"].sum()
        for weight in (0.1, 10.0, 1000.0)
    ]
    assert norms == sorted(norms, reverse=True)


def test_a_fact_that_comes_twice_is_no_trouble(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    other = EditRequest(THREE[0].subject, THREE[0].template, "Berlin")
    before = [_log_prob(lm, request) for request in (THREE[0], other, THREE[1])]
    with prepare(lm, [THREE[0], other, THREE[0], THREE[1]], _params(**STRONG), 0, silent).applied(lm):
        after = [_log_prob(lm, request) for request in (THREE[0], other, THREE[1])]
    assert after[0] > before[0] + 1
    assert after[2] > before[2] + 1


@pytest.mark.parametrize("source", ["fixed", "sampled"])
def test_the_same_question_gives_the_same_numbers(tiny_lm, source: str) -> None:
    lm = tiny_lm("mistral")
    first, again = (prepare(lm, THREE, _params(steps=3, context_source=source), 7, silent) for _ in range(2))
    for one, other in zip(first.matrices, again.matrices, strict=True):
        assert torch.equal(one.left, other.left)
        assert torch.equal(one.right, other.right)


def test_a_later_edit_is_made_for_the_model_as_it_stands(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    first = prepare(lm, THREE[:1], _params(**STRONG), 0, silent)
    plain = prepare(lm, THREE[1:2], _params(**STRONG), 0, silent)
    with first.applied(lm):
        digest = lm.live_digest()
        second = prepare(lm, THREE[1:2], _params(**STRONG), 0, silent)
        assert lm.live_digest() == digest
        assert lm.changes == [first]
    assert not torch.equal(second.matrices[1].left, plain.matrices[1].left)


@pytest.mark.parametrize("at", [("key statistics", 1), ("new value", 2), ("layers", 1), ("layers", 3)])
def test_cancelling_leaves_the_model_identical(at: tuple[str, int]) -> None:
    lm = tiny("qwen2")
    digest = lm.live_digest()

    def stop(event: Event) -> None:
        if isinstance(event, Advanced) and (event.stage, event.done) == at:
            raise Cancelled

    with pytest.raises(Cancelled):
        prepare(lm, [TOWER], _params(steps=4), 0, stop)
    assert (lm.live_digest(), lm.hook_count(), lm.changes) == (digest, 0, [])


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"layers": "1-7"}, "memit.layers"),
        ({"layers": "some"}, "memit.layers"),
        ({"kl_prompts": "no place for the subject"}, "memit.kl_prompts"),
    ],
)
def test_params_that_do_not_fit_are_refused_by_name(tiny_lm, given: dict[str, Any], field: str) -> None:
    with pytest.raises(BadInput) as caught:
        prepare(tiny_lm("gpt2"), [TOWER], _params(**given), 0, silent)
    assert caught.value.field == field


def test_it_is_registered_with_published_values() -> None:
    assert METHODS["memit"] is MEMIT
    params = MEMIT.params()
    assert (params.mom2_weight, params.clamp, params.kl_weight, params.bare_weight) == (15000.0, 0.75, 0.0625, 0.5)


@pytest.mark.slow
def test_three_hundred_facts_at_once(tiny_lm) -> None:
    """More edits than the matrix has dimensions: nothing breaks, and the update is kept by its smaller side."""
    lm = tiny_lm("llama")
    requests = [EditRequest(f"Town {i}", "Look at {}", "Rome" if i % 2 else "Paris") for i in range(300)]
    before = [_log_prob(lm, request) for request in requests[:10]]
    change = prepare(lm, requests, _params(**{**STRONG, "steps": 15}), 0, silent)
    assert all(matrix.rank() == lm.d_model for matrix in change.matrices)
    assert change.keys[0].shape == (300, lm.d_mlp)
    with change.applied(lm):
        after = [_log_prob(lm, request) for request in requests[:10]]
    assert np.mean(after) > np.mean(before) + 1
