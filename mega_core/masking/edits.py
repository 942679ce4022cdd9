"""Edits kept as low-rank factors, and many of them at work in one batch: each row is read by its own edited model.

1. An edit is a sum of l_j r_j^T at one or several layers' last MLP matrices W (out, in). It is never written out.
2. A row x of edit i at a masked layer gives, with K (out, in) the mask that all edits share,
       ((W + L_i R_i^T) * K) x = (W * K) x + sum_j l_ij * (K (r_ij * x))          (* is elementwise)
   and at a layer without mask W x + L_i (R_i^T x).
3. When all rows have the same edit, L R^T is added to W once instead: then its rank doesn't matter.
4. Below the masked layer nothing depends on the mask. `read` runs it once, edits of lower layers included, and keeps
   the stream before the masked MLP's output and the MLP's neurons; `Upper` goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mega_core.changes import MatrixDelta, WeightDelta
from mega_core.errors import BadInput
from mega_core.events import Reporter, silent, stage
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Fn, Site, capture, intervene
from mega_core.models.suffix import KeptPast, block_arguments
from mega_core.records import EditRequest

SITE = "mlp_down"
"""Masks lie on an MLP's last matrix, where the methods write."""
ROWS_AT_ONCE = 256
"""Rows that are read in one forward."""

Masks = Mapping[int, Float[Tensor, "out in"]]
"""Layer -> mask."""


@dataclass(frozen=True, eq=False)
class Edit:
    """One edit that a mask is trained or judged on."""

    request: EditRequest
    change: WeightDelta
    """Low-rank, at mlp_down only."""
    prompts: tuple[str, ...]
    """What a mask may be trained on: the edit prompt first, then the same question in trained words."""

    @property
    def old(self) -> str:
        """The object before the edit. Raises BadInput when the request doesn't name it."""
        if self.request.target_true is None:
            raise BadInput("target_true", f"the object of {self.request.subject} before the edit is not known.")
        return self.request.target_true


class Bank:
    """The factors of several edits side by side; an edit without a matrix at a layer has zeros there."""

    def __init__(self, changes: Sequence[WeightDelta], device: torch.device | str = "cpu") -> None:
        """Raises BadInput on changes that are not low-rank additions at mlp_down."""
        self.count = len(changes)
        places: dict[int, list[tuple[int, MatrixDelta]]] = {}
        for i, change in enumerate(changes):
            for matrix in change.matrices:
                if not isinstance(matrix, MatrixDelta) or matrix.site != SITE:
                    raise BadInput(
                        "method", "a mask needs edits of low rank at the MLPs' last matrices.", "Choose rome or memit."
                    )
                places.setdefault(matrix.layer, []).append((i, matrix))
        self.left: dict[int, Float[Tensor, "edit rank out"]] = {}
        self.right: dict[int, Float[Tensor, "edit rank in"]] = {}
        for layer, found in sorted(places.items()):
            ranks = [0] * self.count
            for i, matrix in found:
                ranks[i] += matrix.rank()
            out, into = found[0][1].shape()
            left, right = torch.zeros(self.count, max(ranks), out), torch.zeros(self.count, max(ranks), into)
            filled = [0] * self.count
            for i, matrix in found:
                span = slice(filled[i], filled[i] + matrix.rank())
                left[i, span], right[i, span] = matrix.left.float().T, matrix.right.float().T
                filled[i] = span.stop
            self.left[layer], self.right[layer] = left.to(device), right.to(device)

    @property
    def layers(self) -> tuple[int, ...]:
        """Where anything is written, ascending."""
        return tuple(self.left)

    def added(
        self,
        layer: int,
        neurons: Float[Tensor, "row pos in"],
        owner: Int[Tensor, " row"],
        mask: Float[Tensor, "out in"] | None = None,
    ) -> Float[Tensor, "row pos out"] | None:
        """What each row's edit adds to the matrix's output at this layer (step 2); None where no edit writes."""
        if layer not in self.left:
            return None
        left, right = self.left[layer].to(neurons.device), self.right[layer].to(neurons.device)
        if self.count == 1:  # 3.
            update = left[0].T @ right[0]
            return neurons.float() @ (update if mask is None else update * mask).T
        left, right = left[owner], right[owner]  # (row, rank, .)
        if mask is None:
            return torch.einsum("bpi,bri,bro->bpo", neurons.float(), right, left)
        total: Tensor | None = None
        for j in range(left.shape[1]):
            part = ((neurons.float() * right[:, None, j]) @ mask.T) * left[:, None, j]
            total = part if total is None else total + part
        return total


