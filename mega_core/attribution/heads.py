"""Heads: which attention heads promote a candidate, and from which tokens (Yu, Ananiadou; arXiv 2312.12141).

At the prompt's last token t, head h of layer l writes the vector

    v^l_h = sum_p alpha^l_h[t, p] W_O^h V^l_h[p]

1. Take every head's vector: its slice of what enters W_O, times its rows of W_O.
2. What attention writes besides its heads (W_O's bias, what steering adds, in half precision rounding) is one more
   vector, head -1. With it the vectors of a layer add up to the attention's output.
3. Score of a vector, in nats, for each candidate w, on the stream x = h^(l-1) before the block, with the final norm
   frozen (see frozen): Imp(v | x, w) = log p(w | x + v) - log p(w | x).
4. For the heads with the highest |score| of either candidate, split the vector by source position p: the term
   alpha[t, p] W_O^h V[p] alone on the same x is that position's score.
5. What the positions leave over is position -1: the head read it off a text in front of the prompt (in-context
   editing). Without such a text it is nothing but rounding.

Scores are not additive: those of heads don't add up to their module's, nor those of positions to their head's; vectors
do. In parallel blocks (GPT-J, GPT-NeoX) attention comes first, which is our choice. With grouped queries some
heads share their values. How many heads are split is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mega_core import frames
from mega_core.attribution.recording import Recording
from mega_core.attribution.settings import HeadsParams
from mega_core.events import Reporter
from mega_core.models import tokens

READS = ("attn_out_in", "pattern", "value")
REST = -1
"""Number of the head, or position, that stands for what no head, or no position of the prompt, accounts for."""
IN_FRONT = "(text in front)"
"""Token label of position -1."""


def look(recording: Recording, params: HeadsParams, state: str, report: Reporter) -> Mapping[str, pd.DataFrame]:
    """The frames `head_scores` (every head, and head -1) and `head_sources` (the strongest heads by position).

    The strongest heads are a state's own: before and after an edit they may differ.
    """
    scores = head_scores(recording)
    sources = [
        row
        for i in range(len(recording.cases))
        for row in _source_rows(recording, i, strongest(recording, scores, i, params.heads), state)
    ]
    return {
        "head_scores": _score_frame(recording, scores, state),
        "head_sources": frames.from_rows(sources, "head_sources"),
    }


def head_vectors(recording: Recording) -> Float[Tensor, "layer head_and_rest batch d_model"]:
    """1. and 2.: what each head writes at the last token; the last entry of a layer is the rest."""
    lm, home = recording.lm, recording.states.device
    layers = []
    for layer in range(lm.n_layers):
        out = lm.head_out(layer).float()  # (head, head_dim, d_model)
        mixed = recording.last(layer, "attn_out_in").unflatten(-1, (lm.n_heads, lm.head_dim))
        heads = torch.einsum("bhj,hjd->hbd", mixed.to(out.device), out).to(home)
        rest = recording.written(layer, "attn") - heads.sum(0)
        layers.append(torch.cat((heads, rest[None])))
    return torch.stack(layers)


def head_scores(recording: Recording) -> Float[Tensor, "layer head_and_rest batch candidate"]:
    """3.: Imp(v | h^(l-1), w) of every head's vector and of the rest, nats; candidates as in recording.ids()."""
    vectors = head_vectors(recording)
    bases = recording.states[0:-1:2, None]  # (layer, 1, batch, d_model): before each block
    states = torch.cat((bases, bases + vectors), 1)
    log_p = recording.lens.log_probs(states.flatten(0, 1), recording.ids()).unflatten(0, states.shape[:2]).double()
    return log_p[:, 1:] - log_p[:, :1]


