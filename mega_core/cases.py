"""What a benchmark asks about: edit requests with the questions that judge them. Plain values; no torch.

A case is one record of a dataset, whatever the dataset: CounterFact, zsRE, RippleEdits, MQuAKE, the embedded models'
own facts, a person's file. A field that the dataset doesn't have is empty, and a protocol that needs it leaves the case
out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from mega_core.errors import BadInput
from mega_core.records import EditRequest, clean_text, request_from_plain

MAX_QUESTION, MAX_ANSWER, MAX_ID, MAX_TOGETHER = 2048, 512, 128, 64

AXES: Mapping[str, str] = MappingProxyType(
    {
        "RS": "Relation_Specificity",
        "LG": "Logical_Generalization",
        "SA": "Subject_Aliasing",
        "CI": "Compositionality_I",
        "CII": "Compositionality_II",
        "FN": "Forgetfulness",
    }
)
"""Short name of an axis of RippleEdits -> the name in its files."""


@dataclass(frozen=True, slots=True)
class Query:
    """A prompt and what answers it."""

    prompt: str
    answers: tuple[tuple[str, ...], ...] = ()
    """Each answer with its other names, the usual one first. Several: each of them has to be given."""
    name: str = ""
    """What a dataset calls this kind of question, as EasyEdit's "neighborhood" of its locality prompts."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", clean_text("prompt", self.prompt, MAX_QUESTION, lines=True))
        given = tuple(names_of(names) for names in self.answers)
        object.__setattr__(self, "answers", tuple(names for names in given if names))
        object.__setattr__(self, "name", clean_text("name", self.name, MAX_ID, may_be_empty=True))

    @property
    def answer(self) -> str:
        """The usual name of the first answer. Raises IndexError without any."""
        return self.answers[0][0]


@dataclass(frozen=True, slots=True)
class AxisTest:
    """One test of RippleEdits: a consequence that an edit has, or must not have."""

    axis: str
    """A short name of AXES."""
    queries: tuple[Query, ...]
    any_query: bool = False
    """True: one right query is enough (OR); False: all have to be right (AND)."""
    conditions: tuple[Query, ...] = ()
    """What the unedited model has to answer, all of it, for the test to count."""

    def __post_init__(self) -> None:
        if self.axis not in AXES:
            raise BadInput("axis", f"there is no axis {self.axis[:40]!r}.", f"They are {', '.join(AXES)}.")
        if not self.queries:
            raise BadInput("test_queries", "there is none.", "Give at least one.")


@dataclass(frozen=True, slots=True)
class Hop:
    """One step of a chain."""

    question: str
    cloze: str
    """The same as a prompt that ends before the answer."""
    answers: tuple[str, ...]
    """The answer and its other names."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "question", clean_text("question", self.question, MAX_QUESTION))
        object.__setattr__(self, "cloze", clean_text("cloze", self.cloze, MAX_QUESTION))
        object.__setattr__(self, "answers", names_of(self.answers))
        if not self.answers:
            raise BadInput("answer", "is empty.", "Give the hop's answer.")


@dataclass(frozen=True, slots=True)
class Chain:
    """A multi-hop question, with the hops it goes through before and after the edits (MQuAKE)."""

    questions: tuple[str, ...]
    """The same question in several forms; MQuAKE has three."""
    hops: tuple[Hop, ...]
    """Before the edits."""
    new_hops: tuple[Hop, ...]
    """After them; the answer of the last is the new answer."""
    answers: tuple[str, ...]
    """The old answer and its other names."""
    new_answers: tuple[str, ...]

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "questions", tuple(clean_text("questions", text, MAX_QUESTION) for text in self.questions))
        set_(self, "answers", names_of(self.answers))
        set_(self, "new_answers", names_of(self.new_answers))
        if not self.questions or not self.new_hops or not self.new_answers:
            raise BadInput("questions", "a chain needs questions, hops and a new answer.", "Give all three.")


@dataclass(frozen=True, slots=True)
class Case:
    """One record of a dataset."""

    id: str
    """The dataset's own number or name of it; unique in a dataset."""
    requests: tuple[EditRequest, ...]
    """What is edited, together: one fact, or the one to four of an MQuAKE record. Their `paraphrases` and `neighbours`
    are the record's."""
    relation: str = ""
    """The dataset's name of the first request's relation."""
    attributes: tuple[str, ...] = ()
    """Prompts about other subjects whose object is the new one (CounterFact's attribute_prompts)."""
    generation_prompts: tuple[str, ...] = ()
    """Beginnings of texts about the subject."""
    locality: tuple[Query, ...] = ()
    """Questions that have nothing to do with the edit (zsRE's and EasyEdit's locality)."""
    portability: tuple[Query, ...] = ()
    """Questions whose answer follows from the edit (EasyEdit)."""
    tests: tuple[AxisTest, ...] = ()
    """RippleEdits."""
    chains: tuple[Chain, ...] = ()
    """Multi-hop questions."""

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "id", clean_text("case_id", self.id, MAX_ID))
        if not 1 <= len(self.requests) <= MAX_TOGETHER:
            raise BadInput("requests", f"{len(self.requests)} edits.", f"Give 1 to {MAX_TOGETHER}.")
        for name in ("attributes", "generation_prompts"):
            prompts = (clean_text(name, prompt, MAX_QUESTION, lines=True) for prompt in getattr(self, name))
            set_(self, name, tuple(prompts))

    @property
    def request(self) -> EditRequest:
        """The first edit request."""
        return self.requests[0]


def names_of(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of one thing, cleaned, each once, empty ones left out."""
    found = (clean_text("answer", name, MAX_ANSWER, may_be_empty=True) for name in names)
    return tuple(dict.fromkeys(name for name in found if name))


def from_plain(plain: Mapping[str, Any]) -> Case:
    """The case that records.as_plain wrote. Raises KeyError, TypeError or BadInput on anything else."""

    def query(found: Mapping[str, Any]) -> Query:
        return Query(found["prompt"], tuple(tuple(names) for names in found["answers"]), found["name"])

    def hops(found: Sequence[Mapping[str, Any]]) -> tuple[Hop, ...]:
        return tuple(Hop(hop["question"], hop["cloze"], tuple(hop["answers"])) for hop in found)

    return Case(
        id=plain["id"],
        requests=tuple(request_from_plain(request) for request in plain["requests"]),
        relation=plain["relation"],
        attributes=tuple(plain["attributes"]),
        generation_prompts=tuple(plain["generation_prompts"]),
        locality=tuple(query(found) for found in plain["locality"]),
        portability=tuple(query(found) for found in plain["portability"]),
        tests=tuple(
            AxisTest(
                test["axis"],
                tuple(query(found) for found in test["queries"]),
                test["any_query"],
                tuple(query(found) for found in test["conditions"]),
            )
            for test in plain["tests"]
        ),
        chains=tuple(
            Chain(
                tuple(chain["questions"]),
                hops(chain["hops"]),
                hops(chain["new_hops"]),
                tuple(chain["answers"]),
                tuple(chain["new_answers"]),
            )
            for chain in plain["chains"]
        ),
    )
