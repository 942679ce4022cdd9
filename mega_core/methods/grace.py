"""GRACE: General Retrieval Adaptors for Continual Editing (Hartvigsen et al., NeurIPS 2023, arXiv 2211.11031).

No weight changes. One layer gets a codebook of keys, values, radii and labels:

1. key k: what enters the layer at the prompt's last token.
2. value v: what the layer shall write there instead. From random numbers it is trained by Adam until the model says
   the new object:
       L(v) = 1/|o| sum_t -log P[o*_t | x, o*_<t, v]
3. Into the codebook, with k' the nearest key, e' its radius, d = |k - k'|:
       d > e_init + e'        a new key with radius e_init
       else, same label       e' grows to d
       else                   a new key; both radii become d / 2
4. A prompt whose last token lies within the radius of its nearest key is answered by that key's value; every other
   one passes with the same bits.

Choices that the paper leaves open, and ours: the layer is the MLP's last matrix (the paper's for GPT-J and Llama), so
a key is d_mlp wide and a value is what the MLP writes; a label is the whole tuple of the new object's token ids
(published code: the mean of the ids, which confuses objects); a prompt edited a second time takes its key's place,
where two radii of zero would silence both; a search ends early at `stop_probability`; when a radius grows, the older
value stays. The decision is made at the prompt's last token and stays with the row while its answer is generated.
`replace` "target" puts the value also where the object's further tokens are predicted from. The search runs the whole
model at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mega_core.events import Note, Reporter, stage
from mega_core.methods import knobs
from mega_core.methods.base import Method, knob
from mega_core.records import EditRequest

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from mega_core.methods.memory import GraceMemory
    from mega_core.models.adapter import ModelAdapter
    from mega_core.models.arch import ArchSpec
    from mega_core.models.tokens import Row

DEPTH = 0.8


@dataclass(frozen=True, slots=True)
class GraceParams:
    """What can be set."""

    layer: int | None = knobs.layer(
        "Layer whose MLP gets the codebook. Empty: the model's default, or four fifths of its depth."
    )
    radius: float = knob(1.0, "Radius of a new key: how far a prompt may lie from it and still be answered.", low=0.0)
    steps: int = knobs.steps(100, high=1000)
    learning_rate: float = knobs.learning_rate(1.0, high=100.0)
    replace: str = knob(
        "last",
        "Where the value stands: at the prompt's last token, where the object is predicted (target), in the whole "
        "prompt, or everywhere.",
        choices=("last", "target", "prompt", "all"),
    )
    stop_probability: float = knobs.stop_probability(0.99, "the new object is at least this likely")


def needs(spec: ArchSpec) -> str | None:
    """Every architecture in the table has an MLP with a last matrix, which is all it takes."""
    return None


def default_layer(n_layers: int) -> int:
    """Four fifths of the depth, where most published ones lie: GRACE's 35 of 48, 25 of 28, 27 of 32; WISE's 21 of 28,
    27 of 32, 23 of 28 (but 8 of 48 for GPT-2 XL)."""
    return min(n_layers - 1, round(n_layers * DEPTH))


def prepare(
    lm: ModelAdapter, requests: Sequence[EditRequest], params: GraceParams, seed: int, report: Reporter
) -> GraceMemory:
    """One entry per request. Leaves the model as it found it."""
    import torch

    from mega_core.methods.memory import Codebook, Entry, GraceMemory
    from mega_core.models import tokens
    from mega_core.models.hooks import Site, capture

    layer = default_layer(lm.n_layers) if params.layer is None else params.layer
    lm.mlp(layer)  # raises on a layer that isn't there
    rows = [tokens.with_target(lm.tokenizer, request.prompt, request.target_new) for request in requests]

    # 1.
    batch = tokens.pack(lm.tokenizer, [row.ids[: row.target_start] for row in rows], lm.device)
    sites = (Site(layer, "mlp_down_in"), Site(layer, "mlp"))
    with torch.no_grad(), capture(lm, sites) as got:
        lm.forward(batch)
    keys, outputs = (
        got[site][torch.arange(len(rows)), batch.last.to(got[site].device)].float().cpu() for site in sites
    )

    # 2.
    values = _values(lm, layer, rows, params, seed, report)

    entries = tuple(
        Entry(layer, key, value, row.target, params.radius, params.replace, float(output.norm()))
        for key, value, row, output in zip(keys, values, rows, outputs, strict=True)
    )
    # 3. happens where the change is applied, so that codebooks learned one after the other are as one
    book = Codebook.of(entries)
    if len(book.radii) < len(entries):
        report(Note(f"{len(entries) - len(book.radii)} of {len(entries)} edits share a key with another one."))
    return GraceMemory(entries)


def _values(
    lm: ModelAdapter, layer: int, rows: Sequence[Row], params: GraceParams, seed: int, report: Reporter
) -> list[Tensor]:
    """Step 2 for every row, a few at a time."""
    import torch

    from mega_core.methods import optimise

    first = torch.rand(len(rows), lm.d_model, generator=torch.Generator().manual_seed(seed))
    size = optimise.REQUESTS_AT_ONCE
    starts = range(0, len(rows), size)
    found: list[Tensor] = []
    with stage(report, "new value", params.steps * len(starts)) as step:
        for start in starts:
            part = slice(start, start + size)
            found += _search(lm, layer, rows[part], first[part], params, step)
    return found


def _search(
    lm: ModelAdapter,
    layer: int,
    rows: Sequence[Row],
    first: Float[Tensor, "row d_model"],
    params: GraceParams,
    step: Callable[[], None],
) -> Iterator[Tensor]:
    """The values of some rows. The loss is their sum and Adam works number by number, so that no row sees another."""
    import torch

    from mega_core.methods.finetune import Targets
    from mega_core.methods.memory import places
    from mega_core.methods.optimise import loss_scale
    from mega_core.methods.solve import check_finite
    from mega_core.models.hooks import Site, intervene

    targets = Targets(lm, rows)
    width = targets.batch.ids.shape[1]
    where = torch.stack(
        [places(params.replace, row.target_start, width, len(row.target)) for row in rows]
    )  # (row, pos)
    values = first.clone().requires_grad_()
    adam = torch.optim.Adam([values], lr=params.learning_rate)
    scale = loss_scale(lm)

    def put(output: Tensor) -> Tensor:
        return torch.where(where[..., None].to(output.device), values.to(output)[:, None], output)

    best = first.clone()
    done = torch.zeros(len(rows), dtype=torch.bool)
    for number in range(params.steps + 1):
        with torch.enable_grad(), intervene(lm, {Site(layer, "mlp"): put}):
            whole = targets.log_probability()
            (values.grad,) = torch.autograd.grad(-(whole / targets.lengths).sum() * scale, values)
        check_finite("The search for the new value", torch.stack((whole.detach(), values.grad.norm(dim=-1))))
        best[~done] = values.detach()[~done]
        done |= whole.detach().exp() >= params.stop_probability if params.stop_probability < 1 else False
        if number == params.steps or done.all():
            break
        values.grad /= scale
        adam.step()
        step()
    return iter(best)


GRACE = Method(
    name="grace",
    title="GRACE",
    summary="Keeps the new fact in a codebook beside one MLP and answers prompts that lie near its key.",
    family="memory",
    paper="arXiv 2211.11031",
    params=GraceParams,
    prepare=prepare,
    needs=needs,
)
