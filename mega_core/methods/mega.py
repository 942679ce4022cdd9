"""MEGA: steering attention's writes in the layers that attribution points at (Cao, Wang, Schuetze 2026, 2603.20795).

What is the paper's (its abstract and a digest are public, no code): neuron-level attribution after an edit, successes
against failures, finds middle to late attention layers that raise the new object o* and, with the MLPs, hold down the
old one; so a transport map like SAKE's, cut down by PCA, is put on the attention-to-residual path of several layers
there, by hooks, without touching a weight. Its steps, as we do them for one edit (s, r, o -> o*):

A. Region: the layers R with leverage. Read from `region`; attribution itself is another view's work.
B. Fit, for every layer l of R:
   1. prompts p of the fact (edit template, trained templates, neutral texts before them): never evaluation prompts
   2. activations a of attention's output at the last token behind S (p) and S' (the old object stated, then p) as
      source, behind T as target: contexts that make the model say o*, or prompts of donors (see fitting)
   3. the map T_l of the two samples: shift of the means and optimal transport inside k principal components (transport)
   4. layers one by one from the unsteered run (`independent`), or each from the run with the maps below it in place
C. Apply, where the edit's gate is open (gate), at the token that predicts the next token of o* (steering):
       a <- a + alpha (T_l(a) - a)
   For an o* of several tokens there is one map per number of its tokens that already stand there, up to four.

Ours, because the paper leaves it open, each a parameter: the layers and their minimum (three: single layers fail, as
measured on the embedded models), the site, sources and targets, strong shrinkage (with fewer rows than dimensions the
covariance part does harm), alpha, the gate, one map per prefix of o*. methods.md 4.2 proposes sequential fits, or
alpha = 1/sqrt(|R|) with independent ones; measured on the embedded models independent fits with alpha above 1 are as
good and many times faster (docs/decisions/0003-mega-choices.md).

`control` runs what the method has to be compared with: other layers, the MLP's output, a mere shift, no gate, alpha 0,
another edit's maps.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, cast

from mega_core.events import Note, Reporter, silent, stage
from mega_core.methods import knobs
from mega_core.methods.base import Method, knob
from mega_core.records import EditRequest

if TYPE_CHECKING:
    from torch import Tensor

    from mega_core.methods.fitting import FitSet
    from mega_core.methods.steering import SteeredEdit, Steering
    from mega_core.methods.transport import AffineMap, Kind
    from mega_core.models.adapter import ModelAdapter
    from mega_core.models.arch import ArchSpec
    from mega_core.models.hooks import Site

CONTROLS = (
    "none",
    "random_region",
    "early_region",
    "ffn_site",
    "mean_shift",
    "always_on",
    "alpha_zero",
    "shuffled",
)
FEWEST_LAYERS = 3
ALPHAS = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
"""Tried from the weakest on when alpha is chosen by itself."""
SEQUENTIAL_ALPHA = 1.25
"""Sequential maps hold only at the strength they were fitted at, so that it can't be searched for afterwards."""
SURE = 0.9
"""A strength works where the new object is at least this likely: what only just wins fails on other questions."""
HELD_OUT = 0.25
"""Share of the prompts that judge alpha instead of being fitted on."""


@dataclass(frozen=True, slots=True)
class MegaParams:
    """What can be set."""

    region: str = knob(
        "auto", "Steered layers: auto, a range (4-7) or a list (4,5,6), such as attribution gives.", ours=True
    )
    site: str = knob(
        "attn_out",
        "Where the map acts: on attention's output, or on the residual stream behind attention.",
        choices=("attn_out", "resid_mid"),
        ours=True,
    )
    target: str = knobs.target("auto")
    contexts: str = knobs.stating("pool", ("pool", "sake", "new"), ours=True)
    source: str = knobs.source("both")
    prompts: int = knobs.prompts(12, low=2, high=100)
    transport: str = knob(
        "ot",
        "The map: optimal transport in principal components, in all directions, or a mere shift.",
        choices=("ot", "ot-full", "mean"),
    )
    components: int = knob(16, "Most principal components.", low=1, high=512, ours=True)
    energy: float = knob(0.99, "Share of the variance the components must hold.", low=0.01, high=1.0, ours=True)
    shrinkage: float = knob(
        1.0, "How far covariances are drawn to a plain one, in mean source variances.", low=0.0, high=100.0, ours=True
    )
    fit: str = knob(
        "independent",
        "Maps of all layers from the unsteered run, or each with the ones below it in place.",
        choices=("independent", "sequential"),
        ours=True,
    )
    alpha: float | None = knob(
        None,
        "Strength of the move. Empty: the weakest that works on withheld fit prompts.",
        low=0.0,
        high=8.0,
        ours=True,
    )
    gate: str = knobs.gate("centroid")
    gate_layer: int | None = knobs.gate_layer()
    implications: bool = knobs.implications(True)
    control: str = knob("none", "Run a control experiment instead of the method itself.", choices=CONTROLS, ours=True)


def needs(spec: ArchSpec) -> str | None:
    """Attention writes to the residual stream in every architecture of the table, which is all it takes."""
    return None


