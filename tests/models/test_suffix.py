from __future__ import annotations

import pytest
import torch

from mega_core.changes import PromptPrefix
from mega_core.errors import BadInput
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture, untuple
from mega_core.models.suffix import KeptPast, as_read, block_arguments, run_keeping, suffix_mask

PROMPTS = ("The capital of France is", "Mount Kenya is in the continent of")


def test_blocks_on_later_positions_give_a_whole_runs_states(lm: ModelAdapter) -> None:
    batch = lm.encode(PROMPTS)
    starts, window = torch.tensor([2, 4]), batch.ids.shape[1] - 2
    sites = [Site(layer, "block_out") for layer in range(lm.n_layers)]
    with torch.no_grad(), capture(lm, sites, stop=False) as got:
        past = run_keeping(lm, batch.ids)
        lm.forward(batch)  # the same states as an ordinary forward's
    index = (starts[:, None] + torch.arange(window)).clamp_max(batch.ids.shape[1] - 1)
    rows = torch.arange(2)[:, None]
    hidden = got[sites[0]][rows, index]
    kept = {layer: (keys[:, :, :4], values[:, :, :4]) for layer, (keys, values) in enumerate(past)}
    arguments = block_arguments(lm, hidden, index, suffix_mask(starts, window, 4), KeptPast(kept))
    for layer in range(1, lm.n_layers):
        with torch.no_grad():
            hidden = untuple(lm.block(layer)(hidden, **arguments))
        for row, (start, length) in enumerate(zip(starts.tolist(), batch.lengths, strict=True)):
            whole = got[sites[layer]][row, start:length]
            torch.testing.assert_close(hidden[row, : length - start], whole, atol=1e-5, rtol=1e-4)


def test_what_stands_in_front_is_read_and_places_are_told(lm: ModelAdapter) -> None:
    batch = lm.encode(PROMPTS)
    full, places = as_read(lm, batch)
    assert full is batch
    assert (places == torch.arange(batch.ids.shape[1])).all()
    with PromptPrefix("Rome is in Italy. ").applied(lm):
        full, places = as_read(lm, batch)
    for row, (own, whole) in enumerate(zip(batch.rows(), full.rows(), strict=True)):
        assert len(whole) > len(own)
        found = [whole[place] for place in places[row, : len(own)].tolist()]
        assert found[-3:] == list(own[-3:])
        assert places[row, len(own) - 1] == len(whole) - 1


def test_more_positions_than_a_sliding_window_are_refused(tiny_lm, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("mistral")
    monkeypatch.setattr(lm.model.config, "sliding_window", 3)
    allowed = suffix_mask(torch.tensor([1]), 3, 1)
    with pytest.raises(BadInput, match="window of 3"):
        block_arguments(lm, torch.zeros(1, 3, lm.d_model), torch.arange(3)[None], allowed, KeptPast({}))
