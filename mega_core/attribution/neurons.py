"""The MLP neurons that promote the new and the old object: neuron-level knowledge attribution (Yu, Ananiadou; EMNLP
2024, arXiv 2312.12141).

An MLP's output at the prompt's last token is a sum over its neurons, each a coefficient (its activation m_k) times a
fixed vector (fc2_k, a column of the last matrix), and a bias. With r^l the stream just before the MLP of layer l, a
neuron's contribution to a candidate w is, in nats,

    Imp(m_k fc2_k | r^l, w) = log p(w | r^l + m_k fc2_k) - log p(w | r^l)

1. Coefficients: the input of the MLP's last matrix at the last token, from the recording.
2. The `top` neurons of the whole model with the greatest contribution, and the `tail` with the least, without looking
   at every one (topk). Every row says whether it is certified.
3. The first `read` of both are read as tokens: those that m_k fc2_k raises and lowers most, by the logits bs(v) of the
   frozen lens. This is the actual vector: where m_k is negative it promotes what fc2_k alone would suppress.

Contributions of neurons don't add up to the layer's: log p is not linear. What an MLP writes besides its neurons (its
bias, a memory that answers in its place) is no neuron and not listed; a note names a layer where there is more than the
bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mega_core import frames
from mega_core.attribution.recording import Recording
from mega_core.attribution.settings import NeuronsParams
from mega_core.attribution.topk import Bases, Found, Vectors, search
from mega_core.events import Note, Reporter, stage
from mega_core.models import tokens

TOKENS = 10
"""How many promoted and how many suppressed tokens a neuron is read as."""
SPELLED_AT_ONCE = 128
FOREIGN = 0.02
"""Share of an MLP's output that is neither its neurons' nor its bias, from which a note says so."""


def look(recording: Recording, params: NeuronsParams, state: str, report: Reporter) -> Mapping[str, pd.DataFrame]:
    """The frames `neuron_scores` and `neuron_tokens` (kind "ffn") of the edit prompts."""
    for layer, rest in enumerate(rests(recording)):
        if rest > FOREIGN:
            report(Note(f"What the MLP of layer {layer} writes {state} the edit is not the sum of its neurons."))
    scores, read = [], []
    with stage(report, "neurons") as step:
        for i, case in enumerate(recording.cases):
            vectors = of_prompt(recording, i)
            states = torch.stack([recording.base(layer, "ffn")[i] for layer in range(recording.lm.n_layers)])
            found, bases = searched(recording, i, states, vectors, params, step)

            def name(layers: Tensor, copies: Tensor, units: Tensor) -> dict[str, object]:
                return {"layer": layers.numpy(), "neuron": units.numpy()}

            scores.append(scored(recording, i, found, vectors, name).assign(state=state, case=case))
            chosen = best(found, params.read)
            layers, _, units = vectors.place(chosen)
            labels = [str(unit) for unit in units.tolist()]
            read.append(
                spelled(bases, vectors, chosen, layers, labels, step).assign(state=state, case=case, kind="ffn")
            )
    return {"neuron_scores": joined(scores, "neuron_scores"), "neuron_tokens": joined(read, "neuron_tokens")}


def of_prompt(recording: Recording, i: int) -> Vectors:
    """1. The neurons' vectors of one prompt; a layer's number k is neuron k."""
    lm = recording.lm
    home = lm.head_weight.device
    coefficients = [recording.last(layer, "mlp_down_in")[i].to(home, torch.float32) for layer in range(lm.n_layers)]

    def directions(layer: int) -> Float[Tensor, "unit d_model"]:
        return lm.read_weight(layer, "mlp_down").T.to(home)

    return Vectors(torch.stack(coefficients)[:, None], directions)


def rests(recording: Recording) -> list[float]:
    """Per layer: which share of the MLP's output is neither its neurons' nor its bias, at most over the prompts.

    What the stream's rounding can explain doesn't count.
    """
    lm, shares = recording.lm, []
    for layer in range(lm.n_layers):
        weight, bias = lm.read_weight(layer, "mlp_down"), lm.bias(layer, "mlp_down")
        own = recording.last(layer, "mlp_down_in") @ weight.float().T  # (batch, d_model)
        if bias is not None:
            own = own + bias.float()
        written = recording.written(layer, "ffn")
        rest = (written - own.to(written.device)).norm(dim=-1)
        rounding = torch.finfo(lm.dtype).eps * recording.base(layer, "ffn").norm(dim=-1)  # of the stream
        shares.append(float(((rest - rounding).clamp_min(0) / written.norm(dim=-1).clamp_min(1e-12)).max()))
    return shares


# What the views of neurons share --------------------------------------------------------------------------------------


def searched(
    recording: Recording,
    i: int,
    states: Float[Tensor, "layer d_model"],
    vectors: Vectors,
    params: NeuronsParams,
    step: Callable[[], None],
) -> tuple[Found, Bases]:
    """2. for one prompt's vectors, which join `states`."""
    bases = Bases.of(recording.lens.row(i), states, list(recording.candidates[i].values()))
    return search(bases, vectors, params.top, params.tail, step), bases


