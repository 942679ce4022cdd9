"""What a benchmark measures, spelled out, and what it finds, line by line. No torch.

1. A plan names model, methods with every parameter, cases, protocols, mode and seed. The cases are in it as digests.
2. A line is what is known of one entrant on one case at one step. Its key is a digest of everything that decides it, so
   that a line which is there already is never measured again, and one of another plan is never taken for it.
3. Modes. single: each case's edits alone. batch: the edits of all cases together. sequential: case after case on top of
   each other; every `every` edits, and at the end, all cases edited so far are asked.
4. `set_up` chooses protocols and cases, and says what is left out and why, before a model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from itertools import accumulate
from math import isfinite
from typing import TYPE_CHECKING, Any

from mega_core.cases import Case
from mega_core.errors import BadInput, UnknownName
from mega_core.evaluation import asking
from mega_core.evaluation.protocols import PROTOCOLS
from mega_core.keys import digest
from mega_core.records import MethodRef, ModelRef, as_plain

if TYPE_CHECKING:
    from mega_core.methods.base import Method

VERSION = 1
"""Part of every key; raise it when lines are made otherwise."""
UNEDITED = "unedited"
MODES = ("single", "batch", "sequential")
BY_DEFAULT = ("rome", "easyedit", "mega", "ripple", "mquake")
BESIDE = "ours"
"""Measured beside every other protocol: success is always shown forced and generated."""
MOST_LINE_BYTES = 16 * 2**20

Scored = tuple[str, str, float, int]
"""protocol, metric, value, n."""
Answered = tuple[str, str, str, str, str, float, bool, int]
"""protocol, metric, prompt, expected, said, value, counts, group."""


@dataclass(frozen=True, slots=True)
class Entrant:
    """A method with its parameters, or the unedited model."""

    label: str
    """"rome", "rome layer=3"."""
    method: MethodRef | None = None
    """None: the unedited model."""


@dataclass(frozen=True)
class Plan:
    """Everything that decides the numbers (step 1)."""

    model: ModelRef
    weights: str
    """Digest of the model's files."""
    entrants: tuple[Entrant, ...]
    """The unedited model first."""
    dataset: str
    """As summary.csv names it."""
    source: str
    cases_digest: str
    ids: tuple[str, ...]
    marks: tuple[str, ...]
    """A digest of each case, in the order of `ids`."""
    edits: tuple[int, ...]
    """How many edits each case makes."""
    protocols: tuple[str, ...]
    versions: tuple[int, ...]
    """Of the protocols."""
    mode: str = "single"
    every: int = 0
    """Sequential: edits between checkpoints; 0: only at the end."""
    seed: int = 0

    def as_plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = as_plain(self)
        assert isinstance(plain, dict)
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Plan:
        """What as_plain wrote. Raises KeyError, TypeError, ValueError or BadInput on anything else."""
        names = ("weights", "dataset", "source", "cases_digest", "mode")
        texts = {name: _is(plain[name], str) for name in names}
        return cls(
            model=ModelRef(**{name: _is(plain["model"][name], str) for name in ("name", "revision", "dtype")}),
            entrants=tuple(Entrant(_is(one["label"], str), _method(one["method"])) for one in plain["entrants"]),
            ids=tuple(_is(one, str) for one in plain["ids"]),
            marks=tuple(_is(one, str) for one in plain["marks"]),
            edits=tuple(_is(one, int) for one in plain["edits"]),
            protocols=tuple(_is(one, str) for one in plain["protocols"]),
            versions=tuple(_is(one, int) for one in plain["versions"]),
            every=_is(plain["every"], int),
            seed=_is(plain["seed"], int),
            **texts,
        )

    @property
    def digest(self) -> str:
        """Of all of it."""
        return digest(self.as_plain())

    def entrant(self, label: str) -> Entrant:
        """Raises KeyError."""
        return self._by_label[label]

    @cached_property
    def _by_label(self) -> dict[str, Entrant]:
        return {one.label: one for one in self.entrants}

    @cached_property
    def _heads(self) -> dict[str, str]:
        """What all lines of an entrant share."""
        about = {
            "version": VERSION,
            "asking": asking.VERSION,
            "model": self.model,
            "weights": self.weights,
            "protocols": [[name, version] for name, version in zip(self.protocols, self.versions, strict=True)],
            "mode": self.mode,
            "seed": self.seed,
        }
        return {one.label: digest({**about, "method": one.method}) for one in self.entrants}

    @cached_property
    def checkpoints(self) -> tuple[tuple[int, int], ...]:
        """(cases, edits) at which all cases so far are asked (step 3); one of them in batch mode, none in single."""
        made = list(accumulate(self.edits))
        if self.mode == "single" or not made:
            return ()
        if self.mode == "batch" or not self.every:
            return ((len(made), made[-1]),)
        before = [0, *made[:-1]]
        return tuple(
            (count, edits)
            for count, (edits, earlier) in enumerate(zip(made, before, strict=True), start=1)
            if edits // self.every > earlier // self.every or count == len(made)
        )

    @cached_property
    def _together(self) -> dict[int, str]:
        """Step -> digest of the cases that are edited by then."""
        return {step: digest(self.marks[:count]) for count, step in self.checkpoints}

    def steps_of(self, index: int) -> tuple[int, ...]:
        """The steps at which a case is asked."""
        if self.mode == "single":
            return (self.edits[index],)
        return tuple(step for count, step in self.checkpoints if index < count)

    def key(self, label: str, index: int, step: int) -> str:
        """Of a line (step 2)."""
        about = (self._heads[label], self.marks[index], str(step), self._together.get(step, ""))
        return sha256(":".join(about).encode()).hexdigest()[:32]

    def sequence(self, label: str, count: int) -> str:
        """Of the first `count` cases edited by an entrant, whatever the checkpoints."""
        return digest([self._heads[label], self.marks[:count]])

    def expected(self) -> Iterator[tuple[str, int, int, str]]:
        """(label, index of the case, step, key) of every line, entrant by entrant."""
        for entrant in self.entrants:
            for index in range(len(self.ids)):
                for step in self.steps_of(index):
                    yield entrant.label, index, step, self.key(entrant.label, index, step)

    def difference(self, other: Plan) -> str:
        """The first thing in which a later plan differs from this one, in words; "" where it only has more cases."""
        for name, words in (
            ("model", "model"), ("weights", "weights of the model"), ("dataset", "dataset"), ("mode", "mode"),
            ("every", "edits between checkpoints"), ("seed", "seed"), ("protocols", "protocols"),
            ("versions", "versions of the protocols"),
        ):  # fmt: skip
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"the {words}: {_words(mine)} there, {_words(theirs)} now"
        for mine, theirs in zip(self.entrants, other.entrants, strict=False):
            if mine != theirs:
                return f"a method: {_entrant(mine)} there, {_entrant(theirs)} now"
        if len(self.entrants) != len(other.entrants):
            return f"the number of methods: {len(self.entrants) - 1} there, {len(other.entrants) - 1} now"
        if len(other.marks) < len(self.marks):
            return f"the number of cases: {len(self.marks)} there, {len(other.marks)} now"
        for mine, theirs, name in zip(self.marks, other.marks, self.ids, strict=False):
            if mine != theirs:
                return f"the case {name!r}"
        return ""


