"""Along which MLPs an answer comes about: value layers that say it, query layers that switch those on.

Read at the last position t of a question with answer w (its first token), after Yu & Ananiadou (arXiv 2312.12141). With
the final norm's scale frozen at the true last state, every part of the stream has its own logits bs(.).

1. Value score of the module that adds v to the stream x:  Imp(v | x) = log p(w | x + v) - log p(w | x).
   Over all modules in their order of computation these telescope to log p(w | h^L) - log p(w | h^0).
2. Query score of the MLP of layer l: how much of what the modules above it say in favour of w rests on what it writes,
   at any position p, to first order:
       Q^l = sum over modules u above, sum over p, F^l_p . d(g . u) / dx_p
   where x is the module's input and g the direction whose logits favour w (the first-order form of 1).

The published query score takes the 30 best neurons one by one, by the share of their inner product with a key. Ours
takes whole modules and the gradient at the true input, which sees gates and attention at every source position, needs
one forward and two short backward steps per layer, and is the same code for every architecture. Shares make no sense
with it: norms don't see the length of their input, so the parts of an input, each times the gradient, sum to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, intervene


@dataclass(frozen=True)
class Pathway:
    """Scores per layer in nats, averaged over the questions; float64 on the CPU."""

    value: Float[Tensor, " layer"]
    """Of MLPs, at the last position."""
    attention: Float[Tensor, " layer"]
    """The same of attention."""
    query: Float[Tensor, " layer"]
    """Of MLPs, over all positions."""
    total: float
    """log p(w | h^L) - log p(w | h^0): the sum of `value` and `attention`."""


def pathway(lm: ModelAdapter, questions: Sequence[tuple[str, str]]) -> Pathway:
    """Scores of (prompt, answer) pairs, by the answers' first tokens. Leaves the model as it found it."""
    found = [_one(lm, prompt, answer) for prompt, answer in questions]
    value, attention, query = (torch.stack([part[i] for part in found]).mean(0) for i in range(3))
    return Pathway(value, attention, query, float(value.sum() + attention.sum()))


def window(scores: Float[Tensor, " layer"], width: int, low: int, high: int) -> tuple[int, ...]:
    """The `width` neighbouring layers from `low` to `high` (included) whose scores sum to most."""
    width = min(width, high - low + 1)
    best = max(range(low, high - width + 2), key=lambda start: float(scores[start : start + width].sum()))
    return tuple(range(best, best + width))


def _one(lm: ModelAdapter, prompt: str, answer: str) -> tuple[Tensor, Tensor, Tensor]:
    """(value of MLPs, value of attention, query of MLPs) for one question."""
    batch = lm.encode([prompt])
    answer_id = tokens.target_ids(lm.tokenizer, prompt, answer)[0]
    # Each module's input is cut off from what came before, so that a gradient stops there.
    inputs: dict[int, Tensor] = {}
    wrote: dict[tuple[int, str], Tensor] = {}

    def enter(layer: int) -> Callable[[Tensor], Tensor]:
        def fn(stream: Tensor) -> Tensor:
            inputs[layer] = stream.detach().requires_grad_()
            return inputs[layer]

        return fn

    def leave(layer: int, part: str) -> Callable[[Tensor], Tensor]:
        def fn(output: Tensor) -> Tensor:
            wrote[layer, part] = output
            return output.detach()

        return fn

    changes = {Site(layer, "block_in"): enter(layer) for layer in range(lm.n_layers)}
    changes |= {Site(layer, part): leave(layer, part) for layer in range(lm.n_layers) for part in ("attn", "mlp")}
    with torch.enable_grad(), intervene(lm, changes):
        lm.forward(batch)

    last = len(batch.ids[0]) - 1
    order = [(layer, part) for layer in range(lm.n_layers) for part in ("attn", "mlp")]
    parts = torch.stack([wrote[place].detach()[0, last].double().cpu() for place in order])
    states = torch.cat((inputs[0].detach()[0, last].double().cpu()[None], parts)).cumsum(0)  # (1 + 2 layer, d_model)
    logs, favour = _read(lm, states, answer_id)
    gains = logs.diff()  # 1.

    query = torch.zeros(lm.n_layers, dtype=torch.float64)  # 2.
    for i, (layer, part) in enumerate(order):
        output = wrote[layer, part]
        aim = (output[0, last].float() * favour[i].to(output.device, torch.float32)).sum()
        # Side by side, both modules of a block share their norm's part of the graph.
        (slope,) = torch.autograd.grad(aim, inputs[layer], retain_graph=True)
        for below in range(layer):
            query[below] += float((wrote[below, "mlp"].detach()[0].float() * slope[0].float().to(output.device)).sum())
    return gains[1::2], gains[0::2], query


def _read(
    lm: ModelAdapter, states: Float[Tensor, "state d_model"], answer: int
) -> tuple[Float[Tensor, " state"], Float[Tensor, "state d_model"]]:
    """log p(answer) of every running state under the last one's norm, and the direction that raises it from there."""
    norm: Any = lm.final_norm
    gain = norm.weight.detach().double().cpu()
    eps: float = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    layernorm = lm.spec.norm == "layernorm"
    centred = states - states.mean(-1, keepdim=True) if layernorm else states
    scale = (centred[-1].square().mean() + eps).rsqrt()
    shift = getattr(norm, "bias", None)
    normed = centred * scale * gain + (0 if shift is None else shift.detach().double().cpu())
    weight = lm.head_weight.double().cpu()
    logits = normed @ weight.T
    if lm.head_bias is not None:
        logits = logits + lm.head_bias.double().cpu()
    logs = logits.log_softmax(-1)
    favour = (weight[answer] - logs.exp() @ weight) * gain * scale  # (state, d_model)
    if layernorm:
        favour = favour - favour.mean(-1, keepdim=True)
    return logs[:, answer], favour
