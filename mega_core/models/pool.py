"""The one door to the models: one holder at a time per model, as many models as fit, each checked clean on return."""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Condition, get_ident
from time import monotonic

import torch

from mega_core.errors import BadInput, Busy, DirtyModel
from mega_core.events import Advanced, Reporter, Started, silent
from mega_core.models.adapter import ModelAdapter
from mega_core.models.loading import load
from mega_core.records import ModelRef
from mega_core.settings import DTYPE_NAMES, ModelEntry, Settings, weights_digest

log = logging.getLogger(__name__)

_WAIT = "wait for the model"
_POLL_S = 0.5  # how often a waiting job looks whether it was cancelled


@dataclass
class _Slot:
    entry: ModelEntry
    holder: int | None
    """Thread that holds the model or is loading it."""
    lm: ModelAdapter | None = None
    digest: str = ""
    """live_digest() right after loading."""


class ModelPool:
    """Loaded models. Share one pool in a process."""

    def __init__(
        self, settings: Settings, loader: Callable[[ModelEntry, Settings, Reporter], ModelAdapter] = load
    ) -> None:
        self.settings = settings
        self._load = loader
        self._slots: OrderedDict[ModelRef, _Slot] = OrderedDict()  # least recently used first
        self._changed = Condition()

    @contextmanager
    def lease(self, ref: ModelRef, report: Reporter = silent, timeout_s: float | None = None) -> Iterator[ModelAdapter]:
        """Hold a model for the block. Waits for its present holder, or for room; raises Busy after `timeout_s`.

        A model that comes back with a hook, a changed weight or in training mode is dropped, and the block fails with
        DirtyModel (or with its own exception, if it has one).
        """
        entry = self._entry(ref)
        key = entry.ref()
        slot = self._take(key, entry, report, timeout_s)
        lm = slot.lm
        if lm is None:
            raise RuntimeError(f"{entry.name} was handed out before it was loaded.")
        try:
            yield lm
        except BaseException as error:
            problem = self._give_back(key, slot)
            if problem:
                error.add_note(problem)
            raise
        else:
            problem = self._give_back(key, slot)
            if problem:
                raise DirtyModel(problem, "Run it again: the model is loaded afresh.")

    def loaded(self) -> tuple[tuple[ModelRef, bool], ...]:
        """Models in memory and whether each is in use."""
        with self._changed:
            return tuple((key, slot.holder is not None) for key, slot in self._slots.items())

    def file_digest(self, ref: ModelRef) -> str:
        """Digest of the model's files, without loading it."""
        return weights_digest(self.settings.locate(self._entry(ref)), self.settings.cache_dir)

    def close(self) -> None:
        """Drop every model that nobody holds."""
        with self._changed:
            for key in [key for key, slot in self._slots.items() if slot.holder is None]:
                del self._slots[key]
            self._changed.notify_all()
        _free_memory()

    def _entry(self, ref: ModelRef) -> ModelEntry:
        """The catalogue entry with the dtype asked for. Only revisions of the catalogue are served."""
        entry = self.settings.model(ref.name)
        if ref.revision and ref.revision != entry.revision:
            raise BadInput(
                "model",
                f"{ref.name} has revision {entry.revision!r} here, not {ref.revision[:60]!r}.",
                "Add that revision to the models file under a name of its own.",
            )
        if ref.dtype not in DTYPE_NAMES:
            raise BadInput("dtype", f"there is no dtype {ref.dtype[:40]!r}.", f"Known: {', '.join(DTYPE_NAMES)}.")
        return replace(entry, dtype=ref.dtype)

    def _take(self, key: ModelRef, entry: ModelEntry, report: Reporter, timeout_s: float | None) -> _Slot:
        begun = monotonic()
        polls = 0
        while True:
            with self._changed:
                slot, must_load = self._try_take(key, entry)
                if slot is None:
                    self._changed.wait(_POLL_S)
                    slot, must_load = self._try_take(key, entry)
            if slot is not None:
                break
            # Outside the lock: a reporter may raise Cancelled, and must never hold up other jobs.
            report(Advanced(_WAIT, polls) if polls else Started(_WAIT))
            polls += 1
            if timeout_s is not None and monotonic() - begun > timeout_s:
                raise Busy(f"{entry.name} is in use by another job.", "Try again in a moment.")
        if must_load:
            try:
                slot.lm = self._load(entry, self.settings, report)
                slot.digest = slot.lm.live_digest()
            except BaseException:
                self._drop(key, slot)
                raise
        return slot

    def _try_take(self, key: ModelRef, entry: ModelEntry) -> tuple[_Slot | None, bool]:
        """A slot held by this thread and whether it must still be loaded, or (None, False). Call with the lock held."""
        slot = self._slots.get(key)
        if slot is not None:
            if slot.holder == get_ident():
                raise Busy(f"This job already holds {entry.name}.", "Pass the model on instead of leasing it twice.")
            if slot.holder is not None:
                return None, False
            slot.holder = get_ident()
            self._slots.move_to_end(key)
            return slot, False
        while not self._has_room(entry):
            idle = next((k for k, s in self._slots.items() if s.holder is None and not s.entry.embedded), None)
            if idle is None:
                return None, False
            log.info("dropping %s to make room for %s", idle.name, entry.name)
            del self._slots[idle]
            _free_memory()
        slot = self._slots[key] = _Slot(entry, get_ident())
        return slot, True

    def _has_room(self, entry: ModelEntry) -> bool:
        """Embedded models always fit, and take no room of others: loading one again costs more than keeping it."""
        others = [slot.entry for slot in self._slots.values() if not slot.entry.embedded]
        if entry.embedded or not others:
            return True
        budget = self.settings.memory_gb
        needed = entry.memory_gb + sum(other.memory_gb for other in others)
        return len(others) < self.settings.max_models and (budget is None or needed <= budget)

    def _give_back(self, key: ModelRef, slot: _Slot) -> str:
        """Empty when the model is clean, else what was wrong with it."""
        try:
            problem = _problem(slot)
        except Exception as error:  # noqa: BLE001 - a model that can't even be read is not clean
            problem = f"its weights can't be read ({type(error).__name__})"
        if problem:
            log.error("dropping %s: %s", slot.entry.name, problem)
            self._drop(key, slot)
            return f"{slot.entry.name} was not given back as it was: {problem}. It was dropped."
        with self._changed:
            slot.holder = None
            self._changed.notify_all()
        return ""

    def _drop(self, key: ModelRef, slot: _Slot) -> None:
        with self._changed:
            if self._slots.get(key) is slot:
                del self._slots[key]
            slot.lm = None
            self._changed.notify_all()
        _free_memory()


def _problem(slot: _Slot) -> str:
    lm = slot.lm
    if lm is None:
        return "it is gone"
    if hooks := lm.hook_count():
        return f"{hooks} hooks were left on it"
    if any(module.training for module in lm.model.modules()):
        return "it was left in training mode"
    if any(parameter.requires_grad for parameter in lm.model.parameters()):
        return "its weights were left trainable"
    if lm.live_digest() != slot.digest:
        return "its weights changed"
    return ""


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
