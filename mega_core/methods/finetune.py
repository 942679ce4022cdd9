"""What the fine-tuning methods share: a loss on target tokens, and descent on it at the price of the upper blocks only.

Loss over the texts x_j of all requests (each request in each of its contexts) and the prompts p_k to be kept:

    mean_j 1/|o| sum_t -log p(o_t | x_j, o_<t) + kl_weight mean_k KL(p_0(. | p_k) || p(. | p_k))

Nothing below the lowest trained layer changes while it is trained. So that layer's input is read once without a graph,
and every step runs only the blocks from there on; the head is applied only where a token is predicted that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mega_core.errors import BadInput
from mega_core.events import Note, Reporter, stage
from mega_core.methods.rome import KeepParams, context_texts, kept
from mega_core.methods.solve import check_finite
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture
from mega_core.models.suffix import KeptPast, block_arguments, suffix_mask
from mega_core.records import EditRequest

TEXTS_AT_ONCE = 32
"""Texts whose activations are held for one backward pass."""


@dataclass(frozen=True, slots=True)
class Text:
    """One row that is read in training."""

    ids: tuple[int, ...]
    start: int
    """Where its prompt ends; the token there is predicted from the one before."""
    reads: tuple[tuple[int, int], ...]
    """(position, token to be said there); none in a text whose next-token distribution is to be kept."""


def texts_for(
    lm: ModelAdapter, request: EditRequest, contexts: Sequence[str], keep: Sequence[str], every_token: bool
) -> list[Text]:
    """The texts of one request: its prompt in every context ("In fact, {}"), then the prompts to keep ("{} is a").

    With `every_token` the target is read along and each of its tokens is predicted at its own place. Without, all are
    predicted at the prompt's last token, as if they were a bag. Raises BadInput when a text is longer than the model
    reads.
    """
    texts = []
    for context in contexts:
        prompt = context.replace("{}", request.template).replace("{}", request.subject)
        row = tokens.with_target(lm.tokenizer, prompt, request.target_new)
        at = row.target_start - 1
        if every_token:
            texts.append(Text(row.ids[:-1], at + 1, tuple((at + t, token) for t, token in enumerate(row.target))))
        else:
            texts.append(Text(row.ids[: at + 1], at + 1, tuple((at, token) for token in row.target)))
    for template in keep:
        ids = tokens.prompt_ids(lm.tokenizer, template.replace("{}", request.subject))
        texts.append(Text(ids, len(ids), ()))
    longest = max(len(text.ids) for text in texts)
    if longest > lm.max_positions:
        raise BadInput("template", f"{longest} tokens, but {lm.name} reads at most {lm.max_positions}.", "Shorten it.")
    return texts


def all_texts(
    lm: ModelAdapter, requests: Sequence[EditRequest], params: KeepParams, seed: int, method: str, every_token: bool
) -> list[Text]:
    """The texts of all requests, in fixed contexts. `method` names the fields in errors. Raises as texts_for does."""
    contexts = context_texts(lm, params.contexts, "fixed", seed)
    texts = []
    for request in requests:
        texts += texts_for(lm, request, contexts, kept(request, params, method), every_token)
    return texts


class Targets:
    """Rows read by the whole model with their targets behind them, and how likely it says these."""

    def __init__(self, lm: ModelAdapter, rows: Sequence[tokens.Row]) -> None:
        self.lm = lm
        self.starts = [row.target_start for row in rows]
        """Where each row's prompt ends."""
        self.batch = tokens.pack(lm.tokenizer, [row.ids[:-1] for row in rows], lm.device, self.starts)
        reads = [
            (i, row.target_start - 1 + t, token) for i, row in enumerate(rows) for t, token in enumerate(row.target)
        ]
        self.owner, self.position, self.target = torch.tensor(reads).T  # (read,)
        self.lengths = torch.tensor([len(row.target) for row in rows])
        """Tokens of each row's target."""

    def log_probability(self) -> Float[Tensor, " row"]:
        """log P of each row's whole target, on the CPU, from one forward of the model as it is; with its graph."""
        lm = self.lm
        logits = lm.logits_at(self.batch, self.owner.to(lm.device), self.position.to(lm.device)).float()
        said = logits.log_softmax(-1).gather(-1, self.target.to(logits.device)[:, None])[:, 0].cpu()  # (read,)
        return torch.zeros(len(self.lengths)).index_add(0, self.owner, said)


