"""Contributions by their definition, without the project's code: NumPy on the vectors that the modules wrote."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def contributions(
    start: Array,
    written: list[Array],
    gain: Array,
    beta: Array,
    eps: float,
    centre: bool,
    head: Array,
    bias: Array,
    w: int,
) -> tuple[float, float, list[float]]:
    """log p(w) before the first module, after the last, and each module's Imp(v | x, w), for one last token."""
    final = start + sum(written)
    sigma = np.sqrt((final.var() if centre else (final**2).mean()) + eps)

    def logprob(x: Array) -> float:
        logits = head @ (gain * (x - x.mean() if centre else x) / sigma + beta) + bias
        return float(logits[w] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))

    bases = [start + sum(written[:i]) for i in range(len(written))]
    gains = [logprob(x + v) - logprob(x) for x, v in zip(bases, written, strict=True)]
    return logprob(start), logprob(final), gains
