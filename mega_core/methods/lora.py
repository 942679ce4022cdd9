"""LoRA: low-rank adaptation (Hu et al., ICLR 2022, arXiv 2106.09685), trained on the edit itself by the peft library.

1. Beside every chosen matrix W (out, in) stands B A, with A (rank, in) drawn by Kaiming's uniform rule and
   B (out, rank) zero, so that nothing changes at first:   W x + alpha / rank * B A x
2. A and B descend by Adam on -log P of the new object's tokens, each at its own place, over all texts together (see
   finetune; prompts to be kept can be added as in ROME).
3. The result is the exact update W <- W + (alpha / rank B) A of rank `rank` per matrix. The adapters are gone then:
   peft puts them into the model, so every module is put back as it was, however the training ends.

Choices that the paper leaves open, and ours: which matrices (it adapts attention; facts sit in MLPs, so here the MLP's
last matrix, with the one after the heads if wished); no dropout; all layers unless some are named; steps, step size and
the loss at which it ends. Editing papers use rank 8, alpha 32, 70 steps of 5e-3 (EasyEdit, arXiv 2308.07269).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mega_core.errors import UnsupportedMethod
from mega_core.events import Reporter
from mega_core.methods import knobs
from mega_core.methods.base import Method, knob
from mega_core.records import EditRequest

if TYPE_CHECKING:
    from mega_core.changes import WeightDelta
    from mega_core.models.adapter import ModelAdapter
    from mega_core.models.arch import ArchSpec

MISSING = "LoRA needs the peft library, which is not installed."
INSTALL = "Run: pip install -r requirements-lora.txt"
ADAPTER = "default"


@dataclass(frozen=True, slots=True)
class LoraParams:
    """What can be set."""

    layers: str | None = knob(
        None, "Layers that are adapted, as 2 or 2-3. Empty: the model's default, or all.", ours=True
    )
    also_attention: bool = knob(False, "Adapt the matrix after the attention heads too.", ours=True)
    rank: int = knob(8, "Rank of the update of each matrix.", low=1, high=256)
    alpha: float = knob(32.0, "The update is multiplied by alpha / rank.", low=0.01, high=1000.0)
    learning_rate: float = knobs.adam_rate(5e-3, low=1e-6)
    steps: int = knobs.updates(70)
    stop_loss: float = knobs.mean_stop_loss(0.01, ours=True)
    weight_decay: float = knob(0.0, "Adam's weight decay of the factors.", low=0.0, high=10.0)
    kl_weight: float = knobs.kl_weight(0.0)
    kl_prompts: str = knobs.kl_prompts("{} is a")
    contexts: int = knobs.contexts(1)


def needs(spec: ArchSpec) -> str | None:
    """Any architecture will do; the library must be there."""
    return None if _installed() else f"{MISSING} {INSTALL}"


def prepare(
    lm: ModelAdapter, requests: Sequence[EditRequest], params: LoraParams, seed: int, report: Reporter
) -> WeightDelta:
    """The low-rank updates that training adapters gives. Leaves the model as it found it."""
    if not _installed():
        raise UnsupportedMethod(MISSING, INSTALL)
    import torch

    from mega_core.changes import MatrixDelta, WeightDelta
    from mega_core.methods import finetune, optimise, spread
    from mega_core.models.hooks import Site

    layers = tuple(range(lm.n_layers))
    if params.layers is not None:
        layers = spread.parse_layers(params.layers, lm.n_layers, "lora.layers")
    sites = ("attn_out", "mlp_down") if params.also_attention else ("mlp_down",)
    places = [(layer, site) for layer in layers for site in sites]
    texts = finetune.all_texts(lm, requests, params, seed, "lora", every_token=True)
    norms = [float(lm.read_weight(*place).float().norm()) for place in places]
    start = Site(layers[0], "block_in")
    how = finetune.Descent(params.steps, params.learning_rate, params.stop_loss, params.weight_decay)

    with finetune.groups(lm, texts, (start,)) as groups, _adapted(lm, places, params, seed) as adapters:  # 1.

        def losses() -> Iterator[torch.Tensor]:
            for group in groups:
                yield group.loss(group.begin[start], layers[0], params.kl_weight)

        # 2.
        factors = [part[ADAPTER].weight for adapter in adapters for part in (adapter.lora_A, adapter.lora_B)]
        scale = optimise.loss_scale(lm)
        finetune.descend(factors, losses, how, report, scale=scale)

        # 3.
        matrices = tuple(
            MatrixDelta(
                *place,
                left=(adapter.scaling[ADAPTER] * adapter.lora_B[ADAPTER].weight.detach()).float().cpu(),
                right=adapter.lora_A[ADAPTER].weight.detach().float().T.contiguous().cpu(),
                base_norm=norm,
            )
            for place, adapter, norm in zip(places, adapters, norms, strict=True)
        )
    return WeightDelta(matrices)


def _installed() -> bool:
    return find_spec("peft") is not None


@contextmanager
def _adapted(lm: ModelAdapter, places: Sequence[tuple[int, str]], params: LoraParams, seed: int) -> Iterator[list[Any]]:
    """peft's adapters beside the matrices at `places`, float32; afterwards the model has its own modules and flags.

    What is put back was written down before, so it doesn't rest on peft's own unloading, which can't know how far an
    interrupted injection got.
    """
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    model: Any = lm.model
    names = {id(module): name for name, module in model.named_modules()}
    held = []
    for layer, site in places:
        module = lm.mlp_down(layer) if site == "mlp_down" else lm.attn_out(layer)
        parent, _, name = names[id(module)].rpartition(".")
        held.append((model.get_submodule(parent), name, module))
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attributes = dict(vars(model))
    config = LoraConfig(
        r=params.rank,
        lora_alpha=params.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=[names[id(module)] for _, _, module in held],
        fan_in_fan_out=lm.conv1d(*places[0]),
        bias="none",
    )
    try:
        with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
            torch.manual_seed(seed)  # peft draws from torch's own generator; fork_rng puts its state back
            inject_adapter_in_model(config, model, ADAPTER)
        adapters = [getattr(parent, name) for parent, name, _ in held]
        for adapter in adapters:
            for part in (adapter.lora_A, adapter.lora_B):
                part.float()
        yield adapters
    finally:
        for parent, name, module in held:
            setattr(parent, name, module)
        for name in set(vars(model)) - set(attributes):
            delattr(model, name)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


LORA = Method(
    name="lora",
    title="LoRA",
    summary="Trains small low-rank adapters on the edit and folds them into the matrices.",
    family="weights",
    paper="arXiv 2106.09685",
    params=LoraParams,
    prepare=prepare,
    needs=needs,
)
