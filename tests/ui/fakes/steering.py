"""What the pages see of `service.steering`."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd

from mega_core.records import Report
from mega_core.service.steering import Dial, Said, Strength


@dataclass
class FakeSteering:
    """Frozen answers. `dials` holds the runs that are fitted."""

    dials: dict[str, Dial] = field(default_factory=dict)
    prepared: list[str] = field(default_factory=list)
    asked: list[float] = field(default_factory=list)
    waits: bool = False
    """The answer isn't there yet."""
    broken: Exception | None = None

    def can(self, report: Report) -> bool:
        return report.question.method.name == "mega"

    def dial(self, digest: str) -> Dial | None:
        return self.dials.get(digest)

    def prepare(self, report: Report, owner: str) -> str:
        if self.broken is not None:
            raise self.broken
        self.prepared.append(report.digest)
        return "s" * 32

    def at(self, digest: str, alpha: float, owner: str, patience: float = 0.0) -> Strength | str:
        if self.broken is not None:
            raise self.broken
        self.asked.append(alpha)
        if self.waits:
            return "s" * 32
        new = min(0.99, 0.6 * alpha)
        return Strength(
            alpha,
            (
                Said("edit", "Eiffel Tower is located in the city of", " Rome. It is" if new > 0.5 else " Paris. It is",
                     new, 1 - new, new > 0.5),
                Said("neighbourhood", "Louvre Museum is located in the city of", " Paris", 0.01, 0.9, True),
            ),
            ((" Rome", new), (" Paris", 1 - new)),
        )  # fmt: skip


def dial(digest: str) -> Dial:
    """A dial whose own strength is 1.25, won from 1 on."""
    alphas = [0.0, 0.5, 1.0, 1.25, 2.0, 3.0]
    curve = pd.DataFrame(
        {
            "alpha": alphas,
            "p_new": [0.002, 0.2, 0.6, 0.9, 0.95, 0.8],
            "p_true": [0.94, 0.7, 0.3, 0.05, 0.01, 0.01],
            "paraphrases": [0.0, 0.33, 0.67, 1.0, 1.0, 1.0],
            "neighbours": [1.0, 1.0, 1.0, 1.0, 0.83, 0.67],
        }
    )
    return Dial(digest, 1.25, 3.0, curve, 3, 6)
