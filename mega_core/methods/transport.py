"""Optimal transport between two Gaussians, cut down to the directions in which the samples vary (SAKE, MEGA).

The map that turns activations of one sort (rows of S) into activations of another (rows of T) with the least movement:

1. Means mu_s, mu_t; covariances with ddof 0 and lambda on the diagonal:
       C_s = cov(S) + lambda I,    C_t = cov(T) + lambda I
2. A = C_s^-1/2 (C_s^1/2 C_t C_s^1/2)^1/2 C_s^-1/2,    T(x) = mu_t + A (x - mu_s)
   which sends the mean to the mean and, as lambda falls to 0, the covariance to the covariance. A is symmetric with no
   negative eigenvalue.
3. With far fewer rows than dimensions, A is the identity off the span of the centred rows, so it is computed inside:
   P holds the k leading right singular vectors of [S - mu_s; T - mu_t], step 2 runs on P^T (x - mu_s), and
       T(x) = x + (mu_t - mu_s) + P (A_k - I) P^T (x - mu_s)
   With k the rank of the stack this is the map of step 2 exactly; a smaller k ignores small directions.

`mean` keeps only the shift (k = 0): a steering vector as in ActAdd. Lambda may be absolute, as in SAKE, or a multiple
of tr(cov(P^T S)) / k. Our choices: a sample of one row, or of equal rows, has no covariance to speak of and gets the
shift alone; everything is fitted in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mega_core.errors import BadInput

Kind = Literal["ot", "ot-full", "mean"]
KINDS: tuple[Kind, ...] = ("ot", "ot-full", "mean")


@dataclass(frozen=True, eq=False)
class AffineMap:
    """T(x) = x + shift + basis @ inner @ basis^T (x - mean), in float32 on the CPU."""

    mean: Float[Tensor, " d"]
    """Of the source."""
    shift: Float[Tensor, " d"]
    """Mean of the target minus mean of the source."""
    basis: Float[Tensor, "d k"]
    """Orthonormal columns; k may be 0."""
    inner: Float[Tensor, "k k"]
    """A_k minus the identity."""
    _copies: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict, init=False, repr=False)

    def move(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """T(x) - x, computed in float32 where x lies and returned in x's dtype."""
        mean, shift, basis, inner = self._at(x.device)
        if not basis.shape[1]:
            return shift.to(x.dtype).expand_as(x)
        return (shift + (x.float() - mean) @ basis @ inner.T @ basis.T).to(x.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Everything there is to it, by name."""
        parts = {"mean": self.mean, "shift": self.shift, "basis": self.basis, "inner": self.inner}
        return {name: tensor.contiguous() for name, tensor in parts.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> AffineMap:
        """What tensors() gave. Raises KeyError when one is missing, ValueError when the shapes don't fit together."""
        mean, shift, basis, inner = (tensors[name] for name in ("mean", "shift", "basis", "inner"))
        d, k = mean.numel(), basis.shape[-1]
        shapes = (tuple(mean.shape), tuple(shift.shape), tuple(basis.shape), tuple(inner.shape))
        if shapes != ((d,), (d,), (d, k), (k, k)):
            raise ValueError(f"These are no parts of one map: {shapes}.")
        return cls(mean, shift, basis, inner)

    def rank(self) -> int:
        """Directions in which it does more than shift."""
        return self.basis.shape[1]

    def _at(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._copies:
            parts = (self.mean, self.shift, self.basis, self.inner)
            self._copies[device] = tuple(part.to(device, torch.float32) for part in parts)
        return self._copies[device]


def fit_map(
    source: Float[Tensor, "n d"],
    target: Float[Tensor, "m d"],
    kind: Kind = "ot",
    components: int = 16,
    energy: float = 0.99,
    shrinkage: float = 1.0,
    absolute: bool = False,
) -> AffineMap:
    """The map from the rows of `source` to those of `target`; step 3 of the file's head.

    `ot` keeps the fewest directions that hold `energy` of the stack's variance, `components` at most; `ot-full` keeps
    all; `mean` none. Lambda is `shrinkage` itself with `absolute`, else `shrinkage` * tr(cov) / k of the source.
    Raises BadInput on an unknown kind, ValueError on samples that don't fit together.
    """
    if kind not in KINDS:
        raise BadInput("kind", f"there is no map {kind!r}.", f"Choose one of {', '.join(KINDS)}.")
    xs, xt = _checked(source), _checked(target)
    if xs.shape[1] != xt.shape[1]:
        raise ValueError(f"Source rows have {xs.shape[1]} numbers, target rows {xt.shape[1]}.")
    mean_s, mean_t = xs.mean(0), xt.mean(0)
    centred_s, centred_t = xs - mean_s, xt - mean_t
    if kind == "mean" or not (_spread(centred_s, xs.abs().max()) and _spread(centred_t, xt.abs().max())):
        basis = xs.new_zeros(xs.shape[1], 0)
    else:
        basis = _leading(torch.cat((centred_s, centred_t)), components if kind == "ot" else None, energy)
    k = basis.shape[1]
    inner = xs.new_zeros(k, k)
    if k:
        cov_s, cov_t = _covariance(centred_s @ basis), _covariance(centred_t @ basis)
        lam = shrinkage if absolute else shrinkage * float(cov_s.trace()) / k
        inner = _bures(cov_s, cov_t, lam) - torch.eye(k, dtype=xs.dtype)
    return AffineMap(mean_s.float(), (mean_t - mean_s).float(), basis.float(), inner.float())


def linear_transport(
    source: Float[Tensor, "n d"], target: Float[Tensor, "m d"], reg: float
) -> tuple[Float[Tensor, "d d"], Float[Tensor, " d"]]:
    """(A, b) of T(x) = A x + b over all d dimensions in float64, steps 1 and 2; `reg` is the absolute lambda.

    It costs d^3: `fit_map(..., "ot-full", absolute=True)` is the same map at the cost of the rank.
    """
    xs, xt = _checked(source), _checked(target)
    mean_s, mean_t = xs.mean(0), xt.mean(0)
    matrix = _bures(_covariance(xs - mean_s), _covariance(xt - mean_t), reg)
    return matrix, mean_t - matrix @ mean_s


def _checked(rows: Tensor) -> Tensor:
    if rows.ndim != 2 or not len(rows):
        raise ValueError(f"A sample is rows of numbers, at least one; this has shape {tuple(rows.shape)}.")
    found = rows.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(found).all()):
        raise ValueError("A sample holds numbers that are not finite.")
    return found


def _spread(centred: Tensor, scale: Tensor) -> bool:
    """Whether the rows differ by more than float32 rounding."""
    return len(centred) > 1 and bool(centred.abs().max() > 1e-6 * scale)


def _covariance(centred: Tensor) -> Tensor:
    return centred.T @ centred / len(centred)


def _leading(stack: Float[Tensor, "rows d"], most: int | None, energy: float) -> Float[Tensor, "d k"]:
    """The leading right singular vectors: all of the rank, or at most `most` and no more than `energy` needs."""
    _, values, right = torch.linalg.svd(stack, full_matrices=False)
    rank = int((values > values[0] * max(stack.shape) * torch.finfo(stack.dtype).eps).sum())
    if most is not None:
        held = values.square().cumsum(0) / values.square().sum()
        rank = max(1, min(rank, most, int((held < energy).sum()) + 1)) if most > 0 else 0
    basis = right[:rank].T.clone()
    # A singular vector's sign is arbitrary: the largest entry becomes positive, so that a fit repeats.
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return basis * torch.where(largest < 0, -1.0, 1.0)


def _bures(cov_s: Float[Tensor, "k k"], cov_t: Float[Tensor, "k k"], lam: float) -> Float[Tensor, "k k"]:
    """Step 2's A."""
    one = torch.eye(len(cov_s), dtype=cov_s.dtype)
    values, vectors = torch.linalg.eigh(cov_s + lam * one)
    # A direction in which the source does not vary at all has no root to divide by: lambda is what fills it.
    values = values.clamp_min(float(values.max()) * len(cov_s) * torch.finfo(values.dtype).eps)
    root = (vectors * values.sqrt()) @ vectors.T
    inverse_root = (vectors / values.sqrt()) @ vectors.T
    found = inverse_root @ _root(root @ (cov_t + lam * one) @ root) @ inverse_root
    return (found + found.T) / 2


def _root(matrix: Float[Tensor, "k k"]) -> Float[Tensor, "k k"]:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
