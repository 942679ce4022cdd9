"""The numbers inside attention heads that promote the new and the old object: neuron-level knowledge attribution (Yu,
Ananiadou; EMNLP 2024, arXiv 2312.12141).

What attention writes at the prompt's last token t is a sum over heads h, numbers j of a head and source positions p of
a coefficient times a fixed vector,

    v = alpha_{h,t,p} V_{h,p,j} W_O^h[j, :]

(alpha is the attention weight, V the value, W_O^h[j, :] what the head's j-th number writes), and a bias. Such an
attention neuron (h, j, p) of layer l contributes to a candidate w, in nats,

    Imp(v | h^{l-1}, w) = log p(w | h^{l-1} + v) - log p(w | h^{l-1})

1. Coefficients: the last token's row of the pattern times the values, from the recording. Where heads share values
   (grouped queries), head h reads those of its key/value head.
2. The `top` of the whole model with the greatest contribution and the `tail` with the least (topk): L * T * d vectors.
3. The first `read` of both are read as tokens, by the actual vector v (as in neurons).

What attention writes besides these (its bias, what a text in front of the prompt or steering adds) is not listed.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mega_core.attribution.neurons import best, joined, scored, searched, spelled
from mega_core.attribution.recording import Recording
from mega_core.attribution.settings import NeuronsParams
from mega_core.attribution.topk import Vectors
from mega_core.events import Reporter, stage
from mega_core.models import tokens


def look(recording: Recording, params: NeuronsParams, state: str, report: Reporter) -> Mapping[str, pd.DataFrame]:
    """The frames `attention_neurons` and `neuron_tokens` (kind "attn") of the edit prompts."""
    lm = recording.lm
    scores, read = [], []
    with stage(report, "attention neurons") as step:
        for i, case in enumerate(recording.cases):
            vectors = of_prompt(recording, i)
            states = torch.stack([recording.base(layer, "attn")[i] for layer in range(lm.n_layers)])
            found, bases = searched(recording, i, states, vectors, params, step)
            labels = tokens.token_strings(lm.tokenizer, recording.batch.ids[i, : recording.length(i)].tolist())

            def name(layers: Tensor, copies: Tensor, units: Tensor, labels: list[str] = labels) -> dict[str, object]:
                return {
                    "layer": layers.numpy(),
                    "head": (units // lm.head_dim).numpy(),
                    "dim": (units % lm.head_dim).numpy(),
                    "position": copies.numpy(),
                    "token": [labels[p] for p in copies.tolist()],
                }

            scores.append(scored(recording, i, found, vectors, name).assign(state=state, case=case))
            chosen = best(found, params.read)
            layers, positions, units = vectors.place(chosen)
            names = [
                f"{unit // lm.head_dim}.{unit % lm.head_dim}.{position}"
                for unit, position in zip(units.tolist(), positions.tolist(), strict=True)
            ]
            read.append(
                spelled(bases, vectors, chosen, layers, names, step).assign(state=state, case=case, kind="attn")
            )
    return {"attention_neurons": joined(scores, "attention_neurons"), "neuron_tokens": joined(read, "neuron_tokens")}


def of_prompt(recording: Recording, i: int) -> Vectors:
    """1. for one prompt: copies are its positions, and unit h * head_dim + j is number j of head h."""
    lm = recording.lm
    home, length = lm.head_weight.device, recording.length(i)
    shared = torch.tensor([lm.kv_head(head) for head in range(lm.n_heads)])
    coefficients = []
    for layer in range(lm.n_layers):
        alpha = recording.last(layer, "pattern")[i, :, :length].to(home, torch.float32)  # (head, pos)
        value = recording.part(layer, "value")[i, :length].to(home, torch.float32)
        value = value.unflatten(-1, (lm.n_kv_heads, lm.head_dim))[:, shared.to(home)]  # (pos, head, head_dim)
        coefficients.append((alpha.T[..., None] * value).flatten(-2))

    def directions(layer: int) -> Float[Tensor, "unit d_model"]:
        return lm.head_out(layer).flatten(0, 1).to(home)

    return Vectors(torch.stack(coefficients), directions)
