"""A benchmark of real methods on a Ray cluster of this machine, a worker killed, against the same in one thread."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch

from mega_core import benchmark
from mega_core.benchmark import Entrant
from mega_core.benchmark.work import open_worker
from mega_core.events import Event, Note
from mega_core.executors import Executor, Local, Ray
from mega_core.methods import METHODS
from mega_core.settings import Settings, weights_digest
from tests.benchmark.test_benchmark import CASES
from tests.cluster.test_ray import _token, processes_of  # noqa: F401 - a fixture
from tests.executors.toy import gone
from tests.methods.test_promises import SETTINGS
from tests.service.toy import write_catalogue

pytest.importorskip("ray", reason="ray is not installed: pip install -r requirements-cluster.txt")
pytestmark = pytest.mark.slow


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the workers in /proc")
def test_two_workers_one_killed_give_the_local_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MEGA_MODELS", str(write_catalogue(tmp_path, little="gpt2")))
    monkeypatch.setenv("MEGA_DEVICE", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = Settings.read()
    entry = settings.model("little")
    weights = weights_digest(settings.locate(entry), settings.cache_dir)
    entrants = [Entrant(name, METHODS[name].ref(SETTINGS[name])) for name in ("rome", "ft_m")]
    setup = benchmark.set_up(entry.ref(), weights, entrants, "facts", "facts.json", CASES, protocols=("rome",))

    def run(name: str, executor: Executor, report=lambda event: None) -> bytes:
        results = benchmark.run(setup, tmp_path / name, open_worker, executor=executor, report=report)
        assert results.complete
        return (tmp_path / name / "summary.csv").read_bytes()

    killed: list[int] = []
    notes: list[str] = []

    def kill_one(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)
        if killed or not (tmp_path / "ray" / "cases.jsonl").exists():
            return
        workers = [pid for pid, line in processes_of(tmp_path).items() if line.startswith("ray::_RayWorker.answers")]
        if len(workers) == 2 and (tmp_path / "ray" / "cases.jsonl").read_text(encoding="utf-8"):
            killed.append(workers[0])
            os.kill(workers[0], signal.SIGKILL)

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers: sums in another order may differ in their last bits
    try:
        local = run("local", Local())
    finally:
        torch.set_num_threads(before)
    assert run("ray", Ray(actors=2), kill_one) == local

    assert killed
    assert any("its unit goes to another one" in note for note in notes)
    for name in ("local", "ray"):
        lines = [
            json.loads(line) for line in (tmp_path / name / "cases.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        seen = Counter((line["label"], line["case"]) for line in lines)
        assert seen == {(label, case.id): 1 for label in ("unedited", "rome", "ft_m") for case in CASES}
    assert gone(set(processes_of(tmp_path)) & set(killed), 10)
