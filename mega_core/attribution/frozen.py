"""The way from the residual stream to logits with the final norm's scale held fixed (Yu, Ananiadou; arXiv 2312.12141).

The norm divides by the size of the last state h^L; that size serves every partial state too. Then the map is affine:

    logits(x) = bs(x) + constants,    bs(x + v) = bs(x) + bs(v),    bs(v) = W_U (gamma * c(v) / sigma)

with c(v) = v - mean(v) and sigma^2 = var(h^L) + eps under a LayerNorm, c(v) = v and sigma^2 = mean((h^L)^2) + eps under
an RMSNorm. The constants are the norm's beta and the head's bias: they belong to a state, never to a vector that is
added to it. With them the last state gives exactly the model's own distribution; the authors' code leaves beta out,
which `constants=False` repeats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mega_core.models.adapter import ModelAdapter

LOGITS_AT_ONCE = 2**24
"""How many logits a slice of the vocabulary may have, over all states."""


@dataclass(frozen=True, eq=False)
class FrozenLens:
    """One such map per row of a batch, in float32 on the device of the head."""

    lm: ModelAdapter
    scale: Float[Tensor, " batch"]
    """1 / sigma."""
    constants: bool = True
    """Whether a state's logits have beta and the head's bias."""

    @classmethod
    def of(cls, lm: ModelAdapter, final: Float[Tensor, "batch d_model"], constants: bool = True) -> FrozenLens:
        """Frozen at the states after the last block (before the final norm), one per row."""
        norm: Any = lm.final_norm
        eps: float = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        final = final.to(lm.head_weight.device, torch.float32)
        if lm.spec.norm == "layernorm":
            final = final - final.mean(-1, keepdim=True)
        return cls(lm, (final.square().mean(-1) + eps).rsqrt(), constants)

    def row(self, i: int) -> FrozenLens:
        """The map of one row, as a batch of one."""
        return FrozenLens(self.lm, self.scale[i : i + 1], self.constants)

    def vector(self, v: Float[Tensor, "*n batch d_model"]) -> Float[Tensor, "*n batch d_model"]:
        """gamma * c(v) / sigma: times W_U^T these are the logits bs(v) of a vector that joins the stream."""
        v = v.to(self.scale.device, torch.float32)
        if self.lm.spec.norm == "layernorm":
            v = v - v.mean(-1, keepdim=True)
        return v * self.scale[:, None] * self._gain(v)

    def state(self, x: Float[Tensor, "*n batch d_model"]) -> Float[Tensor, "*n batch d_model"]:
        """vector(x) + beta: times W_U^T, with the head's bias, these are the logits of a state."""
        normed = self.vector(x)
        beta = getattr(self.lm.final_norm, "bias", None) if self.constants else None
        return normed if beta is None else normed + beta.detach().to(normed)

    def pullback(self, direction: Float[Tensor, "*n batch d_model"]) -> Float[Tensor, "*n batch d_model"]:
        """The transpose of vector(): direction . vector(v) = pullback(direction) . v."""
        back = direction * self.scale[:, None] * self._gain(direction)
        return back - back.mean(-1, keepdim=True) if self.lm.spec.norm == "layernorm" else back

    def log_probs(
        self, states: Float[Tensor, "state batch d_model"], ids: Int[Tensor, "batch candidate"]
    ) -> Float[Tensor, "state batch candidate"]:
        """log p of each row's candidates at each of its states, nats; [state, vocab] is never held."""
        normed = self.state(states)
        partition = self.partition(normed)
        weight, bias = self.lm.head_weight, self._bias()
        ids = ids.to(weight.device)
        picked = torch.einsum("sbd,bcd->sbc", normed, weight[ids].to(normed))
        if bias is not None:
            picked = picked + bias[ids].to(normed)
        return picked - partition[..., None]

    def partition(self, normed: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n"]:
        """log sum over the vocabulary of exp(logits) of what state() gave."""
        weight, bias = self.lm.head_weight, self._bias()
        rows = max(1, normed[..., 0].numel())
        width = max(1, LOGITS_AT_ONCE // rows)
        total = normed.new_full(normed.shape[:-1], -torch.inf)
        for start in range(0, self.lm.vocab_size, width):
            logits = normed @ weight[start : start + width].to(normed).T  # (*n, slice)
            if bias is not None:
                logits += bias[start : start + width].to(normed)
            total = torch.logaddexp(total, logits.logsumexp(-1))
        return total

    def _gain(self, like: Tensor) -> Tensor:
        return self.lm.final_norm.weight.detach().to(like)  # type: ignore[union-attr,operator]

    def _bias(self) -> Tensor | None:
        return self.lm.head_bias if self.constants else None
