"""A catalogue entry becomes a ModelAdapter: safetensors only, nothing from the network, no code from its folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from mega_core.errors import ModelUnavailable, UnsupportedModel
from mega_core.events import Reporter, silent, stage
from mega_core.models.adapter import ModelAdapter, check_parts
from mega_core.models.arch import spec_of
from mega_core.settings import ModelEntry, Settings, check_folder, weights_digest

log = logging.getLogger(__name__)

_one_at_a_time = Lock()
"""transformers loads with the help of states of the whole process: of two models loaded at once, one lacks weights."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(entry: ModelEntry, settings: Settings, report: Reporter = silent) -> ModelAdapter:
    """The model in evaluation mode, without gradients, on the chosen device, its parts checked.

    Raises ModelUnavailable when files are missing or unfit, UnsupportedModel when a part is not where the table says.
    """
    path = settings.locate(entry)
    check_folder(path, entry.name)
    spec_of(json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type", "unknown"))
    if settings.memory_gb is not None and entry.memory_gb > settings.memory_gb:
        raise ModelUnavailable(
            f"{entry.name} needs about {entry.memory_gb:g} GB, the budget is {settings.memory_gb:g} GB.",
            "Choose a smaller model, or raise MEGA_MEMORY_GB.",
        )
    with stage(report, f"load {entry.name}", total=3) as step:
        file_digest = weights_digest(path, settings.cache_dir)
        step()
        with _one_at_a_time:
            tokenizer = _tokenizer(path, entry.name)
            model = _model(path, entry, settings)
        step()
        lm = ModelAdapter(model, tokenizer, entry.ref(), file_digest)
        check_parts(lm)
        step()
    log.info("loaded %s (%s) on %s", entry.name, entry.dtype, lm.device)
    return lm


def pick_device(name: str) -> torch.device:
    """The device for "auto": the fastest there is. Raises ModelUnavailable when a named one is missing."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind = name.split(":")[0]
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(kind, False):
        raise ModelUnavailable(f"This machine has no {name!r} device.", "Set MEGA_DEVICE to auto or cpu.")
    return torch.device(name)


def _tokenizer(path: Path, name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ModelUnavailable(
            f"{name}: its tokenizer can't be read ({error}).", "Download the model again."
        ) from error
    if not tokenizer.is_fast:
        raise UnsupportedModel(
            f"{name}: its tokenizer gives no character offsets, which finding the subject needs.",
            "Add a tokenizer.json to the model's folder.",
        )
    return tokenizer


def _model(path: Path, entry: ModelEntry, settings: Settings) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if settings.device_map:
        options["device_map"] = settings.device_map
    if entry.attention:
        options["attn_implementation"] = entry.attention
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=DTYPES[entry.dtype],
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelUnavailable(
            f"{entry.name}: its files can't be read ({error}).", "Download the model again."
        ) from error
    model, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(map(str, info["missing_keys"])) or sorted(map(str, info["mismatched_keys"]))
        raise ModelUnavailable(
            f"{entry.name}: {len(lacking)} weights are missing or of another shape, such as {lacking[0]}.",
            "Download the model again.",
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelUnavailable(
            f"{entry.name} doesn't fit: some weights would stay on disk, where they can't be edited.",
            "Choose a smaller model, or a lower precision.",
        )
    return model if settings.device_map else model.to(pick_device(settings.device))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bars: progress goes through the Reporter."""
    from transformers.utils import logging as library

    if not library.is_progress_bar_enabled():
        yield
        return
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.enable_progress_bar()
