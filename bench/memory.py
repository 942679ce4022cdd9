"""Peak memory of one edit beside the model: what torch allocates from the first token read to the finished change.

The promise is: the model, two times the edited matrices, and the activations above the edited layer. So each peak is
shown beside twice the matrices it changes, and beside one step of the same value search written plainly (whole
forward, logits everywhere). Statistics of ordinary keys are gathered before and not counted; working with their
factor is (a method that solves by it holds it once in float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from bench.common import Row, open_model, peak_bytes
from bench.quality import test_split
from mega_core.errors import ActionableError
from mega_core.events import silent

MIB = 2**20
STEPS = 3
"""Steps of a search: more of them need no more memory."""


def measure(quick: bool, methods: Sequence[str] = (), models: Sequence[str] = ()) -> list[Row]:
    """MiB per method on the embedded models, and in the shape of GPT-2 small."""
    from mega_core.methods import METHODS
    from mega_core.methods.covariance import Memory
    from mega_core.settings import Settings
    from tests.reference.plain_optimise import gpt2_small_shape

    settings = Settings.read()
    (request, *_) = test_split(1)
    chosen = [METHODS[name] for name in methods] or list(METHODS)
    names = list(models) or [entry.name for entry in settings.available() if entry.embedded]
    rows: list[Row] = []
    for name in names if quick else [*names, "gpt2-shape"]:
        if name == "gpt2-shape":
            lm, defaults = gpt2_small_shape(), settings.model("gpt2").defaults
            lm.file_digest, lm.memo = "0" * 64, Memory()
        else:
            lm, defaults = open_model(name), settings.model(name).defaults
        weights = sum(weight.numel() * weight.element_size() for weight in lm.model.parameters())
        rows.append(Row("memory", f"{name} / the model", weights / MIB, "MiB", str(lm.dtype).removeprefix("torch.")))
        rows.append(_plain(name, lm, request, defaults.get("rome", {})))
        for method in chosen:
            rows.append(_edit(name, lm, request, method, defaults.get(method.name, {})))
    return rows


def _edit(name: str, lm: Any, request: Any, method: Any, defaults: Any) -> Row:
    label = f"{name} / {method.name}"
    reason = method.needs(lm.spec)
    if reason is not None:
        return Row("memory", f"{label} / skipped", 0, "", reason)
    asked = {"steps": STEPS} if any(field.name == "steps" for field in fields(method.params)) else {}
    params = method.read(method.ref(asked, defaults))
    try:
        method.prepare(lm, [request], params, 0, silent)  # gathers the statistics
        change, peak = peak_bytes(lambda: method.prepare(lm, [request], params, 0, silent), str(lm.device))
    except ActionableError as error:
        return Row("memory", f"{label} / failed", 0, "", str(error))
    edited = 4 * int(change.summary()["parameters"].sum())
    note = f"matrices changed {edited / MIB:.1f} MiB; above twice them: {(peak - 2 * edited) / MIB:.1f} MiB"
    return Row("memory", f"{label} / one edit", peak / MIB, "MiB", note)


def _plain(name: str, lm: Any, request: Any, defaults: Any) -> Row:
    """One step of ROME's search as a whole forward and backward pass."""
    import torch

    from mega_core.methods import METHODS, optimise
    from mega_core.methods.rome import BARE, CONTEXTS, default_layer
    from tests.reference.plain_optimise import plain_base, plain_loss

    params = METHODS["rome"].read(METHODS["rome"].ref({}, defaults))
    layer = default_layer(lm.n_layers) if params.layer is None else params.layer
    contexts = (BARE, *CONTEXTS[: params.contexts - 1])
    rows = optimise.rows_for(lm, 0, request, contexts, ("{} is a",))
    search = optimise.Search()

    def step() -> None:
        _, _, kept = plain_base(lm, layer, rows)
        trial = torch.zeros(lm.d_model, device=lm.device, requires_grad=True)
        torch.autograd.grad(plain_loss(lm, layer, rows, trial, kept, search, 1.0), trial)

    _, peak = peak_bytes(step, str(lm.device))
    return Row("memory", f"{name} / one step of ROME's search, written plainly", peak / MIB, "MiB", f"{len(rows)} rows")
