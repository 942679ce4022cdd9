"""One mask that undoes edits it has never seen (Holmov et al., "One Mask to Rule Them All", Findings of ACL 2026,
arXiv 2605.28839).

All edits share one mask K over one edited matrix; only its logits Theta are learned, and an edit's own matrix W + D_i
is read through it, (W + D_i) * K: where K is 0 the weight is gone altogether.

1. Rows: every edit's prompts, read once up to the masked layer (edits.read); and, of the same prompts, what the
   unedited model makes of them, kept as its last hidden state.
2. K = sigmoid(Theta / tau), Theta ~ N(0.85, 0.1), tau = 6 exp(-3 ep / E): from lukewarm to nearly binary.
3. Per step 50 edits with their prompts, first tokens o (old) and o* (new) at the last position, all in nats:
       L      = L_rest + lambda L_sp + beta L_KL
       L_rest = mean ReLU(delta - (log p(o) - log p(o*)))                 delta 3; prompts where o, o* begin alike: none
       L_sp   = ReLU(mean(1 - K) - S_max)                                 S_max 0.10; lambda 1e-6 -> 60 over the epochs
       L_KL   = T^2 KL(softmax(reference / T) || softmax(masked / T))     T 1.643 -> 4.301; beta 3.2552
   AdamW, gradient cut to norm 1.
4. The binary mask: [K >= gamma], gamma 0.7 or 0.9 by model.

Ours, for small models: fewer epochs and larger steps; and `forward` "top", where each step runs on the binary mask that
prunes exactly the share S_max with the lowest Theta (the gradient passes straight through to Theta), so that what is
trained is what is used. It then needs no L_sp. The share grows from nothing over the first epochs. Theta adds up plain
gradients with momentum: by Adam, which takes equal steps everywhere, places that hardly matter win by noise.
`keep_weight` adds the same KL for the unedited model under the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import exp
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from mega_core.errors import BadInput
from mega_core.events import Reporter, silent, stage
from mega_core.masking.edits import SITE, Bank, Edit, Reading, Upper, bank_of, read
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter

EPSILON = 1e-9
"""K stays this far from 0 and 1 while it is trained, as published."""


@dataclass(frozen=True, slots=True)
class TrainParams:
    """The paper's names and values."""

    epochs: int = 301
    """E."""
    edits_per_step: int = 50
    learning_rate: float = 1e-3
    clip: float = 1.0
    delta: float = 3.0
    """Margin in nats."""
    s_max: float = 0.10
    """Share of the weights that may be pruned."""
    lambda_first: float = 1e-6
    lambda_last: float = 60.0
    beta: float = 3.2552
    temperature_first: float = 1.643
    temperature_last: float = 4.301
    tau_first: float = 6.0
    tau_rate: float = 3.0
    gamma: float = 0.7
    theta_mean: float = 0.85
    theta_std: float = 0.1
    forward: Literal["soft", "top"] = "soft"
    """What a step runs on: K itself (published), or the binary mask of exactly the share s_max (ours)."""
    growing: float = 0.3
    """With "top": over this share of the epochs the pruned share grows from nothing to s_max (ours)."""
    momentum: float = 0.9
    """With "top" (ours)."""
    prompts_per_step: int = 0
    """Prompts of an edit that a step draws; 0 for all (ours)."""
    keep_weight: float = 0.0
    """Of the KL for the unedited model under the mask (ours)."""

    def __post_init__(self) -> None:
        """Raises BadInput on a value that can't work."""
        for name in ("epochs", "edits_per_step", "learning_rate", "clip", "tau_first", "temperature_first"):
            if not getattr(self, name) > 0:
                raise BadInput(f"mask.{name}", f"{getattr(self, name)} is not above 0.")
        if not 0 < self.s_max < 1:
            raise BadInput("mask.s_max", f"{self.s_max} is no share.", "Give a number between 0 and 1.")
        if not 0 < self.gamma < 1:
            raise BadInput("mask.gamma", f"{self.gamma} is no threshold.", "Give a number between 0 and 1.")
        if self.forward not in ("soft", "top"):
            raise BadInput("mask.forward", f"{self.forward!r} is not one of its choices.", "Choose soft or top.")

    def tau(self, epoch: int) -> float:
        """Of the sigmoid, in this epoch (from 0)."""
        return self.tau_first * exp(-self.tau_rate * epoch / self.epochs)

    def strength(self, epoch: int) -> float:
        """lambda."""
        return self.lambda_first + (self.lambda_last - self.lambda_first) * self._done(epoch)

    def temperature(self, epoch: int) -> float:
        """T."""
        return self.temperature_first + (self.temperature_last - self.temperature_first) * self._done(epoch)

    def share(self, epoch: int) -> float:
        """With "top": what is pruned in this epoch."""
        return self.s_max * min(1.0, (epoch + 1) / max(1.0, self.growing * self.epochs))

    def _done(self, epoch: int) -> float:
        return epoch / max(1, self.epochs - 1)


