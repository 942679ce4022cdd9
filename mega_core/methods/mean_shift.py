"""Mean shift: adding the difference of mean activations, as in ActAdd (Turner et al. 2023, arXiv 2308.10248).

What SAKE and MEGA are measured against: their map without its covariance part.

1. Source: activations at the chosen layers and part, at the last token, of prompts p for the fact (s, r, o -> o*) (S),
   and of p behind the old fact (S'). Target: of p behind the new fact (T). See fitting.
2. Use: x <- x + alpha (mean T - mean S) at that position of every prompt that the gate lets through.

ActAdd takes one pair of prompts, one layer's residual stream and the first positions of the prompt; the means over many
prompts, the last position and the gate follow SAKE's baseline of that name. Ours: several layers and other parts of the
block, contexts kept only where the model says o*, a shift for each of the first four tokens of the new object. Layers
are fitted apart from each other, so that with more layers less alpha is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mega_core.errors import BadInput
from mega_core.events import Reporter
from mega_core.methods import knobs
from mega_core.methods.base import Method, knob
from mega_core.records import EditRequest

if TYPE_CHECKING:
    from mega_core.methods.steering import Steering
    from mega_core.models.adapter import ModelAdapter
    from mega_core.models.arch import ArchSpec


@dataclass(frozen=True, slots=True)
class MeanShiftParams:
    """What can be set."""

    layers: str | None = knob(
        None, "Layers to steer, such as 4-7 or 2,5. Empty: the upper half, or the last for part final.", ours=True
    )
    part: str = knob(
        "attn",
        "What is shifted: what attention writes (attn), the stream after it (resid_mid), what the MLP writes (mlp), "
        "the block's output (block_out), or the state behind the final norm (final).",
        choices=("attn", "resid_mid", "mlp", "block_out", "final"),
        ours=True,
    )
    alpha: float = knob(1.0, "Strength: the shift is multiplied by it.", low=0.0, high=20.0)
    target: str = knobs.target("auto")
    contexts: str = knobs.stating("pool", ("pool", "new", "sake"), ours=True)
    source: str = knobs.source("both")
    prompts: int = knobs.prompts(12)
    gate: str = knobs.gate("centroid")
    gate_layer: int | None = knobs.gate_layer()
    implications: bool = knobs.implications(True)


def needs(spec: ArchSpec) -> str | None:
    """Every architecture in the table has all these parts."""
    return None


def prepare(
    lm: ModelAdapter, requests: Sequence[EditRequest], params: MeanShiftParams, seed: int, report: Reporter
) -> Steering:
    """The shifts and gates of the edits, one gate each. Leaves the model as it found it."""
    from mega_core.methods import fitting
    from mega_core.methods.spread import parse_layers
    from mega_core.methods.transport import fit_map
    from mega_core.models.hooks import FINAL, Site

    last = lm.n_layers - 1
    if params.layers is not None:
        layers = parse_layers(params.layers, lm.n_layers, "mean_shift.layers")
    else:
        layers = (last,) if params.part == FINAL else tuple(range(lm.n_layers // 2, lm.n_layers))
    if params.part == FINAL and layers != (last,):
        raise BadInput("mean_shift.layers", "the final norm follows the last layer only.", f"Write {last}, or nothing.")
    sites = [Site(layer, params.part) for layer in layers]
    # 1.; 2. is the change itself
    return fitting.steered(lm, requests, sites, params, lambda s, t: fit_map(s, t, "mean"), seed, report)


MEAN_SHIFT = Method(
    name="mean_shift",
    title="Mean shift",
    summary="Adds the difference of mean activations where a prompt asks for the edited fact.",
    family="steering",
    paper="arXiv 2308.10248",
    params=MeanShiftParams,
    prepare=prepare,
    needs=needs,
)
