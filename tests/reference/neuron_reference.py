"""Neurons' contributions by their definition, every one of them, without the project's search.

`contributions` is NumPy in float64; `whole_layer` is how a notebook does it, all neurons of a layer and the whole
vocabulary at once.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]


def contributions(
    x: Array,
    vectors: Array,
    final: Array,
    gain: Array,
    beta: Array,
    eps: float,
    centre: bool,
    head: Array,
    bias: Array,
    w: int,
) -> Array:
    """log p(w | x + v) - log p(w | x) of each row v of `vectors`; `final` is the state that freezes the norm."""
    sigma = np.sqrt((final.var() if centre else (final**2).mean()) + eps)

    def logprob(states: Array) -> Array:
        inner = states - states.mean(-1, keepdims=True) if centre else states
        logits = (gain * inner / sigma + beta) @ head.T + bias
        top = logits.max(-1, keepdims=True)
        return logits[..., w] - top[..., 0] - np.log(np.exp(logits - top).sum(-1))

    pieces = [logprob(x + part) for part in np.array_split(vectors, max(1, len(vectors) // 256))]
    return np.concatenate(pieces) - logprob(x[None])[0]


def whole_layer(
    x: Float[Tensor, " d_model"],
    coefficients: Float[Tensor, " neuron"],
    values: Float[Tensor, "neuron d_model"],
    final: Float[Tensor, " d_model"],
    norm: nn.LayerNorm,
    head: Float[Tensor, "vocab d_model"],
    ids: list[int],
) -> Float[Tensor, "neuron candidate"]:
    """The same for a LayerNorm model in float32: [neuron, vocab] logits and their log-softmax, then differences."""
    sigma = (final.var(unbiased=False) + norm.eps).sqrt()

    def logprobs(states: Tensor) -> Tensor:
        logits = ((states - states.mean(-1, keepdim=True)) / sigma * norm.weight + norm.bias) @ head.T
        return logits.log_softmax(-1)[..., ids]

    return logprobs(x + coefficients[:, None] * values) - logprobs(x)
