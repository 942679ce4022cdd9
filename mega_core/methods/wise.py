"""WISE: rethinking the knowledge memory (Wang et al., NeurIPS 2024, arXiv 2405.14768).

The last matrix W of one MLP stays as it is; beside it stands a side copy W' that holds the edits. With a_t what
enters the matrix at token t of a prompt x, the activation distance is

    dist(x) = mean_t |a_t (W' - W)|

1. W' begins as W. A random mask picks the share `mask` of its numbers; only these are ever trained.
2. Gradient descent on W', with x_e the edit prompts (bare and in contexts) and x_i prompts about something else:
       L = mean_e 1/|o*| sum_t -log P_W'[o*_t | x_e, o*_<t]
           + mean_i max(0, dist(x_i) - alpha) + mean_e max(0, beta - dist(x_e))
           + mean_e,i max(0, gamma - (dist(x_e) - dist(x_i)))
3. The threshold is act_ratio * min_e dist(x_e).
4. A prompt with dist(x) above the threshold is answered by W', with all that follows it; every other one passes with
   the same bits.

Choices that the paper leaves open, and ours: several requests are trained together, with the mean of their losses;
x_i are trained prompts of known facts about other subjects (half of them, where the tables know the edit prompt, in
its very words, with another object than the true one; `same_subject` adds other facts of the edited subject);
contexts are ROME's fixed texts; the search ends early when every object is likely enough and no margin is missed;
distances may be taken at the prompt's last token only; the router decides once per prompt, and generation stays with
that decision. Edits prepared one after the other keep a side copy each, and the one with the greatest distance
answers (the paper's WISE-Retrieve). The paper's other form, which merges side copies by TIES after many edits, is not
here: it takes thousands of edits to show what it does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mega_core.embedded import facts
from mega_core.events import Note, Reporter, stage
from mega_core.methods import knobs
from mega_core.methods.base import Method, knob
from mega_core.methods.grace import default_layer, needs
from mega_core.methods.rome import BARE, CONTEXTS
from mega_core.records import EditRequest

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from mega_core.methods.memory import WiseMemory
    from mega_core.models.adapter import ModelAdapter
    from mega_core.models.tokens import Row, TokenBatch


@dataclass(frozen=True, slots=True)
class WiseParams:
    """What can be set."""

    layer: int | None = knobs.layer(
        "Layer whose MLP gets a side copy. Empty: the model's default, or four fifths of its depth."
    )
    steps: int = knobs.steps(70, "the side copy", high=1000)
    learning_rate: float = knobs.learning_rate(1.0, "the side copy", low=1e-6, high=1000.0)
    mask: float = knob(0.2, "Share of the side copy's numbers that may change.", low=0.001, high=1.0)
    alpha: float = knob(5.0, "Other prompts shall have at most this activation distance.", low=0.0)
    beta: float = knob(20.0, "Edited prompts shall have at least this activation distance.", low=0.0)
    gamma: float = knob(10.0, "Edited prompts shall lie at least this much above other ones.", low=0.0)
    act_ratio: float = knob(
        0.88, "Share of the smallest distance in training above which the side copy answers.", low=0.0, high=1.0
    )
    distance_over: str = knob(
        "prompt",
        "Tokens over which the distance is taken: the whole prompt (its mean), or the last one.",
        choices=("prompt", "last"),
    )
    others: int = knob(8, "How many prompts about something else are held apart.", low=1, high=64, ours=True)
    same_subject: bool = knob(
        False, "Hold other known facts of the edited subject apart too, half of the prompts (never as evaluated)."
    )
    contexts: int = knobs.contexts(6, ours=True)
    stop_probability: float = knobs.stop_probability(
        0.99, "every new object is at least this likely and no margin is missed"
    )


def other_prompts(requests: Sequence[EditRequest], count: int, seed: int, same_subject: bool = False) -> list[str]:
    """Prompts about known facts of other subjects, in forms that were trained, drawn by the seed.

    For requests the tables know, up to half of them ask for the same relation in the same words, about subjects whose
    object is not the request's true one. Never about a subject or object that a request names; but with `same_subject`
    the first half is about other relations of the edited subjects, in paraphrases that training knew and no evaluation
    asks.
    """
    draw = random.Random(seed)
    half = count // 2
    named = {name for r in requests for name in (r.subject, r.target_new, r.target_true)}
    known = [fact for fact in facts.facts() if fact.subject not in named and fact.object not in named]
    forms = {request.template for request in requests}
    own = [
        fact.prompt(form)
        for request in requests
        for fact in (facts.load().by_subject.get(request.subject, ()) if same_subject else ())
        for form in fact.templates_paraphrase
        if not forms & {*fact.trained, *fact.templates_held_out}
    ]
    alike = [fact.prompt(form) for fact in known for form in fact.trained if form in forms]
    rest = [fact.prompt(draw.choice(fact.trained)) for fact in draw.sample(known, count)]
    chosen = draw.sample(own, min(half, len(own)))
    chosen += draw.sample(alike, min((count - len(chosen)) // 2, len(alike)))
    return list(dict.fromkeys([*chosen, *rest]))[:count]


def prepare(
    lm: ModelAdapter, requests: Sequence[EditRequest], params: WiseParams, seed: int, report: Reporter
) -> WiseMemory:
    """One side copy that holds all requests. Leaves the model as it found it."""
    import torch

    from mega_core.methods.memory import Side, WiseMemory
    from mega_core.models import tokens

    layer = default_layer(lm.n_layers) if params.layer is None else params.layer
    weight = lm.read_weight(layer, "mlp_down")  # (out, in); raises on a layer that isn't there
    contexts = (BARE, *CONTEXTS[: params.contexts - 1])
    rows = [
        tokens.with_target(lm.tokenizer, context.replace("{}", request.prompt), request.target_new)
        for request in requests
        for context in contexts
    ]

    # 1.
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(weight.shape, generator=generator) < params.mask).to(weight.device)

    # 2.
    others = lm.encode(other_prompts(requests, params.others, seed, params.same_subject))
    with stage(report, "side memory", params.steps) as step:
        difference, near, far = _train(lm, layer, rows, others, mask, params, step)

    # 3.
    threshold = params.act_ratio * float(near.min())
    if float(far.max()) > threshold:
        share = float((far > threshold).float().mean())
        report(Note(f"{share:.0%} of the other prompts seen in training would be answered by the side memory too."))
    return WiseMemory((Side(layer, difference, threshold, params.distance_over, float(weight.float().norm())),))


def _train(
    lm: ModelAdapter,
    layer: int,
    rows: Sequence[Row],
    others: TokenBatch,
    mask: Bool[Tensor, "out in"],
    params: WiseParams,
    step: Callable[[], None],
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " row"], Float[Tensor, " other"]]:
    """The difference W' - W, on the CPU, and with it the distances of the edit prompts and of the others."""
    import torch

    from mega_core.methods.finetune import Targets
    from mega_core.methods.memory import distance
    from mega_core.methods.optimise import loss_scale
    from mega_core.methods.solve import check_finite
    from mega_core.models.hooks import Site, capture, intervene

    targets = Targets(lm, rows)
    scale = loss_scale(lm)

    # What enters the matrix does not depend on what stands in it.
    site = Site(layer, "mlp_down_in")
    keys = []
    for one in (targets.batch, others):
        with torch.no_grad(), capture(lm, [site]) as got:
            lm.forward(one)
        keys.append(got[site].float().to(mask.device))  # (row, pos, d_mlp)
    key, other_key = keys

    def distances() -> tuple[Tensor, Tensor]:
        over = params.distance_over
        near = distance(key @ difference.T, targets.starts, over)
        return near, distance(other_key @ difference.T, others.start.tolist(), over)

    def write(output: Tensor) -> Tensor:
        return output + (key @ difference.T).to(output)

    difference = torch.zeros(mask.shape, device=mask.device, requires_grad=True)
    for _ in range(params.steps):
        with torch.enable_grad(), intervene(lm, {Site(layer, "mlp"): write}):
            whole = targets.log_probability()
            near, far = distances()
            missed = (
                (far - params.alpha).relu().mean()
                + (params.beta - near).relu().mean()
                + (params.gamma - (near[:, None] - far)).relu().mean()
            )
            loss = -(whole / targets.lengths).mean() + missed.cpu()
            (slope,) = torch.autograd.grad(loss * scale, difference)
        check_finite("The training of the side memory", torch.stack((loss.detach(), slope.norm().cpu())))
        likely = float(whole.detach().exp().min()) >= params.stop_probability
        if params.stop_probability < 1 and likely and float(missed.detach()) == 0:
            break
        difference = (difference.detach() - params.learning_rate / scale * slope * mask).requires_grad_()
        step()
    difference = difference.detach()
    check_finite("The side memory", difference)
    near, far = distances()
    return difference.cpu(), near.cpu(), far.cpu()


WISE = Method(
    name="wise",
    title="WISE",
    summary="Trains a side copy of one MLP matrix and lets it answer the prompts that stir it most.",
    family="memory",
    paper="arXiv 2405.14768",
    params=WiseParams,
    prepare=prepare,
    needs=needs,
)