@dataclass(frozen=True, slots=True)
class Line:
    """One entrant on one case at one step (step 2)."""

    key: str
    label: str
    case: str
    mode: str
    step: int
    """Edits made so far."""
    of: str
    """The unit of work it came from."""
    seconds: float = 0.0
    """Of preparing the edit; in a batch this case's share."""
    ask_seconds: float = 0.0
    """Of asking, alarms and perplexity included."""
    refused: str = ""
    """Why the method refused the edit, or what came of it; then it is scored as the unedited model."""
    left_out: str = ""
    """Why nobody was asked: a prompt that the model can't read."""
    alarms: tuple[str, ...] = ()
    """Those that were raised, a sentence each; "collapsed" before them where no numbers came back."""
    clean: bool = True
    """False: the model was found changed afterwards; the line doesn't count, nor an earlier one of its key."""
    device: str = ""
    scores: tuple[Scored, ...] = ()
    answers: tuple[Answered, ...] = ()
    """Kept at the last step only."""

    def text(self) -> str:
        """One line of JSON."""
        return json.dumps(as_plain(self), ensure_ascii=False, allow_nan=False, separators=(",", ":"))

    @classmethod
    def read(cls, text: str) -> Line:
        """What text() wrote. Raises ValueError on anything else."""
        try:
            if len(text) > MOST_LINE_BYTES:
                raise ValueError("too long")
            plain = json.loads(text)
            found = {name: _is(plain[name], kind) for name, kind in _FIELDS.items()}
            scores = tuple(_row(row, (str, str, float, int)) for row in _is(plain["scores"], list))
            answers = tuple(
                _row(row, (str, str, str, str, str, float, bool, int)) for row in _is(plain["answers"], list)
            )
            alarms = tuple(_is(one, str) for one in _is(plain["alarms"], list))
            return cls(**found, alarms=alarms, scores=scores, answers=answers)  # type: ignore[arg-type]
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"not a line of results ({type(error).__name__})") from error


