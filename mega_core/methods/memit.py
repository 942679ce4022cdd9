"""MEMIT: Mass-Editing Memory in a Transformer (Meng, Sen Sharma, Andonian, Belinkov, Bau, ICLR 2023, arXiv 2210.07229).

Many facts at once, written into the MLPs of several layers l_1 < .. < l_L in small shares:

1. z_i: for every fact the stream after block l_L, at the subject's last token s, that makes the model say the new
   object: z = h + delta, where delta minimises ROME's loss (see optimise) and |delta| stays below clamp * |h|.
2. For every layer in ascending order, with R and K as the model edited so far has them (see spread):
       K = [k_1 .. k_n]   keys at s: half the bare prompt's, half those in other contexts
       R = [z_i - h_i] / (layers that remain, this one included)
3.     D = R KT (lambda C + K KT)^-1,  W <- W + D,  C = E[k kT] over ordinary text
   the least squares that weigh n new pairs against lambda ordinary keys (`mom2_weight`).

The smaller lambda, the surer the edit and the more ordinary keys move. A fact may come twice: its values are averaged.

Choices that the paper leaves open, and ours: the kept distribution is read at the end of its prompt; for an object of
several tokens the loss takes the mean over tokens; contexts are fixed texts unless sampled; a search ends at
`stop_probability` (published: at a loss of 0.05); the default layers end at a third of the depth, where no paper has
named any for the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mega_core.events import Reporter
from mega_core.methods import knobs
from mega_core.methods.base import Method
from mega_core.methods.rome import ReadParams, SearchParams, needs, rows_of, value_search
from mega_core.records import EditRequest

if TYPE_CHECKING:
    from mega_core.changes import MatrixDelta, WeightDelta
    from mega_core.methods import spread
    from mega_core.models.adapter import ModelAdapter


@dataclass(frozen=True, slots=True)
class MemitParams:
    """What can be set."""

    layers: str | None = knobs.edited_layers()
    mom2_weight: float = knobs.mom2_weight(15000.0)
    covariance: str = knobs.covariance("quick")
    shrinkage: float | None = knobs.shrinkage()
    bare_weight: float = knobs.bare_weight(0.5)
    steps: int = knobs.steps(25)
    learning_rate: float = knobs.learning_rate(0.5)
    clamp: float = knobs.clamp(0.75, "the residual stream's norm")
    kl_weight: float = knobs.kl_weight(0.0625)
    kl_prompts: str = knobs.kl_prompts("{} is a")
    weight_decay: float = knobs.weight_decay(0.5)
    stop_probability: float = knobs.stop_probability(0.99)
    contexts: int = knobs.contexts(6)
    context_source: str = knobs.context_source("fixed")


class SpreadParams(ReadParams, SearchParams, Protocol):
    """The knobs that MEMIT and its heirs share."""

    @property
    def layers(self) -> str | None:
        """As parse_layers reads them; None: default_layers."""
        ...

    @property
    def bare_weight(self) -> float:
        """Of the bare prompt in a key."""
        ...


def prepare(
    lm: ModelAdapter, requests: Sequence[EditRequest], params: MemitParams, seed: int, report: Reporter
) -> WeightDelta:
    """An update of rank n (for n requests) of the MLP's last matrix of every layer. Leaves the model as it found it."""
    from mega_core.changes import WeightDelta
    from mega_core.methods import covariance, solve

    layers = layers_of(lm, params, "memit")
    factors = covariance.choleskys(lm, layers, params.covariance, params.shrinkage, report)
    matrices, keys = search_and_spread(
        lm,
        requests,
        layers,
        params,
        "memit",
        lambda layer, key, change: solve.soft_edit(key, change, factors[layer], params.mom2_weight),  # 3.
        seed,
        report,
    )
    return WeightDelta(matrices, keys)


def layers_of(lm: ModelAdapter, params: SpreadParams, method: str) -> tuple[int, ...]:
    """The layers to edit, ascending. Raises BadInput on one that is not there."""
    from mega_core.methods import spread

    if params.layers is None:
        return spread.default_layers(lm.n_layers)
    return spread.parse_layers(params.layers, lm.n_layers, f"{method}.layers")


def search_and_spread(
    lm: ModelAdapter,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    params: SpreadParams,
    method: str,
    solve_layer: spread.Solve,
    seed: int,
    report: Reporter,
) -> tuple[tuple[MatrixDelta, ...], dict[int, spread.Keys]]:
    """Steps 1 and 2, which MEMIT and AlphaEdit share: the updates and the keys per layer."""
    from mega_core.methods import optimise, spread
    from mega_core.models.hooks import Site

    rows = rows_of(lm, requests, params, seed, method)
    found = optimise.find_values(lm, layers[-1], rows, value_search(params, "residual"), report)  # 1.
    return spread.spread(  # 2.
        lm,
        [layers],
        rows,
        found.residual + found.delta,
        Site(layers[-1], "block_out"),
        lambda remaining: 1 / remaining,
        solve_layer,
        report,
        bare_weight=params.bare_weight,
    )


MEMIT = Method(
    name="memit",
    title="MEMIT",
    summary="Writes one or up to a thousand new facts at once into the MLPs of several layers.",
    family="weights",
    paper="arXiv 2210.07229",
    params=MemitParams,
    prepare=prepare,
    needs=needs,
)