def bank_of(edits: Sequence[Edit], device: torch.device | str = "cpu") -> tuple[Bank, list[int]]:
    """The factors of these edits, and each one's place among them; facts that were edited together share one."""
    distinct = {id(edit.change): edit.change for edit in edits}
    places = {key: i for i, key in enumerate(distinct)}
    return Bank(list(distinct.values()), device), [places[id(edit.change)] for edit in edits]


@contextmanager
def routed(
    lm: ModelAdapter, bank: Bank, owner: Int[Tensor, " row"], masks: Masks | None = None, restore: bool = False
) -> Iterator[None]:
    """Inside the block row i of every batch is read by the model with edit owner[i], under the masks.

    An owner of -1 reads the unedited model (under the masks too). `restore` puts the unedited weight back where a mask
    removes one. The weights are never written.
    """
    with intervene(lm, _changes(lm, bank, owner, masks or {}, range(lm.n_layers), restore)):
        yield


def _changes(
    lm: ModelAdapter,
    bank: Bank,
    owner: Int[Tensor, " row"],
    masks: Masks,
    layers: Sequence[int],
    restore: bool = False,
) -> dict[Site, Fn]:
    found: dict[Site, Fn] = {}
    for layer in layers:
        if layer not in bank.left and layer not in masks:
            continue
        kept: list[Tensor] = []

        def remember(neurons: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept[:] = [neurons]
            return neurons

        def replace(mlp: Tensor, layer: int = layer, kept: list[Tensor] = kept) -> Tensor:
            neurons = kept.pop()
            if layer in masks and not restore:
                return written(lm, bank, layer, neurons, owner, masks[layer]).to(mlp.dtype)
            extra = _added(bank, layer, neurons, owner, masks.get(layer))  # restored: W + D * K
            return mlp if extra is None else mlp + extra.to(mlp.dtype)

        found[Site(layer, "mlp_down_in")] = remember
        found[Site(layer, "mlp")] = replace
    return found


def written(
    lm: ModelAdapter,
    bank: Bank,
    layer: int,
    neurons: Float[Tensor, "row pos in"],
    owner: Int[Tensor, " row"],
    mask: Float[Tensor, "out in"],
) -> Float[Tensor, "row pos out"]:
    """Step 2 in float32: what the masked, edited MLP writes, its bias included."""
    out = neurons.float() @ (lm.read_weight(layer, SITE).float() * mask).T
    bias = getattr(lm.mlp_down(layer), "bias", None)
    if bias is not None:
        out = out + bias.detach().float()
    extra = _added(bank, layer, neurons, owner, mask)
    return out if extra is None else out + extra


def _added(bank: Bank, layer: int, neurons: Tensor, owner: Int[Tensor, " row"], mask: Tensor | None) -> Tensor | None:
    """Bank.added for rows of which some have no edit (owner -1)."""
    if layer not in bank.left or not bool((owner >= 0).any()):
        return None
    extra = bank.added(layer, neurons, owner.clamp_min(0), mask)
    if extra is None or bool((owner >= 0).all()):
        return extra
    return extra * (owner >= 0).to(extra)[:, None, None]


# 4. -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What the rows need from the masked layer on. Rows keep their own length: they are padded when they are used."""

    layer: int
    mid: tuple[Float[Tensor, "pos d_model"], ...]
    """The stream before the masked MLP's output joins it."""
    neurons: tuple[Float[Tensor, "pos d_mlp"], ...]
    owner: Int[Tensor, " row"]

    def __len__(self) -> int:
        return len(self.mid)


def read(
    lm: ModelAdapter,
    layer: int,
    rows: Sequence[Sequence[int]],
    bank: Bank,
    owner: Int[Tensor, " row"],
    report: Reporter = silent,
) -> Reading:
    """Run every row up to the masked layer's MLP, with its edit's changes at lower layers. No gradients."""
    mid: list[Tensor | None] = [None] * len(rows)
    neurons: list[Tensor | None] = [None] * len(rows)
    sites = Site(layer, "resid_mid"), Site(layer, "mlp_down_in")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    starts = range(0, len(order), ROWS_AT_ONCE)
    with torch.no_grad(), stage(report, "reading prompts", len(starts)) as step:
        for start in starts:
            part = order[start : start + ROWS_AT_ONCE]
            batch = tokens.pack(lm.tokenizer, [rows[i] for i in part], lm.device)
            below = _changes(lm, bank, owner[part], {}, range(layer))
            with intervene(lm, below), capture(lm, sites) as got:
                lm.forward(batch)
            for row, (i, n) in enumerate(zip(part, batch.lengths, strict=True)):
                mid[i], neurons[i] = got[sites[0]][row, :n].clone(), got[sites[1]][row, :n].clone()
            step()
    return Reading(layer, tuple(m for m in mid if m is not None), tuple(n for n in neurons if n is not None), owner)


class Upper:
    """The model from the masked MLP's output on, for chosen rows of a reading."""

    def __init__(self, lm: ModelAdapter, bank: Bank, reading: Reading) -> None:
        self.lm, self.bank, self.reading = lm, bank, reading

    def last_hidden(
        self, rows: Sequence[int], mask: Float[Tensor, "out in"] | None, edited: bool = True
    ) -> Float[Tensor, "row d_model"]:
        """The stream after the last block at each row's last token. `mask` None means K = 1."""
        lm, layer = self.lm, self.reading.layer
        lengths = torch.tensor([len(self.reading.mid[i]) for i in rows])
        mid = _padded([self.reading.mid[i] for i in rows])  # (row, pos, d_model)
        neurons = _padded([self.reading.neurons[i] for i in rows])
        owner = self.reading.owner[list(rows)] if edited else torch.full((len(rows),), -1)
        whole = torch.ones(lm.read_weight(layer, SITE).shape, device=neurons.device) if mask is None else mask
        hidden = mid + written(lm, self.bank, layer, neurons, owner, whole).to(mid.dtype)
        arguments = _arguments(lm, hidden)
        above = range(layer + 1, lm.n_layers)
        with intervene(lm, _changes(lm, self.bank, owner, {}, above)):
            for at in above:
                output = lm.block(at)(hidden, **arguments)
                hidden = output if isinstance(output, Tensor) else output[0]
        return hidden[torch.arange(len(rows)), (lengths - 1).to(hidden.device)]

    def last_logits(
        self, rows: Sequence[int], mask: Float[Tensor, "out in"] | None, edited: bool = True
    ) -> Float[Tensor, "row vocab"]:
        """float32 logits after each row's last token."""
        return self.lm.unembed(self.last_hidden(rows, mask, edited)).float()


class _NoPast(KeptPast):
    """Whole rows have nothing in front of them."""

    def __init__(self) -> None:
        super().__init__({})

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What the block attends to: its own positions."""
        return keys, values


def _arguments(lm: ModelAdapter, hidden: Float[Tensor, "row pos d_model"]) -> dict[str, Any]:
    """What a block wants besides its input when whole rows pass it."""
    rows, width = hidden.shape[:2]
    positions = torch.arange(width, device=hidden.device).expand(rows, width)
    causal = torch.ones(width, width, dtype=torch.bool, device=hidden.device).tril()
    return block_arguments(lm, hidden, positions, causal.expand(rows, 1, width, width), _NoPast())


def _padded(parts: Sequence[Float[Tensor, "pos width"]]) -> Float[Tensor, "row pos width"]:
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
