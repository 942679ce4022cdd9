from __future__ import annotations

import numpy as np
import pytest
import torch

from mega_core.attribution import VIEWS, frozen, look_at, read_view, recording
from mega_core.changes import MatrixDelta, WeightDelta
from mega_core.errors import ActionableError
from mega_core.events import Cancelled, Note, silent
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture
from mega_core.records import EditRequest
from tests.reference.nlka_reference import contributions

FRANCE = EditRequest("France", "The capital of {} is", "Rome", "Paris")
TOWER = EditRequest("Eiffel Tower", "{} is in the city of", "London", "Paris")
SHORT = EditRequest("Italy", "{}", "Tokyo")
REQUESTS = (FRANCE, TOWER, SHORT)


def look(lm: ModelAdapter, requests, state: str, report):
    (found,) = look_at(lm, [read_view("module_scores")], requests, state, report).values()
    return found


def states_of(lm: ModelAdapter, request: EditRequest) -> torch.Tensor:
    return recording.record(lm, [request]).states


def first_tokens(lm: ModelAdapter, request: EditRequest) -> dict[str, int]:
    both = {"new": request.target_new, "true": request.target_true}
    return {name: tokens.target_ids(lm.tokenizer, request.prompt, word)[0] for name, word in both.items() if word}


def test_it_telescopes_and_ends_at_the_models_own_answer(lm: ModelAdapter) -> None:
    found = look(lm, REQUESTS, "before", silent)
    scores, totals = found["module_scores"], found["module_totals"]
    assert len(scores) == 5 * 2 * lm.n_layers  # five candidates: SHORT has no true object
    assert set(scores["module"]) == {"attn", "ffn"}
    summed = scores.groupby(["case", "candidate"])["contribution"].sum()
    own = torch.log_softmax(lm.last_logits(lm.encode([r.prompt for r in REQUESTS])).double(), -1)
    for row in totals.itertuples():
        assert row.total == pytest.approx(row.end - row.start, abs=1e-9)
        assert row.total == pytest.approx(summed[row.case, row.candidate], abs=1e-9)
        token = first_tokens(lm, REQUESTS[row.case])[row.candidate]
        assert row.end == pytest.approx(float(own[row.case, token]), abs=1e-4)


def test_the_last_state_gives_the_whole_distribution(lm: ModelAdapter) -> None:
    batch = lm.encode([request.prompt for request in REQUESTS])
    everything = torch.arange(lm.vocab_size).expand(len(REQUESTS), -1)
    with torch.no_grad():
        seen = recording.record(lm, REQUESTS)
        log_p = seen.lens.log_probs(seen.states, everything)
        own = torch.log_softmax(lm.last_logits(batch), -1)
    torch.testing.assert_close(log_p[-1], own, atol=1e-4, rtol=0)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(log_p.shape[:2]))


def test_each_contribution_is_the_definitions(lm: ModelAdapter) -> None:
    scores = look(lm, REQUESTS, "before", silent)["module_scores"]
    totals = look(lm, REQUESTS, "before", silent)["module_totals"]
    parts = [Site(layer, part) for layer in range(lm.n_layers) for part in ("attn", "mlp")]
    norm = lm.final_norm
    zeros = np.zeros(lm.d_model)
    beta = norm.bias.detach().double().numpy() if getattr(norm, "bias", None) is not None else zeros
    bias = lm.head_bias.double().numpy() if lm.head_bias is not None else np.zeros(lm.vocab_size)
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    for case, request in enumerate(REQUESTS):
        with torch.no_grad(), capture(lm, [Site(0, "block_in"), *parts], stop=False) as got:
            lm.forward(lm.encode([request.prompt]))  # alone, so this is a test of padding too
        start, *written = (got[site][0, -1].double().numpy() for site in (Site(0, "block_in"), *parts))
        for candidate, token in first_tokens(lm, request).items():
            low, high, expected = contributions(
                start,
                written,
                norm.weight.detach().double().numpy(),
                beta,
                eps,
                lm.spec.norm == "layernorm",
                lm.head_weight.double().numpy(),
                bias,
                token,
            )
            mine = scores[(scores["case"] == case) & (scores["candidate"] == candidate)]
            mine = mine.sort_values(["layer", "module"])  # "attn" before "ffn"
            np.testing.assert_allclose(mine["contribution"], expected, atol=2e-5)
            total = totals[(totals["case"] == case) & (totals["candidate"] == candidate)].iloc[0]
            np.testing.assert_allclose([total["start"], total["end"]], [low, high], atol=2e-5)


