"""What the pages see of `service.checks`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mega_core.service.checks import Check

FOUND = (
    Check("Load a model and undo an edit", True, 2.1, "atlas-gpt2: bit-identical afterwards."),
    Check("Keep a result and read it again", False, 0.1, "What was kept did not come back. Free some space."),
)


@dataclass
class FakeChecks:
    """Frozen answers."""

    started: list[tuple[str, ...]] = field(default_factory=list)
    broken: Exception | None = None

    def start(self, owner: str, extra: Mapping[str, Callable[[], str]] | None = None) -> str:
        if self.broken is not None:
            raise self.broken
        self.started.append(tuple(extra or {}))
        return "j" * 32
