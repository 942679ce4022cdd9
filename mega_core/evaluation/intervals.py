"""95 % intervals of means over cases. No torch.

1. Every case a success or a failure: Wilson's score interval (Wilson 1927), which holds for few cases and for shares of
   0 and 1, where the usual interval has no width.
2. Anything else (shares within a record, magnitudes, numbers made of several means): cases are drawn anew with
   replacement, 1,000 times from a fixed seed, and the middle 95 % of the draws is the interval (Efron 1979).
3. Cases that are all alike give draws without width. A share has Wilson's interval then, as if it were counted over as
   many cases (ours): three cases that agree are not certainty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054
"""The normal distribution's 97.5 % point."""


class Interval(NamedTuple):
    """A number with its interval."""

    value: float
    low: float
    high: float


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a share (step 1). Raises ValueError without trials."""
    if n < 1:
        raise ValueError("a share of nothing has no interval")
    share = successes / n
    middle = share + Z**2 / (2 * n)
    half = Z * sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    scale = 1 + Z**2 / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def of_mean(values: Sequence[float], share: bool, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The interval of the mean of one number per case. `share`: the numbers lie between 0 and 1."""
    if share and all(value in (0.0, 1.0) for value in values):
        return wilson(sum(values), len(values))
    array = np.asarray(values, dtype=np.float64)
    low, high = _middle(array[_draws(len(array), draws, seed)].mean(axis=1))
    return _widened(float(array.mean()), low, high, len(array)) if share else (low, high)


def of_derived(
    columns: Sequence[Sequence[float | None]],
    empty: Sequence[float | None],
    combine: Callable[[Sequence[float]], float],
    draws: int = 1000,
    seed: int = 0,
    share: bool = False,
) -> Interval | None:
    """A number made of means, one per column; a draw takes whole cases, so that a case's numbers stay together.

    `columns` hold one number per case, None where the case has none; `empty` stands for the mean of a column without
    any number. None when a column has none and nothing stands for it.
    """
    table = np.array([[np.nan if value is None else value for value in column] for column in columns], dtype=np.float64)
    missing = [bool(np.isnan(column).all()) for column in table]
    if any(gone and stand is None for gone, stand in zip(missing, empty, strict=True)):
        return None
    stands = np.array([np.nan if stand is None else stand for stand in empty], dtype=np.float64)

    def made(rows: NDArray[np.float64]) -> float:
        there = ~np.isnan(rows)
        counts = there.sum(axis=1)
        sums = np.where(there, rows, 0.0).sum(axis=1)
        means = np.where(counts > 0, sums / np.maximum(counts, 1), stands)
        found = [float(mean) for mean in means if not np.isnan(mean)]
        return combine(found) if found else np.nan

    drawn = np.array([made(table[:, rows]) for rows in _draws(table.shape[1], draws, seed)])
    value, some = made(table), drawn[~np.isnan(drawn)]  # a draw may hold no case that counts
    low, high = _middle(some) if len(some) else (value, value)
    return Interval(value, *(_widened(value, low, high, table.shape[1]) if share else (low, high)))


# 3.
def _widened(value: float, low: float, high: float, n: int) -> tuple[float, float]:
    return wilson(min(max(value, 0.0), 1.0) * n, n) if high - low < 1e-12 else (low, high)


def _draws(n: int, draws: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, n, size=(draws, n))


def _middle(drawn: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)
