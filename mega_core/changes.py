"""A change to a model is a value: `with change.applied(lm)` makes it true, leaving the block makes it untrue.

Restoring copies the saved tensors back. Subtracting is not undoing: it leaves 2e-7 in float32, 2e-2 in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mega_core import frames
from mega_core.models.adapter import ModelAdapter


class Change(Protocol):
    """What a method hands back; everything downstream knows only this."""

    def applied(self, lm: ModelAdapter) -> AbstractContextManager[None]:
        """Make the change true inside the block and bit-exactly undone after it, however the block ends."""
        ...

    def summary(self) -> pd.DataFrame:
        """What is changed, as the frame `weight_change`."""
        ...


@dataclass(frozen=True)
class MatrixDelta:
    """A low-rank addition to one weight matrix, kept on the CPU: W <- W + left @ right.T with W as (out, in)."""

    layer: int
    site: str
    """"mlp_down" or "attn_out"."""
    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "in rank"]
    base_norm: float
    """Frobenius norm of the unedited matrix."""

    def norm(self) -> float:
        """Frobenius norm of left @ right.T, from the two (rank, rank) Gram matrices."""
        left, right = self.left.double(), self.right.double()
        return float(((left.T @ left) * (right.T @ right)).sum().clamp_min(0).sqrt())


@dataclass(frozen=True)
class WeightDelta:
    """An edit of some weight matrices, as low-rank factors."""

    matrices: tuple[MatrixDelta, ...]

    @contextmanager
    def applied(self, lm: ModelAdapter) -> Iterator[None]:
        """Add every matrix's update in float32 (then cast), and copy the saved originals back at the end."""
        with ExitStack() as stack, torch.no_grad():
            for matrix in self.matrices:
                weight = lm.weight(matrix.layer, matrix.site)
                stack.callback(_copy_back, weight, weight.detach().clone())
                left = matrix.left.to(weight.device, torch.float32)
                right = matrix.right.to(weight.device, torch.float32)
                update = right @ left.T if lm.conv1d(matrix.layer, matrix.site) else left @ right.T
                weight.copy_((weight.float() + update).to(weight.dtype))
            with torch.enable_grad():
                yield

    def summary(self) -> pd.DataFrame:
        """One row per matrix: norms, relative norm, rank and how many parameters the matrix has."""
        rows: list[dict[str, object]] = [
            {
                "layer": m.layer,
                "site": m.site,
                "kind": "weights",
                "norm": (norm := m.norm()),
                "relative_norm": norm / m.base_norm if m.base_norm else 0.0,
                "rank": m.left.shape[1],
                "parameters": m.left.shape[0] * m.right.shape[0],
            }
            for m in self.matrices
        ]
        return frames.from_rows(rows, "weight_change")


def _copy_back(weight: Tensor, saved: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(saved)
