"""Heads, query layers and query neurons by their definitions, without the project's code: NumPy, one number at a time.

Everything stands in one prompt's arrays. `stream` has, at every position, the state before the first module and after
each module; attention of layer l is module 2 l, its MLP 2 l + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
SMALLEST = 1e-6


@dataclass
class Prompt:
    """What one prompt of T tokens left behind in a model of L layers."""

    stream: Array
    """[2 L + 1, T, d]."""
    pattern: Array
    """[L, H, T, T]."""
    value: Array
    """[L, T, KV, hd]."""
    neurons: Array
    """[L, T, N]."""
    w_o: Array
    """[L, H, hd, d]."""
    w_down: Array
    """[L, N, d]."""
    gain: Array
    beta: Array
    eps: float
    centre: bool
    head: Array
    """[V, d]."""
    bias: Array

    def log_p(self, x: Array, w: int) -> float:
        """log p(w | x), the final norm frozen at this prompt's last state."""
        final = self.stream[-1, -1]
        sigma = np.sqrt((final.var() if self.centre else (final**2).mean()) + self.eps)
        logits = self.head @ (self.gain * (x - x.mean() if self.centre else x) / sigma + self.beta) + self.bias
        return float(logits[w] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))

    def imp(self, v: Array, x: Array, w: int) -> float:
        """Imp(v | x, w)."""
        return self.log_p(x + v, w) - self.log_p(x, w)

    def moved(self, layer: int, head: int, position: int) -> Array:
        """What a head moves from a source position to the last token."""
        kv = head // (self.w_o.shape[1] // self.value.shape[2])
        return self.pattern[layer, head, -1, position] * (self.value[layer, position, kv] @ self.w_o[layer, head])


def head_scores(prompt: Prompt, w: int) -> dict[tuple[int, int], float]:
    """(layer, head) -> score."""
    found = {}
    n_layers, n_heads, length = prompt.pattern.shape[:3]
    for layer in range(n_layers):
        for head in range(n_heads):
            v = sum(prompt.moved(layer, head, p) for p in range(length))
            found[layer, head] = prompt.imp(np.asarray(v), prompt.stream[2 * layer, -1], w)
    return found


def position_scores(prompt: Prompt, layer: int, head: int, w: int) -> list[float]:
    """Score of each source position of a head."""
    base = prompt.stream[2 * layer, -1]
    return [prompt.imp(prompt.moved(layer, head, p), base, w) for p in range(prompt.pattern.shape[-1])]


def ffn_values(prompt: Prompt, w: int, count: int) -> list[tuple[int, int, float]]:
    """The `count` MLP neurons (layer, neuron, score) with the highest scores at the last token."""
    found = []
    for layer in range(len(prompt.neurons)):
        for n, m in enumerate(prompt.neurons[layer, -1]):
            v = m * prompt.w_down[layer, n]
            found.append((layer, n, prompt.imp(v, prompt.stream[2 * layer + 1, -1], w)))
    return sorted(found, key=lambda one: -one[2])[:count]


def attention_values(prompt: Prompt, w: int, count: int) -> list[tuple[int, int, int, int, float]]:
    """The `count` attention neurons (layer, head, dim, position, score) with the highest scores."""
    found = []
    n_layers, n_heads, length = prompt.pattern.shape[:3]
    for layer in range(n_layers):
        for head in range(n_heads):
            kv = head // (n_heads // prompt.value.shape[2])
            for p in range(length):
                for j in range(prompt.w_o.shape[2]):
                    m = prompt.pattern[layer, head, -1, p] * prompt.value[layer, p, kv, j]
                    v = m * prompt.w_o[layer, head, j]
                    found.append((layer, head, j, p, prompt.imp(v, prompt.stream[2 * layer, -1], w)))
    return sorted(found, key=lambda one: -one[4])[:count]


def query_layers(prompt: Prompt, reads: list[tuple[int, int, Array, float]]) -> Array:
    """Score per component (embedding, attention 0, MLP 0, ...), from value neurons as
    (components before it, position, key, score)."""
    scores = np.zeros(len(prompt.stream))
    for before, position, key, imp in reads:
        states = prompt.stream[:before, position]
        components = [states[0], *(states[s] - states[s - 1] for s in range(1, before))]
        dots = np.array([component @ key for component in components])
        if abs(dots.sum()) < SMALLEST * np.abs(dots).sum():
            continue
        for s, dot in enumerate(dots):
            scores[s] += dot / dots.sum() * imp
    return scores


def query_neurons(prompt: Prompt, reads: list[tuple[int, int, Array, float]]) -> Array:
    """Q[layer, neuron] from attention value neurons as (layer, position, key, score)."""
    found = np.zeros(prompt.neurons[:, -1].shape)
    for layer, position, key, imp in reads:
        total = prompt.stream[2 * layer, position] @ key
        for below in range(layer):
            for n, m in enumerate(prompt.neurons[below, position]):
                found[below, n] += m * (prompt.w_down[below, n] @ key) / total * imp
    return found
