"""Fine-tuning written plainly: a copy of the whole model, autograd on the matrix itself, torch's Adam, no batches."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor

from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.records import EditRequest


def copy_of(lm: ModelAdapter, layers: Sequence[int]) -> ModelAdapter:
    """A copy whose matrices at `layers` require gradients."""
    other = ModelAdapter(deepcopy(lm.model), lm.tokenizer, lm.ref)
    for layer in layers:
        other.weight(layer, "mlp_down").requires_grad_(True)
    return other


def plain_loss(lm: ModelAdapter, prompts: Sequence[str], targets: Sequence[str], kind: str) -> Tensor:
    """Mean over the prompts, each run alone through the whole model."""
    losses = []
    for prompt, target in zip(prompts, targets, strict=True):
        row = tokens.with_target(lm.tokenizer, prompt, target)
        logs = lm.model(input_ids=torch.tensor([row.ids])).logits[0].float().log_softmax(-1)  # (pos, vocab)
        last = row.target_start - 1
        where = range(last, last + len(row.target)) if kind == "target" else [last] * len(row.target)
        losses.append(-torch.stack([logs[at, token] for at, token in zip(where, row.target, strict=True)]).mean())
    return torch.stack(losses).mean()


def plain_kl(lm: ModelAdapter, base: ModelAdapter, prompts: Sequence[str]) -> Tensor:
    """Mean over the prompts of KL(before || now) of the next token."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([tokens.prompt_ids(lm.tokenizer, prompt)])
        now = lm.model(input_ids=ids).logits[0, -1].float().log_softmax(-1)
        before = base.model(input_ids=ids).logits[0, -1].float().log_softmax(-1)
        found.append((before.exp() * (before - now)).sum())
    return torch.stack(found).mean()


def plain_fine_tuning(
    lm: ModelAdapter,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    *,
    kind: str = "target",
    contexts: Sequence[str] = ("{}",),
    steps: int = 25,
    learning_rate: float = 5e-4,
    stop_loss: float = 0.01,
    epsilon: float | None = None,
    weight_decay: float = 0.0,
    kl_weight: float = 0.0,
) -> tuple[dict[int, Tensor], dict[int, Tensor], list[float]]:
    """Layer -> difference of the matrix (out, in); layer -> gradient of the first step; the loss before each update."""
    other = copy_of(lm, layers)
    weights = {layer: other.weight(layer, "mlp_down") for layer in layers}
    original = {layer: weight.detach().clone() for layer, weight in weights.items()}
    prompts = [c.replace("{}", r.template).replace("{}", r.subject) for r in requests for c in contexts]
    targets = [r.target_new for r in requests for _ in contexts]
    adam = torch.optim.Adam(weights.values(), lr=learning_rate, weight_decay=weight_decay)
    first: dict[int, Tensor] = {}
    history = []
    for _ in range(steps):
        adam.zero_grad()
        loss = plain_loss(other, prompts, targets, kind)
        if kl_weight:
            loss = loss + kl_weight * plain_kl(other, lm, [f"{r.subject} is a" for r in requests])
        history.append(float(loss.detach()))
        if history[-1] < stop_loss:
            break
        loss.backward()
        first = first or {layer: _upright(other, layer, weight.grad) for layer, weight in weights.items()}
        adam.step()
        if epsilon is not None:
            with torch.no_grad():
                for layer, weight in weights.items():
                    weight.copy_(weight.clamp(original[layer] - epsilon, original[layer] + epsilon))
    moved = {layer: _upright(other, layer, weight.detach() - original[layer]) for layer, weight in weights.items()}
    return moved, first, history


def _upright(lm: ModelAdapter, layer: int, matrix: Tensor | None) -> Tensor:
    assert matrix is not None
    return (matrix.T if lm.conv1d(layer, "mlp_down") else matrix).clone()
