"""What long work says while it runs.

A Reporter carries progress out and cancellation in: it raises Cancelled when the person pressed stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class Cancelled(Exception):
    """The person pressed stop. Raised by a Reporter, passes through every context manager, leaves nothing behind."""


@dataclass(frozen=True, slots=True)
class Started:
    """A stage began. `total` is its number of steps, None when unknown."""

    stage: str
    total: int | None = None


@dataclass(frozen=True, slots=True)
class Advanced:
    """`done` of `total` steps of a stage are behind us."""

    stage: str
    done: int
    total: int | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """A stage ended without error."""

    stage: str


@dataclass(frozen=True, slots=True)
class Note:
    """One sentence for the person: a fallback taken, an alarm raised."""

    text: str


Event = Started | Advanced | Finished | Note
Reporter = Callable[[Event], None]


def silent(event: Event) -> None:
    """A Reporter that listens to nothing and never cancels."""


@contextmanager
def stage(report: Reporter, name: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Announce a stage, yield a function that advances it by one, announce its end.

    Calling the yielded function is also the point where a cancelled job stops, so call it in every loop.
    """
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        report(Advanced(name, done, total))

    report(Started(name, total))
    yield step
    report(Finished(name))