PUBLISHED = TrainParams()
SMALL = replace(PUBLISHED, epochs=60, learning_rate=3e-2, gamma=0.9)
"""Ours: the published schedule in a fifth of the epochs."""
TOP = replace(
    SMALL,
    epochs=12,
    edits_per_step=80,
    learning_rate=1.0,
    forward="top",
    beta=0.3,
    temperature_first=2.0,
    temperature_last=2.0,
    theta_mean=0.0,
    theta_std=1e-6,
    prompts_per_step=2,
)
"""Ours: trained on the binary mask itself. Only the order of Theta counts, so the step's size hardly does."""


@dataclass(frozen=True)
class Rows:
    """Step 1: the rows of some edits, ready for any mask."""

    edits: tuple[Edit, ...]
    upper: Upper
    plain: Reading
    """The same rows in the unedited model."""
    reference: Float[Tensor, "row d_model"]
    """Last hidden state of the unedited model."""
    old: Int[Tensor, " row"]
    new: Int[Tensor, " row"]
    """First tokens."""
    by_edit: tuple[tuple[int, ...], ...]
    """Rows of each edit."""

    @property
    def differ(self) -> Bool[Tensor, " row"]:
        """Where old and new object begin differently."""
        return self.old != self.new

    def unedited(self) -> Upper:
        """The rows read by the unedited model."""
        return Upper(self.upper.lm, Bank(()), self.plain)


@dataclass(frozen=True, slots=True)
class Epoch:
    """Means over an epoch's steps."""

    number: int
    loss: float
    rest: float
    kl: float
    sparsity: float
    """Of K as it was used: mean(1 - K)."""


@dataclass(frozen=True)
class Trained:
    """What training gives."""

    theta: Float[Tensor, "out in"]
    layer: int
    params: TrainParams
    history: tuple[Epoch, ...]

    def soft(self) -> Float[Tensor, "out in"]:
        """K of the last epoch."""
        return torch.sigmoid(self.theta / self.params.tau(self.params.epochs - 1))

    def binary(self) -> Bool[Tensor, "out in"]:
        """Step 4; with "top" the mask that was trained."""
        if self.params.forward == "top":
            return keep_top(self.theta, self.params.s_max)
        return self.soft() >= self.params.gamma


def keep_top(scores: Float[Tensor, "out in"], pruned: float) -> Bool[Tensor, "out in"]:
    """The mask that prunes exactly round(pruned * size) weights, those of the lowest score; ties by place."""
    count = round(pruned * scores.numel())
    keep = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    keep[scores.flatten().argsort(stable=True)[:count]] = False
    return keep.view(scores.shape)


def prepare(lm: ModelAdapter, layer: int, edits: Sequence[Edit], report: Reporter = silent) -> Rows:
    """Step 1. Raises BadInput when there is nothing to train on."""
    if not edits:
        raise BadInput("edits", "there is none.", "Give at least one.")
    ids: list[tuple[int, ...]] = []
    owner: list[int] = []
    old: list[int] = []
    new: list[int] = []
    of_edit: list[int] = []
    bank, places = bank_of(edits, lm.device)
    for i, edit in enumerate(edits):
        for prompt in edit.prompts:
            ids.append(tokens.prompt_ids(lm.tokenizer, prompt))
            owner.append(places[i])
            of_edit.append(i)
            old.append(tokens.target_ids(lm.tokenizer, prompt, edit.old)[0])
            new.append(tokens.target_ids(lm.tokenizer, prompt, edit.request.target_new)[0])
    whose = torch.tensor(owner)
    upper = Upper(lm, bank, read(lm, layer, ids, bank, whose, report))
    nothing = Bank(())
    plain = upper.reading
    if bank.layers and min(bank.layers) < layer:  # edits of lower layers changed what was read
        plain = read(lm, layer, ids, nothing, torch.full_like(whose, -1), report)
    unedited = Upper(lm, nothing, plain)
    with torch.no_grad():
        parts = [unedited.last_hidden(part, None, edited=False) for part in slices(len(ids))]
    by_edit = tuple(tuple(r for r, o in enumerate(of_edit) if o == i) for i in range(len(edits)))
    return Rows(tuple(edits), upper, plain, torch.cat(parts), torch.tensor(old), torch.tensor(new), by_edit)


