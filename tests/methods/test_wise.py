"""What WISE promises: a masked side copy, answered by those it was trained for, and silence everywhere else."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from mega_core.changes import Chain, DenseDelta, WeightDelta
from mega_core.embedded import facts
from mega_core.embedded.examples import candidates
from mega_core.events import Advanced, Event, Note, silent
from mega_core.methods.memory import Side, WiseMemory, distance
from mega_core.methods.wise import WISE, WiseParams, default_layer, other_prompts, prepare
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture
from mega_core.records import EditRequest

SEE = EditRequest("The Eiffel Tower", "Here we see {}", "Madrid")
LOOK = EditRequest("Mount Kenya", "Look at {}", "Rome and Berlin")
FAR = ["The capital of France is", "Rome", "Marie Curie speaks the language of Poland and"]


def _params(**given: Any) -> WiseParams:
    return WISE.read(WISE.ref({"learning_rate": 3.0, "contexts": 2, "steps": 20, **given}))


def _with(change: WiseMemory, threshold: float) -> WiseMemory:
    """The same side copies with a router that opens above another distance."""
    return WiseMemory(tuple(Side(s.layer, s.difference, threshold, s.tokens, s.base_norm) for s in change.sides))


def _log_prob(lm: ModelAdapter, request: EditRequest) -> float:
    row = tokens.with_target(lm.tokenizer, request.prompt, request.target_new)
    batch = tokens.pack(lm.tokenizer, [row.ids], lm.device, [row.target_start])
    at = torch.arange(row.target_start - 1, len(row.ids) - 1)
    with torch.no_grad():
        logs = lm.logits_at(batch, torch.zeros_like(at), at).float().log_softmax(-1)
    return float(logs.gather(-1, torch.tensor(row.target)[:, None]).sum())


def _distances(lm: ModelAdapter, change: WiseMemory, prompts: list[str]) -> list[float]:
    (side,) = change.sides
    found = []
    for prompt in prompts:
        with capture(lm, [Site(side.layer, "mlp_down_in")]) as got:
            lm.forward(lm.encode([prompt]))
        added = got[Site(side.layer, "mlp_down_in")][0] @ side.difference.T
        found.append(float(added.norm(dim=-1).mean()))
    return found


def test_the_distance_is_the_mean_length_over_the_prompts_own_tokens() -> None:
    written = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [9.0, 9.0]], [[6.0, 8.0], [5.0, 5.0], [5.0, 5.0]]])
    assert distance(written, [2, 1], "prompt").tolist() == [3.0, 10.0]
    assert distance(written, [2, 1], "last").tolist() == [1.0, 10.0]


def test_only_the_masks_share_of_numbers_changes(lm: ModelAdapter) -> None:
    digest = lm.live_digest()
    change = prepare(lm, [SEE], _params(steps=4), 0, silent)
    (side,) = change.sides
    assert lm.live_digest() == digest
    assert side.difference.shape == (lm.d_model, lm.d_mlp)
    assert 0.15 < float((side.difference != 0).float().mean()) < 0.25
    assert int(change.summary()["parameters"].iloc[0]) == int((side.difference != 0).sum())


def test_a_prompt_below_the_threshold_keeps_its_bits_alone_and_in_a_mixed_batch(lm: ModelAdapter) -> None:
    change = prepare(lm, [SEE], _params(), 0, silent)
    near, *far = _distances(lm, change, [SEE.prompt, *FAR])
    change = _with(change, near - 1e-3)
    kept = [prompt for prompt, away in zip(FAR, far, strict=True) if away < near - 2e-3]
    assert kept
    alone, mixed = lm.encode(kept), lm.encode([kept[0], SEE.prompt, *kept])
    with torch.no_grad():
        before = lm.last_logits(alone), lm.last_logits(mixed)
        with change.applied(lm):
            after = lm.last_logits(alone), lm.last_logits(mixed)
    assert torch.equal(before[0], after[0])
    same = [torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True)]
    assert same == [True, False, *[True] * len(kept)]


def test_a_routed_row_is_answered_by_the_side_copy(lm: ModelAdapter) -> None:
    """As if the copy stood in the model, target tokens and generated ones included."""
    change = prepare(lm, [SEE, LOOK], _params(steps=5), 0, silent)
    (side,) = change.sides
    with WeightDelta((DenseDelta(side.layer, "mlp_down", side.difference, side.base_norm),)).applied(lm):
        wanted, text = [_log_prob(lm, request) for request in (SEE, LOOK)], lm.generate([SEE.prompt, LOOK.prompt], 5)
    with _with(change, 0.0).applied(lm):
        assert [_log_prob(lm, request) for request in (SEE, LOOK)] == pytest.approx(wanted, rel=1e-3, abs=1e-3)
        assert lm.generate([SEE.prompt, LOOK.prompt], 5) == text


def test_the_threshold_is_a_share_of_the_smallest_distance_in_training(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    change = prepare(lm, [SEE, LOOK], _params(contexts=1, act_ratio=0.5), 0, silent)
    assert change.sides[0].threshold == pytest.approx(0.5 * min(_distances(lm, change, [SEE.prompt, LOOK.prompt])))


def test_the_margins_push_edited_and_other_prompts_apart(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    gaps = []
    for beta, gamma in ((0.0, 0.0), (3.0, 1.5)):
        params = _params(contexts=1, alpha=0.5, beta=beta, gamma=gamma, learning_rate=0.1, steps=60, mask=1.0)
        change = prepare(lm, [SEE], params, 0, silent)
        near, *far = _distances(lm, change, [SEE.prompt, *other_prompts([SEE], params.others, 0)])
        gaps.append(near - max(far))
    assert gaps[1] > max(gaps[0], 1.0)


def test_of_several_side_copies_the_most_stirred_one_answers(tiny_lm: Any) -> None:
    lm = tiny_lm("llama")
    changes = [prepare(lm, [request], _params(), seed, silent) for seed, request in enumerate((SEE, LOOK))]
    alone = []
    for change, request in zip(changes, (SEE, LOOK), strict=True):
        with change.applied(lm):
            alone.append(_log_prob(lm, request))
    away = [[_distances(lm, change, [r.prompt])[0] for change in changes] for r in (SEE, LOOK)]
    with Chain(tuple(changes)).applied(lm):
        assert len(lm.changes) == 1
        together = [_log_prob(lm, request) for request in (SEE, LOOK)]
    for i, own in enumerate(away):
        if own[i] == max(own):
            assert together[i] == pytest.approx(alone[i], abs=1e-4)
    assert any(own[i] == max(own) for i, own in enumerate(away))


def test_other_prompts_are_never_what_edits_are_judged_by() -> None:
    for request in islice(candidates(5, min_neighbours=1), 30):
        others = other_prompts([request], 16, 0)
        assert len(others) == 16
        assert not set(others) & {request.prompt, *request.paraphrases, *request.neighbours}
        assert not any(request.subject in prompt for prompt in others)
        assert others == other_prompts([request], 16, 0)


def test_other_facts_of_the_subject_are_held_apart_where_asked() -> None:
    for request in islice(candidates(5, min_neighbours=1), 10):
        others = other_prompts([request], 16, 0, same_subject=True)
        own = [prompt for prompt in others if request.subject in prompt]
        asked = {fact.prompt(form) for fact in facts.load().by_subject[request.subject] for form in fact.templates_edit}
        held = {fact.prompt(f) for fact in facts.load().by_subject[request.subject] for f in fact.templates_held_out}
        assert not set(own) & (asked | held | {*request.paraphrases})
        assert len(own) <= 8
        assert own or len(facts.load().by_subject[request.subject]) == 1


def test_known_prompts_are_held_apart_in_their_own_words() -> None:
    request = next(candidates(5, min_neighbours=1))
    head, tail = request.template.split("{}")
    others = other_prompts([request], 8, 0)
    assert sum(prompt.startswith(head) and prompt.endswith(tail) for prompt in others) >= 4


def test_it_stops_when_all_is_said_and_no_margin_is_missed(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    counts = []
    for stop in (0.05, 1.0):
        seen: list[Event] = []
        margins = {"alpha": 1000.0, "beta": 0.0, "gamma": 0.0}
        prepare(lm, [SEE], _params(stop_probability=stop, steps=40, **margins), 0, seen.append)
        counts.append(sum(isinstance(event, Advanced) for event in seen))
    # gamma = 0 still asks edited prompts to lie above the others, so the first may run on a little
    assert counts[0] < counts[1] == 40


def test_a_router_that_would_open_for_others_is_said(tiny_lm: Any) -> None:
    notes: list[Event] = []
    prepare(tiny_lm("gpt2"), [SEE], _params(steps=2, act_ratio=0.0), 0, notes.append)
    assert any(isinstance(event, Note) and "side memory" in event.text for event in notes)


def test_the_default_layer_is_late() -> None:
    assert [default_layer(n) for n in (1, 3, 8, 32)] == [0, 2, 6, 26]
