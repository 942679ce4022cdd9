"""Query side: what switches the value neurons on (Yu, Ananiadou; arXiv 2312.12141).

Value neurons are those whose output promotes a candidate (see neurons, attention_neurons). A neuron is active because
the stream it reads lies along its key; the stream is a sum of what earlier modules wrote, so each has a share in it.

1. Value neurons: per candidate the `values` MLP neurons f = (l, k) at the last token, and as many attention neurons
   a = (l, h, j, p) (number j of head h at source position p), with the highest scores Imp.
2. Keys, as directions in the stream. Of an MLP neuron (`key`):
       linearised  derivative of its activation with respect to what the MLP reads, at what it read; in gated MLPs
                   act'(g.x) (u.x) g + act(g.x) u; in plain ones act'(u.x) u, a factor that cancels below   (ours)
       up, gate    its row u of the MLP's first matrix, g of its gate
       repo        in gated MLPs its column of the last matrix, as in the authors' code; else u
   Of an attention neuron: row j of W_V of the key/value head that serves h.
   Both times the gain of the norm in front; under a LayerNorm less their mean, since the norm centres (`centre`; ours:
   the authors' code doesn't). Scale of the norm, its beta and the matrices' biases play no part in shares.
3. Query layers. The stream that the neuron read is h = sum_i c_i: the embedding, then every attention and MLP before
   it, at the last token for f and at position p for a. Then
       score_i += (c_i . key / h . key) Imp
4. Query neurons. Of every MLP neuron n in a layer below a's, with activation m at position p and column w of the last
   matrix:  Q[l, n] += (m w . key / h . key) Imp(a). The `top` highest are kept.
5. Guard (ours): where |h . key| < SMALLEST sum_i |c_i . key|, shares mean nothing and the neuron is passed over; the
   fraction is said in a note.

Shares of a neuron add up to 1, so query layers add up to the scores of the neurons that they explain. A share below 0
holds the neuron back. Where an edit steers attention or answers from a memory, modules write what their neurons don't,
and query neurons miss that; what attention reads off a text in front of the prompt has no source here. In parallel
blocks (GPT-J, GPT-NeoX) both modules read h^(l-1), so a block's attention is no component of its own MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mega_core import frames
from mega_core.attribution.attention_neurons import of_prompt as attention_vectors
from mega_core.attribution.neurons import of_prompt as mlp_vectors
from mega_core.attribution.recording import Recording
from mega_core.attribution.settings import QueryParams
from mega_core.attribution.topk import Bases, Vectors, search
from mega_core.events import Note, Reporter, stage
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter

READS = ("block_in", "resid_mid", "mlp_down_in", "pattern", "value")
SMALLEST = 1e-6
EMBEDDING = -1
"""Layer of the component "embedding"."""


class ValueNeuron(NamedTuple):
    """A neuron of an MLP at the last token."""

    layer: int
    neuron: int
    score: float


class AttentionNeuron(NamedTuple):
    """One number of a head at one source position."""

    layer: int
    head: int
    dim: int
    position: int
    score: float


@dataclass(frozen=True, eq=False)
class Shares:
    """What some value neurons of one prompt read, by component; float64 on the CPU."""

    keys: Float[Tensor, "neuron d_model"]
    shares: Float[Tensor, "component neuron"]
    """Embedding, then attention and MLP of every layer; 0 from the neuron on, and for a neuron passed over."""
    totals: Float[Tensor, " neuron"]
    """h . key."""
    kept: Bool[Tensor, " neuron"]
    """False for a neuron passed over."""

    def scores(self, neurons: Sequence[ValueNeuron] | Sequence[AttentionNeuron]) -> Float[Tensor, " component"]:
        """3.: in nats."""
        return self.shares @ torch.tensor([one.score for one in neurons], dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class _Traced:
    """One prompt and candidate."""

    i: int
    candidate: str
    attn: list[AttentionNeuron]
    source: Shares
    known: set[tuple[int, int]]
    """(layer, neuron) of the value neurons of MLPs."""


def look(recording: Recording, params: QueryParams, state: str, report: Reporter) -> Mapping[str, pd.DataFrame]:
    """The frames `query_layers` and `query_neurons`. Raises BadInput for key "gate" where MLPs have no gate."""
    layers: list[pd.DataFrame] = []
    traced: list[_Traced] = []
    seen = passed = 0
    with stage(report, "query") as step:
        for i, case in enumerate(recording.cases):
            every = value_neurons(recording, i, max(params.values, params.value_top), step)
            sources = attention_value_neurons(recording, i, params.values, step)
            for candidate, found_ffn, attn in zip(recording.candidates[i], every, sources, strict=True):
                known = {(one.layer, one.neuron) for one in found_ffn[: params.value_top]}
                ffn = found_ffn[: params.values]
                at_last = ffn_shares(recording, i, ffn, params)
                at_source = attention_shares(recording, i, attn, params)
                key = {"state": state, "case": case, "candidate": candidate}
                layers.append(_layer_frame(at_last.scores(ffn), {**key, "values": "ffn"}))
                layers.append(_layer_frame(at_source.scores(attn), {**key, "values": "attn"}))
                traced.append(_Traced(i, candidate, attn, at_source, known))
                for found in (at_last, at_source):
                    seen, passed = seen + len(found.kept), passed + int((~found.kept).sum())
    if passed:
        report(Note(f"{passed / seen:.0%} of the value neurons were passed over: their shares cancel to nothing."))
    return {
        "query_layers": frames.check(pd.concat(layers, ignore_index=True), "query_layers"),
        "query_neurons": _neuron_frame(recording, traced, params.top, state),
    }


# 1. Value neurons ----------------------------------------------------------------------------------------------------


def value_neurons(recording: Recording, i: int, count: int, step: Callable[[], None]) -> list[list[ValueNeuron]]:
    """Per candidate the MLP neurons of prompt i that promote it most, the highest score first; `step` is called often.

    Exact (see topk), as far as float32 goes.
    """
    found = _search(recording, i, "ffn", mlp_vectors(recording, i), count, step)
    return [[ValueNeuron(layer, unit, score) for layer, _, unit, score in mine] for mine in found]


def attention_value_neurons(
    recording: Recording, i: int, count: int, step: Callable[[], None]
) -> list[list[AttentionNeuron]]:
    """Per candidate the attention neurons of prompt i that promote it most, as value_neurons() has it."""
    size = recording.lm.head_dim
    found = _search(recording, i, "attn", attention_vectors(recording, i), count, step)
    return [
        [AttentionNeuron(layer, unit // size, unit % size, position, score) for layer, position, unit, score in mine]
        for mine in found
    ]


def _search(
    recording: Recording, i: int, module: str, vectors: Vectors, count: int, step: Callable[[], None]
) -> list[list[tuple[int, int, int, float]]]:
    """(layer, copy, unit, score) of the best vectors per candidate."""
    states = torch.stack([recording.base(layer, module)[i] for layer in range(recording.lm.n_layers)])
    bases = Bases.of(recording.lens.row(i), states, list(recording.candidates[i].values()))
    found = search(bases, vectors, count, 0, step)
    return [
        list(zip(*(part.tolist() for part in vectors.place(top)), value[top].tolist(), strict=True))
        for top, value in zip(found.top, found.value, strict=True)
    ]


# 2. Keys -------------------------------------------------------------------------------------------------------------


def mlp_keys(
    recording: Recording, i: int, layer: int, neurons: Sequence[int], params: QueryParams
) -> Float[Tensor, "neuron d_model"]:
    """What MLP neurons of a layer look for in the stream of prompt i; float64 on the CPU."""
    lm, at = recording.lm, list(neurons)
    if params.key in ("up", "gate") or not lm.spec.gated:
        rows = lm.mlp_in(layer, "gate" if params.key == "gate" else "up")[at]
    elif params.key == "repo":
        rows = lm.read_weight(layer, "mlp_down")[:, at].T
    else:
        x = _mlp_input(recording, i, layer)
        g, u = (lm.mlp_in(layer, which)[at].double().cpu() for which in ("gate", "up"))
        act, slope = _activation(lm, g @ x + _bias_in(lm, lm.spec.mlp_gate, layer, at))
        rows = (slope * (u @ x + _bias_in(lm, lm.spec.mlp_up, layer, at)))[:, None] * g + act[:, None] * u
    return _before_norm(rows, lm.mlp_norm(layer), lm, params.centre)


def value_keys(
    lm: ModelAdapter, layer: int, heads: Sequence[int], dims: Sequence[int], centre: bool = True
) -> Float[Tensor, "neuron d_model"]:
    """What numbers of attention heads look for in the stream; float64 on the CPU."""
    rows = lm.value_weight(layer)[[lm.kv_head(head) for head in heads], list(dims)]
    return _before_norm(rows, lm.attn_norm(layer), lm, centre)


def _before_norm(
    rows: Float[Tensor, "neuron d_model"], norm: nn.Module, lm: ModelAdapter, centre: bool
) -> Float[Tensor, "neuron d_model"]:
    """Directions in what a norm gives, as directions in what it is given, up to its scale."""
    gain: Any = norm.weight
    keys = rows.double().cpu() * gain.detach().double().cpu()
    return keys - keys.mean(-1, keepdim=True) if centre and lm.spec.norm == "layernorm" else keys


def _mlp_input(recording: Recording, i: int, layer: int) -> Float[Tensor, " d_model"]:
    """What the MLP of a layer reads at the last token, behind its norm."""
    lm = recording.lm
    norm: Any = lm.mlp_norm(layer)
    stream = recording.base(layer, "attn" if lm.spec.parallel else "ffn")[i]
    with torch.no_grad():
        return norm(stream[None].to(norm.weight))[0].double().cpu()


def _bias_in(lm: ModelAdapter, path: str, layer: int, neurons: list[int]) -> Float[Tensor, " neuron"]:
    bias = getattr(attrgetter(path)(lm.block(layer)), "bias", None)
    return torch.zeros(len(neurons), dtype=torch.float64) if bias is None else bias.detach()[neurons].double().cpu()


def _activation(lm: ModelAdapter, z: Float[Tensor, " n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """A gated MLP's activation and its derivative."""
    from transformers.activations import ACT2FN

    config: Any = lm.model.config
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        act: Tensor = ACT2FN[config.hidden_act](z)
        (slope,) = torch.autograd.grad(act.sum(), z)
    return act.detach(), slope


