"""Edits made one after the other on one model, without paying for the earlier ones again (ours).

1. Changes of the weights stay applied for the whole sequence: the original of every touched matrix is kept once, each
   edit adds to what is there, and the originals are copied back at the end. An edit is prepared on the weights as they
   are then, and finds the earlier ones in `lm.changes`, as in an EditStack, whose numbers these are bit for bit.
2. Steering, memories and texts in front are prepared without each other, as in an EditStack, and act as one (Chain)
   when the sequence is asked.
3. Low-rank additions are kept as they are; dense differences of one matrix are kept as one sum, so that two hundred
   fine-tunings need the memory of one.
4. `save` writes everything into one file, whole or not at all: the weights themselves, because adding a sum again would
   not give the same last bits. `restored` reads it; a file that is damaged or of another sequence counts as none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors import torch as files
from torch import Tensor

from mega_core.changes import Chain, Change, DenseDelta, MatrixDelta, Tensors, WeightDelta
from mega_core.errors import ActionableError
from mega_core.folders import write_file
from mega_core.models.adapter import ModelAdapter
from mega_core.stack import class_of, kind_of

FORMAT = "edit-anatomy sequence 1"
Place = tuple[int, str]
"""Layer and site."""


@dataclass
class Kept:
    """What a file holds."""

    count: int
    weights: dict[Place, Tensor]
    delta: WeightDelta
    others: list[Change]
    seconds: list[float]
    refused: list[str]
    collapsed: bool


@dataclass(eq=False)
class Edited:
    """The model as the edits so far made it: a change that grows while it is true, read by alarms like a stack."""

    lm: ModelAdapter
    delta: WeightDelta = field(default_factory=lambda: WeightDelta(()))
    others: list[Change] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of preparing each case."""
    refused: list[str] = field(default_factory=list)
    """Why a case was not edited; "" where it was."""
    collapsed: bool = False
    """Its numbers were not finite when it was asked: nothing more is edited."""
    _originals: dict[Place, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Cases so far, those refused included."""
        return len(self.seconds)

    # 1.
    @contextmanager
    def held(self) -> Iterator[Edited]:
        """Weights are as edited inside the block, and bit for bit as before after it."""
        try:
            yield self
        finally:
            if self.delta in self.lm.changes:
                self.lm.changes.remove(self.delta)
            with torch.no_grad():
                for place, saved in self._originals.items():
                    self.lm.weight(*place).copy_(saved)
            self._originals.clear()

    def add(self, change: Change | str, seconds: float) -> None:
        """One more case: its change, or why there is none."""
        self.seconds.append(seconds)
        self.refused.append(change if isinstance(change, str) else "")
        if isinstance(change, str):
            return
        if not isinstance(change, WeightDelta):
            self.others.append(change)
            return
        with torch.no_grad():
            for matrix in change.matrices:
                weight = self._touch((matrix.layer, matrix.site))
                update = matrix.update(weight.device)
                if self.lm.conv1d(matrix.layer, matrix.site):
                    update = update.T
                weight.copy_((weight.float() + update).to(weight.dtype))
        self._stand(_summed(self.delta, change))

    def take_up(self, kept: Kept) -> None:
        """Go on from what a file holds."""
        with torch.no_grad():
            for place, weight in kept.weights.items():
                self._touch(place).copy_(weight)
        self.others, self.seconds, self.refused = kept.others, kept.seconds, kept.refused
        self.collapsed = kept.collapsed
        if kept.delta.matrices or kept.delta.keys:
            self._stand(kept.delta)

    def _touch(self, place: Place) -> torch.nn.Parameter:
        weight = self.lm.weight(*place)
        if place not in self._originals:
            self._originals[place] = weight.detach().clone()
        return weight

    def _stand(self, delta: WeightDelta) -> None:
        changes = self.lm.changes
        if self.delta in changes:
            changes[changes.index(self.delta)] = delta
        else:
            changes.append(delta)
        self.delta = delta

    # 2.
    @contextmanager
    def others_applied(self) -> Iterator[None]:
        """What is not in the weights, true inside the block."""
        with Chain(tuple(self.others)).applied(self.lm):
            yield

    def parts(self) -> tuple[Change, ...]:
        """All changes, the weights' as one."""
        own = (self.delta,) if self.delta.matrices else ()
        return (*own, *Chain(tuple(self.others)).parts())

    def summary(self) -> pd.DataFrame:
        """The frame `weight_change` of all of them together."""
        return Chain(self.parts()).summary()

    # 4.
    def save(self, path: Path, sequence: str) -> None:
        """Write the file; where there is no folder for it, or no room, nothing is kept."""
        delta, tensors = self.delta.pack()
        tensors = {f"delta/{name}": tensor for name, tensor in tensors.items()}
        others = []
        for i, change in enumerate(self.others):
            plain, own = change.pack()
            others.append({"kind": kind_of(change), "plain": plain})
            tensors |= {f"{i}/{name}": tensor for name, tensor in own.items()}
        tensors |= {f"weight/{layer}/{site}": self.lm.weight(layer, site) for layer, site in self._originals}
        about = {"format": FORMAT, "sequence": sequence, "delta": delta, "others": others, "seconds": self.seconds,
                 "refused": self.refused, "collapsed": self.collapsed}  # fmt: skip
        plain_tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        data = files.save(plain_tensors, {"about": json.dumps(about)})
        if path.parent.is_dir():
            try:
                write_file(path, sha256(data).digest() + data)
            except OSError:
                path.unlink(missing_ok=True)


def restored(path: Path, sequence: Callable[[int], str]) -> Kept | None:
    """What save() wrote, if it is whole and of the sequence that `sequence` names for its number of cases."""
    try:
        data = path.read_bytes()
        if sha256(data[32:]).digest() != data[:32]:
            return None
        tensors = files.load(data[32:])
        length = int.from_bytes(data[32:40], "little")
        about = json.loads(json.loads(data[40 : 40 + length])["__metadata__"]["about"])
        count = len(about["seconds"])
        if about["format"] != FORMAT or about["sequence"] != sequence(count) or len(about["refused"]) != count:
            return None
        own = _under(tensors, "delta/")
        others: list[Change] = [
            class_of(one["kind"]).unpack(one["plain"], _under(tensors, f"{i}/"))
            for i, one in enumerate(about["others"])
        ]
        weights = {}
        for name, tensor in _under(tensors, "weight/").items():
            layer, _, site = name.partition("/")
            weights[int(layer), site] = tensor
        delta = WeightDelta.unpack(about["delta"], own)
        seconds, refused = [float(s) for s in about["seconds"]], [str(text) for text in about["refused"]]
        return Kept(count, weights, delta, others, seconds, refused, bool(about["collapsed"]))
    except (OSError, SafetensorError, ActionableError, KeyError, TypeError, ValueError, IndexError, RecursionError):
        return None


# 3.
def _summed(delta: WeightDelta, change: WeightDelta) -> WeightDelta:
    """Both together: low-rank parts side by side, dense ones of a matrix as one, keys one below the other."""
    places: dict[Place, list[MatrixDelta | DenseDelta]] = {}
    for matrix in (*delta.matrices, *change.matrices):
        places.setdefault((matrix.layer, matrix.site), []).append(matrix)
    matrices = [matrix for parts in places.values() for matrix in _merged(parts)]
    keys: dict[int, Any] = dict(delta.keys)
    for layer, own in change.keys.items():
        keys[layer] = torch.cat((keys[layer], own.to(keys[layer]))) if layer in keys else own
    return WeightDelta(tuple(matrices), keys)


def _merged(parts: list[MatrixDelta | DenseDelta]) -> list[MatrixDelta | DenseDelta]:
    low = [part for part in parts if isinstance(part, MatrixDelta)]
    dense = [part for part in parts if isinstance(part, DenseDelta)]
    found: list[MatrixDelta | DenseDelta] = []
    if low:
        left, right = torch.cat([p.left for p in low], dim=1), torch.cat([p.right for p in low], dim=1)
        found.append(MatrixDelta(low[0].layer, low[0].site, left, right, low[0].base_norm))
    if dense:
        total = dense[0].difference.float()
        for part in dense[1:]:
            total = total + part.difference.float()
        found.append(DenseDelta(dense[0].layer, dense[0].site, total, dense[0].base_norm))
    return found


def _under(tensors: Mapping[str, Tensor], start: str) -> Tensors:
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
