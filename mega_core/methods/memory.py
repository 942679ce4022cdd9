"""What memories keep beside a model, and when they speak: GRACE's codebook (grace.py) and WISE's side memory (wise.py).

Both sit at one MLP. They look at what enters its last matrix (the key), decide row by row, and change what the MLP
writes. A row that they let pass keeps its bits.

The decision is made while the prompt is read and stays with its row: a target that is read along, and every token that
is generated, belongs to the prompt before it. A hook sees activations only, so a reader tells it where prompts end. A
forward that no reader was told of (another method's search on the bare blocks, a look aside) passes untouched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mega_core import frames
from mega_core.changes import Plain, Tensors, standing
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, intervene
from mega_core.models.tokens import TokenBatch

SAME_KEY = 1e-4
"""Keys nearer than this share of their norm are one prompt, read twice: its later label takes the place (ours)."""
LESS_THAN_HALF = 1e-5
"""How much smaller than half the distance the older of two conflicting radii becomes (published code)."""
REPLACE = ("last", "target", "prompt", "all")


class Watch:
    """A reader that tells a memory's hooks what the model is reading; each batch lets them act once."""

    def __init__(self, lm: ModelAdapter) -> None:
        self.lm = lm
        self.start: list[int] = []
        """Per row, the index of the first position after its prompt."""
        self.beyond = 0
        """Tokens generated so far: 0 while prompts are read; then hooks see one position."""
        self.due = False

    def begin(self, batch: TokenBatch) -> None:
        """The model is about to read these rows."""
        self.start, self.beyond, self.due = batch.start.tolist(), 0, True

    def advance(self, ids: Int[Tensor, " batch"]) -> None:
        """One more token per row."""
        self.beyond, self.due = self.beyond + 1, True

    def acts(self, value: Float[Tensor, "batch pos d"]) -> bool:
        """Whether this activation belongs to the batch it was told of."""
        rows, width = value.shape[:2]
        fits = width == 1 if self.beyond else width >= max(self.start, default=0)
        return self.due and fits and rows == len(self.start) and any(reader is self for reader in self.lm.readers)


# GRACE ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Entry:
    """One edit as GRACE learned it; tensors are float32 on the CPU."""

    layer: int
    key: Float[Tensor, " d_mlp"]
    """What enters the MLP's last matrix at the prompt's last token."""
    value: Float[Tensor, " d_model"]
    """What the MLP is made to write."""
    label: tuple[int, ...]
    """The new object's token ids."""
    radius: float
    """Radius of a new key."""
    replace: str
    """Where the value stands, one of REPLACE."""
    norm: float
    """Of the output that the value replaces."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """Keys with radii and labels; adding gives a new one."""

    keys: Float[Tensor, "n d_mlp"]
    radii: tuple[float, ...] = ()
    labels: tuple[tuple[int, ...], ...] = ()
    entries: tuple[int, ...] = ()
    """Which entry's value belongs to each key."""

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Codebook:
        """The rules applied to the entries in their order."""
        book = cls(torch.zeros(0, len(entries[0].key) if entries else 1))
        for i, entry in enumerate(entries):
            book = book.add(entry.key, entry.label, entry.radius, i)
        return book

    def add(self, key: Float[Tensor, " d_mlp"], label: tuple[int, ...], radius: float, entry: int) -> Codebook:
        """Step 3 of grace.py: a new key, a wider radius, or two that no longer overlap."""
        if not self.radii:
            return self._with(key, radius, label, entry)
        at, distance = self._nearest(key[None])
        near, away = at[0], distance[0]
        if away <= SAME_KEY * float(key.norm()):
            return self._change(near, label=label, entry=entry)
        if away > radius + self.radii[near]:
            return self._with(key, radius, label, entry)
        if self.labels[near] == label:
            return self._change(near, radius=max(self.radii[near], away))
        return self._change(near, radius=away / 2 - LESS_THAN_HALF)._with(key, away / 2, label, entry)

    def lookup(self, queries: Float[Tensor, "row d_mlp"]) -> list[int | None]:
        """Step 4: per query the entry of the nearest key, if the query lies within that key's radius."""
        if not self.radii:
            return [None] * len(queries)
        found = zip(*self._nearest(queries), strict=True)
        return [self.entries[near] if away <= self.radii[near] else None for near, away in found]

    def _nearest(self, queries: Float[Tensor, "row d_mlp"]) -> tuple[list[int], list[float]]:
        # Not through a matrix product, which is blind to small distances between long vectors.
        keys = self.keys.to(queries.device).double()
        away = torch.cdist(queries.double(), keys, compute_mode="donot_use_mm_for_euclid_dist")
        distance, at = away.min(dim=-1)
        return at.tolist(), distance.tolist()

    def _with(self, key: Float[Tensor, " d_mlp"], radius: float, label: tuple[int, ...], entry: int) -> Codebook:
        keys = torch.cat((self.keys.to(key).reshape(-1, len(key)), key[None]))
        return Codebook(keys, (*self.radii, radius), (*self.labels, label), (*self.entries, entry))

    def _change(
        self, at: int, radius: float | None = None, label: tuple[int, ...] | None = None, entry: int | None = None
    ) -> Codebook:
        radii, labels, entries = list(self.radii), list(self.labels), list(self.entries)
        radii[at] = radii[at] if radius is None else radius
        labels[at] = labels[at] if label is None else label
        entries[at] = entries[at] if entry is None else entry
        return Codebook(self.keys, tuple(radii), tuple(labels), tuple(entries))