# 3. Query layers -----------------------------------------------------------------------------------------------------


def ffn_shares(recording: Recording, i: int, neurons: Sequence[ValueNeuron], params: QueryParams) -> Shares:
    """Of MLP neurons of prompt i, in what they read at the last token."""
    states = recording.states[:, i].double().cpu()
    components = torch.cat((states[:1], states.diff(dim=0)))  # (component, d_model)
    keys = torch.zeros(len(neurons), states.shape[-1], dtype=torch.float64)
    for layer in {one.layer for one in neurons}:
        at = [n for n, one in enumerate(neurons) if one.layer == layer]
        keys[at] = mlp_keys(recording, i, layer, [neurons[n].neuron for n in at], params)
    before = [2 * one.layer + (1 if recording.lm.spec.parallel else 2) for one in neurons]
    return _shares(components @ keys.T, before, keys)


def attention_shares(recording: Recording, i: int, neurons: Sequence[AttentionNeuron], params: QueryParams) -> Shares:
    """Of attention neurons of prompt i, in what they read at their source positions."""
    lm = recording.lm
    keys = torch.zeros(len(neurons), lm.d_model, dtype=torch.float64)
    for layer in {one.layer for one in neurons}:
        at = [n for n, one in enumerate(neurons) if one.layer == layer]
        keys[at] = value_keys(lm, layer, [neurons[n].head for n in at], [neurons[n].dim for n in at], params.centre)
    positions = [one.position for one in neurons]
    dots = torch.zeros(2 * lm.n_layers + 1, len(neurons), dtype=torch.float64)
    below = torch.zeros_like(keys)
    for n, (layer, part) in enumerate(product(range(lm.n_layers), ("block_in", "resid_mid"))):
        stream = recording.part(layer, part)[i, positions].double().cpu()
        dots[n] = ((stream - below) * keys).sum(-1)
        below = stream
    return _shares(dots, [2 * one.layer + 1 for one in neurons], keys)


