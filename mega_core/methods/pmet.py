"""PMET: Precise Model Editing in a Transformer (Li, Li, Song, Yang, Ma, Yu, AAAI 2024, arXiv 2308.08742).

MEMIT searches one change of a block's whole output, though the block's two halves do different work: attention
extracts, the MLP remembers. PMET lets each have its own change while it searches, and writes only the MLP's.

1. At the subject's last token s, in the last of the layers, search two deltas together: delta_attn joins what attention
   writes, delta_mlp what the MLP writes. They minimise
       L = f 1/N sum_j -log P[o* | x_j + p, deltas] + kl_weight KL(P[. | p'] || P[. | p', deltas])
             + weight_decay (|delta_attn| / |a0|^2 + |delta_mlp| / |v0|^2)
   with |delta_attn| <= clamp |a0| and |delta_mlp| <= clamp |v0|. f is 1, or 0.1 while o* is already what the model
   would say in every context; then the search ends once the KL is at most 0.01. It also ends once L is below
   `stop_loss`.
2. The goal is the MLP's output there: v* = v0 + delta_mlp. delta_attn is thrown away.
3. For every layer, first to last, with m layers remaining: R = (v* - v) / sqrt(m), where v is the MLP's output at the
   last layer as the model is by then, and
       W <- W + R K^T (lambda C + K K^T)^-1
   with the keys K at s, averaged over the contexts, and C = E[k k^T] over ordinary text (see solve and spread).

Where attention and MLP run side by side (GPT-J, NeoX), both deltas get the same gradient, so only their clamps and
decays tell them apart, and half of what was found is thrown away.

Choices that the paper leaves open, and ours: `written` "all" puts everything that the two deltas do to the block's
output into the MLP's goal; contexts are fixed texts; the norm that clamp and decay refer to may be the residual
stream's, since small models write short outputs; a search may also end at `stop_probability`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import TYPE_CHECKING

from mega_core.events import Reporter
from mega_core.methods import knobs
from mega_core.methods.base import Method
from mega_core.methods.memit import layers_of
from mega_core.methods.rome import needs, rows_of, value_search
from mega_core.records import EditRequest

if TYPE_CHECKING:
    from mega_core.changes import WeightDelta
    from mega_core.methods import optimise
    from mega_core.methods.ace import AceParams
    from mega_core.models.adapter import ModelAdapter


@dataclass(frozen=True, slots=True)
class PmetParams:
    """What can be set. Defaults as published for GPT-J."""

    layers: str | None = knobs.edited_layers()
    steps: int = knobs.steps(30, "the new values")
    learning_rate: float = knobs.learning_rate(0.2, "the new values")
    clamp: float = knobs.clamp_each(0.75)
    clamp_reference: str = knobs.clamp_references("value")
    kl_weight: float = knobs.kl_weight(1.0)
    kl_prompts: str = knobs.kl_prompts("{} is a")
    weight_decay: float = knobs.weight_decay(0.5, "both changes")
    adaptive: bool = knobs.adaptive(True)
    stop_loss: float = knobs.stop_loss(0.05)
    stop_probability: float = knobs.stop_probability(1.0)
    written: str = knobs.written("mlp")
    covariance: str = knobs.covariance("quick")
    mom2_weight: float = knobs.mom2_weight(6000.0)
    shrinkage: float | None = knobs.shrinkage()
    bare_weight: float = knobs.bare_weight(0.5)
    contexts: int = knobs.contexts(6)
    context_source: str = knobs.context_source("fixed")


def prepare(
    lm: ModelAdapter, requests: Sequence[EditRequest], params: PmetParams, seed: int, report: Reporter
) -> WeightDelta:
    """The edit of the MLP matrices of `layers`. Leaves the model as it found it."""
    from mega_core.changes import WeightDelta
    from mega_core.methods import covariance, optimise, solve, spread
    from mega_core.models.hooks import Site

    layers = layers_of(lm, params, "pmet")
    rows = rows_of(lm, requests, params, seed, "pmet")
    factors = covariance.choleskys(lm, layers, params.covariance, params.shrinkage, report)
    # 1.
    found = optimise.find_pairs(lm, layers[-1], rows, search_of(params), report)
    # 2.
    goal = found.v0 + (found.mlp if params.written == "mlp" else found.out)
    # 3.
    matrices, keys = spread.spread(
        lm,
        [layers],
        rows,
        goal,
        Site(layers[-1], "mlp"),
        share,
        lambda layer, key, change: solve.soft_edit(key, change, factors[layer], params.mom2_weight),
        report,
        bare_weight=params.bare_weight,
    )
    return WeightDelta(matrices, keys)


def share(remaining: int) -> float:
    """The part of what is missing that a layer takes on, with `remaining` layers left, itself included."""
    return 1 / sqrt(remaining)


def search_of(params: PmetParams | AceParams) -> optimise.Search:
    """How the deltas are searched."""
    search = value_search(params, params.clamp_reference)
    return replace(search, stop_loss=params.stop_loss, adaptive=params.adaptive)


PMET = Method(
    name="pmet",
    title="PMET",
    summary="Searches changes for attention and MLP together, and writes the MLP's through several layers.",
    family="weights",
    paper="arXiv 2308.08742",
    params=PmetParams,
    prepare=prepare,
    needs=needs,
)
