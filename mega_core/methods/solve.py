"""Closed forms of the locate-then-edit family: from keys and wanted changes of values to a low-rank update.

Setting: a matrix W (out, in), keys K = [k_1 .. k_n] as columns, the changes R = [r_1 .. r_n] that W k_i shall make, and
C = E[k kT], the keys' second moment over ordinary text. The update D is kept as its factors; no (in, in) system is
solved, only triangles of C's Cholesky factor and systems of as many unknowns as there are keys.

equality_edit   min tr(D C DT) so that D K = R:
                    D = R (KT C^-1 K)^-1 KT C^-1                                            (EMMET, arXiv 2403.14236)
                With one key it is ROME's rank-one update, D = r (C^-1 k)T / (kT C^-1 k)    (arXiv 2202.05262).
soft_edit       min |D K - R|^2 + lambda tr(D C DT):
                    D = R KT (lambda C + K KT)^-1                                           (MEMIT, arXiv 2210.07229)
                      = R (A (I + KT A)^-1)T with A = C^-1 K / lambda                       (Woodbury)
projected_edit  min |D K - R|^2 + |D Kp|^2 + L2 |D|^2 among D = D P, where P projects on the directions that ordinary
                keys don't use and Kp are the keys of earlier edits:
                    DT = [P (K KT + Kp KpT) + L2 I]^-1 P K RT                              (AlphaEdit, arXiv 2410.02355)
                       = A (L2 I + BT A)^-1 [I; 0] RT with B = [K, Kp], A = P B            (push-through)
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


def thin(update: LowRank) -> LowRank:
    """The same update with no more columns than the smaller side of the matrix has; many edits make more."""
    out, into = update.left.shape[0], update.right.shape[0]
    if update.left.shape[1] <= min(out, into):
        return update
    left, right = update.left.double(), update.right.double()
    if out <= into:
        return LowRank(torch.eye(out, dtype=left.dtype, device=left.device), right @ left.T)
    return LowRank(left @ right.T, torch.eye(into, dtype=right.dtype, device=right.device))


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


def soft_edit(
    keys: Float[Tensor, "n in"],
    changes: Float[Tensor, "n out"],
    cholesky: Float[Tensor, "in in"] | None,
    weight: float,
) -> LowRank:
    """MEMIT's update: D k_i near r_i, ordinary keys moved little; `weight` is lambda, above 0.

    `cholesky` is the lower Cholesky factor of C, None for C = I. Keys may repeat: their changes are then averaged.
    """
    wide = keys.double()
    a = whiten(wide, cholesky).to(wide.device) / weight  # (n, in): A^T
    gram = wide @ a.T
    gram.diagonal().add_(1.0)
    return _factors(gram, a, changes, "lambda")


@dataclass(frozen=True)
class Projector:
    """P: the projection on some directions, or on all others; kept by the smaller of the two bases."""

    basis: Float[Tensor, "in some"]
    """Orthonormal columns."""
    complement: bool
    """True: P = I - V VT removes the basis; False: P = V VT keeps it."""

    def __call__(self, rows: Float[Tensor, "n in"]) -> Float[Tensor, "n in"]:
        """P k for every row, in float64."""
        wide, basis = rows.double(), self.basis.to(rows.device, torch.float64)
        inside = (wide @ basis) @ basis.T
        return wide - inside if self.complement else inside

    @property
    def rank(self) -> int:
        """Directions that an update may use."""
        width, some = self.basis.shape
        return width - some if self.complement else some


def projected_edit(
    keys: Float[Tensor, "n in"],
    changes: Float[Tensor, "n out"],
    projector: Projector,
    earlier: Float[Tensor, "m in"] | None,
    l2: float,
) -> LowRank:
    """AlphaEdit's update: D k_i near r_i, D k near 0 for the keys of `earlier` edits, D = D P exactly; `l2` above 0."""
    n = len(keys)
    both = keys.double() if earlier is None else torch.cat((keys.double(), earlier.to(keys.device, torch.float64)))
    a = projector(both)  # (n + m, in): A^T
    gram = both @ a.T
    gram = (gram + gram.T) / 2
    gram.diagonal().add_(l2)
    return _factors(gram, a, changes, "L2", n)


def _factors(
    gram: Float[Tensor, "k k"],
    a: Float[Tensor, "k in"],
    changes: Float[Tensor, "n out"],
    knob: str,
    n: int | None = None,
) -> LowRank:
    """R times the first n rows of gram^-1 A^T, for a symmetric positive definite gram."""
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info) != 0 or not bool(torch.isfinite(factor).all()):
        raise ActionableError("The keys' system can't be solved, so nothing was changed.", f"Raise {knob}.")
    right = torch.cholesky_solve(a, factor)[:n]  # (n, in)
    found = LowRank(changes.double().T.cpu(), right.T.cpu())
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
