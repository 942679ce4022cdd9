"""A worker without a model, for tests of executors: what a unit says is what it does."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread

from mega_core.errors import BadInput, OutOfMemory
from mega_core.events import Event


def unit(key: str, **does: object) -> tuple[str, str]:
    return key, json.dumps({"key": key, **does})


def note(folder: str, name: str) -> Path:
    path = Path(folder) / name
    path.touch()
    return path


def place(folder: str, number: int) -> bool:
    """Take a place that nobody has."""
    try:
        (Path(folder) / f"place-{number}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def noted(folder: Path, kind: str) -> set[int]:
    """The process ids that left a note of this kind."""
    return {int(path.name.split("-")[1]) for path in folder.glob(f"{kind}-*")}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def gone(pids: set[int], seconds: float = 10.0) -> bool:
    """Have all of these ended, within that time?"""
    until = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


@contextmanager
def open_toy(plan: str) -> Iterator[Callable[[str], Iterator[str]]]:
    """Leaves a note when it is opened and closed. The plan may tell it to fail or to die instead."""
    told = json.loads(plan)
    folder = told["folder"]
    note(folder, f"tried-{os.getpid()}")
    if told.get("refuse"):
        raise OutOfMemory("There is no room for the toy.", "Tidy up.")
    if not any(place(folder, n) for n in range(told.get("room", 99))):
        os.kill(os.getpid(), signal.SIGKILL)
    note(folder, f"opened-{os.getpid()}")
    try:
        yield lambda text: answer(folder, text)
    finally:
        note(folder, f"closed-{os.getpid()}")


def answer(folder: str, text: str) -> Iterator[str]:
    """As many lines as `lines` says (2), then what else the unit says. `meet`: first wait for so many open workers."""
    does = json.loads(text)
    until = time.monotonic() + 120
    while len(noted(Path(folder), does.get("of", "opened"))) < does.get("meet", 0) and time.monotonic() < until:
        time.sleep(0.02)
    print(f"the toy prints {text}", flush=True)
    for n in range(does.get("lines", 2)):
        yield json.dumps({"key": does["key"], "n": n, "pid": os.getpid(), "text": "ÿ\n" * 3} | seen())
    if does.get("die") == "always" or (
        does.get("die") == "once" and not (Path(folder) / f"dead-{does['key']}").exists()
    ):
        note(folder, f"dead-{does['key']}")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(does.get("sleep", 0.0))
    if does.get("raise") == "input":
        raise BadInput("subject", "isn't in the prompt.", "Write it out.")
    if does.get("raise") == "defect":
        raise KeyError("a key of the toy")


def seen() -> dict[str, object]:
    """What the worker sees of its surroundings."""
    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    return {name: os.environ.get(name) for name in names} | {
        "thread": current_thread().name,
        "torch": "torch" in sys.modules,
    }


class Heard:
    """Takes lines and events, and notes on which thread."""

    def __init__(self, stop: Callable[[Heard], None] | None = None) -> None:
        self.lines: list[tuple[str, dict]] = []
        self.events: list[Event] = []
        self.threads: set[str] = set()
        self.stop = stop

    def take(self, key: str, line: str) -> None:
        self.lines.append((key, json.loads(line)))
        self.threads.add(current_thread().name)

    def report(self, event: Event) -> None:
        self.events.append(event)
        self.threads.add(current_thread().name)
        if self.stop is not None:
            self.stop(self)

    def told(self) -> list[tuple[str, int]]:
        """(key of the unit, number of the line), sorted."""
        return sorted((key, line["n"]) for key, line in self.lines)

    def pids(self) -> set[int]:
        return {line["pid"] for _, line in self.lines}
