"""What the pages see of `service.comparisons`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mega_core.keys import digest
from mega_core.records import Inspection


@dataclass
class FakeComparisons:
    """Kept in memory."""

    kept: dict[str, tuple[Inspection, ...]] = field(default_factory=dict)

    def save(self, plans: Sequence[Inspection]) -> str:
        name = digest({"comparison": tuple(plans)})
        self.kept[name] = tuple(plans)
        return name

    def find(self, name: str) -> tuple[Inspection, ...] | None:
        return self.kept.get(name)
