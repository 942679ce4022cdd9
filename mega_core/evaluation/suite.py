"""The questions of several protocols about one case, asked in one round.

1. `Questions.of` makes the sheets: tokenised once, used for the unedited model and under every method.
2. `ask` puts them to a model as it is now.
3. `judge` reads rows and scores off the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mega_core.evaluation import asking
from mega_core.evaluation.asking import Row, Score, Told, Wanted
from mega_core.evaluation.protocols.base import PROTOCOLS, Sheet, score
from mega_core.events import Reporter, silent

if TYPE_CHECKING:
    from mega_core.cases import Case
    from mega_core.models.adapter import ModelAdapter


@dataclass(frozen=True)
class Judged:
    """What one protocol says of a case."""

    protocol: str
    rows: tuple[Row, ...]
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class Questions:
    """The sheets of a case, by protocol; those that have nothing to ask about it are absent."""

    sheets: tuple[tuple[str, Sheet], ...]

    # 1.
    @classmethod
    def of(cls, lm: ModelAdapter, case: Case, protocols: Sequence[str]) -> Questions:
        """Raises UnknownName on a protocol that is none, BadInput on a prompt that the model can't read."""
        chosen = [PROTOCOLS[name] for name in protocols]
        return cls(tuple((one.name, one.sheet(lm, case)) for one in chosen if one.needs(case) is None))

    # 2.
    def ask(self, lm: ModelAdapter, base: Told | None = None, report: Reporter = silent) -> Told:
        """`base` is what the unedited model said, None when that is the one being asked."""
        wanted = Wanted()
        for _, sheet in self.sheets:
            sheet.want(wanted, base)
        return asking.ask(lm, wanted, report)

    # 3.
    def judge(self, told: Told, base: Told) -> tuple[Judged, ...]:
        """Rows and scores by protocol."""
        found = []
        for name, sheet in self.sheets:
            rows = tuple(sheet.rows(told, base))
            found.append(Judged(name, rows, tuple(score(rows, PROTOCOLS[name].metrics))))
        return tuple(found)
