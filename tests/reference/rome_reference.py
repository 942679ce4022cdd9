"""ROME's and EMMET's closed forms and the key statistics in a few lines of NumPy, written from the papers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture

Array = NDArray[np.float64]


def rome_update(c: Array, k_mean: Array, k_used: Array, change: Array) -> Array:
    """(out, in): change (C^-1 k_mean)^T / ((C^-1 k_mean)^T k_used)."""
    u = np.linalg.inv(c) @ k_mean
    u = u / np.linalg.norm(u)  # the published code normalises; the update does not depend on it
    return np.outer(change, u) / (u @ k_used)


def emmet_update(c: Array, keys: Array, changes: Array, ridge: float = 0.0) -> Array:
    """(out, in) for keys (in, n) and changes (out, n): R (K^T C^-1 K + mu I)^-1 K^T C^-1."""
    inverse = np.linalg.inv(c)
    return changes @ np.linalg.inv(keys.T @ inverse @ keys + ridge * np.eye(keys.shape[1])) @ keys.T @ inverse


def naive_second_moment(lm: ModelAdapter, layer: int, rows: Sequence[Sequence[int]]) -> Array:
    """One row at a time, one token at a time, in float64."""
    total = np.zeros((lm.d_mlp, lm.d_mlp))
    count = 0
    for row in rows:
        site = Site(layer, "mlp_down_in")
        with capture(lm, [site], stop=False) as got:
            lm.last_logits(tokens.pack(lm.tokenizer, [row]))
        for key in got[site][0].double().numpy():
            total += np.outer(key, key)
            count += 1
    return total / count
