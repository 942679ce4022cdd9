"""The vectors of a prompt that raise a candidate's log-probability most, found exactly without looking at every one.

Thousands of vectors v (a neuron's coefficient times what it writes) join the stream x of their layer. With the final
norm frozen (see frozen) and p = p(. | x), the contribution of one to a candidate w is, in nats,

    Imp(v | x, w) = bs_w(v) - log sum_t p_t e^{bs_t(v)}                                (Yu, Ananiadou; arXiv 2312.12141)

1. p for every layer's x, once per prompt; with it, for every layer, mu = sum_t p_t W_U[t].
2. Jensen: Imp <= bound(v) = bs_w(v) - sum_t p_t bs_t(v) = g . v with g = pullback(W_U[w] - mu): one product of a matrix
   with a vector bounds a whole layer (ours, as is all that follows).
3. The greatest: evaluate those with the greatest bounds; then, in growing chunks, whatever has a bound above the k-th
   best value so far. When nothing is left there, the k best are the k best of all. One evaluation (bs_t of all tokens)
   gives the values for all candidates.
4. The least: Jensen's gap is log sum_t p_t e^{X_t} with X_t = bs_t(v) - sum_s p_s bs_s(v), of mean 0, and Bennett's
   inequality limits it: gap <= log(1 + s2 (e^c - 1 - c) / c^2) for any s2 >= var X and c >= max X. With bs(v) = W_U b,
       c = |b| max_t |W_t - mu|
       s2 = the smaller of |b|^2 sum_t p_t |W_t - mu|^2 and (sum_k sqrt(b_k . M_kk b_k))^2,
   b_k being the k-th BLOCK of b's numbers, M_kk that block of M = sum_t P_t (W_t - a)(W_t - a)^T, and P_t the greatest
   p_t of any layer: var X <= b . M b for every layer and any a, and in a form M that is never negative, b . M b is
   below the square of the sum of its blocks' roots. That gives a lower bound on every value. Those with the least
   bounds of 2. are evaluated, then those whose lower bound is below the k-th least value so far; where these are too
   many, only some with the least bounds of 2. A row is certified when no vector that was not evaluated has a lower
   bound below it.

[vectors, vocab] is never held: a chunk has at most LOGITS_AT_ONCE logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mega_core.attribution.frozen import FrozenLens

LOGITS_AT_ONCE = 2**24
"""How many logits a chunk of vectors may have."""
CAST_AT_ONCE = 2**26
"""How many numbers of the head are cast to float32 at once, where it is not float32."""
SMALLEST_CHUNK, LARGEST_CHUNK = 64, 256
BLOCK = 32
MOMENT_AT_ONCE = 2**22
"""How many numbers of the head are weighted at once, for M."""
ROUNDING = 1.001
"""By what the gap of 4. is widened, being made of long float32 sums."""
SLACK = 1e-5
"""Nats by which a bound and a value, both float32, may be wrong."""
MOST_FOR_TAIL, FEWEST_FOR_TAIL = 50, 4
"""How many vectors are evaluated per row of the least ones: at most, and where certifying them would take more."""


@dataclass(frozen=True, eq=False)
class Bases:
    """The streams that one prompt's vectors join, one per layer, and what they say about the next token."""

    lens: FrozenLens
    """Of this prompt alone."""
    targets: Int[Tensor, " candidate"]
    log_p: Float[Tensor, "layer vocab"]
    back: Float[Tensor, "candidate layer d_model"]
    """g of 2."""
    widest: Float[Tensor, " layer"]
    """max_t |W_t - mu|, of 4."""
    spread: Float[Tensor, " layer"]
    """sum_t p_t |W_t - mu|^2, of 4."""

    @classmethod
    def of(cls, lens: FrozenLens, states: Float[Tensor, "layer d_model"], targets: Sequence[int]) -> Bases:
        """1. and 2. for the streams of one prompt; `lens` is a batch of one."""
        lm = lens.lm
        normed = lens.state(states[:, None])[:, 0]
        logits = torch.cat([normed @ part.T for part in _head(lens)], dim=-1)  # (layer, vocab)
        if lens.constants and lm.head_bias is not None:
            logits += lm.head_bias.to(logits)
        log_p = logits.double().log_softmax(-1).float()
        p = log_p.exp()
        mu = torch.zeros_like(normed)
        squares, start = [], 0
        for part in _head(lens):
            mu += p[:, start : start + len(part)] @ part
            squares.append(part.square().sum(-1))
            start += len(part)
        square = torch.cat(squares)  # (vocab,)
        cross = torch.cat([mu @ part.T for part in _head(lens)], dim=-1)  # (layer, vocab)
        distance = (square - 2 * cross + mu.square().sum(-1, keepdim=True)).clamp_min(0)
        ids = torch.as_tensor(targets, device=lm.head_weight.device)
        rows = lm.head_weight[ids].to(mu)  # (candidate, d_model)
        return cls(
            lens,
            ids,
            log_p,
            lens.pullback((rows[:, None] - mu).unsqueeze(-2))[..., 0, :],
            distance.amax(-1).sqrt(),
            (p * distance).sum(-1),
        )

    def moments(self) -> Float[Tensor, "block size size"]:
        """The blocks M_kk of 4.; the last is filled up with zeros."""
        weight = self.lens.lm.head_weight
        p = self.log_p.amax(0).exp()  # (vocab,), sums to 1 or more
        step = max(1, MOMENT_AT_ONCE // weight.shape[1])
        pieces = list(zip(weight.split(step), p.split(step), strict=True))
        centre = torch.stack([share @ part.float() for part, share in pieces]).sum(0) / p.sum()
        total = centre.new_zeros(-(-len(centre) // BLOCK), BLOCK, BLOCK)
        for part, share in pieces:
            blocks = _blocks((part.float() - centre) * share.sqrt()[:, None])  # (block, slice, size)
            total += blocks.transpose(1, 2) @ blocks
        return total

    def values(self, layers: Int[Tensor, " n"], vectors: Float[Tensor, "n d_model"]) -> Float[Tensor, "candidate n"]:
        """Imp of each vector on its layer's stream, for each target."""
        b = self.lens.vector(vectors[:, None])[:, 0]
        partition = b.new_full((len(b),), -torch.inf)
        start = 0
        for part in _head(self.lens, len(b)):
            logits = b @ part.T  # (n, slice)
            for layer in layers.unique().tolist():
                at = layers == layer
                logits[at] += self.log_p[layer, start : start + len(part)]
            top = logits.amax(-1, keepdim=True)
            total = logits.sub_(top).exp_().sum(-1).log_() + top[:, 0]
            partition = torch.logaddexp(partition, total)
            start += len(part)
        rows = self.lens.lm.head_weight[self.targets].to(b)  # (candidate, d_model)
        return rows @ b.T - partition

    def extremes(
        self, vectors: Float[Tensor, "n d_model"], count: int
    ) -> tuple[Int[Tensor, "n direction rank"], Float[Tensor, "n direction rank"]]:
        """Tokens with the greatest and with the least logits bs(v), and these logits."""
        b = self.lens.vector(vectors[:, None])[:, 0]
        ids, logits = [], []
        start = 0
        for part in _head(self.lens, len(b)):
            found = b @ part.T
            ends = [found.topk(min(count, len(part)), largest=largest) for largest in (True, False)]
            ids.append(torch.stack([end.indices + start for end in ends], dim=1))
            logits.append(torch.stack([end.values for end in ends], dim=1))
            start += len(part)
        every, values = torch.cat(ids, dim=-1), torch.cat(logits, dim=-1)  # (n, direction, slice * rank)
        sign = values.new_tensor([1.0, -1.0])[:, None]
        order = (values * sign).argsort(dim=-1, descending=True, stable=True)[..., :count]
        return every.gather(-1, order), values.gather(-1, order)


@dataclass(frozen=True, eq=False)
class Vectors:
    """coefficient * direction, for all layers; a direction may occur with several coefficients ("copies")."""

    coefficients: Float[Tensor, "layer copy unit"]
    directions: Callable[[int], Float[Tensor, "unit d_model"]]
    """Of a layer."""

    def __len__(self) -> int:
        return self.coefficients.numel()

    def place(self, index: Int[Tensor, " n"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Int[Tensor, " n"]]:
        """(layer, copy, unit) of vectors by their number."""
        _, copies, units = self.coefficients.shape
        return index // (copies * units), index // units % copies, index % units

    def take(self, index: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        """Vectors by their number."""
        layers, _, units = self.place(index)
        order, parts = [], []
        for layer in layers.unique().tolist() or [0]:
            at = torch.nonzero(layers == layer)[:, 0]
            order.append(at)
            parts.append(self.directions(layer)[units[at]].to(self.coefficients))
        rows = torch.cat(parts)[torch.cat(order).argsort()]
        return rows * self.coefficients.flatten()[index][:, None]


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found; vectors go by their number."""

    top: tuple[Int[Tensor, " n"], ...]
    """Per candidate: the greatest, greatest first."""
    tail: tuple[Int[Tensor, " n"], ...]
    """Per candidate: the least, least first."""
    sure_top: tuple[Bool[Tensor, " n"], ...]
    """Whether no other vector belongs before it."""
    sure_tail: tuple[Bool[Tensor, " n"], ...]
    value: Float[Tensor, "candidate vector"]
    """NaN where it was not evaluated."""
    bound: Float[Tensor, "candidate vector"]
    evaluated: int


def search(bases: Bases, vectors: Vectors, top: int, tail: int, step: Callable[[], None]) -> Found:
    """The `top` greatest and the `tail` least of all vectors, for each candidate; `step` is called per chunk."""
    n = len(vectors)
    top = min(top, n)
    tail = min(tail, n - top)
    bound = bounds(bases, vectors)
    floor = bound - gaps(bases, vectors) if tail else torch.full_like(bound, -torch.inf)
    seen = _Seen(bases, vectors, bound, floor, step)
    first = [row.topk(top).indices for row in bound] + [row.topk(tail, largest=False).indices for row in bound]
    seen.evaluate(torch.cat(first).unique())
    _greatest(seen, top)
    if tail:
        _least(seen, tail)

    ends: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for high, low, value in zip(seen.bound, seen.floor, seen.value, strict=True):
        best = torch.where(seen.known, value, -torch.inf).topk(top)
        rest = seen.known.clone()
        rest[best.indices] = False
        worst = torch.where(rest, value, torch.inf).topk(tail, largest=False)
        above, below = torch.where(seen.known, -torch.inf, high).max(), torch.where(seen.known, torch.inf, low).min()
        ends.append((best.indices, worst.indices, best.values >= above - SLACK, worst.values <= below + SLACK))
    tops, tails, sure_tops, sure_tails = zip(*ends, strict=True)
    return Found(tops, tails, sure_tops, sure_tails, seen.value, bound, int(seen.known.sum()))


class _Seen:
    """What is known so far of every vector."""

    def __init__(
        self,
        bases: Bases,
        vectors: Vectors,
        bound: Float[Tensor, "candidate vector"],
        floor: Float[Tensor, "candidate vector"],
        step: Callable[[], None],
    ) -> None:
        self.bound, self.floor = bound, floor  # value <= bound, value >= floor
        self.value = torch.full_like(bound, torch.nan)
        self.known = torch.zeros(len(vectors), dtype=torch.bool, device=bound.device)
        self._bases, self._vectors, self._step = bases, vectors, step
        self._at_once = max(1, min(LARGEST_CHUNK, LOGITS_AT_ONCE // bases.lens.lm.vocab_size))

    def evaluate(self, index: Int[Tensor, " n"]) -> None:
        """Make these known."""
        fresh = index[~self.known[index]]
        for chunk in fresh.split(self._at_once) if len(fresh) else ():
            self.value[:, chunk] = self._bases.values(self._vectors.place(chunk)[0], self._vectors.take(chunk))
            self.known[chunk] = True
            self._step()


def _greatest(seen: _Seen, top: int) -> None:
    """3. Evaluate until no bound is above the last of the `top` best values."""
    size = SMALLEST_CHUNK
    while True:
        parts = []
        for high, value in zip(seen.bound, seen.value, strict=True):
            last = torch.where(seen.known, value, -torch.inf).topk(top).values[-1]
            waiting = torch.nonzero((high >= last - SLACK) & ~seen.known)[:, 0]
            parts.append(waiting[high[waiting].topk(min(size // len(seen.bound), len(waiting))).indices])
        chunk = torch.cat(parts).unique()
        if not len(chunk):
            return
        seen.evaluate(chunk)
        size = min(2 * size, LARGEST_CHUNK)


def _least(seen: _Seen, tail: int) -> None:
    """4. Evaluate until no lower bound is below the last of the `tail` least values, if that seems within reach."""
    size = max(tail, SMALLEST_CHUNK // 2)
    left = MOST_FOR_TAIL * size
    while True:
        open_ = torch.zeros_like(seen.known)
        for low, value in zip(seen.floor, seen.value, strict=True):
            last = torch.where(seen.known, value, torch.inf).topk(tail, largest=False).values[-1]
            open_ |= (low <= last + SLACK) & ~seen.known
        waiting = torch.nonzero(open_)[:, 0]
        if not len(waiting):
            return
        if len(waiting) > left:
            some = min(FEWEST_FOR_TAIL * tail, seen.bound.shape[1])
            seen.evaluate(seen.bound.topk(some, largest=False).indices.unique())
            return
        lowest = seen.floor[:, waiting].amin(0).topk(min(size, len(waiting)), largest=False).indices
        seen.evaluate(waiting[lowest])
        left -= len(lowest)
        size = max(size, min(2 * size, LARGEST_CHUNK))


def bounds(bases: Bases, vectors: Vectors) -> Float[Tensor, "candidate vector"]:
    """2. for every vector."""
    parts = []
    for layer, own in enumerate(vectors.coefficients):  # (copy, unit)
        rows = vectors.directions(layer).to(own)
        parts.append(torch.einsum("ud,cd,pu->cpu", rows, bases.back[:, layer], own).flatten(1))
    return torch.cat(parts, dim=1)


def gaps(bases: Bases, vectors: Vectors) -> Float[Tensor, " vector"]:
    """4. How far each value may lie below its bound."""
    moments = bases.moments()
    parts = []
    for layer, own in enumerate(vectors.coefficients):  # (copy, unit)
        rows = bases.lens.vector(vectors.directions(layer).to(own)[:, None])[:, 0]  # b of a coefficient of 1
        blocks = _blocks(rows)
        root = ((blocks @ moments) * blocks).sum(-1).clamp_min(0).sqrt().sum(0)
        length = rows.norm(dim=-1)
        deviation = torch.minimum(root, length * bases.spread[layer].sqrt())
        c = (own.abs() * length).flatten().double() * bases.widest[layer].double()
        s2 = (own.abs() * deviation).flatten().double().square()
        small = c < 1e-3  # e^c - 1 - c loses its digits there
        ratio = torch.where(small, 0.5 + c / 5, (torch.expm1(c) - c) / c.clamp_min(1e-3).square())
        # Hoeffding's lemma, with a range of 2 c, is better where c is large.
        parts.append((ROUNDING * torch.minimum(torch.log1p(s2 * ratio), c.square() / 2)).float())
    return torch.cat(parts)


def _blocks(rows: Float[Tensor, "n d_model"]) -> Float[Tensor, "block n size"]:
    """Rows cut into blocks of numbers, filled up with zeros."""
    filled = torch.nn.functional.pad(rows, (0, -rows.shape[1] % BLOCK))
    return filled.unflatten(-1, (-1, BLOCK)).transpose(0, 1)


def _head(lens: FrozenLens, rows: int = 1) -> Iterator[Tensor]:
    """Slices of W_U in float32: few enough rows that nothing made from them is large."""
    weight = lens.lm.head_weight
    width = LOGITS_AT_ONCE // max(1, rows)
    if weight.dtype != torch.float32:
        width = min(width, CAST_AT_ONCE // weight.shape[1])
    for part in weight.split(max(1, width)):
        yield part.float()