_FIELDS: Mapping[str, type] = {
    "key": str, "label": str, "case": str, "mode": str, "step": int, "of": str, "seconds": float,
    "ask_seconds": float, "refused": str, "left_out": str, "clean": bool, "device": str,
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """A plan, its cases, and what is left out of it (step 4)."""

    plan: Plan
    cases: tuple[Case, ...]
    problems: tuple[tuple[int, str, str], ...] = ()
    """Line, record and reason of each record that the dataset leaves out."""
    left_out: tuple[tuple[str, str, int], ...] = ()
    """Protocol, reason, how many cases it has nothing to ask about."""
    unsupported: tuple[tuple[str, str], ...] = ()
    """Label and reason of each method that can't edit this model."""
    apart: int = 0
    """Cases dropped because another one asks about their subjects."""


def set_up(
    model: ModelRef,
    weights: str,
    methods: Sequence[Entrant],
    dataset: str,
    source: str,
    cases: Sequence[Case],
    *,
    protocols: Sequence[str] = (),
    mode: str = "single",
    every: int = 0,
    seed: int = 0,
    limit: int | None = None,
    apart: bool = False,
    problems: Sequence[tuple[int, str, str]] = (),
    unsupported: Sequence[tuple[str, str]] = (),
) -> Setup:
    """Step 4. The first `limit` cases count; `apart` passes over cases whose subjects another one names.

    Raises BadInput or UnknownName.
    """
    if mode not in MODES:
        raise UnknownName("mode", mode, MODES)
    if every < 0 or (every and mode != "sequential"):
        raise BadInput("every", f"{every} edits between checkpoints.", "It goes with the mode sequential, from 1 on.")
    if limit is not None and limit < 1:
        raise BadInput("limit", f"{limit} cases.", "Give 1 or more.")
    chosen, dropped = _apart(cases, limit) if apart else (tuple(cases)[:limit], 0)
    if not chosen:
        raise BadInput("dataset", "has no case.", "Choose another one.")
    names = _protocols(protocols, chosen)
    left_out: dict[tuple[str, str], int] = {}
    for name in names:
        for case in chosen:
            if reason := PROTOCOLS[name].needs(case):
                left_out[name, reason] = left_out.get((name, reason), 0) + 1
    asked = tuple(case for case in chosen if any(PROTOCOLS[name].needs(case) is None for name in names))
    if not asked:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out)
        raise BadInput("protocols", f"none has anything to ask about these cases ({reasons}).", "Choose others.")
    labels = [one.label for one in methods]
    if twice := [one for one in labels if labels.count(one) > 1]:
        raise BadInput("methods", f"{twice[0]} is there twice.", "Name each once.")
    marks = tuple(mark_of(case) for case in asked)
    plan = Plan(
        model=model,
        weights=weights,
        entrants=(Entrant(UNEDITED), *methods),
        dataset=dataset,
        source=source,
        cases_digest=digest(marks),
        ids=tuple(case.id for case in asked),
        marks=marks,
        edits=tuple(len(case.requests) for case in asked),
        protocols=names,
        versions=tuple(PROTOCOLS[name].version for name in names),
        mode=mode,
        every=every,
        seed=seed,
    )
    skipped = tuple((name, reason, count) for (name, reason), count in left_out.items())
    return Setup(plan, asked, tuple(problems), skipped, tuple(unsupported), dropped)


