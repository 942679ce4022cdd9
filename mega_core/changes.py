"""A change to a model is a value: `with change.applied(lm)` makes it true, leaving the block makes it untrue.

    WeightDelta    some matrices differ: low-rank factors, or dense differences
    PromptPrefix   a text stands in front of every prompt
    Chain          several changes at once
    and what steering methods and memories put in front of or behind a module: see methods/

Restoring copies the saved tensors back. Subtracting is not undoing: it leaves 2e-7 in float32, 2e-2 in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mega_core import frames
from mega_core.models.adapter import ModelAdapter

Plain = dict[str, Any]
"""What JSON can hold."""
Tensors = dict[str, Tensor]


class Change(Protocol):
    """What a method hands back; everything downstream knows only this."""

    def applied(self, lm: ModelAdapter) -> AbstractContextManager[None]:
        """Make the change true inside the block and bit-exactly undone after it, however the block ends.

        While it is true it stands in `lm.changes`, where a later edit finds what it has to respect.
        """
        ...

    def summary(self) -> pd.DataFrame:
        """What is changed, as the frame `weight_change`; `kind` tells weights from steering, memory and prompt."""
        ...

    def pack(self) -> tuple[Plain, Tensors]:
        """Everything there is to it, for a file; the class's `unpack(plain, tensors)` reads it again, bit by bit."""
        ...


@contextmanager
def standing(lm: ModelAdapter, change: Change) -> Iterator[None]:
    """List a change in `lm.changes` inside the block."""
    lm.changes.append(change)
    try:
        yield
    finally:
        lm.changes.remove(change)


# Weights -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MatrixDelta:
    """A low-rank addition to one weight matrix, kept on the CPU: W <- W + left @ right.T with W as (out, in)."""

    layer: int
    site: str
    """"mlp_down" or "attn_out"."""
    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "in rank"]
    base_norm: float
    """Frobenius norm of the unedited matrix."""

    def update(self, device: torch.device) -> Float[Tensor, "out in"]:
        """What is added, in float32."""
        return self.left.to(device, torch.float32) @ self.right.to(device, torch.float32).T

    def norm(self) -> float:
        """Frobenius norm of the addition, from the two (rank, rank) Gram matrices."""
        left, right = self.left.double(), self.right.double()
        return float(((left.T @ left) * (right.T @ right)).sum().clamp_min(0).sqrt())

    def rank(self) -> int:
        """Columns of the factors."""
        return self.left.shape[1]

    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.left.shape[0], self.right.shape[0]


@dataclass(frozen=True, eq=False)
class DenseDelta:
    """An addition to one weight matrix that has no small factors, as fine-tuning makes it; float32 on the CPU."""

    layer: int
    site: str
    """"mlp_down" or "attn_out"."""
    difference: Float[Tensor, "out in"]
    base_norm: float
    """Frobenius norm of the unedited matrix."""

    def update(self, device: torch.device) -> Float[Tensor, "out in"]:
        """What is added, in float32."""
        return self.difference.to(device, torch.float32)

    def norm(self) -> float:
        """Frobenius norm of the addition."""
        return float(self.difference.double().norm())

    def rank(self) -> int:
        """Of the matrix: a dense difference has full rank in general."""
        return min(self.difference.shape)

    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.difference.shape[0], self.difference.shape[1]


@dataclass(frozen=True, eq=False)
class WeightDelta:
    """An edit of some weight matrices; a matrix may be named more than once, and then all additions count."""

    matrices: tuple[MatrixDelta | DenseDelta, ...]
    keys: Mapping[int, Float[Tensor, "n d_mlp"]] = field(default_factory=dict)
    """Layer -> the keys whose values this edit set there, for later edits that must not move them."""

    @contextmanager
    def applied(self, lm: ModelAdapter) -> Iterator[None]:
        """Add every matrix's update in float32 (then cast), and copy the saved originals back at the end."""
        with ExitStack() as stack, torch.no_grad():
            for matrix in self.matrices:
                weight = lm.weight(matrix.layer, matrix.site)
                stack.callback(_copy_back, weight, weight.detach().clone())
                update = matrix.update(weight.device)
                if lm.conv1d(matrix.layer, matrix.site):
                    update = update.T
                weight.copy_((weight.float() + update).to(weight.dtype))
            stack.enter_context(standing(lm, self))
            with torch.enable_grad():
                yield

    def summary(self) -> pd.DataFrame:
        """One row per matrix: norms, relative norm, rank and how many parameters the matrix has."""
        rows: dict[tuple[int, str], dict[str, object]] = {}
        for (layer, site), parts in _by_place(self.matrices).items():
            whole = parts[0] if len(parts) == 1 else _together(parts)
            norm = whole.norm()
            out, into = whole.shape()
            rows[layer, site] = {
                "layer": layer,
                "site": site,
                "kind": "weights",
                "norm": norm,
                "relative_norm": norm / whole.base_norm if whole.base_norm else 0.0,
                "rank": whole.rank(),
                "parameters": out * into,
            }
        return frames.from_rows(list(rows.values()), "weight_change")

    def pack(self) -> tuple[Plain, Tensors]:
        """Factors and differences as tensors, places and norms as plain values."""
        tensors: Tensors = {}
        listed = []
        for i, matrix in enumerate(self.matrices):
            if isinstance(matrix, DenseDelta):
                tensors[f"{i}.difference"] = matrix.difference.contiguous()
            else:
                tensors |= {f"{i}.left": matrix.left.contiguous(), f"{i}.right": matrix.right.contiguous()}
            listed.append({"layer": matrix.layer, "site": matrix.site, "base_norm": matrix.base_norm})
        tensors |= {f"keys.{layer}": keys.contiguous() for layer, keys in self.keys.items()}
        return {"matrices": listed}, tensors

    @classmethod
    def unpack(cls, plain: Plain, tensors: Tensors) -> WeightDelta:
        """What pack() wrote. Raises KeyError or TypeError on anything else."""
        matrices: list[MatrixDelta | DenseDelta] = []
        for i, place in enumerate(plain["matrices"]):
            layer, site, norm = int(place["layer"]), str(place["site"]), float(place["base_norm"])
            if f"{i}.difference" in tensors:
                matrices.append(DenseDelta(layer, site, tensors[f"{i}.difference"], norm))
            else:
                matrices.append(MatrixDelta(layer, site, tensors[f"{i}.left"], tensors[f"{i}.right"], norm))
        keys = {int(name[5:]): tensor for name, tensor in tensors.items() if name.startswith("keys.")}
        return cls(tuple(matrices), keys)


