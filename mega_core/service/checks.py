"""The self-check: whether a model loads, an edit is undone, and what is kept can be written and read again."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from mega_core.embedded import examples as shipped
from mega_core.errors import ActionableError, ModelUnavailable, TimedOut
from mega_core.events import Cancelled, Reporter, stage
from mega_core.methods.base import METHODS
from mega_core.notebook import Run

if TYPE_CHECKING:
    from mega_core.models.adapter import ModelAdapter
    from mega_core.service.core import Core
    from mega_core.settings import ModelEntry

KIND = "check"
METHOD = "rome"
QUICK: Mapping[str, object] = {"steps": 3, "contexts": 1, "covariance": "identity", "kl_weight": 0.0}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried."""

    name: str
    good: bool
    seconds: float
    told: str
    """What was seen, or what is wrong and what to do; one sentence."""


class Checks:
    """Tries what the app promises, on the smallest embedded model."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def start(self, owner: str, extra: Mapping[str, Callable[[], str]] | None = None) -> str:
        """Queue a self-check; its job's id, and the job's result is a tuple of Check.

        `extra` are checks of the caller by name: each says what it saw, or raises. Raises Busy.
        """
        entry = self._smallest()
        lane = "check" if entry is None else entry.name

        def work(report: Reporter) -> tuple[Check, ...]:
            return self.run(entry, extra or {}, report)

        return self._core.start(work, owner=owner, key=_new_key(), lane=lane, method="self-check", kind=KIND)

    def run(
        self, entry: ModelEntry | None, extra: Mapping[str, Callable[[], str]], report: Reporter
    ) -> tuple[Check, ...]:
        """Every check, one after the other; one that fails costs the others nothing."""
        tried: dict[str, Callable[[], str]] = {
            "Load a model and undo an edit": lambda: self._edit(entry, report),
            "Keep a result and read it again": self._keep,
            "Write into the history": self._note,
            **extra,
        }
        found = []
        with stage(report, "checks", len(tried)) as step:
            for name, attempt in tried.items():
                started = time.monotonic()
                try:
                    told, good = attempt(), True
                except (Cancelled, TimedOut):
                    raise
                except ActionableError as error:
                    told, good = str(error), False
                except Exception as error:  # noqa: BLE001 - whatever is wrong is what is to be told
                    told, good = f"{type(error).__name__}: see the log of the server.", False
                found.append(Check(name, good, time.monotonic() - started, told))
                step()
        return tuple(found)

    def _smallest(self) -> ModelEntry | None:
        """The embedded model of the fewest parameters that is here."""
        here = [entry for entry in self._core.settings.available() if entry.embedded]
        return min(here, key=lambda entry: (entry.memory_gb, entry.name)) if here else None

    def _edit(self, entry: ModelEntry | None, report: Reporter) -> str:
        if entry is None:
            raise ModelUnavailable("No embedded model is on this machine.", "Restore its folder, or train it.")
        with self._core.held(entry.ref(), report) as lm:
            return _undone(lm, entry, report)

    def _keep(self) -> str:
        key, value = f"self-check:{_new_key()}", secrets.token_bytes(1024)
        written = self._core.store.put(key, value)
        again = self._core.store.get(key)
        self._core.store.delete(key)
        if not written or again != value:
            raise ActionableError("What was kept did not come back.", "Free some space, then restart the app.")
        health = self._core.store.health()
        return "1024 bytes came back unchanged." + (" They are held in memory only." if health.mode == "memory" else "")

    def _note(self) -> str:
        digest, session = _new_key(), f"self-check {secrets.token_hex(8)}"
        self._core.notebook.add_run(Run(digest, session, "none", "self-check", "Self-check", "{} writes", "a line"))
        try:
            if self._core.notebook.get(digest) is None:
                raise ActionableError("The line did not come back.", "Look at the log of the server.")
        finally:
            self._core.notebook.delete_run(digest, session)
        return f"A line was written to {self._core.notebook.health().backend}, read and deleted."


def _undone(lm: ModelAdapter, entry: ModelEntry, report: Reporter) -> str:
    """Edit one known fact in a few steps and take it back. Raises ActionableError when the bits differ."""
    method = METHODS[METHOD]
    request = next(shipped.candidates(0))
    params = method.read(method.ref(QUICK, entry.defaults.get(METHOD)))
    before = lm.live_digest()
    with method.prepare(lm, [request], params, 0, report).applied(lm):
        inside = lm.live_digest()
    if inside == before:
        raise ActionableError("The edit changed nothing.", "Look at the log of the server.")
    if lm.live_digest() != before or lm.hook_count():
        raise ActionableError("The model was not given back as it was.", "Restart the app.")
    return f"{entry.name}: edited, and bit-identical afterwards ({before[:8]})."


def _new_key() -> str:
    return sha256(secrets.token_bytes(16)).hexdigest()