def prepare(
    lm: ModelAdapter, requests: Sequence[EditRequest], params: MegaParams, seed: int, report: Reporter
) -> Steering:
    """One steered edit per request behind a common gatekeeper. Leaves the model as it found it."""
    from mega_core.methods.steering import Registry

    layers, remark = read_region(params.region, lm.n_layers)  # A
    if remark:
        report(Note(f"Layers {_said(layers)}: {remark}."))
    layers = _control_layers(params.control, layers, lm.n_layers, seed)
    if len(layers) < FEWEST_LAYERS:
        report(Note(f"Only {len(layers)} steered layer(s): fewer than {FEWEST_LAYERS} rarely carry an edit."))
    params = _control_params(params)
    registry = Registry()
    with stage(report, "edits", len(requests)) as step:
        for i, request in enumerate(requests):
            edit = fit_edit(lm, request, layers, params, seed, report)
            if params.control == "shuffled":
                other = _another(requests, i, seed)
                edit = replace(edit, maps=fit_edit(lm, other, layers, params, seed, report).maps)
            registry.add(edit)
            step()
    return registry.change()


# A. The region -------------------------------------------------------------------------------------------------------


def read_region(text: str, n_layers: int) -> tuple[tuple[int, ...], str]:
    """(layers, remark) of a region as text; a remark in brackets behind the layers is handed on.

    Raises BadInput on text that names no layers, or layers that aren't there.
    """
    from mega_core.methods.spread import parse_layers

    wanted, _, remark = text.strip().partition("(")
    wanted, remark = wanted.strip(), remark.rstrip(") ")
    if wanted.lower() in ("", "auto"):
        return default_region(n_layers), remark or "default, not measured"
    layers = parse_layers(wanted, n_layers, "mega.region")
    return layers, remark


def default_region(n_layers: int) -> tuple[int, ...]:
    """Without attribution: the upper half of a small model, a sixth of a large one from just above its middle."""
    if n_layers <= 12:
        first = min(n_layers // 2, max(0, n_layers - FEWEST_LAYERS))
        return tuple(range(first, n_layers))
    first = round(0.55 * n_layers)
    return tuple(range(first, first + max(FEWEST_LAYERS, ceil(n_layers / 6))))


def _said(layers: Sequence[int]) -> str:
    whole = len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}-{layers[-1]}" if whole else ", ".join(map(str, layers))


# B. The fit ----------------------------------------------------------------------------------------------------------


def fit_edit(
    lm: ModelAdapter,
    request: EditRequest,
    layers: Sequence[int],
    params: MegaParams,
    seed: int,
    report: Reporter = silent,
) -> SteeredEdit:
    """Stage B for one request: samples, maps, gate and strength."""
    from mega_core.methods import fitting, gate
    from mega_core.methods.steering import SteeredEdit
    from mega_core.models.hooks import Site

    part = "mlp" if params.control == "ffn_site" else "attn" if params.site == "attn_out" else "resid_mid"
    sites = [Site(layer, part) for layer in layers]
    sets = fitting.target_sets(lm, request, params.target, params.prompts, params.contexts, seed, report)  # 1. and T
    judges: tuple[str, ...] = ()
    if params.alpha is None and params.fit == "independent":
        sets, judges = _withhold(sets)
    maps, norms = fit_maps(lm, sets, sites, params, report)
    guard = gate.fit_gate(
        lm, request, params.gate, layer=params.gate_layer, implications=params.implications, prompts=sets.prompts
    )
    edit = SteeredEdit(
        name=f"{request.subject} | {request.template}",
        subject=request.subject,
        aliases=gate.aliases_of(request.subject)[1:],
        maps=maps,
        alpha=SEQUENTIAL_ALPHA if params.alpha is None else params.alpha,
        gate=guard,
        target=sets.target,
        norms=norms,
    )
    if judges:
        edit = edit.with_alpha(weakest_that_works(lm, edit, judges, gate.negatives(request), report))
    return edit


def fit_maps(
    lm: ModelAdapter, sets: FitSet, sites: Sequence[Site], params: MegaParams, report: Reporter = silent
) -> tuple[dict[tuple[Site, int], AffineMap], dict[Site, float]]:
    """Steps 2 to 4: (site, prefix length) -> map, and each site's mean source norm."""
    from mega_core.methods import fitting
    from mega_core.methods.steering import Steering

    count = sets.positions
    source = fitting.rows(lm, sets.source(params.source == "both"), sets.target, count)
    target = fitting.rows(lm, sets.contexts, sets.target, count)
    maps: dict[tuple[Site, int], AffineMap] = {}
    norms: dict[Site, float] = {}
    # 2. Everything is read in one go; what a map below changes is read again only by a sequential fit.
    wanted = fitting.activations(lm, [*source, *target], sites, report)
    for i, site in enumerate(sites):
        before, after = wanted[site][: len(source)], wanted[site][len(source) :]
        if params.fit == "sequential" and i:
            steered = Steering((_bare_edit(maps, sets, params),))
            with steered.applied(lm):
                before = fitting.activations(lm, source, [site], report)[site]
        norms[site] = float(before[:, 0].norm(dim=-1).mean())
        for j in range(count):
            maps[site, j] = _fit_map(before[:, j], after[:, j], params)  # 3.
    return maps, norms


