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
from mega_core.methods.base import Method, knob
from mega_core.methods.rome import ReadParams, needs, rows_of
from mega_core.records import EditRequest

if TYPE_CHECKING:
    from mega_core.changes import MatrixDelta, WeightDelta
    from mega_core.methods import spread
    from mega_core.models.adapter import ModelAdapter


@dataclass(frozen=True, slots=True)
class MemitParams:
    """What can be set."""

    layers: str | None = knob(
        None, "Layers whose MLPs are edited, such as 3-8 or 2,4. Empty: the model's own, or up to a third of its depth."
    )
    mom2_weight: float = knob(
        15000.0,
        "How many ordinary keys an edit is weighed against (lambda); less edits more surely.",
        low=1e-6,
        high=1e9,
    )
    covariance: str = knob(
        "quick",
        "Statistics of ordinary keys: quick (a small text), full (ten times as much), identity (none).",
        choices=("quick", "identity", "full"),
        ours=True,
    )
    shrinkage: float | None = knob(
        None,
        "Share of a plain average mixed into the statistics. Empty: 1 to 5 %, by text size.",
        low=0.0,
        high=1.0,
        ours=True,
    )
    bare_weight: float = knob(0.5, "Share of the prompt without context in a key.", low=0.0, high=1.0)
    steps: int = knob(25, "Most updates of the new value.", low=1, high=200)
    learning_rate: float = knob(0.5, "Size of an update of the new value.", low=1e-4, high=10.0)
    clamp: float = knob(
        0.75, "The value may change by this multiple of the residual stream's norm.", low=0.01, high=100.0
    )
    kl_weight: float = knob(0.0625, "How strongly the kept prompts hold their answers.", low=0.0, high=100.0)
    kl_prompts: str = knob(
        "{} is a",
        "Prompts whose next word should stay, with {} for the subject and | between several; auto: the subject's "
        "other relations, where they are known.",
    )
    weight_decay: float = knob(0.5, "Penalty on the size of the change of the value.", low=0.0, high=100.0)
    stop_probability: float = knob(
        0.99,
        "Stop when the new object is at least this likely in every context; 1 never stops early.",
        low=0.0,
        high=1.0,
        ours=True,
    )
    contexts: int = knob(6, "In how many contexts the prompt is put, the bare prompt included.", low=1, high=21)
    context_source: str = knob(
        "fixed",
        "Texts of the contexts: fixed ones, or sampled from the model.",
        choices=("fixed", "sampled"),
        ours=True,
    )


class SpreadParams(ReadParams, Protocol):
    """The knobs that MEMIT and its heirs share."""

    @property
    def layers(self) -> str | None:
        """As parse_layers reads them; None: default_layers."""
        ...

    @property
    def bare_weight(self) -> float:
        """Of the bare prompt in a key."""
        ...

    @property
    def steps(self) -> int:
        """Of the search."""
        ...

    @property
    def learning_rate(self) -> float:
        """Of the search."""
        ...

    @property
    def clamp(self) -> float:
        """Of the search."""
        ...

    @property
    def weight_decay(self) -> float:
        """Of the search."""
        ...

    @property
    def stop_probability(self) -> float:
        """Of the search; 1 for never."""
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
    search = optimise.Search(
        steps=params.steps,
        learning_rate=params.learning_rate,
        clamp=params.clamp,
        reference="residual",
        kl_weight=params.kl_weight,
        weight_decay=params.weight_decay,
        stop_probability=params.stop_probability if params.stop_probability < 1 else 2.0,
    )
    found = optimise.find_values(lm, layers[-1], rows, search, report)  # 1.
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
