"""What AlphaEdit promises: the paper's closed form, free directions only, and earlier edits left in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mega_core.changes import Chain, WeightDelta
from mega_core.errors import BadInput
from mega_core.events import Advanced, Cancelled, Event, silent
from mega_core.methods import METHODS, covariance, optimise
from mega_core.methods.alphaedit import ALPHAEDIT, earlier_keys, prepare
from mega_core.methods.memit import MEMIT
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture
from mega_core.records import EditRequest
from tests.reference.closed_forms import alphaedit_update, null_projector, null_projector_absolute
from tests.reference.rome_reference import naive_second_moment
from tests.tiny import tiny

TOWER = EditRequest("The Eiffel Tower", "Here we see {}", "Madrid")
KENYA = EditRequest("Mount Kenya", "Look at {}", "Berlin")
CURIE = EditRequest("Marie Curie", "A letter from {}", "Rome and Tokyo")
SEARCH = {"learning_rate": 0.3, "clamp": 30.0, "weight_decay": 0.0, "steps": 40, "contexts": 2}
STRONG = {**SEARCH, "l2": 0.01, "nullspace_cut": 0.7}


def _params(**given: Any) -> Any:
    return ALPHAEDIT.read(ALPHAEDIT.ref(given))


def _log_prob(lm: ModelAdapter, request: EditRequest) -> float:
    row = tokens.with_target(lm.tokenizer, request.prompt, request.target_new)
    with torch.no_grad():
        logs = lm.logits(tokens.pack(lm.tokenizer, [row.ids])).float().log_softmax(-1)[0]
    return float(sum(logs[row.target_start - 1 + t, token] for t, token in enumerate(row.target)))


def _update(change: WeightDelta, layer: int) -> torch.Tensor:
    (matrix,) = (matrix for matrix in change.matrices if matrix.layer == layer)
    return matrix.update(torch.device("cpu")).double()


def _second_moment(lm: ModelAdapter, layer: int) -> np.ndarray:
    return naive_second_moment(lm, layer, covariance.covariance_texts(lm, covariance.tokens_for("quick", lm.d_mlp)))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_each_of_several_targets_rises_and_all_is_undone(lm: ModelAdapter, n: int) -> None:
    requests, digest = (TOWER, KENYA, CURIE)[:n], lm.live_digest()
    before = [_log_prob(lm, request) for request in requests]
    change = prepare(lm, requests, _params(**STRONG), 0, silent)
    with change.applied(lm):
        for old, request in zip(before, requests, strict=True):
            assert _log_prob(lm, request) > old + 1
    assert (lm.live_digest(), lm.hook_count(), lm.changes) == (digest, 0, [])


@pytest.mark.parametrize("nullspace", ["relative", "absolute"])
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_the_update_is_the_papers(tiny_lm, arch: str, nullspace: str) -> None:
    lm = tiny_lm(arch)
    given = {"layers": "1", "steps": 3, "contexts": 1, "nullspace_cut": 0.4, "nullspace": nullspace, "l2": 0.3}
    earlier = prepare(lm, [KENYA, CURIE], _params(**given), 0, silent)
    with earlier.applied(lm):
        change = prepare(lm, [TOWER], _params(**given), 0, silent)
        rows = optimise.rows_for(lm, 0, TOWER, ("{}",), ("{} is a",))
        search = optimise.Search(3, clamp=0.75, reference="residual", stop_probability=0.99)
        found = optimise.find_values(lm, 1, rows, search)
    cut = null_projector if nullspace == "relative" else null_projector_absolute
    wanted = alphaedit_update(
        cut(_second_moment(lm, 1), 0.4),
        found.key.double().numpy().T,
        found.delta.double().numpy().T,
        earlier.keys[1].double().numpy().T,
        0.3,
    )
    assert np.abs(_update(change, 1).numpy() - wanted).max() < 5e-3 * np.abs(wanted).max()


def test_ordinary_keys_are_moved_less_than_without_the_null_space(lm: ModelAdapter) -> None:
    """Compared at the same strength: the mean square of D k over ordinary text, by that of D."""
    moved = {}
    free = {**STRONG, "nullspace_cut": 0.3, "steps": 10}
    for method, given in (
        (ALPHAEDIT, free),
        (MEMIT, {**SEARCH, "steps": 10, "mom2_weight": 0.01, "covariance": "identity"}),
    ):
        change = method.prepare(lm, [TOWER], method.read(method.ref({**given, "layers": "1"})), 0, silent)
        update, c = _update(change, 1).numpy(), _second_moment(lm, 1)
        moved[method.name] = np.trace(update @ c @ update.T) / np.trace(update @ update.T)
    assert moved["alphaedit"] < 0.7 * moved["memit"]


def test_earlier_edits_stay_in_place(lm: ModelAdapter) -> None:
    """The second edit finds the first one's keys in the model's changes and hardly moves what they give."""
    given = {**STRONG, "l2": 1e-6, "layers": "0-1", "steps": 10}
    first = prepare(lm, [TOWER, CURIE], _params(**given), 0, silent)
    blind = prepare(lm, [KENYA], _params(**given), 0, silent)
    with first.applied(lm):
        aware = prepare(lm, [KENYA], _params(**given), 0, silent)
    for layer in (0, 1):
        past = first.keys[layer].double()
        before, after = ((_update(change, layer) @ past.T).norm() for change in (blind, aware))
        assert after < 0.02 * before
    with first.applied(lm):
        alone = _log_prob(lm, TOWER)
    with Chain((first, aware)).applied(lm):
        assert _log_prob(lm, TOWER) == pytest.approx(alone, abs=0.3)


def test_keys_of_earlier_edits_come_from_the_changes_that_stand(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    one, two = torch.ones(2, lm.d_mlp), torch.zeros(1, lm.d_mlp)
    assert earlier_keys(lm, 1) is None
    with WeightDelta((), {1: one}).applied(lm), WeightDelta((), {0: two, 1: two}).applied(lm):
        found = earlier_keys(lm, 1)
        assert found is not None
        assert torch.equal(found, torch.cat((one, two)))
        assert earlier_keys(lm, 2) is None
    assert earlier_keys(lm, 1) is None


def test_the_same_question_gives_the_same_numbers(tiny_lm) -> None:
    lm = tiny_lm("mistral")
    given = {**STRONG, "steps": 3, "context_source": "sampled"}
    first, again = (prepare(lm, [TOWER, KENYA], _params(**given), 7, silent) for _ in range(2))
    for one, other in zip(first.matrices, again.matrices, strict=True):
        assert torch.equal(one.left, other.left)
        assert torch.equal(one.right, other.right)


@pytest.mark.parametrize("at", [("key statistics", 1), ("directions to keep", 1), ("new value", 2), ("layers", 2)])
def test_cancelling_leaves_the_model_identical(at: tuple[str, int]) -> None:
    lm = tiny("qwen2")
    digest = lm.live_digest()

    def stop(event: Event) -> None:
        if isinstance(event, Advanced) and (event.stage, event.done) == at:
            raise Cancelled

    with pytest.raises(Cancelled):
        prepare(lm, [TOWER], _params(**{**STRONG, "steps": 4}), 0, stop)
    assert (lm.live_digest(), lm.hook_count(), lm.changes) == (digest, 0, [])


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"layers": "1-7"}, "alphaedit.layers"),
        ({"nullspace_cut": 1e-9}, "nullspace_cut"),
        ({"nullspace_cut": 1e-9, "nullspace": "absolute"}, "nullspace_cut"),
        ({"kl_prompts": "none of it"}, "alphaedit.kl_prompts"),
    ],
)
def test_params_that_do_not_fit_are_refused_by_name(tiny_lm, given: dict[str, Any], field: str) -> None:
    with pytest.raises(BadInput) as caught:
        prepare(tiny_lm("gpt2"), [TOWER], _params(**given), 0, silent)
    assert caught.value.field == field


def test_it_is_registered_with_published_values() -> None:
    assert METHODS["alphaedit"] is ALPHAEDIT
    assert (ALPHAEDIT.params().l2, ALPHAEDIT.params().clamp) == (10.0, 0.75)


def test_the_free_directions_do_not_reach_the_captured_keys_of_text(tiny_lm) -> None:
    """D k stays below the cut's share for ordinary text, seen through the model itself."""
    lm = tiny_lm("gptj")
    change = prepare(lm, [TOWER], _params(**{**STRONG, "layers": "1", "nullspace_cut": 0.05}), 0, silent)
    texts = covariance.covariance_texts(lm, covariance.tokens_for("quick", lm.d_mlp))
    update = _update(change, 1)
    spectral = torch.linalg.matrix_norm(update, 2)
    total = power = 0.0
    for row in texts:
        with capture(lm, [Site(1, "mlp_down_in")]) as got:
            lm.forward(tokens.pack(lm.tokenizer, [row]))
        keys = got[Site(1, "mlp_down_in")][0].double()
        total += float((update @ keys.T).square().sum())
        power += float(keys.square().sum())
    assert total <= 0.05 * float(spectral) ** 2 * power * 1.001
