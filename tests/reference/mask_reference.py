"""One Mask in the plainest way: a dense edited and masked matrix per edit, whole forwards, one row at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mega_core.changes import MatrixDelta, WeightDelta
from mega_core.masking.edits import Edit
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter


def dense(lm: ModelAdapter, layer: int, change: WeightDelta) -> Tensor:
    """W + D at a layer, (out, in)."""
    weight = lm.read_weight(layer, "mlp_down").clone()
    for matrix in change.matrices:
        assert isinstance(matrix, MatrixDelta)
        if matrix.layer == layer:
            weight += matrix.left @ matrix.right.T
    return weight


def last_logits(lm: ModelAdapter, ids: Sequence[int], weights: dict[int, Tensor]) -> Tensor:
    """Logits after the row with these matrices in the place of the model's, with gradients to them."""
    named = {}
    for layer, weight in weights.items():
        module = lm.mlp_down(layer)
        name = next(name for name, other in lm.model.named_modules() if other is module)
        named[f"{name}.weight"] = weight.T if lm.conv1d(layer, "mlp_down") else weight
    batch = torch.tensor([list(ids)])
    out = torch.func.functional_call(lm.model, named, kwargs={"input_ids": batch, "use_cache": False})
    return out.logits[0, -1].float()


def loss(
    lm: ModelAdapter,
    layer: int,
    edits: Sequence[Edit],
    theta: Tensor,
    *,
    tau: float,
    strength: float,
    temperature: float,
    delta: float = 3.0,
    s_max: float = 0.1,
    beta: float = 3.2552,
) -> Tensor:
    """L of methods that read it off the paper: mean over prompts of hinge and KL, plus the sparsity hinge."""
    mask = torch.sigmoid(theta / tau)
    rest, kl = [], []
    for edit in edits:
        places = {matrix.layer for matrix in edit.change.matrices} | {layer}
        weights = {at: dense(lm, at, edit.change) for at in places}
        weights[layer] = weights[layer] * mask
        for prompt in edit.prompts:
            ids = tokens.prompt_ids(lm.tokenizer, prompt)
            said = last_logits(lm, ids, weights)
            with torch.no_grad():
                before = last_logits(lm, ids, {})
            old = tokens.target_ids(lm.tokenizer, prompt, edit.old)[0]
            new = tokens.target_ids(lm.tokenizer, prompt, edit.request.target_new)[0]
            logs = said.log_softmax(-1)
            if old != new:
                rest.append(torch.relu(delta - (logs[old] - logs[new])))
            p, q = torch.softmax(before / temperature, -1), torch.log_softmax(said / temperature, -1)
            kl.append(temperature**2 * (p * (p.log() - q)).sum())
    sparsity = torch.relu((1 - mask).mean() - s_max)
    return sum(rest) / len(rest) + strength * sparsity + beta * sum(kl) / len(kl)


def schedules(epoch: int, epochs: int) -> tuple[float, float, float]:
    """tau, lambda and T of an epoch."""
    done = epoch / (epochs - 1)
    return 6 * math.exp(-3 * epoch / epochs), 1e-6 + (60 - 1e-6) * done, 1.643 + (4.301 - 1.643) * done
