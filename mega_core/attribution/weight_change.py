"""How an edit's weight changes are spread over directions: singular values beside those of the unedited matrix.

1. All additions to one matrix count together. Low-rank factors L R^T are reduced by two thin QR decompositions,
       L = Q_L T_L,  R = Q_R T_R:    singular values of L R^T = those of the small matrix T_L T_R^T,
   so that the whole matrix is never made. A difference without small factors (fine-tuning) is taken as it is.
2. Of a whole matrix M, the square roots of the eigenvalues of M M^T, in float64: exact but for values below 1e-8 of the
   greatest, and much faster than a decomposition. For an unedited matrix whose shorter side is longer than EXACT,
   where only some of its values are wanted, block Krylov iteration with a fixed start finds the greatest ones (Musco,
   Musco 2015, arXiv 1504.05477).
3. At least LEADING values of each (ours), more where the change has a higher rank, so that

       Frobenius norm of the change = sqrt(sum of its squared singular values).

Steering, memories and texts in front of the prompt change no weight: no rows. Nor has a change whose numbers are not
finite; its alarm says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mega_core import frames
from mega_core.changes import DenseDelta, MatrixDelta, WeightDelta

if TYPE_CHECKING:
    from mega_core.changes import Change
    from mega_core.models.adapter import ModelAdapter

LEADING = 32
EXACT = 1024
SPARE = 8
"""Columns of the iteration's block beyond the values wanted."""
ITERATIONS = 10


def spectrum(change: Change, lm: ModelAdapter) -> pd.DataFrame:
    """The frame `weight_spectrum`. Call it where the change is not true: the model's matrices are read as unedited."""
    tables = []
    places: dict[tuple[int, str], list[MatrixDelta | DenseDelta]] = {}
    for matrix in _matrices(change):
        places.setdefault((matrix.layer, matrix.site), []).append(matrix)
    with torch.no_grad():
        for (layer, site), parts in sorted(places.items()):
            values = _of_change(parts)
            if not torch.isfinite(values).all():
                continue
            weight = lm.read_weight(layer, site)
            count = min(max(LEADING, len(values)), *weight.shape)
            singular = torch.zeros(count, dtype=torch.float64)
            singular[: len(values)] = values[:count]
            base = leading(weight, count)
            if not torch.isfinite(base).all():
                continue
            tables.append(
                pd.DataFrame(
                    {
                        "layer": layer,
                        "site": site,
                        "index": range(count),
                        "singular": singular.numpy(),
                        "base_singular": base.numpy(),
                    }
                )
            )
    if not tables:
        return frames.empty("weight_spectrum")
    return frames.check(pd.concat(tables, ignore_index=True), "weight_spectrum")


def leading(weight: Float[Tensor, "out in"], count: int) -> Float[Tensor, " count"]:
    """The greatest `count` singular values, float64 on the CPU; see step 2 for when they are exact."""
    matrix = weight.detach().float()
    if not torch.isfinite(matrix).all():
        return torch.full((count,), torch.nan, dtype=torch.float64)
    if min(matrix.shape) <= EXACT or ITERATIONS * (count + SPARE) >= min(matrix.shape):
        return _whole(matrix)[:count].cpu()
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    start = torch.randn(matrix.shape[1], count + SPARE, generator=torch.Generator().manual_seed(0))
    block = torch.linalg.qr(matrix @ start.to(matrix))[0]
    basis = block
    for _ in range(ITERATIONS - 1):
        block = matrix @ (matrix.T @ block)
        for _ in range(2):  # twice: once leaves rounding behind
            block = torch.linalg.qr(block - basis @ (basis.T @ block))[0]
        basis = torch.cat((basis, block), dim=1)  # orthonormal columns
    return _whole(basis.T @ matrix)[:count].cpu()


def _of_change(parts: Sequence[MatrixDelta | DenseDelta]) -> Float[Tensor, " rank"]:
    """Step 1: the singular values of the sum, float64, greatest first; NaN when a number is not finite."""
    low = [part for part in parts if isinstance(part, MatrixDelta)]
    left = torch.cat([part.left.double() for part in low], dim=1) if low else None
    right = torch.cat([part.right.double() for part in low], dim=1) if low else None
    whole: Tensor | None = None
    for part in parts:
        if isinstance(part, DenseDelta):
            whole = part.difference.double() if whole is None else whole + part.difference.double()
    if whole is not None and left is not None and right is not None:
        whole = torch.addmm(whole, left, right.T)  # as large as what is there already
    if whole is None:
        if left is None or right is None:
            return torch.zeros(0, dtype=torch.float64)
        if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
            return torch.full((1,), torch.nan, dtype=torch.float64)
        whole = torch.linalg.qr(left)[1] @ torch.linalg.qr(right)[1].T
        return torch.linalg.svdvals(whole)
    if not torch.isfinite(whole).all():
        return torch.full((1,), torch.nan, dtype=torch.float64)
    return _whole(whole)


def _whole(matrix: Float[Tensor, "out in"]) -> Float[Tensor, " least"]:
    """Step 2: every singular value, float64, greatest first."""
    wide = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).double()
    return torch.linalg.eigvalsh(wide @ wide.T).clamp_min(0).sqrt().flip(0)


def _matrices(change: Change) -> Iterator[MatrixDelta | DenseDelta]:
    """Every matrix that a change, or one of several changes in it, adds to."""
    if isinstance(change, WeightDelta):
        yield from change.matrices
    elif hasattr(change, "parts"):
        for part in change.parts():
            yield from _matrices(part)
