"""AlphaEdit: null-space constrained editing (Fang et al., ICLR 2025, arXiv 2410.02355).

As MEMIT, but updates move only along directions that ordinary keys hardly use, and spare the keys of earlier edits:

1. z_i at the last of the layers l_1 < .. < l_L, and for every layer in ascending order K and R, as MEMIT has them.
2. P = U UT: U are the eigenvectors of C = E[k kT] with small eigenvalues, so that D P k is near 0 for ordinary keys.
3. Kp: the keys of earlier edits. They are found in the changes that stand on the model while this edit is prepared,
   never in a memory of the process, so the same question gives the same answer.
4. DT = [P (K KT + Kp KpT) + L2 I]^-1 P K RT,  W <- W + D

Which eigenvalues are small: the published code has a threshold of 0.02, which depends on the scale of a model's keys.
Ours is relative: the smallest ones that together hold at most `nullspace_cut` of C's trace. C is MEMIT's, unshrunk.

The other choices are MEMIT's. Published L2 is 10 (1 for Llama 3 in EasyEdit); the larger, the smaller the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mega_core.events import Reporter
from mega_core.methods import knobs
from mega_core.methods.base import Method, knob
from mega_core.methods.memit import layers_of, search_and_spread
from mega_core.methods.rome import needs
from mega_core.records import EditRequest

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from mega_core.changes import WeightDelta
    from mega_core.models.adapter import ModelAdapter


@dataclass(frozen=True, slots=True)
class AlphaEditParams:
    """What can be set."""

    layers: str | None = knobs.edited_layers()
    l2: float = knob(10.0, "Penalty on the update (L2); less edits more surely.", low=1e-9, high=1e9)
    nullspace: str = knob(
        "relative",
        "Free directions: those of least use by their share (relative), or below the published threshold (absolute).",
        choices=("relative", "absolute"),
        ours=True,
    )
    nullspace_cut: float = knob(
        0.02,
        "Share of the keys' variance that may lie along free directions; with absolute, the threshold.",
        low=1e-9,
        high=1e6,
        ours=True,
    )
    covariance: str = knob(
        "quick",
        "Statistics of ordinary keys: quick (a small text) or full (ten times as much).",
        choices=("quick", "full"),
        ours=True,
    )
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


def prepare(
    lm: ModelAdapter, requests: Sequence[EditRequest], params: AlphaEditParams, seed: int, report: Reporter
) -> WeightDelta:
    """An update of rank n (for n requests) of the MLP's last matrix of every layer. Leaves the model as it found it."""
    from mega_core.changes import WeightDelta
    from mega_core.methods import covariance, solve

    layers = layers_of(lm, params, "alphaedit")
    free = covariance.null_spaces(  # 2.
        lm, layers, params.covariance, params.nullspace_cut, params.nullspace, report
    )
    earlier = {layer: earlier_keys(lm, layer) for layer in layers}  # 3., before our own changes stand there
    matrices, keys = search_and_spread(  # 1.
        lm,
        requests,
        layers,
        params,
        "alphaedit",
        lambda layer, key, change: solve.projected_edit(key, change, free[layer], earlier[layer], params.l2),  # 4.
        seed,
        report,
    )
    return WeightDelta(matrices, keys)


def earlier_keys(lm: ModelAdapter, layer: int) -> Float[Tensor, "m d_mlp"] | None:
    """The keys that the changes now true have set at this layer, in their order."""
    import torch

    from mega_core.changes import WeightDelta

    found = [change.keys[layer] for change in lm.changes if isinstance(change, WeightDelta) and layer in change.keys]
    return torch.cat(found) if found else None


ALPHAEDIT = Method(
    name="alphaedit",
    title="AlphaEdit",
    summary="Writes facts only along directions that ordinary text hardly uses, and spares earlier edits.",
    family="weights",
    paper="arXiv 2410.02355",
    params=AlphaEditParams,
    prepare=prepare,
    needs=needs,
)
