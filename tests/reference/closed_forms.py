"""MEMIT's and AlphaEdit's closed forms as the papers print them: dense float64 NumPy, every matrix in full."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def memit_update(c: Array, keys: Array, changes: Array, weight: float) -> Array:
    """(out, in) for keys (in, n) and changes (out, n): R K^T (lambda C + K K^T)^-1."""
    return np.linalg.solve(weight * c + keys @ keys.T, keys @ changes.T).T


def alphaedit_update(projector: Array, keys: Array, changes: Array, earlier: Array, l2: float) -> Array:
    """(out, in): ([P (K K^T + K_p K_p^T) + L2 I]^-1 P K R^T)^T, with P (in, in) and K_p (in, m)."""
    system = projector @ (keys @ keys.T + earlier @ earlier.T) + l2 * np.eye(len(projector))
    return np.linalg.solve(system, projector @ keys @ changes.T).T


def null_projector(c: Array, share: float) -> Array:
    """Onto the eigenvectors of C of smallest eigenvalue that together hold at most `share` of its trace."""
    values, vectors = np.linalg.eigh(c)
    total = 0.0
    found = np.zeros_like(c)
    for value, vector in zip(values, vectors.T, strict=True):
        total += max(value, 0.0)
        if total > share * np.trace(c):
            break
        found += np.outer(vector, vector)
    return found


def null_projector_absolute(c: Array, threshold: float) -> Array:
    """Onto the singular vectors of C whose singular value is below the threshold, as AlphaEdit publishes it."""
    left, values, _ = np.linalg.svd(c)
    small = left[:, values < threshold]
    return small @ small.T
