"""The joint search of two deltas written plainly: full forwards, one request, hooks on both outputs.

Also PMET's and ACE's update of one layer in float64 NumPy, by an explicit inverse as the published code has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from mega_core.methods.optimise import PairUpper, Row, Search, read
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture, intervene

Pair = Float[Tensor, "2 d_model"]
"""delta_attn, delta_mlp."""


def pair_base(lm: ModelAdapter, layer: int, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(attention's output, MLP's output, stream after the block) at s in the first row; log-probabilities to keep."""
    batch = tokens.pack(lm.tokenizer, [row.ids for row in rows], lm.device)
    sites = [Site(layer, part) for part in ("attn", "mlp", "block_out")]
    with torch.no_grad(), capture(lm, sites, stop=False) as got:
        logs = lm.logits(batch).float().log_softmax(-1)
    kept = [logs[i, len(row.ids) - 1] for i, row in enumerate(rows) if not row.target]
    at = rows[0].subject
    first = [got[site][0, at].float() for site in sites]
    return first[0], first[1], first[2], torch.stack(kept) if kept else logs[:0, 0]


def pair_loss(
    lm: ModelAdapter,
    layer: int,
    rows: Sequence[Row],
    pair: Pair,
    kept: Float[Tensor, "keep vocab"],
    search: Search,
    radii: tuple[float, float],
) -> tuple[Tensor, float, bool]:
    """(loss, KL, whether every target token is the likeliest in all rows) by the published formulas."""
    batch = tokens.pack(lm.tokenizer, [row.ids for row in rows], lm.device)
    each = torch.arange(len(rows))
    at = torch.tensor([row.subject for row in rows])

    def adding(delta: Tensor):
        def add(output: Tensor) -> Tensor:
            new = output.clone()
            new[each, at] = (output[each, at].float() + delta).to(output.dtype)
            return new

        return add

    with intervene(lm, {Site(layer, "attn"): adding(pair[0]), Site(layer, "mlp"): adding(pair[1])}):
        logs = lm.logits(batch).float().log_softmax(-1)  # (row, pos, vocab)
    nlls, kls, said = [], [], True
    for i, row in enumerate(rows):
        if row.target:
            start = len(row.ids) - len(row.target)
            picks = [logs[i, start + t] for t in range(len(row.target))]
            nlls.append(-torch.stack([pick[token] for pick, token in zip(picks, row.target, strict=True)]).mean())
            said &= all(int(pick.argmax()) == token for pick, token in zip(picks, row.target, strict=True))
        else:
            before = kept[len(kls)]
            kls.append((before.exp() * (before - logs[i, len(row.ids) - 1])).sum())
    kl = torch.stack(kls).mean() if kls else torch.zeros(())
    factor = 0.1 if search.adaptive and said else 1.0
    decay = sum(search.weight_decay * pair[i].norm() / radii[i] ** 2 for i in (0, 1))
    return factor * torch.stack(nlls).mean() + search.kl_weight * kl + decay, float(kl.detach()), said


def pair_gradient(
    lm: ModelAdapter, layer: int, rows: Sequence[Row], pair: Pair, search: Search
) -> tuple[Tensor, Tensor]:
    """(loss, its gradient (2, d_model)) by full forwards."""
    attn, mlp, _, kept = pair_base(lm, layer, rows)
    trial = pair.clone().requires_grad_()
    loss, _, _ = pair_loss(lm, layer, rows, trial, kept, search, (float(attn.norm()), float(mlp.norm())))
    (gradient,) = torch.autograd.grad(loss, trial)
    return loss.detach(), gradient


def fast_pair_gradient(
    lm: ModelAdapter, layer: int, rows: Sequence[Row], pair: Pair, search: Search
) -> tuple[Tensor, Tensor]:
    """(loss without decay, its gradient) by the restructured search, for one request."""
    upper = PairUpper(lm, read(lm, layer, rows, between=True), [0])
    kept = upper.losses(torch.zeros_like(pair)[None], None).now.detach()
    trial = pair[None].clone().requires_grad_()
    found = upper.losses(trial, kept)
    loss = (found.nll + search.kl_weight * found.kl)[0]
    return loss.detach(), torch.autograd.grad(loss, trial)[0][0]


def pair_search(lm: ModelAdapter, layer: int, rows: Sequence[Row], search: Search) -> tuple[Tensor, int]:
    """Both deltas after all steps by torch's own Adam, and how many losses were computed."""
    attn, mlp, stream, kept = pair_base(lm, layer, rows)
    own = (attn, mlp) if search.reference == "value" else (stream, stream)
    radii = (float(own[0].norm()), float(own[1].norm()))
    pair = torch.zeros(2, lm.d_model, requires_grad=True)
    adam = torch.optim.Adam([pair], lr=search.learning_rate)
    for number in range(1, search.steps + 1):
        adam.zero_grad()
        loss, kl, said = pair_loss(lm, layer, rows, pair, kept, search, radii)
        if float(loss.detach()) < search.stop_loss or (search.adaptive and said and kl <= 0.01):
            return pair.detach(), number
        loss.backward()
        adam.step()
        with torch.no_grad():
            for i in (0, 1):
                pair[i].mul_(min(1.0, search.clamp * radii[i] / float(pair[i].detach().norm().clamp_min(1e-30))))
    return pair.detach(), search.steps


def soft_update(
    moment: NDArray[np.float64],
    keys: NDArray[np.float64],
    gap: NDArray[np.float64],
    remaining: int,
    weight: float,
) -> NDArray[np.float64]:
    """(out, in): (gap / sqrt(remaining)) K^T (weight C + K K^T)^-1, keys (in, n) and gap (out, n) as columns."""
    return (gap / np.sqrt(remaining)) @ keys.T @ np.linalg.inv(weight * moment + keys @ keys.T)