def scored(
    recording: Recording,
    i: int,
    found: Found,
    vectors: Vectors,
    name: Callable[[Tensor, Tensor, Tensor], Mapping[str, object]],
) -> pd.DataFrame:
    """The rows of one prompt, without state and case; `name` makes columns of (layer, copy, unit)."""
    parts = []
    coefficients = vectors.coefficients.flatten()
    for j, candidate in enumerate(recording.candidates[i]):
        top, tail = found.top[j], found.tail[j]
        index = torch.cat([top, tail])
        value = found.value[j][index].double()
        rank = np.concatenate([np.arange(1, len(top) + 1), -np.arange(1, len(tail) + 1)])
        columns = {
            **name(*(part.cpu() for part in vectors.place(index))),
            "candidate": candidate,
            "contribution": value.cpu().numpy(),
            "coefficient": coefficients[index].double().cpu().numpy(),
            # Where a vector is so small that both agree to the last digits, rounding may put the bound below.
            "bound": torch.maximum(found.bound[j][index].double(), value).cpu().numpy(),
            "rank": rank,
            "certified": torch.cat([found.sure_top[j], found.sure_tail[j]]).cpu().numpy(),
        }
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def best(found: Found, read: int) -> Int[Tensor, " n"]:
    """The first `read` of both ends for any candidate, each once."""
    return torch.cat([index[:read] for index in (*found.top, *found.tail)]).unique()


def spelled(
    bases: Bases,
    vectors: Vectors,
    chosen: Int[Tensor, " n"],
    layers: Int[Tensor, " n"],
    labels: Sequence[str],
    step: Callable[[], None],
) -> pd.DataFrame:
    """3. What each chosen vector promotes and suppresses, without state, case and kind; `labels` name neurons."""
    tokenizer = bases.lens.lm.tokenizer
    parts = []
    for at in torch.arange(len(chosen)).split(SPELLED_AT_ONCE):
        ids, logits = bases.extremes(vectors.take(chosen[at.to(chosen.device)]), TOKENS)  # (n, direction, rank)
        n, _, k = ids.shape
        words = tokens.token_strings(tokenizer, ids.flatten().tolist())
        each = at.repeat_interleave(2 * k).tolist()
        parts.append(
            pd.DataFrame(
                {
                    "layer": layers.cpu()[each].numpy(),
                    "neuron": [labels[e] for e in each],
                    "direction": np.tile(np.repeat(["promoted", "suppressed"], k), n),
                    "rank": np.tile(np.arange(1, k + 1), 2 * n),
                    "token": words,
                    "token_id": ids.flatten().cpu().numpy(),
                    "logit": logits.flatten().double().cpu().numpy(),
                }
            )
        )
        step()
    return pd.concat(parts, ignore_index=True) if parts else frames.empty("neuron_tokens")


def joined(parts: Sequence[pd.DataFrame], name: str) -> pd.DataFrame:
    """One checked frame of the prompts' tables."""
    full = [part for part in parts if len(part)]
    return frames.check(pd.concat(full, ignore_index=True), name) if full else frames.empty(name)