def _fit_map(source: Tensor, target: Tensor, params: MegaParams) -> AffineMap:
    from mega_core.methods.transport import fit_map

    kind = cast("Kind", params.transport)
    return fit_map(source, target, kind, params.components, params.energy, params.shrinkage)


def _bare_edit(maps: dict[tuple[Site, int], AffineMap], sets: FitSet, params: MegaParams) -> SteeredEdit:
    """The maps found so far, at the strength they will be applied with, in every row."""
    from mega_core.methods.gate import ALWAYS
    from mega_core.methods.steering import SteeredEdit

    alpha = SEQUENTIAL_ALPHA if params.alpha is None else params.alpha
    return SteeredEdit("fit", "", (), dict(maps), alpha, ALWAYS, sets.target)


def _withhold(sets: FitSet) -> tuple[FitSet, tuple[str, ...]]:
    """The samples without some of their prompts, and those as judges of alpha: bare, and behind the old object."""
    count = max(1, round(HELD_OUT * len(sets.prompts)))
    if len(sets.prompts) - count < 2:
        return sets, sets.source()
    # The edit prompt comes first and stays in.
    judges = sets.prompts[-count:] + sets.forced[-count:]
    forced = sets.forced[: len(sets.forced) - count] if sets.forced else ()
    return replace(sets, prompts=sets.prompts[:-count], forced=forced), judges


def weakest_that_works(
    lm: ModelAdapter, edit: SteeredEdit, prompts: Sequence[str], negatives: Sequence[str], report: Reporter = silent
) -> float:
    """The smallest of ALPHAS with which every prompt gives each token of the new object at least SURE.

    When none does, the one with most successes; among equals the one that moves the negatives' next-token distribution
    least (mean KL). The gate is left out here.
    """
    import torch

    from mega_core.methods import fitting
    from mega_core.methods.gate import ALWAYS
    from mega_core.methods.steering import Steering
    from mega_core.models import tokens

    rows = fitting.rows(lm, prompts, edit.target, len(edit.target))
    batch = tokens.pack(lm.tokenizer, [row.ids for row in rows], lm.device, [row.target_start for row in rows])
    which = torch.arange(len(rows)).repeat_interleave(len(edit.target))
    at = (batch.start.cpu()[:, None] - 1 + torch.arange(len(edit.target))).flatten()
    wanted = torch.tensor(edit.target).repeat(len(rows))[:, None]
    others = lm.encode(negatives) if negatives else None
    with torch.no_grad():
        before = lm.last_logits(others).float().log_softmax(-1) if others is not None else None
    tried: list[tuple[int, float, float]] = []
    with stage(report, "alpha") as step, torch.no_grad():
        for alpha in ALPHAS:
            step()
            with Steering((replace(edit, alpha=alpha, gate=ALWAYS),)).applied(lm):
                probs = lm.logits_at(batch, which, at).float().softmax(-1).cpu().gather(-1, wanted)
                worked = int((probs >= SURE).view(len(rows), -1).all(-1).sum())
                if worked == len(rows):
                    return alpha
                moved = 0.0
                if others is not None and before is not None:
                    after = lm.last_logits(others).float().log_softmax(-1)
                    moved = float((before.exp() * (before - after)).sum(-1).mean())
            tried.append((-worked, moved, alpha))
    return min(tried)[2]


# Controls ------------------------------------------------------------------------------------------------------------


def _control_layers(control: str, layers: tuple[int, ...], n_layers: int, seed: int) -> tuple[int, ...]:
    """As many other layers, where a control asks for them; of random ones at most half are the region's."""
    if control == "early_region":
        return tuple(range(min(len(layers), max(1, layers[0]))))
    if control == "random_region" and len(layers) < n_layers:
        generator = random.Random(seed)
        while True:
            drawn = tuple(sorted(generator.sample(range(n_layers), len(layers))))
            shared = len({*drawn} & {*layers})
            if shared <= max(len(layers) // 2, 2 * len(layers) - n_layers):
                return drawn
    return layers


def _control_params(params: MegaParams) -> MegaParams:
    if params.control == "mean_shift":
        return replace(params, transport="mean")
    if params.control == "always_on":
        return replace(params, gate="always")
    if params.control == "alpha_zero":
        return replace(params, alpha=0.0)
    return params


def _another(requests: Sequence[EditRequest], i: int, seed: int) -> EditRequest:
    """The next request, or a random known edit of another subject."""
    from mega_core.embedded.examples import candidates

    mine = requests[i]
    listed = [*requests[i + 1 :], *requests[:i]]
    found = next((one for one in listed if one.subject != mine.subject), None)
    return found or next(one for one in candidates(seed) if one.subject != mine.subject)


MEGA = Method(
    name="mega",
    title="MEGA",
    summary="Moves attention's writes to the new fact in the layers that attribution points at; no weight changes.",
    family="steering",
    paper="arXiv 2603.20795",
    params=MegaParams,
    prepare=prepare,
    needs=needs,
)
