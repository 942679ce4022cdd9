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
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

from mega_core.events import Reporter
from mega_core.methods.base import Method, knob
from mega_core.methods.memit import layers_of
from mega_core.methods.rome import needs, rows_of
from mega_core.records import EditRequest

if TYPE_CHECKING:
    from mega_core.changes import WeightDelta
    from mega_core.methods import optimise
    from mega_core.methods.ace import AceParams
    from mega_core.models.adapter import ModelAdapter


@dataclass(frozen=True, slots=True)
class PmetParams:
    """What can be set. Defaults as published for GPT-J."""

    layers: str | None = knob(
        None, "Layers that are written, such as 3-8. Empty: the model's default, or a few up to a third of its depth."
    )
    steps: int = knob(30, "Most updates of the new values.", low=1, high=200)
    learning_rate: float = knob(0.2, "Size of an update of the new values.", low=1e-4, high=10.0)
    clamp: float = knob(0.75, "Either value may change by this multiple of its reference norm.", low=0.01, high=100.0)
    clamp_reference: str = knob(
        "value",
        "Reference norms: of attention's and the MLP's own outputs (value, as published), or of the residual stream.",
        choices=("value", "residual"),
    )
    kl_weight: float = knob(1.0, "How strongly the kept prompts hold their answers.", low=0.0, high=100.0)
    kl_prompts: str = knob(
        "{} is a",
        "Prompts whose next word should stay, with {} for the subject and | between several; auto: the subject's "
        "other relations, where they are known.",
    )
    weight_decay: float = knob(0.5, "Penalty on the size of both changes.", low=0.0, high=100.0)
    adaptive: bool = knob(
        True, "Once the new object is said everywhere, press less, and stop when the kept prompts have hardly moved."
    )
    stop_loss: float = knob(0.05, "Stop when the loss is below this.", low=0.0, high=10.0)
    stop_probability: float = knob(
        1.0,
        "Stop when the new object is at least this likely in every context; 1 never stops for that.",
        low=0.0,
        high=1.0,
        ours=True,
    )
    written: str = knob(
        "mlp",
        "What is written: the MLP's own change (mlp, as published), or all that both changes do to the block (all).",
        choices=("mlp", "all"),
    )
    covariance: str = knob(
        "quick",
        "Statistics of ordinary keys: quick (a small text), full (ten times as much), identity (none).",
        choices=("quick", "identity", "full"),
        ours=True,
    )
    mom2_weight: float = knob(
        6000.0,
        "How many ordinary keys an edit is weighed against (lambda); less edits more surely.",
        low=1e-6,
        high=1e9,
    )
    shrinkage: float | None = knob(
        None,
        "Share of a plain average mixed into the statistics. Empty: 1 to 5 %, by text size.",
        low=0.0,
        high=1.0,
        ours=True,
    )
    bare_weight: float = knob(0.5, "Share of the prompt without context in a key.", low=0.0, high=1.0)
    contexts: int = knob(6, "In how many contexts the prompt is put, the bare prompt included.", low=1, high=21)
    context_source: str = knob(
        "fixed",
        "Texts of the contexts: fixed ones, or sampled from the model.",
        choices=("fixed", "sampled"),
        ours=True,
    )


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
    from mega_core.methods.optimise import Search

    return Search(
        steps=params.steps,
        learning_rate=params.learning_rate,
        clamp=params.clamp,
        reference="residual" if params.clamp_reference == "residual" else "value",
        kl_weight=params.kl_weight,
        weight_decay=params.weight_decay,
        stop_probability=params.stop_probability if params.stop_probability < 1 else 2.0,
        stop_loss=params.stop_loss,
        adaptive=params.adaptive,
    )


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
