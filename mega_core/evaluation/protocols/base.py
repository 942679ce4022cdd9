"""What a protocol is: a published way of scoring edits, with every choice it makes spelled out. No torch.

1. A case becomes a sheet: the prompts that this protocol asks about it, tokenised once for all methods.
2. The sheet says what it wants to know (`want`), is asked together with the other protocols' sheets, and reads rows off
   the answers: one prompt behind one metric each.
3. `score` turns the rows of a case into a number per metric: numerator over denominator, as the metric says.
4. `summarise` averages over cases, "within a record first", with an interval, and derives what is made of averages.

Numbers of different protocols are different things under like names: they never share an average or an axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple
from typing import Protocol as Interface

from mega_core.evaluation import intervals
from mega_core.evaluation.asking import Row, Score, Told, Wanted
from mega_core.registry import Registry

if TYPE_CHECKING:
    from mega_core.cases import Case
    from mega_core.models.adapter import ModelAdapter

Values = Mapping[str, Sequence[float]]


class Sheet(Interface):
    """The questions of one protocol about one case (steps 1 and 2)."""

    def want(self, wanted: Wanted, base: Told | None) -> None:
        """Add what has to be known. `base` is what the unedited model said; None while it is the one being asked."""
        ...

    def rows(self, told: Told, base: Told) -> list[Row]:
        """The prompts behind the numbers. For the unedited model, `told` is `base`."""
        ...


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of a protocol."""

    name: str
    title: str
    formula: str
    """What is counted, in words and signs: for a tooltip."""
    how: Literal["forced", "generated", "text"]
    """Teacher-forced probabilities, the text that greedy generation gives, or other text."""
    numerator: str
    denominator: str
    combine: Literal["mean", "all", "any"] = "mean"
    """What counts once: every row, or a group of rows of which all, or any, have to succeed."""
    better: Literal["higher", "lower"] = "higher"
    unit: Literal["share", "nats", "bits", "difference", "ratio"] = "share"
    if_none: float | None = None
    """The mean where cases had prompts of this metric and none counted; None: then there is no mean."""


@dataclass(frozen=True, slots=True)
class Derived:
    """A number made of averages over cases."""

    name: str
    title: str
    formula: str
    of: tuple[str, ...]
    """The metrics it is made of."""
    combine: Callable[[Sequence[float]], float]
    partly: bool = False
    """True: made of those that were measured; False: there is none unless all were."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """A published way of scoring edits, or ours."""

    name: str
    title: str
    summary: str
    paper: str
    metrics: tuple[Metric, ...]
    needs: Callable[[Case], str | None]
    """Why this protocol has nothing to ask about a case, or None."""
    sheet: Callable[[ModelAdapter, Case], Sheet]
    """Step 1. Raises BadInput on a prompt that the model can't read."""
    derived: tuple[Derived, ...] = ()
    notes: str = ""
    """What differs from the published protocol, and what is ours."""
    version: int = 1
    """Part of every stored result; raise it when the numbers change."""

    def metric(self, name: str) -> Metric:
        """Raises KeyError."""
        return next(metric for metric in self.metrics if metric.name == name)


class Mean(NamedTuple):
    """A metric over all cases."""

    metric: str
    value: float
    n: int
    """How many cases count."""
    low: float
    high: float


PROTOCOLS: Registry[Protocol] = Registry("protocol")


# 3.
def score(rows: Sequence[Row], metrics: Sequence[Metric]) -> list[Score]:
    """The numbers of one case. A metric that nothing was asked about is absent; one that nothing counts for has n 0."""
    found = []
    for metric in metrics:
        own = [row for row in rows if row.metric == metric.name and row.eligible]
        if not own:
            continue
        counted = [row for row in own if row.counts]
        if metric.combine == "mean":
            values = [row.value for row in counted]
        else:
            join = min if metric.combine == "all" else max
            groups: dict[int, list[float]] = {}
            for row in counted:
                groups.setdefault(row.group, []).append(row.value)
            values = [join(group) for group in groups.values()]
        found.append(Score(metric.name, sum(values) / len(values) if values else 0.0, len(values)))
    return found


# 4.
def summarise(protocol: Protocol, cases: Sequence[Sequence[Score]], draws: int = 1000, seed: int = 0) -> list[Mean]:
    """Means over cases with 95 % intervals: Wilson's where every case is a 0 or a 1, else by drawing cases anew.

    `cases` holds each case's scores. A case without a metric, or with none that counts, leaves its mean alone.
    """
    table = [{one.metric: one for one in case} for case in cases]
    found = []
    for metric in protocol.metrics:
        asked = [case[metric.name] for case in table if metric.name in case]
        values = [one.value for one in asked if one.n]
        if values:
            low, high = intervals.of_mean(values, metric.unit == "share", draws, seed)
            found.append(Mean(metric.name, sum(values) / len(values), len(values), low, high))
        elif asked and metric.if_none is not None:
            found.append(Mean(metric.name, metric.if_none, 0, metric.if_none, metric.if_none))
    for derived in protocol.derived:
        columns = [
            [case[name].value if name in case and case[name].n else None for case in table] for name in derived.of
        ]
        empty = [protocol.metric(name).if_none for name in derived.of]
        asked_at_all = [any(name in case for case in table) for name in derived.of]
        measured = [
            one is not None or any(value is not None for value in column)
            for one, column in zip(empty, columns, strict=True)
        ]
        keep = [i for i, both in enumerate(zip(asked_at_all, measured, strict=True)) if all(both)]
        if not keep or (len(keep) < len(derived.of) and not derived.partly):
            continue
        share = all(protocol.metric(name).unit == "share" for name in derived.of)
        one = intervals.of_derived(
            [columns[i] for i in keep], [empty[i] for i in keep], derived.combine, draws, seed, share
        )
        if one is not None:
            found.append(Mean(derived.name, one.value, len(table), one.low, one.high))
    return found
