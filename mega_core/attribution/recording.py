"""What one forward of the edit prompts leaves behind, so that all views of one state share that forward.

A view names the parts it reads (`reads` in base.View, names of hooks.PARTS; "final" and the residual stream at the last
token are always there). Prompts run in groups small enough for CAPTURE_BYTES; a view is called once per group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mega_core.attribution.frozen import FrozenLens
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture
from mega_core.models.tokens import TokenBatch
from mega_core.records import EditRequest

CAPTURE_BYTES = 2**28
"""Activations kept from one forward, at most (a single prompt always runs)."""


@dataclass(frozen=True, eq=False)
class Recording:
    """Some edit prompts as one state of the model reads them; everything float32."""

    lm: ModelAdapter
    requests: tuple[EditRequest, ...]
    cases: tuple[int, ...]
    """Each request's number in the whole question: the column `case`."""
    batch: TokenBatch
    candidates: tuple[Mapping[str, int], ...]
    """Per request: "new", and "true" where it is known -> the first token of that object after the prompt."""
    spans: tuple[tuple[int, int], ...]
    """Per request: the subject's first token and the one after its last."""
    states: Float[Tensor, "state batch d_model"]
    """The stream at the last token: before the first block, then after each attention and each MLP (2 L + 1 states)."""
    lens: FrozenLens
    """From that stream to logits, frozen at the last of these states."""
    parts: Mapping[Site, Tensor]
    """What the views asked for, at every position: (batch, pos, ...)."""

    def part(self, layer: int, name: str) -> Tensor:
        """One captured part, (batch, pos, ...); for a view only what its `reads` names."""
        return self.parts[Site(layer, name)]

    def last(self, layer: int, name: str) -> Tensor:
        """One captured part at the last tokens, (batch, ...); of a pattern that token's row, (batch, head, pos)."""
        value = self.parts[Site(layer, name)]
        rows = torch.arange(len(value), device=value.device)
        at = self.batch.last.to(value.device)
        return once(value[rows, :, at]) if name == "pattern" else value[rows, at]

    def written(self, layer: int, module: str) -> Float[Tensor, "batch d_model"]:
        """What "attn" or "ffn" of a layer adds to the stream at the last token."""
        at = 2 * layer + (module == "ffn")
        return self.states[at + 1] - self.states[at]

    def base(self, layer: int, module: str) -> Float[Tensor, "batch d_model"]:
        """The stream at the last token just before "attn" or "ffn" of a layer writes to it."""
        return self.states[2 * layer + (module == "ffn")]

    def ids(self) -> Int[Tensor, "batch candidate"]:
        """Tokens of "new" and "true" (0 where there is no true object)."""
        return torch.tensor([[one["new"], one.get("true", 0)] for one in self.candidates])

    def length(self, i: int) -> int:
        """Tokens of prompt i."""
        return int(self.batch.last[i]) + 1


def record(
    lm: ModelAdapter, requests: Sequence[EditRequest], reads: Iterable[str] = (), cases: Sequence[int] | None = None
) -> Recording:
    """Run the edit prompts once, as one batch, and keep what is asked for. Ends the forward at the last block."""
    rows = [tokens.prompt_ids(lm.tokenizer, request.prompt) for request in requests]
    batch = tokens.pack(lm.tokenizer, rows, lm.device)
    stream = [Site(0, "block_in")]
    stream += [Site(layer, part) for layer in range(lm.n_layers) for part in ("resid_mid", "block_out")]
    wanted = [Site(layer, part) for layer in range(lm.n_layers) for part in dict.fromkeys(reads)]
    with torch.no_grad(), capture(lm, [*stream, *wanted]) as got:
        lm.forward(batch)
    home = lm.head_weight.device
    asked = set(wanted)
    at_row = torch.arange(len(batch))
    states = []
    for site in stream:
        value = got[site] if site in asked else got.pop(site)  # popped, so that its other positions are freed at once
        states.append(value[at_row.to(value.device), batch.last.to(value.device)].to(home, torch.float32))
    return Recording(
        lm=lm,
        requests=tuple(requests),
        cases=tuple(range(len(rows)) if cases is None else cases),
        batch=batch,
        candidates=tuple(candidates(lm, request) for request in requests),
        spans=tuple(tokens.subject_span(lm.tokenizer, request.template, request.subject) for request in requests),
        states=torch.stack(states),
        lens=FrozenLens.of(lm, states[-1]),
        parts={site: got[site].float() for site in wanted},
    )


def once(weights: Float[Tensor, "*n head pos"]) -> Float[Tensor, "*n head pos"]:
    """Attention weights without those that stand there twice, so that they can be summed.

    Behind a text several tokens of a prompt's first word may become one token. Each of them then shows that token's
    weights, which count for the last of them. No two different tokens share the weights of all heads.
    """
    repeated = (weights[..., 1:] == weights[..., :-1]).all(-2, keepdim=True)  # (*n, 1, pos - 1)
    kept = weights.clone()
    kept[..., :-1] = kept[..., :-1].masked_fill(repeated, 0)
    return kept


def candidates(lm: ModelAdapter, request: EditRequest) -> dict[str, int]:
    """Candidate -> the first token of that object after the prompt."""
    targets = {"new": request.target_new, "true": request.target_true}
    return {
        name: tokens.target_ids(lm.tokenizer, request.prompt, target)[0] for name, target in targets.items() if target
    }


def groups(lm: ModelAdapter, requests: Sequence[EditRequest], reads: Iterable[str]) -> Iterator[list[int]]:
    """Requests (by number) that run together, so that what is captured stays within CAPTURE_BYTES."""
    lengths = [len(tokens.prompt_ids(lm.tokenizer, request.prompt)) for request in requests]
    widths = {
        "value": lm.n_kv_heads * lm.head_dim,
        "attn_out_in": lm.n_heads * lm.head_dim,
        "mlp_down_in": lm.d_mlp,
    }
    names = list(dict.fromkeys(reads))
    per_token = 2 * lm.d_model + sum(widths.get(name, lm.d_model) for name in names if name != "pattern")
    patterns = lm.n_heads if "pattern" in names else 0
    group: list[int] = []
    for case, length in enumerate(lengths):
        widest = max([length, *(lengths[other] for other in group)])
        numbers = widest * (len(group) + 1) * lm.n_layers * (per_token + patterns * widest)
        if group and 4 * numbers > CAPTURE_BYTES:
            yield group
            group = []
        group.append(case)
    if group:
        yield group