def _shares(
    dots: Float[Tensor, "component neuron"], before: Sequence[int], keys: Float[Tensor, "neuron d_model"]
) -> Shares:
    """Shares of the components before each neuron; 5. where they cancel."""
    dots = dots * (torch.arange(len(dots))[:, None] < torch.tensor(before, dtype=torch.long))
    totals = dots.sum(0)
    kept = (totals.abs() >= SMALLEST * dots.abs().sum(0)) & (totals != 0)
    return Shares(keys, torch.where(kept, dots / totals.where(kept, 1), 0), totals, kept)


def _layer_frame(scores: Float[Tensor, " component"], key: Mapping[str, object]) -> pd.DataFrame:
    n_layers = len(scores) // 2
    return pd.DataFrame(
        {
            **key,
            "layer": [EMBEDDING, *np.repeat(np.arange(n_layers), 2)],
            "module": ["embedding", *["attn", "ffn"] * n_layers],
            "score": scores.numpy(),
        }
    )


# 4. Query neurons ----------------------------------------------------------------------------------------------------


def query_scores(
    recording: Recording,
    i: int,
    layer: int,
    neurons: Sequence[AttentionNeuron],
    found: Shares,
    columns: Float[Tensor, "d_model d_mlp"],
) -> tuple[Float[Tensor, " d_mlp"], Int[Tensor, " d_mlp"]]:
    """Q of every MLP neuron of a layer, in nats (float64, on the CPU), and the position where it matters most.

    That is the source position of the attention neuron to which it contributes most, in absolute terms. `columns` is
    the layer's last MLP matrix, in float32.
    """
    at = [n for n, one in enumerate(neurons) if one.layer > layer and found.kept[n]]
    if not at:
        none = torch.zeros(columns.shape[1], dtype=torch.float64)
        return none, none.long()
    positions = torch.tensor([neurons[n].position for n in at])
    m = recording.part(layer, "mlp_down_in")[i, positions].double().cpu()  # (neuron, d_mlp)
    along = (found.keys[at].to(columns) @ columns).double().cpu()
    imp = torch.tensor([neurons[n].score for n in at], dtype=torch.float64)
    parts = m * along * (imp / found.totals[at])[:, None]
    return parts.sum(0), positions[parts.abs().argmax(0)]


