"""A method that takes milliseconds and still edits, and a models file with tiny models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mega_core.events import Reporter, stage
from mega_core.methods.base import Method, knob
from mega_core.records import EditRequest


@dataclass(frozen=True)
class ToyParams:
    layer: int = knob(1, "Layer to change", low=0, high=2)
    strength: float = knob(0.5, "How far to push", low=0.0, high=10.0)
    sleep: float = knob(0.0, "Seconds to wait at every step", low=0.0, high=5.0)
    fail: str = knob("no", "Whether to fail", choices=("no", "error", "memory"))


def prepare(lm: Any, requests: Sequence[EditRequest], params: ToyParams, seed: int, report: Reporter) -> Any:
    from time import sleep

    import torch

    from mega_core.changes import MatrixDelta, WeightDelta

    with stage(report, "toy", total=5) as step:
        for _ in range(5):
            sleep(params.sleep)
            step()
    if params.fail == "error":
        raise RuntimeError("secret path /home/somebody")
    if params.fail == "memory":
        raise MemoryError
    weight = lm.read_weight(params.layer, "mlp_down")
    generator = torch.Generator().manual_seed(seed)
    left = params.strength * torch.randn(weight.shape[0], 1, generator=generator)
    right = torch.randn(weight.shape[1], 1, generator=generator)
    return WeightDelta((MatrixDelta(params.layer, "mlp_down", left, right, float(weight.norm())),))


def needs(spec: Any) -> str | None:
    return "the toy does not know this family" if spec.model_type == "gptj" else None


TOY = Method("toy", "Toy", "Pushes one direction.", "weights", "none", ToyParams, prepare, needs)


def write_catalogue(folder: Path, **archs: str) -> Path:
    """A models file with tiny models: name -> architecture."""
    from tests.tiny import save_tiny

    entries = []
    for name, arch in archs.items():
        save_tiny(arch, folder / name)
        entries.append(
            f'[[model]]\nname = "{name}"\ntitle = "Tiny {arch}"\npath = "{name}"\narchitecture = "{arch}"\n'
            f"memory_gb = 0.1\n"
            f"[model.defaults.toy]\nlayer = 2\n"
        )
    file = folder / "models.toml"
    file.write_text("\n".join(entries), encoding="utf-8")
    return file
