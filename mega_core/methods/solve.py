"""Closed forms of the locate-then-edit family: from keys and wanted changes of values to a low-rank update.

Setting: a matrix W (out, in), keys K = [k_1 .. k_n] as columns, the changes R = [r_1 .. r_n] that W k_i shall make, and
C = E[k kT], the keys' second moment over ordinary text. The update that moves ordinary keys least, measured by
tr(D C DT), under the constraint D K = R is

    D = R (KT C^-1 K)^-1 KT C^-1                              (EMMET, arXiv 2403.14236)

With one key it is ROME's rank-one update, D = r (C^-1 k)T / (kT C^-1 k) (arXiv 2202.05262). D is kept as its factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mega_core.errors import ActionableError, BadInput

SINGULAR = 1e-10
"""Smallest reciprocal condition number of the keys' Gram matrix at which several edits still count as distinct."""


@dataclass(frozen=True)
class LowRank:
    """An update left @ right.T, in float64 on the CPU."""

    left: Float[Tensor, "out n"]
    right: Float[Tensor, "in n"]


def whiten(keys: Float[Tensor, "n in"], cholesky: Float[Tensor, "in in"] | None) -> Float[Tensor, "n in"]:
    """C^-1 k for every key, in float64, by the lower Cholesky factor of C; None stands for C = I."""
    wide = keys.double()
    if cholesky is None:
        return wide
    return torch.cholesky_solve(wide.T, cholesky.to(wide.device, torch.float64)).T


def equality_edit(
    whitened: Float[Tensor, "n in"],
    keys: Float[Tensor, "n in"],
    changes: Float[Tensor, "n out"],
    ridge: float = 0.0,
) -> LowRank:
    """The update D with D k_i = r_i for `keys`, acting along `whitened`.

    `whitened` is C^-1 times the same keys; ROME's published code takes other ones, and then D k_i = r_i still holds.
    A positive `ridge` turns the constraint soft (EMMET's lambda). Raises BadInput when two keys are practically one.
    """
    right = whitened.double().T  # (in, n)
    gram = right.T @ keys.double().T  # (n, n)
    if ridge:
        gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if len(gram) > 1:
        scale = gram.diagonal().abs().clamp_min(1e-300).sqrt()
        values = torch.linalg.svdvals(gram / scale[:, None] / scale)
        if not torch.isfinite(values).all() or values[-1] < SINGULAR * values[0]:
            raise BadInput(
                "requests", "two of the edits have the same key, so one matrix can't hold both.", "Drop one of them."
            )
    factor = torch.linalg.solve_ex(gram.T, changes.double())[0]  # (n, out): gram^-T R
    found = LowRank(factor.T.cpu(), right.cpu())
    check_finite("The update", found.left, found.right)
    return found


def key_match(
    whitened: Float[Tensor, "n in"], keys: Float[Tensor, "n in"], edited: Float[Tensor, "n in"]
) -> list[float]:
    """(k_edit . u) / (k . u) per edit, where u comes from `keys` and the scale from `edited`.

    1 when both are the same key. Near 0 the published, mismatched form divides by almost nothing and wrecks the model.
    """
    u = whitened.double()
    return ((edited.double() * u).sum(-1) / (keys.double() * u).sum(-1)).tolist()


def check_finite(what: str, *tensors: Tensor) -> None:
    """Raise ActionableError when a number is infinite or missing."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise ActionableError(
            f"{what} is not finite, so nothing was changed.", "Lower the learning rate, or choose another layer."
        )
