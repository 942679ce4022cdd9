"""What the measurements share: a row of the table, and a service on a folder of its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, TypeVar

from mega_core.embedded import examples
from mega_core.records import EditRequest, Inspection
from mega_core.service import Service
from mega_core.settings import Settings

if TYPE_CHECKING:
    from mega_core.models.adapter import ModelAdapter

T = TypeVar("T")

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: its profiler would report every start


@dataclass(frozen=True, slots=True)
class Row:
    """One measured number."""

    group: str
    name: str
    value: float
    unit: str = ""
    note: str = ""


class Unmeasured(Exception):
    """A measurement that can't be made on this machine, with the reason."""


@contextmanager
def temporary_service(**changes: object) -> Iterator[Service]:
    """A service whose results, history and statistics lie in a folder that goes away."""
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(Settings.read(), cache_dir=Path(folder), database_url="", **changes)  # type: ignore[arg-type]
        with Service.open(settings) as service:
            yield service


def open_model(name: str) -> ModelAdapter:
    """A model of the catalogue with its defaults' statistics kept in memory, as the service has it on its store."""
    from mega_core.methods.covariance import Memory
    from mega_core.models.loading import load

    settings = Settings.read()
    lm = load(settings.model(name), settings)
    lm.memo = Memory()
    return lm


def peak_bytes(run: Callable[[], T], device: str = "cpu") -> tuple[T, int]:
    """(result, most bytes of tensors alive at once that `run` made, beyond what was there before).

    On the CPU every allocation and release of torch is counted, in order; other libraries' arrays are not.
    """
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = run()
        torch.cuda.synchronize()
        return found, torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as watched:
        found = run()
    events = watched.profiler.kineto_results.events()
    steps = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return found, max(accumulate(size for _, size in steps), default=0)


def embedded_models(service: Service) -> list[str]:
    """The models that ship and are there. Raises Unmeasured when none is."""
    names = [info.name for info in service.models() if info.embedded and info.available]
    if not names:
        raise Unmeasured("no embedded model is here")
    return names


def plan_of(service: Service, model: str, request: EditRequest, method: str = "rome", seed: int = 0) -> Inspection:
    """The question that a request stands for, with the model's defaults."""
    return service.plan(
        model,
        method,
        request.subject,
        request.template,
        request.target_new,
        request.target_true or "",
        request.paraphrases,
        request.neighbours,
        seed=seed,
    )


def random_plans(service: Service, model: str, count: int, seed: int) -> list[Inspection]:
    """Counterfactual edits of random facts, no two alike."""
    plans: dict[EditRequest, Inspection] = {}
    for request in examples.candidates(seed, min_neighbours=1):
        if len(plans) == count:
            break
        plans.setdefault(request, plan_of(service, model, request))
    return list(plans.values())


def percentile(values: Sequence[float], percent: int) -> float:
    """The percentile (1 to 99) by linear interpolation; the value itself when there is one."""
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def machine() -> str:
    """One line about where the numbers come from."""
    import platform

    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    threads = f"torch {torch.__version__} with {torch.get_num_threads()} threads"
    return f"{os.cpu_count()} cores, {platform.machine()}, {device}, {threads}"