class Group:
    """Some texts, read once up to the trained layer. `begin` holds what was captured there."""

    def __init__(self, lm: ModelAdapter, texts: Sequence[Text], sites: Sequence[Site], said: int, kept: int) -> None:
        """`said` and `kept`: how many texts with and without a target all groups together have."""
        self.lm = lm
        self.batch = tokens.pack(lm.tokenizer, [text.ids for text in texts], lm.device, [text.start for text in texts])
        with torch.no_grad(), capture(lm, sites) as got:
            lm.forward(self.batch)
        self.begin = {site: got[site] for site in sites}
        reads = [
            (i, position, token, 1 / (len(text.reads) * said))
            for i, text in enumerate(texts)
            for position, token in text.reads
        ]
        keeps = [(i, len(text.ids) - 1) for i, text in enumerate(texts) if not text.reads]
        device = lm.device
        self.at = torch.tensor([place[:2] for place in (*reads, *keeps)], device=device)  # (read, 2)
        self.target = torch.tensor([read[2] for read in reads], dtype=torch.long, device=device)  # (target,)
        self.share = torch.tensor([read[3] for read in reads], dtype=torch.float32, device=device)  # (target,)
        self.keep_share = 1 / kept if kept else 0.0
        self.kept: Tensor | None = None
        hidden = self.begin[sites[-1]]  # any of them tells rows, positions and dtype
        rows, width = hidden.shape[:2]
        allowed = suffix_mask(torch.zeros(rows, dtype=torch.long, device=device), width, 0)
        positions = torch.arange(width, device=device).expand(rows, width)
        self.arguments = block_arguments(lm, hidden, positions, allowed, _NoPast({}))

    def loss(self, hidden: Float[Tensor, "row pos d_model"], first: int, kl_weight: float = 0.0) -> Float[Tensor, ""]:
        """This group's summand of the loss, from the stream before block `first`.

        The first call sets what the kept distributions are, so it must be made before anything has changed.
        """
        lm = self.lm
        with torch.no_grad():
            for reader in lm.readers:  # of a change that stands already: its hooks go by the batch they were told last
                reader.begin(self.batch)
        for layer in range(first, lm.n_layers):
            output = lm.block(layer)(hidden, **self.arguments)
            hidden = output if isinstance(output, Tensor) else output[0]
        at = self.at.to(hidden.device)
        logs = lm.unembed(hidden[at[:, 0], at[:, 1]]).float().log_softmax(-1).to(self.share.device)  # (read, vocab)
        said, now = logs[: len(self.target)], logs[len(self.target) :]
        total = -(self.share * said.gather(-1, self.target[:, None])[:, 0]).sum()
        if len(now):
            before = self.kept = now.detach() if self.kept is None else self.kept
            total = total + kl_weight * self.keep_share * (before.exp() * (before - now)).sum()
        return total


class _NoPast(KeptPast):
    """Stands where a block expects its cache; there is none."""

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return keys, values


@contextmanager
def groups(lm: ModelAdapter, texts: Sequence[Text], sites: Sequence[Site]) -> Iterator[list[Group]]:
    """The texts in groups that bound the memory, read without a prefix: what is trained must hold on its own."""
    kept = sum(not text.reads for text in texts)
    prefix, lm.prefix = lm.prefix, None
    try:
        yield [
            Group(lm, texts[i : i + TEXTS_AT_ONCE], sites, len(texts) - kept, kept)
            for i in range(0, len(texts), TEXTS_AT_ONCE)
        ]
    finally:
        lm.prefix = prefix


@dataclass(frozen=True, slots=True)
class Descent:
    """How to descend. `steps` counts updates."""

    steps: int
    learning_rate: float
    stop_loss: float
    """No update is made at a loss below this, and the descent ends."""
    weight_decay: float = 0.0
    """Adam's own: this times the parameter is added to its gradient."""


def descend(
    parameters: Sequence[Tensor],
    losses: Callable[[], Iterator[Tensor]],
    how: Descent,
    report: Reporter,
    *,
    scale: float = 1.0,
    pull: Callable[[], Sequence[Tensor]] | None = None,
    after: Callable[[], None] | None = None,
) -> tuple[float, ...]:
    """Adam on `parameters` (float32 leaves that require a gradient), in place; the loss before every update.

    `losses` yields the summands one by one, so that only one graph is alive. `pull` gives what is added to the
    gradients, `after` runs after every update. Gradients are taken of scale * loss. Reports when there was nothing to
    train. Raises ActionableError when a loss or a parameter is no longer finite.
    """
    adam = torch.optim.Adam(parameters, lr=how.learning_rate, weight_decay=how.weight_decay)
    history: list[float] = []
    with stage(report, "fine-tuning", how.steps) as step, torch.enable_grad():
        for _ in range(how.steps):
            total = 0.0
            gradients = [torch.zeros_like(parameter) for parameter in parameters]
            for loss in losses():
                total += float(loss.detach())
                for gradient, part in zip(gradients, torch.autograd.grad(loss * scale, parameters), strict=True):
                    gradient += part / scale
            check_finite("Fine-tuning", torch.tensor(total), *gradients)
            history.append(total)
            if total < how.stop_loss:
                break
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            if pull is not None:
                for parameter, extra in zip(parameters, pull(), strict=True):
                    parameter.grad = parameter.grad + extra  # type: ignore[operator]
            adam.step()
            if after is not None:
                with torch.no_grad():
                    after()
            step()
    check_finite("Fine-tuning", *(parameter.detach() for parameter in parameters))
    if len(history) == 1 and history[0] < how.stop_loss:
        report(Note("The model says the new object already, so nothing was trained."))
    return tuple(history)
