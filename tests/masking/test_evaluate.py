"""The figures of a mask, by hand; controls that prune as much as what they stand beside."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mega_core.changes import MatrixDelta, WeightDelta
from mega_core.masking import controls, evaluate
from mega_core.masking.edits import Bank, bank_of, read
from mega_core.masking.evaluate import Answers
from mega_core.masking.train import keep_top
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from tests.masking.cases import LAYER, random_edits
from tests.reference import mask_reference

TinyLm = Callable[[str], ModelAdapter]


def _answers(margins: list[float], first: list[int]) -> Answers:
    old = torch.tensor(margins)
    top = torch.stack([torch.arange(100) + 1000 * i for i in first])
    return Answers(old, torch.zeros_like(old), top)


def test_reversal_counts_the_edits_that_took() -> None:
    unedited = _answers([1.0, 2.0, 3.0, -1.0], [1, 1, 1, 1])
    edited = _answers([-4.0, -4.0, 0.5, -4.0], [2, 2, 2, 2])  # the third never took, the fourth was not known
    masked = _answers([0.5, -1.5, 9.0, 9.0], [1, 2, 2, 2])
    found = evaluate.scores(unedited, edited, masked)
    assert (found.cases, found.took) == (2, 0.5)
    assert found.rsr == 0.5
    assert found.rsm == pytest.approx((0.5 - 1.5) / 2)
    assert (found.top1, found.top5, found.top100) == (0.5, 0.5, 0.5)
    only = evaluate.scores(unedited, edited, masked, torch.tensor([True, False, False, False]))
    assert (only.cases, only.rsr) == (1, 1.0)
    assert evaluate.scores(unedited, unedited, masked).cases == 0


def test_overlap_is_of_sets() -> None:
    one = torch.arange(100)[None]
    other = torch.cat((torch.tensor([1, 0, 9, 8, 7]), torch.arange(10, 105)))[None]
    assert evaluate.overlap(one, other, 1) == 0
    assert evaluate.overlap(one, other, 5) == pytest.approx(2 / 5)


def test_answers_are_sums_over_whole_objects(tiny_lm: TinyLm) -> None:
    lm = tiny_lm("llama")
    edits = random_edits(lm, (0, LAYER))
    bank, places = bank_of(edits)
    cases = evaluate.cases_of(edits, places)
    mask = keep_top(torch.rand(lm.read_weight(LAYER, "mlp_down").shape), 0.3).float()
    found = evaluate.answers(lm, cases, bank, {LAYER: mask})
    assert {case.kind for case in cases} == {"edit", "paraphrase"}
    for i, case in enumerate(cases):
        change = edits[case.edit].change
        weights = {layer: mask_reference.dense(lm, layer, change) for layer in (0, LAYER)}
        weights[LAYER] = weights[LAYER] * mask
        for word, said in ((case.old, found.old[i]), (case.new, found.new[i])):
            row = tokens.with_target(lm.tokenizer, case.prompt, word)
            with torch.no_grad():
                total = sum(
                    float(mask_reference.last_logits(lm, row.ids[:at], weights).log_softmax(-1)[row.ids[at]])
                    for at in range(row.target_start, len(row.ids))
                )
            assert float(said) == pytest.approx(total, abs=1e-3)


def test_controls_prune_as_much_as_the_mask(tiny_lm: TinyLm) -> None:
    lm = tiny_lm("gpt2")
    edits = random_edits(lm)
    bank, places = bank_of(edits)
    rows = [tokens.prompt_ids(lm.tokenizer, edit.request.prompt) for edit in edits]
    reading = read(lm, LAYER, rows, bank, torch.tensor(places))
    weight = lm.read_weight(LAYER, "mlp_down")
    keep = keep_top(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)).pow(3), 0.137)
    found = controls.all_of(keep, weight, bank, reading)
    assert tuple(found) == controls.NAMES
    for name, mask in found.items():
        assert mask.shape == keep.shape, name
        assert int((~mask).sum()) == int((~keep).sum()), name
    assert torch.equal((~found["within rows"]).sum(1), (~keep).sum(1))
    assert torch.equal((~found["within columns"]).sum(0), (~keep).sum(0))
    assert not torch.equal(found["within rows"], keep)
    assert float(weight[~found["largest weight"]].abs().min()) >= float(weight[found["largest weight"]].abs().max())
    assert float(weight[~found["smallest weight"]].abs().max()) <= float(weight[found["smallest weight"]].abs().min())
    gone = (~found["active inputs"]).sum(0)
    assert set(gone.tolist()) <= {0, len(weight), int((~keep).sum()) % len(weight)}
    change = sum((edit.change.matrices[0].left @ edit.change.matrices[0].right.T).abs() for edit in edits) / len(edits)
    assert torch.allclose(controls.mean_change(bank, LAYER, tuple(weight.shape)), change, atol=1e-5)
    own = controls.own_change(bank, 0, LAYER, 0.137)
    assert int((~own).sum()) == int((~keep).sum())


def test_a_layer_is_degenerate_only_where_nothing_is_lost() -> None:
    assert evaluate.degenerate(1.0, 1.0, 1.0)
    assert not evaluate.degenerate(0.1, 1.0, 1.0)
    assert not evaluate.degenerate(1.0, 0.4, 1.0)
    assert not evaluate.degenerate(1.0, 1.0, 50.0)


def test_what_a_shared_mask_can_reach_by_hand() -> None:
    left, right = torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [1.0], [2.0]])
    bank = Bank([WeightDelta((MatrixDelta(LAYER, "mlp_down", left, right, 1.0),))])
    parts = evaluate.parts_of_edits(bank, LAYER, torch.tensor([[2.0, -1.0, 0.5]]))  # r * k = 2, -1, 1
    assert parts.tolist() == [[1.0, -0.5, 0.5]]
    seen, unseen = evaluate.carried(parts, torch.tensor([[0.25, 0.0, 0.75]]), 2 / 3)
    assert (seen, unseen) == (1.5, 1.0)


def test_contributions_are_products_with_the_unembedding(tiny_lm: TinyLm) -> None:
    lm = tiny_lm("gpt2")
    edits = random_edits(lm)
    bank, places = bank_of(edits)
    cases = evaluate.cases_of(edits, places, paraphrases=False)
    nothing = torch.zeros(lm.read_weight(LAYER, "mlp_down").shape)
    shares = {share[:4]: share for share in evaluate.over_attention(lm, cases, bank, {LAYER: nothing})}
    assert len(shares) == 3 * lm.n_layers * 2 * 2
    rows = torch.stack([lm.head_weight[tokens.target_ids(lm.tokenizer, c.prompt, c.old)[0]] for c in cases])
    bias = lm.mlp_down(LAYER).bias.detach()  # all that K = 0 leaves
    assert shares["masked", LAYER, "mlp", "old"].mean == pytest.approx(float((rows @ bias).mean()), rel=1e-4)
    assert shares["original", 0, "attn", "new"].mean == pytest.approx(shares["edited", 0, "attn", "new"].mean)
    assert shares["original", LAYER, "mlp", "new"].mean != pytest.approx(shares["edited", LAYER, "mlp", "new"].mean)
