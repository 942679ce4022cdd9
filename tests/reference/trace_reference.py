"""Causal tracing written plainly: one whole forward of one row per cell and draw, with torch's own hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from mega_core.models.adapter import ModelAdapter

Place = tuple[str, int]
"""(site, layer)."""


def _module(lm: ModelAdapter, place: Place) -> Any:
    site, layer = place
    return {"block_out": lm.block, "attn": lm.attn, "mlp": lm.mlp}[site](layer)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def clean_states(lm: ModelAdapter, ids: tuple[int, ...]) -> dict[Place, Tensor]:
    """(pos, d_model) of every place in the clean run."""
    kept: dict[Place, Tensor] = {}

    def keep(place: Place) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            kept[place] = _first(output).detach()[0].clone()

        return hook

    with ExitStack() as stack, torch.no_grad():
        for layer in range(lm.n_layers):
            for site in ("block_out", "attn", "mlp"):
                handle = _module(lm, (site, layer)).register_forward_hook(keep((site, layer)))
                stack.callback(handle.remove)
        lm.model(torch.tensor([ids]))
    return kept


def probability(
    lm: ModelAdapter,
    ids: tuple[int, ...],
    span: tuple[int, int] = (0, 0),
    noise: Tensor | None = None,
    restored: Mapping[Place, Mapping[int, Tensor]] | None = None,
) -> Tensor:
    """Distribution after the last token, float64 (vocab,), of one forward.

    `noise` (token, d_model) joins the embeddings of `span`; `restored` says which state stands at which position.
    """

    def corrupt(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stream = (args[0] if args else kwargs["hidden_states"]).clone()
        if noise is not None:
            stream[0, span[0] : span[1]] += noise
        return ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stream})

    def put(states: Mapping[int, Tensor]) -> Callable[..., Any]:
        def hook(_: Any, __: Any, output: Any) -> Any:
            new = _first(output).clone()
            for position, state in states.items():
                new[0, position] = state
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    with ExitStack() as stack, torch.no_grad():
        stack.callback(lm.block(0).register_forward_pre_hook(corrupt, with_kwargs=True).remove)
        for place, states in (restored or {}).items():
            stack.callback(_module(lm, place).register_forward_hook(put(states)).remove)
        logits = lm.model(torch.tensor([ids])).logits[0, -1]
    return logits.double().softmax(-1)


def window(layer: int, width: int, n_layers: int) -> list[int]:
    """The layers restored together around one, as the authors' code has it."""
    return list(range(max(0, layer - width // 2), min(n_layers, layer - (-width // 2))))


def plain_cell(
    lm: ModelAdapter,
    ids: tuple[int, ...],
    span: tuple[int, int],
    noise: Tensor,
    clean: Mapping[Place, Tensor],
    site: str,
    layer: int,
    position: int,
    width: int,
) -> Tensor:
    """Distribution of one cell, averaged over the draws (sample, token, d_model)."""
    layers = [layer] if site == "block_out" else window(layer, width, lm.n_layers)
    restored = {(site, one): {position: clean[site, one][position]} for one in layers}
    return torch.stack([probability(lm, ids, span, draw, restored) for draw in noise]).mean(0)
