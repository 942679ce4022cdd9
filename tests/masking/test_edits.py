"""Rows read by their own edited, masked model: as if each matrix had been written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mega_core.changes import DenseDelta, WeightDelta
from mega_core.errors import BadInput
from mega_core.masking.edits import Bank, Edit, Upper, bank_of, read, routed
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from tests.masking.cases import LAYER, random_change, random_edits
from tests.reference import mask_reference

TinyLm = Callable[[str], ModelAdapter]


def _mask(lm: ModelAdapter, seed: int = 0) -> torch.Tensor:
    return torch.rand(lm.read_weight(LAYER, "mlp_down").shape, generator=torch.Generator().manual_seed(seed))


def _rows(lm: ModelAdapter, edits: list[Edit]) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    rows = [tokens.prompt_ids(lm.tokenizer, prompt) for edit in edits for prompt in edit.prompts]
    return rows, torch.tensor([i for i, edit in enumerate(edits) for _ in edit.prompts])


@pytest.mark.parametrize("layers", [(LAYER,), (0, 1, 2)])
def test_every_row_is_read_by_its_own_masked_matrix(lm: ModelAdapter, layers: tuple[int, ...]) -> None:
    edits = random_edits(lm, layers)
    bank, _ = bank_of(edits)
    rows, owner = _rows(lm, edits)
    mask = _mask(lm)
    upper = Upper(lm, bank, read(lm, LAYER, rows, bank, owner))
    with torch.no_grad():
        ours = upper.last_logits(range(len(rows)), mask)
        batch = tokens.pack(lm.tokenizer, rows)
        with routed(lm, bank, owner, {LAYER: mask}):
            hooked = lm.last_logits(batch)
        for i, ids in enumerate(rows):
            change = edits[int(owner[i])].change
            weights = {layer: mask_reference.dense(lm, layer, change) for layer in layers}
            weights[LAYER] = weights[LAYER] * mask
            plain = mask_reference.last_logits(lm, ids, weights)
            scale = plain.abs().max()
            assert float((ours[i] - plain).abs().max() / scale) < 1e-5
            assert float((hooked[i] - plain).abs().max() / scale) < 1e-5


def test_one_edit_for_all_rows_is_the_same_as_one_for_each(tiny_lm: TinyLm) -> None:
    lm = tiny_lm("qwen3")
    change = random_change(lm, rank=5)
    neurons, mask = torch.randn(4, 6, lm.d_mlp), _mask(lm)
    one, many = Bank([change]), Bank([change, random_change(lm, seed=9)])
    owner = torch.zeros(4, dtype=torch.long)
    for over in (mask, None):
        left, right = one.added(LAYER, neurons, owner, over), many.added(LAYER, neurons, owner, over)
        assert left is not None
        assert right is not None
        assert torch.allclose(left, right, atol=1e-5)


def test_rows_without_edit_read_the_unedited_model(tiny_lm: TinyLm) -> None:
    lm = tiny_lm("gpt2")
    edits = random_edits(lm)
    bank, _ = bank_of(edits)
    batch = lm.encode([edits[0].prompts[0]] * 2)
    with torch.no_grad():
        plain = lm.last_logits(batch)
        with routed(lm, bank, torch.tensor([-1, 0])):
            said = lm.last_logits(batch)
    assert torch.allclose(said[0], plain[0], atol=1e-6)
    assert not torch.allclose(said[1], plain[1], atol=1e-2)


def test_restoring_keeps_the_unedited_weight_where_the_mask_removes(tiny_lm: TinyLm) -> None:
    lm = tiny_lm("llama")
    edits = random_edits(lm)
    bank, _ = bank_of(edits)
    keep = _mask(lm).round()
    ids = tokens.prompt_ids(lm.tokenizer, edits[1].prompts[0])
    base = lm.read_weight(LAYER, "mlp_down")
    weight = torch.where(keep > 0, mask_reference.dense(lm, LAYER, edits[1].change), base)
    with torch.no_grad():
        plain = mask_reference.last_logits(lm, ids, {LAYER: weight})
        with routed(lm, bank, torch.tensor([1]), {LAYER: keep}, restore=True):
            said = lm.last_logits(tokens.pack(lm.tokenizer, [ids]))[0]
    assert torch.allclose(said, plain, atol=1e-5)


def test_dense_changes_are_refused(tiny_lm: TinyLm) -> None:
    lm = tiny_lm("gpt2")
    dense = WeightDelta((DenseDelta(LAYER, "mlp_down", torch.zeros(lm.d_model, lm.d_mlp), 1.0),))
    with pytest.raises(BadInput, match="low rank"):
        Bank([dense])


def test_edits_made_together_share_their_factors(tiny_lm: TinyLm) -> None:
    lm = tiny_lm("gpt2")
    one, two, three = random_edits(lm)
    bank, places = bank_of([one, Edit(two.request, one.change, two.prompts), three])
    assert (bank.count, places) == (2, [0, 0, 1])
