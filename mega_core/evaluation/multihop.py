"""Where a chain of facts breaks after an edit: from the rows of the protocol mquake, and how its questions are put.

1. Frames of a question. `plain`: as the dataset words it, for beginnings of sentences. `few_shot`: as "Q: ..." behind
   demonstrations, with "A:" for the model to go on from; the demonstrations are ours (not MQuAKE's, arXiv 2305.14795)
   and about things that no dataset edits. Chosen by whether the question ends with a question mark (ours).
2. An answer is given when one of its names stands in the text's first line as whole words, without case. A name that
   stands there only as a part of a longer name of the other answer ("football" in "association football") does not
   count (ours).
3. A chain's outcome: which hops of the new chain are recalled, which forms of its question give the new answer, which
   still give the old one. It broke at the first hop that is not recalled; with every hop recalled and no form
   answered, at the composition.
4. Tables for charts: `broken` a row per hop, `chains` a row per chain, `by_size` means over chains by the number of
   hops and of edits.

No torch. Rows come by case; those of a chain have its number as their group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from mega_core import frames
from mega_core.evaluation.answers_text import contains
from mega_core.evaluation.asking import Row

Frame = Literal["plain", "few_shot"]
EDIT, HOP, MULTIHOP, KNOWN, OLD = "edit", "hop", "multihop", "multihop_known", "old_answer"
"""The metrics of the protocol that are read here."""
COMPOSITION: Literal["composition"] = "composition"
DEMONSTRATIONS = (
    ("What colour is the fruit that lemonade is made from?", "yellow"),
    ("What is the food called that the insects in a hive make?", "honey"),
    ("How many wheels do two bicycles have?", "four"),
)


# 1.
def frame_of(question: str) -> Frame:
    """The frame that suits a question."""
    return "few_shot" if question.rstrip().endswith("?") else "plain"


def framed(question: str, frame: Frame | None = None) -> str:
    """The prompt that asks the question; without a frame the one that suits it."""
    if (frame or frame_of(question)) == "plain":
        return question
    shown = "".join(f"Q: {asked}\nA: {answer}\n" for asked, answer in DEMONSTRATIONS)
    return f"{shown}Q: {question}\nA:"


# 2.
def answer_in(text: str) -> str:
    """What a greedy text answers: its first line that is not empty."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def gives(text: str, names: Sequence[str], others: Sequence[str] = ()) -> bool:
    """Whether a greedy text gives an answer by one of its names; `others` are names of another answer."""
    line = answer_in(text)
    longer = [other for other in others if contains(line, other)]
    return any(
        contains(line, name) and not any(contains(other, name) and not contains(name, other) for other in longer)
        for name in names
    )


