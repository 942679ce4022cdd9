"""Runs in processes of their own, to be killed. One process imports everything once and makes the others by fork.

It reads lines "MODE FOLDER", starts a run of it, and writes the run's process id, then its exit status when it is over.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet  # noqa: F401 - here once, not in every run
import torch
import transformers.models.gpt2.modeling_gpt2  # noqa: F401

from mega_core import benchmark
from mega_core.benchmark.work import open_worker
from mega_core.methods import METHODS
from mega_core.settings import Settings, weights_digest
from tests.benchmark.test_benchmark import MANY, _prepare
from tests.service.toy import TOY


def work(mode: str, out: Path) -> None:
    """Start, or go on: a tiny model, and a method that waits a little."""
    settings = Settings.read()
    entry = settings.model("little")
    weights = weights_digest(settings.locate(entry), settings.cache_dir)
    ref = METHODS["toy"].ref({"strength": 0.3, "sleep": 0.01})
    setup = benchmark.set_up(
        entry.ref(), weights, [benchmark.Entrant("toy", ref)], "facts", "facts.json", MANY, protocols=("rome",),
        mode=mode, every=2 if mode == "sequential" else 0,
    )  # fmt: skip
    benchmark.run(setup, out, open_worker, resume=(out / "plan.json").is_file())


def main() -> None:
    """See the head of this file."""
    torch.set_num_threads(1)
    METHODS.add("toy", replace(TOY, prepare=_prepare))
    for line in sys.stdin:
        mode, _, folder = line.strip().partition(" ")
        child = os.fork()
        if not child:
            work(mode, Path(folder))
            os._exit(0)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(status, flush=True)


if __name__ == "__main__":
    main()
