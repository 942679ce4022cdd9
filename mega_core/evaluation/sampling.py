"""Choosing the next token by chance among the most likely ones, with random numbers that depend on the text alone.

Fan, Lewis, Dauphin 2018 (arXiv 1805.04833): the k most likely tokens, their probabilities scaled to add up to 1.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class TopK:
    """Chooses the next tokens of one text (see ModelAdapter.generate)."""

    def __init__(self, k: int, room: int, prompt: str, seed: int) -> None:
        """`room` is how many tokens may follow the prompt; `prompt` and `seed` fix the random numbers."""
        self.k = k
        self.room = room
        self.random = Random(f"{seed} {prompt}")

    def __call__(self, logits: Float[Tensor, " vocab"]) -> int | None:
        """The next token's id, or None when there is no room left."""
        if self.room <= 0:
            return None
        self.room -= 1
        top = logits.double().topk(min(self.k, logits.shape[-1]))
        return int(self.random.choices(top.indices.tolist(), top.values.softmax(-1).tolist())[0])
