"""What a trained mask has to beat: masks of exactly the same sparsity, made without training (arXiv 2605.28839; ours).

    random             places drawn at random
    within rows        the trained mask's places shuffled within each output's row: how much is pruned where stays
    within columns     the same within each input's column
    largest change     where the edits' mean |D| is largest
    largest weight     where |W| is largest;  smallest weight  where it is smallest
    active inputs      all outputs of the neurons that are most active on the edits' prompts

They keep the count of pruned weights to the last one; ties are broken by place.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mega_core.masking.edits import Bank, Reading
from mega_core.masking.train import keep_top

NAMES = (
    "random",
    "within rows",
    "within columns",
    "largest change",
    "largest weight",
    "smallest weight",
    "active inputs",
)


def all_of(
    keep: Bool[Tensor, "out in"], weight: Float[Tensor, "out in"], bank: Bank, reading: Reading, seed: int = 0
) -> dict[str, Bool[Tensor, "out in"]]:
    """Every control of a mask, by its name in NAMES."""
    generator = torch.Generator().manual_seed(seed)
    count = int((~keep).sum())
    size = weight.abs().float().cpu()
    active = activity(reading)[None].expand_as(size)
    return {
        "random": lowest(torch.rand(keep.shape, generator=generator), count),
        "within rows": shuffled(keep, generator),
        "within columns": shuffled(keep.T, generator).T.contiguous(),
        "largest change": lowest(-mean_change(bank, reading.layer, keep.shape), count),
        "largest weight": lowest(-size, count),
        "smallest weight": lowest(size, count),
        "active inputs": lowest(-active.T, count).T.contiguous(),  # whole columns, one after the other
    }


def lowest(scores: Float[Tensor, "out in"], count: int) -> Bool[Tensor, "out in"]:
    """The mask that prunes the `count` places of the lowest score."""
    return keep_top(scores.contiguous(), count / scores.numel())


def shuffled(keep: Bool[Tensor, "out in"], generator: torch.Generator) -> Bool[Tensor, "out in"]:
    """The places of each row in another order."""
    order = torch.rand(keep.shape, generator=generator).argsort(dim=1)
    return keep.gather(1, order)


def mean_change(bank: Bank, layer: int, shape: tuple[int, ...]) -> Float[Tensor, "out in"]:
    """Mean over the edits of |D|, one edit at a time."""
    total = torch.zeros(shape)
    if layer in bank.left:
        for left, right in zip(bank.left[layer].cpu(), bank.right[layer].cpu(), strict=True):
            total += (left.T @ right).abs()
    return total / max(1, bank.count)


def own_change(bank: Bank, edit: int, layer: int, pruned: float) -> Bool[Tensor, "out in"]:
    """Per edit: the mask over the largest share of its own |D|. Not one mask for all: it knows the edit."""
    return keep_top(-(bank.left[layer][edit].T @ bank.right[layer][edit]).abs().cpu(), pruned)


def activity(reading: Reading) -> Float[Tensor, " in"]:
    """Mean |activation| of every input over the rows' tokens."""
    total = torch.stack([rows.float().abs().sum(0) for rows in reading.neurons]).sum(0)
    return (total / sum(len(rows) for rows in reading.neurons)).cpu()
