"""What the pages see of `service.studies`."""

from __future__ import annotations

from mega_core.embedded.measured import Measured


class FakeStudies:
    """Frozen answers."""

    def __init__(self, shipped: Measured) -> None:
        self.shipped = shipped

    def measured(self, model: str) -> Measured | None:
        return self.shipped if model == "atlas-gpt2" else None