def controls(method: Method[Any]) -> Iterator[dict[str, object]]:
    """What to give a method to have each control that it offers: its gate always open, and its knob `control`."""
    knobs = {knob.name: knob for knob in method.knobs()}
    gated = "gate" in knobs and "always" in knobs["gate"].choices
    if gated:
        yield {"gate": "always"}
    if "control" in knobs:
        for name in knobs["control"].choices:
            if name != knobs["control"].default and not (gated and name == "always_on"):
                yield {"control": name}


def mark_of(case: Case) -> str:
    """A digest of everything in a case."""
    return digest(case)[:32]


def extended(plan: Plan, other: Plan) -> bool:
    """Whether the later plan `other` is this one with more cases."""
    return not plan.difference(other) and len(other.marks) > len(plan.marks)


def finite(value: float) -> float:
    """A number that JSON can hold: what is infinite or missing becomes 1e12 with its sign."""
    if isfinite(value):
        return float(value)
    return -1e12 if value == float("-inf") else 1e12


# Inside --------------------------------------------------------------------------------------------------------------


def _protocols(wanted: Sequence[str], cases: Sequence[Case]) -> tuple[str, ...]:
    """Those named, else those of BY_DEFAULT with something to ask; ours beside them, in the registry's order."""
    for name in wanted:
        PROTOCOLS[name]
    if len(set(wanted)) < len(wanted):
        raise BadInput("protocols", "names one twice.", "Name each once.")
    chosen = set(wanted) or {
        name for name in BY_DEFAULT if name in PROTOCOLS and any(PROTOCOLS[name].needs(case) is None for case in cases)
    }
    return tuple(name for name in PROTOCOLS.names() if name in chosen or name == BESIDE)


def _apart(cases: Sequence[Case], limit: int | None) -> tuple[tuple[Case, ...], int]:
    """The first cases of which none asks about a subject that another one edits, in their order; how many were passed.

    Greedy, ours: a case is dropped when it and one that is kept already meet.
    """
    kept: list[Case] = []
    subjects: list[str] = []
    texts: list[str] = []
    dropped = 0
    for case in cases:
        if limit is not None and len(kept) == limit:
            break
        own, text = [request.subject for request in case.requests], "\n".join(prompts_of(case))
        if any(one in text for one in subjects) or any(one in other for one in own for other in texts):
            dropped += 1
            continue
        kept.append(case)
        subjects += own
        texts.append(text)
    return tuple(kept), dropped


def prompts_of(case: Case) -> Iterator[str]:
    """Every prompt of a case."""
    for request in case.requests:
        yield from (request.prompt, *request.paraphrases, *request.neighbours)
    yield from case.attributes
    yield from case.generation_prompts
    for query in (*case.locality, *case.portability):
        yield query.prompt
    for test in case.tests:
        yield from (query.prompt for query in (*test.queries, *test.conditions))
    for chain in case.chains:
        yield from chain.questions
        yield from (text for hop in (*chain.hops, *chain.new_hops) for text in (hop.question, hop.cloze))


def _is(value: Any, kind: type) -> Any:
    """The value, if it is of this kind. Raises TypeError."""
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} instead of {kind.__name__}")
    return value


def _row(row: Any, kinds: Sequence[type]) -> tuple[Any, ...]:
    return tuple(_is(value, kind) for value, kind in zip(_is(row, list), kinds, strict=True))


def _method(plain: Any) -> MethodRef | None:
    if plain is None:
        return None
    params = tuple((_is(name, str), value) for name, value in plain["params"])
    if not all(value is None or isinstance(value, str | int | float) for _, value in params):
        raise TypeError("a parameter is not a plain value")
    return MethodRef(_is(plain["name"], str), _is(plain["version"], int), params)


def _entrant(one: Entrant) -> str:
    if one.method is None:
        return one.label
    return f"{one.label} ({', '.join(f'{name}={value}' for name, value in one.method.params)})"


def _words(value: object) -> str:
    if isinstance(value, ModelRef):
        return f"{value.name} {value.revision} {value.dtype}".replace("  ", " ")
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value)[:64]


def without_answers(line: Line) -> Line:
    """The line without what it was read off."""
    return replace(line, answers=())
