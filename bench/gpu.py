"""One edit of each method in the shape of large models, with random weights: seconds and peak memory on a CUDA device.

Random weights know no facts, so a method that needs a model which follows its prompt may refuse; it is then listed with
its reason. The first edit gathers statistics of ordinary keys, the second finds them kept; searches run all their
steps (no early stop), so that seconds don't depend on luck. `--shape tiny` runs the same on any machine.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from bench.common import Row, Unmeasured, peak_bytes
from mega_core.embedded import examples, facts
from mega_core.errors import ActionableError
from mega_core.events import silent
from mega_core.records import EditRequest, ModelRef

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Shape:
    """A configuration of transformers, by its class and what differs from the default."""

    config: str
    values: dict[str, Any]
    entry: str
    """Whose defaults of the catalogue apply."""


SHAPES = {
    "gpt2-xl": Shape("GPT2Config", {"n_embd": 1600, "n_layer": 48, "n_head": 25}, "gpt2-xl"),
    "llama2-7b": Shape("LlamaConfig", {}, "llama-2-7b"),  # the class's own values are Llama 7B's
    "tiny": Shape(
        "GPT2Config",
        {"n_embd": 64, "n_layer": 20, "n_head": 4, "vocab_size": 600, "eos_token_id": 0, "bos_token_id": 0},
        "gpt2-xl",
    ),
}
DTYPES = ("float32", "bfloat16")


def measure(quick: bool, methods: Sequence[str] = (), shape: str = "") -> list[Row]:
    """Per shape, dtype and method: seconds with and without statistics at hand, and peak GiB."""
    import torch

    from mega_core.methods import METHODS

    if shape and shape not in SHAPES:
        raise Unmeasured(f"there is no shape {shape!r}; there are {', '.join(SHAPES)}")
    if not torch.cuda.is_available() and shape != "tiny":
        raise Unmeasured("no CUDA device is here; --shape tiny runs the same on the CPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = [METHODS[name] for name in methods] or list(METHODS)
    rows: list[Row] = []
    for name in [shape] if shape else ["gpt2-xl", "llama2-7b"]:
        for dtype in DTYPES[:1] if quick else DTYPES:
            lm = build(SHAPES[name], dtype, device)
            weights = sum(weight.numel() * weight.element_size() for weight in lm.model.parameters())
            label = f"{name} {dtype}"
            rows.append(Row("gpu", f"{label} / the model", weights / GIB, "GiB"))
            for method in chosen:
                rows += _edit(lm, label, method, SHAPES[name], weights)
                print(f"  {label} / {method.name}", file=sys.stderr, flush=True)  # noqa: T201
            del lm
            if device == "cuda":
                torch.cuda.empty_cache()
    return rows


def build(shape: Shape, dtype: str, device: str) -> Any:
    """A model of this shape with random weights, made on the device itself."""
    import torch
    import transformers

    from mega_core.methods.covariance import Memory
    from mega_core.models.adapter import ModelAdapter
    from tests.tiny import tiny_tokenizer

    config = getattr(transformers, shape.config)(**shape.values)
    kind = getattr(torch, dtype)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=kind)
    lm = ModelAdapter(model, tiny_tokenizer(), ModelRef("random", dtype=dtype), file_digest="0" * 64)
    lm.memo = Memory()
    return lm


def _edit(lm: Any, label: str, method: Any, shape: Shape, weights: int) -> list[Row]:
    name = f"{label} / {method.name}"
    reason = method.needs(lm.spec)
    if reason is not None:
        return [Row("gpu", f"{name} / skipped", 0, "", reason)]
    from mega_core.settings import Settings

    # Searches go to their end, and methods that steer fit on contexts that a random model does not follow either.
    wanted = {"stop_probability": 1.0, "stop_loss": 0.0, "target": "contexts"}
    knobs = [knob for knob in method.knobs() if knob.name in wanted]
    whole = {knob.name: wanted[knob.name] for knob in knobs if not knob.choices or wanted[knob.name] in knob.choices}
    request = examples.request_of(facts.find("Eiffel Tower", "landmark_city"), "Rome")
    seconds = []
    peak = 0
    try:
        params = method.read(method.ref(whole, Settings.read().model(shape.entry).defaults.get(method.name, {})))
        for _ in range(2):
            start = perf_counter()
            _, peak = peak_bytes(lambda: _once(lm, method, request, params), str(lm.device))
            seconds.append(perf_counter() - start)
    except (ActionableError, RuntimeError) as error:  # RuntimeError: no memory left, among others
        return [Row("gpu", f"{name} / failed", 0, "", f"{type(error).__name__}: {str(error)[:160]}")]
    return [
        Row("gpu", f"{name} / seconds", seconds[1], "s", f"the first, with statistics, {seconds[0]:.1f} s"),
        Row("gpu", f"{name} / peak", (peak + weights) / GIB, "GiB", f"beside the model {peak / GIB:.2f} GiB"),
    ]


def _once(lm: Any, method: Any, request: EditRequest, params: Any) -> None:
    """Prepare an edit, apply it, ask once, undo it."""
    import torch

    change = method.prepare(lm, [request], params, 0, silent)
    with change.applied(lm), torch.no_grad():
        lm.last_logits(lm.encode([request.prompt]))