def slices(count: int, size: int = 256) -> list[range]:
    """Rows in parts of bounded size."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def relaxed(theta: Float[Tensor, "out in"], params: TrainParams, epoch: int) -> Float[Tensor, "out in"]:
    """Step 2, or ours: the K that a step runs on, with its gradient."""
    if params.forward == "soft":
        return torch.sigmoid(theta / params.tau(epoch)).clamp(EPSILON, 1 - EPSILON)
    hard = keep_top(theta.detach(), params.share(epoch)).to(theta.dtype)
    return hard + (theta - theta.detach())


@dataclass(frozen=True)
class Losses:
    """The parts of step 3."""

    rest: Float[Tensor, ""]
    sparsity: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    keep: Float[Tensor, ""]

    def total(self, params: TrainParams, epoch: int) -> Float[Tensor, ""]:
        """L, with ours where it has a weight."""
        weight = params.strength(epoch) if params.forward == "soft" else 0.0
        return self.rest + weight * self.sparsity + params.beta * self.kl + params.keep_weight * self.keep


def losses(rows: Rows, picked: Sequence[int], mask: Float[Tensor, "out in"], params: TrainParams, epoch: int) -> Losses:
    """Step 3 on some rows."""
    lm, at = rows.upper.lm, torch.tensor(list(picked))
    with torch.no_grad():
        reference = lm.unembed(rows.reference[at]).float()  # (row, vocab)
    logits = rows.upper.last_logits(picked, mask)
    old, new = rows.old[at].to(logits.device), rows.new[at].to(logits.device)
    margin = (logits.gather(1, old[:, None]) - logits.gather(1, new[:, None]))[:, 0]  # the partition cancels
    apart = old != new
    rest = functional.relu(params.delta - margin[apart]).mean() if bool(apart.any()) else logits.new_zeros(())
    temperature = params.temperature(epoch)
    keep = logits.new_zeros(())
    if params.keep_weight:
        keep = divergence(reference, rows.unedited().last_logits(picked, mask, edited=False), temperature)
    sparsity = functional.relu((1 - mask).mean() - params.s_max)
    return Losses(rest, sparsity, divergence(reference, logits, temperature), keep)


def divergence(
    reference: Float[Tensor, "row vocab"], student: Float[Tensor, "row vocab"], temperature: float
) -> Float[Tensor, ""]:
    """L_KL: T^2 KL(softmax(reference / T) || softmax(student / T)), the mean over rows, in nats."""
    p, q = (reference / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    return temperature**2 * (p.exp() * (p - q)).sum(-1).mean()


def train(
    lm: ModelAdapter,
    layer: int,
    rows: Rows,
    params: TrainParams = SMALL,
    seed: int = 0,
    report: Reporter = silent,
    each: Callable[[Epoch, Tensor], None] | None = None,
) -> Trained:
    """Steps 2 and 3. The model is never written; the same seed gives the same mask on the same machine.

    `each` is called after every epoch with its means and Theta. Cancelling (the reporter raises) leaves nothing behind.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = lm.read_weight(layer, SITE).shape
    first = params.theta_mean + params.theta_std * torch.randn(shape, generator=generator)
    theta = first.to(rows.reference.device).requires_grad_()
    optimiser: torch.optim.Optimizer = torch.optim.AdamW([theta], lr=params.learning_rate, weight_decay=0.0)
    if params.forward == "top":
        optimiser = torch.optim.SGD([theta], lr=params.learning_rate, momentum=params.momentum)
    history = []
    count = len(rows.edits)
    with torch.enable_grad(), stage(report, "training the mask", params.epochs) as step:
        for epoch in range(params.epochs):
            if params.forward == "top":  # so that the order of Theta settles
                optimiser.param_groups[0]["lr"] = params.learning_rate * (1 - 0.95 * epoch / params.epochs)
            order = torch.randperm(count, generator=generator).tolist()
            sums, steps = [0.0] * 4, 0
            for start in range(0, count, params.edits_per_step):
                picked = _prompts(rows, order[start : start + params.edits_per_step], params, generator)
                mask = relaxed(theta, params, epoch)
                found = losses(rows, picked, mask, params, epoch)
                loss = found.total(params, epoch)
                if not bool(torch.isfinite(loss)):
                    raise BadInput("mask.learning_rate", "the loss is not finite.", "Choose a smaller learning rate.")
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_([theta], params.clip)
                optimiser.step()
                pruned = float((1 - mask.detach()).mean())
                values = (float(loss.detach()), float(found.rest.detach()), float(found.kl.detach()), pruned)
                sums = [total + value for total, value in zip(sums, values, strict=True)]
                steps += 1
            history.append(Epoch(epoch + 1, *(total / steps for total in sums)))
            if each is not None:
                each(history[-1], theta.detach())
            step()
    return Trained(theta.detach().cpu(), layer, params, tuple(history))


def _prompts(rows: Rows, edits: Sequence[int], params: TrainParams, generator: torch.Generator) -> list[int]:
    """Rows of these edits: all of them, or as many of each as a step draws."""
    found: list[int] = []
    for i in edits:
        own = rows.by_edit[i]
        if 0 < params.prompts_per_step < len(own):
            chosen = torch.randperm(len(own), generator=generator)[: params.prompts_per_step]
            own = tuple(own[j] for j in chosen.tolist())
        found += own
    return found
