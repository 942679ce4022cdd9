"""Running only a part of the model on only a part of its rows: some blocks, on positions from some place on.

A block reads nothing of the positions before but their keys and values. Whoever keeps those from one whole run can run
any block on later positions alone, and gets what a whole run would give. Readers and hooks that count positions or rows
are not told where they are: run whole rows while any is active.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mega_core.errors import BadInput
from mega_core.models.adapter import ModelAdapter
from mega_core.models.tokens import TokenBatch

KeysValues = tuple[Tensor, Tensor]
"""(row, kv_head, pos, head_dim) each."""


def as_read(lm: ModelAdapter, batch: TokenBatch) -> tuple[TokenBatch, Int[Tensor, "batch pos"]]:
    """The rows with what stands in front of them, and where their own positions lie in that (0 at padding)."""
    full, places = lm._with_prefix(batch)
    if places is None:
        places = torch.arange(batch.ids.shape[1], device=batch.ids.device).expand_as(batch.ids)
    return full, places


def run_keeping(lm: ModelAdapter, ids: Int[Tensor, "row pos"]) -> tuple[KeysValues, ...]:
    """Run the trunk on these ids as they stand, for its hooks; every block's keys and values at every position."""
    from transformers import DynamicCache

    cache = DynamicCache()
    everything = torch.ones_like(ids)  # padding is on the right; causality keeps it out
    lm.model.base_model(input_ids=ids, attention_mask=everything, past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    return tuple((kept.keys, kept.values) for kept in layers)


class KeptPast:
    """Stands where a block expects its cache: puts the kept keys and values in front and remembers nothing new."""

    def __init__(self, kept: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.kept = kept

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What the block attends to: (row, head, position, width) with the kept positions first."""
        before, worth = self.kept[layer_idx]
        return torch.cat((before, keys), dim=2), torch.cat((worth, values), dim=2)


def suffix_mask(at: Int[Tensor, " row"], window: int, before: int) -> Bool[Tensor, "row 1 window total"]:
    """True where a position >= s (`at`) may look: at its row's own positions < s, at itself and at what lies between.

    `window` is how many positions from s on are read, `before` how many kept ones stand in front of them.
    """
    earlier = torch.arange(before, device=at.device) < at[:, None]  # (row, before)
    causal = torch.ones(window, window, dtype=torch.bool, device=at.device).tril()
    rows = len(at)
    return torch.cat(
        (earlier[:, None, None].expand(rows, 1, window, before), causal.expand(rows, 1, window, window)), dim=-1
    )


def block_arguments(
    lm: ModelAdapter,
    hidden: Float[Tensor, "row window d_model"],
    positions: Int[Tensor, "row window"],
    allowed: Bool[Tensor, "row 1 window total"],
    past: KeptPast,
) -> dict[str, Any]:
    """What a block wants besides its input. The names differ by architecture, so its signature is asked.

    Raises BadInput on more positions than the model's sliding window.
    """
    window = getattr(lm.model.config, "sliding_window", None)
    if window and allowed.shape[-1] > window:
        raise BadInput("template", f"the prompts are longer than {lm.name}'s attention window of {window} tokens.")
    names = inspect.signature(type(lm.block(0)).forward).parameters
    # Added to the attention scores, which every implementation understands.
    mask = torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device)
    mask.masked_fill_(~allowed, torch.finfo(hidden.dtype).min)
    found: dict[str, Any] = {
        "attention_mask": mask,
        "position_ids": positions,
        "layer_past" if "layer_past" in names else "past_key_values": past,
        "use_cache": True,
    }
    if "position_embeddings" in names:
        rotary: Any = lm.model.base_model.rotary_emb
        found["position_embeddings"] = rotary(hidden, position_ids=positions)
    return found
