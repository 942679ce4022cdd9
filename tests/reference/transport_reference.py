"""Optimal transport between Gaussians written out the slow way, with scipy's general matrix root."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import inv, sqrtm

Array = NDArray[np.float64]


def plain_map(source: Array, target: Array, reg: float) -> tuple[Array, Array]:
    """(A, b) of T(x) = A x + b, from the textbook formula over all dimensions."""
    d = source.shape[1]
    mean_s, mean_t = np.zeros(d), np.zeros(d)
    for row in source:
        mean_s += row / len(source)
    for row in target:
        mean_t += row / len(target)
    cov_s, cov_t = reg * np.eye(d), reg * np.eye(d)
    for row in source:
        cov_s += np.outer(row - mean_s, row - mean_s) / len(source)
    for row in target:
        cov_t += np.outer(row - mean_t, row - mean_t) / len(target)
    root = np.real(sqrtm(cov_s))
    middle = np.real(sqrtm(root @ cov_t @ root))
    matrix = inv(root) @ middle @ inv(root)
    return matrix, mean_t - matrix @ mean_s


def principal_directions(rows: Array, k: int) -> Array:
    """(d, k): eigenvectors of rows^T rows with the k largest eigenvalues."""
    values, vectors = np.linalg.eigh(rows.T @ rows)
    return vectors[:, np.argsort(values)[::-1][:k]]