def strongest(
    recording: Recording, scores: Float[Tensor, "layer head_and_rest batch candidate"], i: int, count: int
) -> list[tuple[int, int]]:
    """(layer, head) of the heads of prompt i with the highest |score| of either candidate, the highest first."""
    size = scores[:, :-1, i, : len(recording.candidates[i])].abs().amax(-1)  # (layer, head)
    order = size.flatten().sort(descending=True, stable=True).indices[:count].tolist()
    return [divmod(at, recording.lm.n_heads) for at in order]


def source_vectors(
    recording: Recording, i: int, heads: Sequence[tuple[int, int]]
) -> tuple[Float[Tensor, "chosen pos_and_rest d_model"], Float[Tensor, "chosen pos_and_rest"]]:
    """4. and 5.: what each (layer, head) moves from each position of prompt i, and its attention there; the rest last.

    A head's vectors add up to what head_vectors() has, its attention to 1.
    """
    lm, home, length = recording.lm, recording.states.device, recording.length(i)
    vectors, attention = [], []
    for layer, head in heads:
        out = lm.head_out(layer)[head].float()  # (head_dim, d_model)
        alpha = recording.last(layer, "pattern")[i, head, :length].to(out.device)
        values = recording.part(layer, "value")[i, :length].unflatten(-1, (lm.n_kv_heads, lm.head_dim))
        terms = (alpha[:, None] * values[:, lm.kv_head(head)].to(out.device)) @ out  # (pos, d_model)
        mixed = recording.last(layer, "attn_out_in")[i].unflatten(-1, (lm.n_heads, lm.head_dim))[head]
        rest = mixed.to(out.device) @ out - terms.sum(0)
        vectors.append(torch.cat((terms, rest[None])).to(home))
        attention.append(torch.cat((alpha, 1 - alpha.sum()[None].clamp_max(1))).to(home))
    return torch.stack(vectors), torch.stack(attention)


def _source_rows(recording: Recording, i: int, heads: Sequence[tuple[int, int]], state: str) -> list[dict[str, object]]:
    if not heads:
        return []
    vectors, attention = source_vectors(recording, i, heads)
    bases = torch.stack([recording.base(layer, "attn")[i] for layer, _ in heads])[:, None]  # (chosen, 1, d_model)
    states = torch.cat((bases, bases + vectors), 1)
    log_p = recording.lens.row(i).log_probs(states.flatten(0, 1)[:, None], recording.ids()[i : i + 1])[:, 0]
    log_p = log_p.unflatten(0, states.shape[:2]).double()  # (chosen, 1 + pos_and_rest, candidate)
    scores, masses = (log_p[:, 1:] - log_p[:, :1]).tolist(), attention.double().tolist()
    length = recording.length(i)
    labels = [*tokens.token_strings(recording.lm.tokenizer, recording.batch.rows()[i]), IN_FRONT]
    places = [*range(length), REST]
    return [
        {
            "state": state, "case": recording.cases[i], "layer": layer, "head": head, "position": places[at],
            "candidate": candidate, "token": labels[at], "attention": masses[n][at], "contribution": scores[n][at][c],
        }
        for n, (layer, head) in enumerate(heads)
        for at in range(length + 1)
        for c, candidate in enumerate(recording.candidates[i])
    ]  # fmt: skip


def _score_frame(
    recording: Recording, scores: Float[Tensor, "layer head_and_rest batch candidate"], state: str
) -> pd.DataFrame:
    n_layers, n_heads = recording.lm.n_layers, recording.lm.n_heads + 1
    numbers = scores.cpu().numpy()
    parts = [
        pd.DataFrame(
            {
                "state": state,
                "case": case,
                "layer": np.repeat(np.arange(n_layers), n_heads),
                "head": np.tile([*range(n_heads - 1), REST], n_layers),
                "candidate": candidate,
                "contribution": numbers[:, :, i, c].ravel(),
            }
        )
        for i, case in enumerate(recording.cases)
        for c, candidate in enumerate(recording.candidates[i])
    ]
    return frames.check(pd.concat(parts, ignore_index=True), "head_scores")