def _neuron_frame(recording: Recording, traced: Sequence[_Traced], top: int, state: str) -> pd.DataFrame:
    lm = recording.lm
    scores = torch.zeros(len(traced), lm.n_layers, lm.d_mlp, dtype=torch.float64)
    positions = torch.zeros_like(scores, dtype=torch.long)
    for layer in range(lm.n_layers):
        columns = lm.read_weight(layer, "mlp_down").float()
        for n, one in enumerate(traced):
            scores[n, layer], positions[n, layer] = query_scores(recording, one.i, layer, one.attn, one.source, columns)
    parts = []
    for n, one in enumerate(traced):
        best = scores[n].flatten().topk(min(top, int((scores[n] > 0).sum())))
        places = [divmod(at, lm.d_mlp) for at in best.indices.tolist()]
        where = positions[n].flatten()[best.indices].tolist()
        active = [
            float(recording.part(layer, "mlp_down_in")[one.i, p, neuron])
            for (layer, neuron), p in zip(places, where, strict=True)
        ]
        labels = tokens.token_strings(lm.tokenizer, recording.batch.rows()[one.i])
        if places:
            parts.append(
                pd.DataFrame(
                    {
                        "state": state,
                        "case": recording.cases[one.i],
                        "layer": [layer for layer, _ in places],
                        "neuron": [neuron for _, neuron in places],
                        "candidate": one.candidate,
                        "score": best.values.numpy(),
                        "coefficient": active,
                        "position": where,
                        "token": [labels[p] for p in where],
                        "rank": np.arange(1, len(places) + 1),
                        "is_value": [place in one.known for place in places],
                    }
                )
            )
    name = "query_neurons"
    return frames.check(pd.concat(parts, ignore_index=True), name) if parts else frames.empty(name)