@dataclass(frozen=True, eq=False)
class GraceMemory:
    """Edits kept in a codebook beside one MLP per layer; the weights stay as they are."""

    entries: tuple[Entry, ...]
    """In the order in which they were learned, which the rules depend on."""

    @classmethod
    def merged(cls, changes: Sequence[GraceMemory]) -> GraceMemory:
        """One codebook that learned everything in order."""
        return cls(tuple(entry for change in changes for entry in change.entries))

    @contextmanager
    def applied(self, lm: ModelAdapter) -> Iterator[None]:
        """Look every prompt up, and replace the MLP's output of the rows that a key answers."""
        with ExitStack() as stack:
            for layer in sorted({entry.layer for entry in self.entries}):
                lookup = _Lookup(lm, [entry for entry in self.entries if entry.layer == layer])
                stack.enter_context(lm.reading(lookup))
                sites = {Site(layer, "mlp_down_in"): lookup.look, Site(layer, "mlp"): lookup.replace}
                stack.enter_context(intervene(lm, sites))
            stack.enter_context(standing(lm, self))
            yield

    def summary(self) -> pd.DataFrame:
        """One row per layer: the norm of its values, also relative to the outputs they replace; numbers kept."""
        rows: list[dict[str, object]] = []
        for layer in sorted({entry.layer for entry in self.entries}):
            own = [entry for entry in self.entries if entry.layer == layer]
            book = Codebook.of(own)
            kept = [own[i] for i in book.entries]
            norm = float(torch.stack([entry.value for entry in kept]).double().norm())
            before = sum(entry.norm**2 for entry in kept) ** 0.5
            rows.append(
                {
                    "layer": layer,
                    "site": "codebook",
                    "kind": "memory",
                    "norm": norm,
                    "relative_norm": norm / before if before else 0.0,
                    "rank": len(kept),
                    "parameters": sum(entry.key.numel() + entry.value.numel() for entry in kept),
                }
            )
        return frames.from_rows(rows, "weight_change")

    def pack(self) -> tuple[Plain, Tensors]:
        """Keys and values as tensors."""
        tensors: Tensors = {}
        for i, entry in enumerate(self.entries):
            tensors |= {f"{i}.key": entry.key.contiguous(), f"{i}.value": entry.value.contiguous()}
        listed = [
            {
                "layer": entry.layer,
                "label": list(entry.label),
                "radius": entry.radius,
                "replace": entry.replace,
                "norm": entry.norm,
            }
            for entry in self.entries
        ]
        return {"entries": listed}, tensors

    @classmethod
    def unpack(cls, plain: Plain, tensors: Tensors) -> GraceMemory:
        """What pack() wrote. Raises KeyError or TypeError on anything else."""
        return cls(
            tuple(
                Entry(
                    int(one["layer"]),
                    tensors[f"{i}.key"],
                    tensors[f"{i}.value"],
                    tuple(int(token) for token in one["label"]),
                    float(one["radius"]),
                    str(one["replace"]),
                    float(one["norm"]),
                )
                for i, one in enumerate(plain["entries"])
            )
        )