# 3.
def broke_at(recalled: Sequence[bool], answered: bool) -> int | Literal["composition"] | None:
    """Index of the first hop that is not recalled, "composition", or None when the chain held."""
    first = next((i for i, good in enumerate(recalled) if not good), None)
    if first is None and not answered:
        return COMPOSITION
    return first


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a chain went."""

    case: str
    chain: int
    """Its number in the case, from 0."""
    edits: int
    """How many facts the case edits."""
    hops: tuple[Row, ...]
    """One per hop of the new chain, in order; value 1: recalled."""
    answered: tuple[bool, ...]
    """For each form of the question: whether it gives the new answer."""
    old: tuple[bool, ...]
    """For each form: whether it gives the old answer."""
    known: bool
    """Whether the unedited model recalls every hop of the old chain."""

    @property
    def recalled(self) -> tuple[bool, ...]:
        """For each hop of the new chain: whether it is recalled."""
        return tuple(hop.value > 0 for hop in self.hops)

    @property
    def broke_at(self) -> int | Literal["composition"] | None:
        """As the function of that name, judged by any form of the question."""
        return broke_at(self.recalled, any(self.answered))


def outcomes(rows: Mapping[str, Sequence[Row]]) -> list[Outcome]:
    """The chains of every case. Raises ValueError on rows that lack the questions of a chain."""
    return [outcome for case, own in rows.items() for outcome in _of_case(case, own)]


def _of_case(case: str, rows: Sequence[Row]) -> Iterator[Outcome]:
    edits = sum(row.metric == EDIT for row in rows)
    for chain in sorted({row.group for row in rows if row.metric == HOP}):
        own = {
            metric: tuple(row for row in rows if row.metric == metric and row.group == chain)
            for metric in (HOP, MULTIHOP, KNOWN, OLD)
        }
        if not own[MULTIHOP]:
            raise ValueError(f"chain {chain} of case {case} has no questions: give all rows of the protocol mquake")
        yield Outcome(
            case,
            chain,
            edits,
            own[HOP],
            tuple(row.value > 0 for row in own[MULTIHOP]),
            tuple(row.value > 0 for row in own[OLD]),
            any(row.counts for row in own[KNOWN]),
        )


# 4.
def broken(rows: Mapping[str, Sequence[Row]]) -> pd.DataFrame:
    """The frame `hops`: every hop of the new chains, chains and hops numbered from 1."""
    return frames.from_rows(
        [
            {
                "case": one.case,
                "chain": one.chain + 1,
                "hop": i,
                "prompt": hop.prompt,
                "expected": hop.expected,
                "said": hop.said,
                "recalled": hop.value > 0,
            }
            for one in outcomes(rows)
            for i, hop in enumerate(one.hops, 1)
        ],
        "hops",
    )


def chains(rows: Mapping[str, Sequence[Row]]) -> pd.DataFrame:
    """The frame `chains`: every chain and where it broke: "hop 1", "composition", or nothing."""
    return frames.from_rows(
        [
            {
                "case": one.case,
                "chain": one.chain + 1,
                "hops": len(one.hops),
                "edits": one.edits,
                "recalled": sum(one.recalled),
                "answered": any(one.answered),
                "strict": all(one.answered),
                "old_answer": any(one.old),
                "known": one.known,
                "broke_at": _place(one.broke_at),
            }
            for one in outcomes(rows)
        ],
        "chains",
    )


def _place(where: int | str | None) -> str:
    if where is None:
        return ""
    return f"hop {where + 1}" if isinstance(where, int) else where


_SIZED: Mapping[str, Callable[[Outcome], float | None]] = {
    "hop": lambda one: sum(one.recalled) / len(one.hops),
    "instance": lambda one: float(all(one.recalled)),
    "multihop": lambda one: float(any(one.answered)),
    "multihop_strict": lambda one: float(all(one.answered)),
    "multihop_known": lambda one: float(any(one.answered)) if one.known else None,
    "composition": lambda one: float(any(one.answered)) if all(one.recalled) else None,
    "old_answer": lambda one: float(any(one.old)),
}


def by_size(rows: Mapping[str, Sequence[Row]]) -> pd.DataFrame:
    """The frame `chain_sizes`: means over chains, each counting once, by number of hops and of edits.

    0 hops: chains of any length; 0 edits: of any number of edits. A mean of no chain has no row.
    """
    found: dict[tuple[int, int, str], list[float]] = {}
    for one in outcomes(rows):
        for metric, value_of in _SIZED.items():
            value = value_of(one)
            if value is not None:
                for hops in (0, len(one.hops)):
                    for edits in (0, one.edits):
                        found.setdefault((hops, edits, metric), []).append(value)
    order = {metric: i for i, metric in enumerate(_SIZED)}
    return frames.from_rows(
        [
            {"hops": hops, "edits": edits, "metric": metric, "value": sum(values) / len(values), "n": len(values)}
            for (hops, edits, metric), values in sorted(
                found.items(), key=lambda item: (item[0][:2], order[item[0][2]])
            )
        ],
        "chain_sizes",
    )