def test_slices_of_the_vocabulary_and_groups_of_prompts_change_nothing(
    lm: ModelAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = look(lm, REQUESTS, "before", silent)["module_scores"]
    monkeypatch.setattr(frozen, "LOGITS_AT_ONCE", 100)
    monkeypatch.setattr(recording, "CAPTURE_BYTES", 1)
    sliced = look(lm, REQUESTS, "before", silent)["module_scores"]
    np.testing.assert_allclose(sliced["contribution"], whole["contribution"], atol=1e-5)
    assert sliced.drop(columns="contribution").equals(whole.drop(columns="contribution"))


def test_adding_the_modules_output_has_the_effect_it_reports(lm: ModelAdapter) -> None:
    """Only at the last MLP: whatever comes later would react, and here nothing comes later. Norm frozen by hand."""
    last = lm.n_layers - 1
    with torch.no_grad():
        states = states_of(lm, FRANCE)
        new = torch.tensor([[first_tokens(lm, FRANCE)["new"]]])
        path = frozen.FrozenLens.of(lm, states[-1]).log_probs(states, new)[:, 0, 0]
        alone = frozen.FrozenLens.of(lm, states[-1]).log_probs(states[[-2, -1]], new)[:, 0, 0]
    scores = look(lm, [FRANCE], "before", silent)["module_scores"]
    row = scores[(scores["layer"] == last) & (scores["module"] == "ffn") & (scores["candidate"] == "new")].iloc[0]
    assert row["contribution"] == pytest.approx(float(alone[1] - alone[0]), abs=1e-6)
    assert float(path[-1]) == pytest.approx(float(alone[1]), abs=1e-6)


def test_an_edit_before_a_layer_moves_only_what_comes_after_it(tiny_lm) -> None:
    lm = tiny_lm("llama")
    left, right = torch.randn(lm.d_model, 1), torch.randn(lm.d_mlp, 1)
    edit = WeightDelta((MatrixDelta(1, "mlp_down", left, right, 1.0),))
    states_before = states_of(lm, FRANCE)
    with edit.applied(lm), torch.no_grad():
        states_after = states_of(lm, FRANCE)
        after = look(lm, [FRANCE], "after", silent)
    assert torch.equal(states_before[:4], states_after[:4])  # up to the attention of layer 1
    assert not torch.equal(states_before[4], states_after[4])
    assert set(after["module_scores"]["state"]) == {"after"}


def test_a_shared_first_token_is_said(tiny_lm) -> None:
    said: list[object] = []
    lm = tiny_lm("gpt2")
    first = tokens.target_ids(lm.tokenizer, "France is", "Paris")
    assert first == tokens.target_ids(lm.tokenizer, "France is", "Paris, Texas")[: len(first)]
    found = look(lm, [EditRequest("France", "{} is", "Paris, Texas", "Paris")], "before", said.append)
    assert [event for event in said if isinstance(event, Note)]
    both = found["module_totals"].set_index("candidate")["total"]
    assert both["new"] == both["true"]


def test_numbers_that_are_not_finite_are_refused(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    huge = torch.full((lm.d_model, 1), float("inf"))
    broken = WeightDelta((MatrixDelta(0, "mlp_down", huge, torch.ones(lm.d_mlp, 1), 1.0),))
    with broken.applied(lm), pytest.raises(ActionableError, match="not finite"):
        look(lm, [FRANCE], "after", silent)


def test_cancelling_leaves_no_hook(tiny_lm) -> None:
    def stop(event: object) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        look(tiny_lm("gpt_neox"), [FRANCE], "before", stop)


def test_the_view_fills_the_frames_it_names(tiny_lm) -> None:
    assert set(look(tiny_lm("qwen3"), [FRANCE], "before", silent)) == set(VIEWS["module_scores"].frames)