def places(replace: str, start: int, width: int, label: int, beyond: int = 0) -> Bool[Tensor, " pos"]:
    """At which positions the value stands, for a prompt that ends before `start` and an object of `label` tokens.

    `beyond` is 0 while the prompt is read; then `width` is 1 and the position is that many tokens after the prompt.
    """
    after = torch.arange(width) - (start - 1) if not beyond else torch.tensor([beyond])  # 0 at the prompt's last token
    if replace == "last":
        return after == 0
    if replace == "target":  # where the object's tokens are predicted from
        return (after >= 0) & (after < label)
    if replace == "prompt":
        return after <= 0
    return torch.ones_like(after, dtype=torch.bool)


class _Lookup(Watch):
    """The hooks of one layer's codebook."""

    def __init__(self, lm: ModelAdapter, entries: Sequence[Entry]) -> None:
        super().__init__(lm)
        self.book, self.entries = Codebook.of(entries), entries
        self.found: list[int | None] = []

    def look(self, key: Float[Tensor, "batch pos d_mlp"]) -> Float[Tensor, "batch pos d_mlp"]:
        """Decide, once per prompt, at its last token."""
        if self.acts(key) and not self.beyond:
            last = torch.tensor(self.start, device=key.device) - 1
            self.found = self.book.lookup(key[torch.arange(len(key), device=key.device), last].float())
        return key

    def replace(self, value: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Put the values in; without any the very same tensor goes on."""
        if not self.acts(value):
            return value
        self.due = False
        new: Tensor | None = None
        for row, (entry, start) in enumerate(zip(self.found, self.start, strict=True)):
            if entry is None:
                continue
            kept = self.entries[entry]
            where = places(kept.replace, start, value.shape[1], len(kept.label), self.beyond).to(value.device)
            if where.any():
                new = value.clone() if new is None else new
                new[row, where] = kept.value.to(value)
        return value if new is None else new


# WISE ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Side:
    """A side copy of one MLP's last matrix, as its difference from the original; float32 on the CPU."""

    layer: int
    difference: Float[Tensor, "out in"]
    threshold: float
    """A prompt whose activation distance is above this is answered by the side copy."""
    tokens: str
    """Over which of the prompt's tokens the distance is taken: "prompt" (their mean) or "last"."""
    base_norm: float
    """Frobenius norm of the original."""


@dataclass(frozen=True, eq=False)
class WiseMemory:
    """Side copies of MLP matrices that answer the prompts they were trained for; the weights stay as they are.

    Of several at one layer that claim a prompt, the one with the greatest distance answers (the paper's WISE-Retrieve).
    """

    sides: tuple[Side, ...]

    @classmethod
    def merged(cls, changes: Sequence[WiseMemory]) -> WiseMemory:
        """All side copies, with one router per layer."""
        return cls(tuple(side for change in changes for side in change.sides))

    @contextmanager
    def applied(self, lm: ModelAdapter) -> Iterator[None]:
        """Route every prompt, and let the side copy write for the rows that it claims."""
        with ExitStack() as stack:
            for layer in sorted({side.layer for side in self.sides}):
                router = _Router(lm, [side for side in self.sides if side.layer == layer])
                stack.enter_context(lm.reading(router))
                stack.enter_context(
                    intervene(lm, {Site(layer, "mlp_down_in"): router.look, Site(layer, "mlp"): router.write})
                )
            stack.enter_context(standing(lm, self))
            yield

    def summary(self) -> pd.DataFrame:
        """One row per layer: norm of the differences, also relative to the original; parameters that differ."""
        rows: list[dict[str, object]] = []
        for layer in sorted({side.layer for side in self.sides}):
            own = [side for side in self.sides if side.layer == layer]
            norm = sum(float(side.difference.double().norm()) ** 2 for side in own) ** 0.5
            rows.append(
                {
                    "layer": layer,
                    "site": "side memory",
                    "kind": "memory",
                    "norm": norm,
                    "relative_norm": norm / own[0].base_norm if own[0].base_norm else 0.0,
                    "rank": min(own[0].difference.shape),
                    "parameters": sum(int((side.difference != 0).sum()) for side in own),
                }
            )
        return frames.from_rows(rows, "weight_change")

    def pack(self) -> tuple[Plain, Tensors]:
        """The differences as tensors."""
        listed = [
            {"layer": side.layer, "threshold": side.threshold, "tokens": side.tokens, "base_norm": side.base_norm}
            for side in self.sides
        ]
        tensors = {f"{i}.difference": side.difference.contiguous() for i, side in enumerate(self.sides)}
        return {"sides": listed}, tensors

    @classmethod
    def unpack(cls, plain: Plain, tensors: Tensors) -> WiseMemory:
        """What pack() wrote. Raises KeyError or TypeError on anything else."""
        return cls(
            tuple(
                Side(
                    int(one["layer"]),
                    tensors[f"{i}.difference"],
                    float(one["threshold"]),
                    str(one["tokens"]),
                    float(one["base_norm"]),
                )
                for i, one in enumerate(plain["sides"])
            )
        )


def distance(written: Float[Tensor, "row pos d_model"], start: Sequence[int], over: str) -> Float[Tensor, " row"]:
    """How far a side copy's output lies from the original's over a prompt: the length of what it adds, per token.

    The mean over the prompt's tokens ("prompt"), or its last token alone ("last").
    """
    lengths = written.norm(dim=-1)  # (row, pos)
    after = torch.arange(lengths.shape[1], device=lengths.device) - torch.tensor(start, device=lengths.device)[:, None]
    own = (after == -1 if over == "last" else after < 0).to(lengths.dtype)
    return (lengths * own).sum(-1) / own.sum(-1)


class _Router(Watch):
    """The hooks of one layer's side copies."""

    def __init__(self, lm: ModelAdapter, sides: Sequence[Side]) -> None:
        super().__init__(lm)
        device = lm.weight(sides[0].layer, "mlp_down").device
        self.sides = sides
        self.differences = [side.difference.to(device) for side in sides]
        self.chosen: list[int | None] = []
        self.key: Tensor | None = None

    def look(self, key: Float[Tensor, "batch pos d_mlp"]) -> Float[Tensor, "batch pos d_mlp"]:
        """Decide, once per prompt."""
        if self.acts(key):
            self.key = key
            if not self.beyond:
                away = [
                    distance(key.float() @ difference.T, self.start, side.tokens).tolist()
                    for side, difference in zip(self.sides, self.differences, strict=True)
                ]
                self.chosen = [self._choose(row) for row in zip(*away, strict=True)]
        return key

    def _choose(self, away: Sequence[float]) -> int | None:
        claims = [(one, i) for i, (one, side) in enumerate(zip(away, self.sides, strict=True)) if one > side.threshold]
        return max(claims)[1] if claims else None

    def write(self, value: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Add the side copy's difference to its rows; without any the very same tensor goes on."""
        if not self.acts(value) or self.key is None:
            return value
        self.due = False
        key, self.key = self.key, None
        new: Tensor | None = None
        for row, side in enumerate(self.chosen):
            if side is not None:
                new = value.clone() if new is None else new
                added = (key[row].float() @ self.differences[side].T).to(value.device)
                new[row] = (value[row].float() + added).to(value.dtype)
        return value if new is None else new
