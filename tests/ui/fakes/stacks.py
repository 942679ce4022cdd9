"""What the pages see of `service.stacks`."""

from __future__ import annotations

from dataclasses import dataclass, field

from mega_core.records import Inspection
from mega_core.service import StackedEdit


@dataclass
class FakeStacks:
    """Frozen answers. `edits` is the stack, whoever asks."""

    edits: tuple[StackedEdit, ...] = ()
    queued: list[tuple[str, object]] = field(default_factory=list)
    broken: Exception | None = None
    damaged: Exception | None = None

    def mine(self, model: str, owner: str) -> tuple[StackedEdit, ...]:
        if self.damaged is not None:
            raise self.damaged
        return self.edits

    def start_add(self, plan: Inspection, owner: str) -> str:
        return self._queue("add", plan)

    def start_undo(self, model: str, name: str, owner: str) -> str:
        return self._queue("undo", name)

    def start_check(self, model: str, owner: str) -> str:
        return self._queue("check", model)

    def start_removal(self, model: str, owner: str) -> str:
        return self._queue("remove", model)

    def packed(self, model: str, owner: str) -> bytes:
        return b"PK"

    def _queue(self, what: str, about: object) -> str:
        if self.broken is not None:
            raise self.broken
        self.queued.append((what, about))
        return "k" * 32