def _by_place(
    matrices: Sequence[MatrixDelta | DenseDelta],
) -> dict[tuple[int, str], list[MatrixDelta | DenseDelta]]:
    places: dict[tuple[int, str], list[MatrixDelta | DenseDelta]] = {}
    for matrix in matrices:
        places.setdefault((matrix.layer, matrix.site), []).append(matrix)
    return places


def _together(parts: Sequence[MatrixDelta | DenseDelta]) -> MatrixDelta | DenseDelta:
    """Several additions to one matrix as one."""
    first = parts[0]
    low = [part for part in parts if isinstance(part, MatrixDelta)]
    if len(low) == len(parts):
        left, right = torch.cat([p.left for p in low], dim=1), torch.cat([p.right for p in low], dim=1)
        return MatrixDelta(first.layer, first.site, left, right, first.base_norm)
    total = torch.stack([part.update(torch.device("cpu")) for part in parts]).sum(0)
    return DenseDelta(first.layer, first.site, total, first.base_norm)


def _copy_back(weight: Tensor, saved: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(saved)


# Prompts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptPrefix:
    """A text that stands in front of every prompt; positions everywhere go on counting from the prompt's own tokens."""

    text: str

    @contextmanager
    def applied(self, lm: ModelAdapter) -> Iterator[None]:
        """Read every prompt behind the text."""
        with lm.behind(lambda prompt: self.text), standing(lm, self):
            yield

    def summary(self) -> pd.DataFrame:
        """One row: nothing in the model is changed."""
        return prompt_summary()

    def pack(self) -> tuple[Plain, Tensors]:
        """The text."""
        return {"text": self.text}, {}

    @classmethod
    def unpack(cls, plain: Plain, tensors: Tensors) -> PromptPrefix:
        """What pack() wrote."""
        return cls(str(plain["text"]))


def prompt_summary() -> pd.DataFrame:
    """The frame `weight_change` of a change that touches prompts only: one row, at no layer."""
    row: dict[str, object] = {"layer": -1, "site": "prompt", "kind": "prompt", "norm": 0.0, "relative_norm": 0.0}
    return frames.from_rows([{**row, "rank": 0, "parameters": 0}], "weight_change")


# Several -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Chain:
    """Several changes, true together, applied in their order.

    Changes of a class with `merged(changes)` act as one: two steered edits, for example, share one gate, so that the
    nearer one answers.
    """

    changes: tuple[Change, ...]

    def parts(self) -> tuple[Change, ...]:
        """The changes with those of one mergeable class put together, where the first of them stands."""
        groups: dict[object, list[Change]] = {}
        for change in self.changes:
            mergeable = hasattr(type(change), "merged")
            groups.setdefault(type(change) if mergeable else id(change), []).append(change)
        return tuple(
            group[0] if len(group) == 1 else type(group[0]).merged(group)  # type: ignore[attr-defined]
            for group in groups.values()
        )

    @contextmanager
    def applied(self, lm: ModelAdapter) -> Iterator[None]:
        """All of them, in order; undone in the reverse order."""
        with ExitStack() as stack:
            for change in self.parts():
                stack.enter_context(change.applied(lm))
            yield

    def summary(self) -> pd.DataFrame:
        """The rows of all; a matrix changed twice has one row, by the sum of its changes."""
        weights = [change for change in self.changes if isinstance(change, WeightDelta)]
        others = [change for change in self.parts() if not isinstance(change, WeightDelta)]
        tables = [change.summary() for change in others]
        if weights:
            tables.insert(0, WeightDelta(tuple(m for w in weights for m in w.matrices)).summary())
        if not tables:
            return frames.empty("weight_change")
        joined = pd.concat(tables, ignore_index=True).drop_duplicates(["layer", "site"])
        return frames.check(joined, "weight_change")
