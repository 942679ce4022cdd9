"""Benchmark runs as a whole: what sharing saves, and what a kill costs.

1. Sharing: one run of a few edits by every method, against one process per edit on the same edits (a sample of
   them), each with an empty cache folder, as the scripts of the reference code bases are run. Seconds per (method,
   edit), interpreter start and model loading included in both.
2. Kills: the same run killed without warning five times, at moments drawn by seed, and resumed each time: its
   `summary.csv` against that of the run nobody touched, and how often a result was made twice.
"""

# ruff: noqa: T201
from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, sleep

from bench.common import Row

MODEL = "atlas-gpt2"
SEED = 4


def measure(quick: bool, methods: Sequence[str] = (), count: int | None = None) -> list[Row]:
    """Rows of both parts."""
    from mega_core.methods import METHODS

    names = list(methods) or list(METHODS.names())
    edits = count or (3 if quick else 20)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder)
        rows, seconds, lines = _sharing(whole, names, edits, 1 if quick else 2)
        return rows + _kills(whole, names, edits, seconds, lines)


def _sharing(folder: Path, names: Sequence[str], edits: int, apart: int) -> tuple[list[Row], float, int]:
    start = perf_counter()
    _run(folder / "shared", folder / "cache-shared", names, edits)
    seconds = perf_counter() - start
    lines = len(_keys(folder / "shared"))
    work = len(names) * edits
    alone = []
    for name in names:
        for number in range(apart):
            start = perf_counter()
            _run(folder / f"{name}-{number}", folder / f"cache-{name}-{number}", [name], 1, skip=number)
            alone.append(perf_counter() - start)
            print(f"  {name}, alone: {alone[-1]:.1f} s", file=sys.stderr, flush=True)
    shared, own = seconds / work, sum(alone) / len(alone)
    what = f"{len(names)} methods x {edits} edits"
    return (
        [
            Row("sweep", "one run", shared, "s per edit", f"{what} in {seconds:.0f} s, start included"),
            Row("sweep", "one process per edit", own, "s per edit", f"mean of {len(alone)} processes"),
            Row("sweep", "ratio", own / shared, "times", "one process per edit / one run"),
        ],
        seconds,
        lines,
    )


def _kills(folder: Path, names: Sequence[str], edits: int, seconds: float, lines: int, kills: int = 5) -> list[Row]:
    """The run of `_sharing` again, killed at random moments."""
    out, cache = folder / "killed", folder / "cache-killed"
    draw = random.Random(SEED)
    killed = 0
    for _ in range(kills):
        process = subprocess.Popen(
            _command(out, names, edits, resume=(out / "plan.json").exists()),
            env=_env(cache),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        known, until = len(_keys(out)), perf_counter() + 60
        while len(_keys(out)) == known and process.poll() is None and perf_counter() < until:
            sleep(0.05)
        sleep(draw.random() * seconds / (2 * kills))  # at any moment after something new was measured
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
        print(f"  killed after {len(_keys(out))} of {lines} results", file=sys.stderr, flush=True)
    _run(out, cache, names, edits, resume=True)
    keys = _keys(out)
    same = (out / "summary.csv").read_bytes() == (folder / "shared" / "summary.csv").read_bytes()
    return [
        Row("sweep", "killed", killed, "times", "SIGKILL to the whole process group, resumed each time"),
        Row("sweep", "summary.csv the same", float(same), "", "byte for byte, against the run nobody touched"),
        Row("sweep", "results lost", lines - len(set(keys)), f"of {lines}"),
        Row("sweep", "results made twice", len(keys) - len(set(keys)), f"of {lines}"),
    ]


def _command(out: Path, names: Sequence[str], edits: int, resume: bool = False, skip: int = 0) -> list[str]:
    dataset = f"builtin:{SEED + skip}" if skip else f"builtin:{SEED}"
    command = [sys.executable, "-m", "mega_core", "bench", "--model", MODEL, "--methods", ",".join(names)]
    command += ["--dataset", dataset, "--limit", str(edits), "--out", str(out)]
    return [*command, "--resume"] if resume else command


def _env(cache: Path) -> dict[str, str]:
    return {**os.environ, "MEGA_CACHE_DIR": str(cache)}


def _run(out: Path, cache: Path, names: Sequence[str], edits: int, resume: bool = False, skip: int = 0) -> None:
    command = _command(out, names, edits, resume, skip)
    done = subprocess.run(command, env=_env(cache), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")


def _keys(out: Path) -> list[str]:
    """The key of every whole line of the journal."""
    journal = out / "cases.jsonl"
    if not journal.exists():
        return []
    lines = journal.read_bytes().split(b"\n")[:-1]
    return [json.loads(line)["key"] for line in lines if line.strip()]
