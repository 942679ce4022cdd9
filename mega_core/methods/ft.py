"""Fine-tuning of one MLP matrix on the edit itself: FT, FT-L and FT-M, the baselines of every editing paper.

FT and FT-L: Zhu et al. 2020, arXiv 2012.00363, as Meng et al. run them (arXiv 2202.05262, appendix E.1, with its code).
FT-M: the loss of EasyEdit (arXiv 2308.07269), masked so that it counts every token of the new object and nothing else.

1. Which numbers may move: W, the MLP's last matrix of the chosen layers. Nothing else, its bias neither.
2. The loss over the texts x_j of all requests together:
       "target"        mean_j 1/|o| sum_t -log P(o_t | x_j, o_<t)     every token of o at its own place
       "prompt_last"   mean_j 1/|o| sum_t -log P(o_t | x_j)           all at the prompt's last token, as published
       + kl_weight mean_k KL(P_0(. | p_k) || P(. | p_k))              over prompts to be kept (off in the papers)
   For an object of several tokens prompt_last asks for a bag of words at one place: two tokens can't both be likely.
3. Adam on W. Weight decay is Adam's own, added to the gradient. No update is made at a loss below `stop_loss`, and
   there it ends.
4. FT-L: after every update each number of W is cut to W_0 +/- epsilon.

W itself is never written: its difference D (zero at first, float32) is trained instead, k -> W_0 k + D k, which is the
same descent with fewer roundings.

Choices that the papers leave open, and ours: all texts make one step together (published: chunks of 64 texts, each a
step); the prompt may stand in several contexts; several layers may move at once; decay may pull to W_0 instead of zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from mega_core.events import Note, Reporter
from mega_core.methods import knobs
from mega_core.methods.base import Method, knob
from mega_core.methods.rome import default_layer
from mega_core.records import EditRequest

if TYPE_CHECKING:
    from torch import Tensor

    from mega_core.changes import WeightDelta
    from mega_core.models.adapter import ModelAdapter
    from mega_core.models.arch import ArchSpec
    from mega_core.models.hooks import Fn, Site

_LAYERS = "Layers whose MLP is trained, as 2 or 2-3. Empty: the model's default, or the one at a third of its depth."
_LOSS = (
    "Train every token of the new object at its own place (target), or all at the prompt's last token (prompt_last)."
)
_EPSILON = "How far any number of the matrix may move. Empty: as far as it likes."


@dataclass(frozen=True, slots=True)
class FtParams:
    """What can be set; defaults as published for FT."""

    layers: str | None = knob(None, _LAYERS, ours=True)
    loss: str = knob("prompt_last", _LOSS, choices=("target", "prompt_last"))
    learning_rate: float = knobs.adam_rate(5e-4, low=1e-7)
    steps: int = knobs.updates(25)
    stop_loss: float = knobs.mean_stop_loss(0.01)
    epsilon: float | None = knob(None, _EPSILON, low=1e-8, high=100.0)
    weight_decay: float = knob(0.0, "Adam's weight decay.", low=0.0, high=10.0)
    decay_towards: str = knob(
        "zero",
        "What weight decay pulls the matrix to: zero as published, or the original matrix.",
        choices=("zero", "original"),
    )
    kl_weight: float = knobs.kl_weight(0.0)
    kl_prompts: str = knobs.kl_prompts("{} is a")
    contexts: int = knobs.contexts(1)


@dataclass(frozen=True, slots=True)
class FtLParams(FtParams):
    """What can be set; defaults as published for FT-L on GPT-2 XL."""

    epsilon: float = knob(5e-4, "How far any number of the matrix may move.", low=1e-8, high=100.0)  # type: ignore[mutable-override]


@dataclass(frozen=True, slots=True)
class FtMParams(FtParams):
    """What can be set; defaults as published for FT-M."""

    loss: str = knob("target", _LOSS, choices=("target", "prompt_last"))


def needs(spec: ArchSpec) -> str | None:
    """Every architecture in the table has one last matrix per MLP, which is all it takes."""
    return None


def prepare(
    name: str, lm: ModelAdapter, requests: Sequence[EditRequest], params: FtParams, seed: int, report: Reporter
) -> WeightDelta:
    """The difference that fine-tuning makes to the chosen matrices. Leaves the model as it found it."""
    import torch

    from mega_core.changes import DenseDelta, WeightDelta
    from mega_core.methods import finetune, optimise, spread
    from mega_core.models.hooks import Site, intervene

    # 1.
    layers: tuple[int, ...] = (default_layer(lm.n_layers),)
    if params.layers is not None:
        layers = spread.parse_layers(params.layers, lm.n_layers, f"{name}.layers")
    weights = [lm.read_weight(layer, "mlp_down") for layer in layers]  # (out, in) each
    differences = [torch.zeros_like(w, dtype=torch.float32, memory_format=torch.contiguous_format) for w in weights]
    lowest, key, block_out = layers[0], Site(layers[0], "mlp_down_in"), Site(layers[0], "block_out")

    # 2.
    every = params.loss == "target"
    texts = finetune.all_texts(lm, requests, params, seed, name, every)
    longest = max(len(text.reads) for text in texts)
    if not every and longest > 1:
        report(
            Note(
                f"The new object has {longest} tokens, and the published loss trains all of them at the prompt's end. "
                "With loss = target each is trained at its own place."
            )
        )

    # 3. and 4.
    scale = optimise.loss_scale(lm)
    how = finetune.Descent(params.steps, params.learning_rate, params.stop_loss, params.weight_decay)

    def pull() -> list[Tensor]:  # with Adam's own part: weight_decay * (W_0 + D)
        return [params.weight_decay * weight.float() for weight in weights]

    def clamp() -> None:
        if params.epsilon is not None:
            for difference in differences:
                difference.clamp_(-params.epsilon, params.epsilon)

    with (
        finetune.groups(lm, texts, (key, block_out)) as groups,
        intervene(lm, _added(dict(zip(layers[1:], differences[1:], strict=True)))),
    ):
        for difference in differences:
            difference.requires_grad_()

        def losses() -> Iterator[Tensor]:
            for group in groups:
                # the MLP's output joins the stream as it is, in all supported architectures
                before = group.begin[block_out]
                hidden = before + (group.begin[key].float() @ differences[0].T).to(before.dtype)
                yield group.loss(hidden, lowest + 1, params.kl_weight)

        finetune.descend(
            differences,
            losses,
            how,
            report,
            scale=scale,
            pull=pull if params.weight_decay and params.decay_towards == "zero" else None,
            after=clamp,
        )
    return WeightDelta(
        tuple(
            DenseDelta(layer, "mlp_down", difference.detach().cpu(), float(weight.float().norm()))
            for layer, difference, weight in zip(layers, differences, weights, strict=True)
        )
    )


def _added(differences: dict[int, Tensor]) -> dict[Site, Fn]:
    """Interventions that add D k to the MLP's output of each layer, gradients included."""
    from mega_core.models.hooks import Site

    changes: dict[Site, Fn] = {}
    keys: dict[int, Tensor] = {}

    def remember(layer: int, key: Tensor) -> Tensor:
        keys[layer] = key
        return key

    def add(layer: int, mlp: Tensor) -> Tensor:
        return mlp + (keys.pop(layer).float() @ differences[layer].T).to(mlp.dtype)

    for layer in differences:
        changes[Site(layer, "mlp_down_in")] = partial(remember, layer)
        changes[Site(layer, "mlp")] = partial(add, layer)
    return changes


FT = Method(
    name="ft",
    title="FT",
    summary="Fine-tunes one MLP matrix on the edit until the model says the new object.",
    family="weights",
    paper="arXiv 2012.00363",
    params=FtParams,
    prepare=partial(prepare, "ft"),
    needs=needs,
)
FT_L = Method(
    name="ft_l",
    title="FT-L",
    summary="Fine-tunes one MLP matrix, and holds every number of it close to its original value.",
    family="weights",
    paper="arXiv 2012.00363",
    params=FtLParams,
    prepare=partial(prepare, "ft_l"),
    needs=needs,
)
FT_M = Method(
    name="ft_m",
    title="FT-M",
    summary="Fine-tunes one MLP matrix on every token of the new object.",
    family="weights",
    paper="arXiv 2308.07269",
    params=FtMParams,
    prepare=partial(prepare, "ft_m"),
    needs=needs,
)
