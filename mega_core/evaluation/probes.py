"""The metrics of SAKE's and MEGA's papers on facts that the tables know; the same probes for every method.

1. An edit (s, r, o -> o*) of a known fact is asked about in nine ways. A probe is one prompt with the objects that
   count as success:
     Acc   the edit prompt: o*
     Gen   prompt forms never trained with this subject: o*
     Spec  other subjects whose object is o, in the edit's words: p(o) > p(o*)
     RS    other relations of s, in forms never trained with s: still their own object
     DI    the edit prompt, o*, a doubt that names no object, the edit prompt again: o*
     DII   the same with a doubt that insists on o: o*
     CI    a second relation asked through the edited one ("the currency of the country where s lies"): that of o*
     CII   a prompt about another subject that leads to s: o*
     SA    the edit prompt with another name of s: o*
2. The unedited model settles which probes count (`baseline`): in Spec those where p(o) > p(o*), in RS, CI, CII and SA
   those whose condition it answers: RS the original object, CI the second relation of o*, CII that the other subject
   leads to s, SA the true object under the other name.
3. Success is judged by the most likely next token, as in the papers: it begins the object. Where the object and the one
   it competes with begin alike, the tokens up to the first that differs are judged (our choice; teacher forcing).
   Beside it `exact`: the greedy answer is the whole object. In Spec that is the true object.
4. CI, CII and SA count only while the edit itself took: p(o*) > p(o) after the edit prompt.
5. Means: first within an edit, then over the edits that have the metric, then over metrics (`means`, `average`).

A known fact's RS, CI, CII and SA come from `embedded.related`, any other case's from its own tests (`of_case`; the
first question of each, as SAKE's code does). A request that no table knows has Acc, DI and DII, Gen from its
paraphrases and Spec from its neighbours. Probes judge; no method may read them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import exp
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from mega_core.cases import AxisTest, Case, Chain, Query
from mega_core.embedded import corpus, facts, related
from mega_core.embedded.related import fact_of
from mega_core.evaluation import looks
from mega_core.evaluation.looks import Context, NextToken
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.records import EditRequest

if TYPE_CHECKING:
    from mega_core.changes import Change

METRICS: Mapping[str, str] = {
    "Acc": "the edit prompt gives the new object",
    "Gen": "prompt forms never seen with this subject give the new object",
    "Spec": "other subjects with the same object keep it",
    "RS": "other relations of the subject keep their objects",
    "DI": "the new object survives a doubt that names no object",
    "DII": "the new object survives a doubt that insists on the old one",
    "CI": "questions that pass through the edited fact follow the new object",
    "CII": "questions about others that lead to the subject give the new object",
    "SA": "other names of the subject give the new object",
}
"""Metric -> what it asks, in the order they are shown."""

ONLY_IF_TAKEN = frozenset({"CI", "CII", "SA"})
MOST = 8
"""At most this many probes of a metric per edit; a stable hash chooses."""


class Question(NamedTuple):
    """A prompt, and the objects that answer it."""

    prompt: str
    accept: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """One prompt about one edit."""

    metric: str
    """A name in METRICS."""
    prompt: str
    accept: tuple[str, ...]
    """Objects that are a success; the first is the one whose probability is compared."""
    reject: str | None
    """The object it competes with, where there is one."""
    given: Question | None = None
    """What the unedited model must answer for this probe to count."""
    also: tuple[Question, ...] = ()
    """What else it must answer."""

    @property
    def conditions(self) -> tuple[Question, ...]:
        """All that the unedited model must answer."""
        return (*((self.given,) if self.given is not None else ()), *self.also)


class Tally(NamedTuple):
    """How one metric went for one edit."""

    successes: int
    n: int
    """Probes that counted; 0 where the edit did not take and the metric needs that (step 4)."""
    exact: int
    """Of n: the whole object was the greedy answer."""


@dataclass(frozen=True, slots=True)
class Base:
    """What the unedited model says to the probes of one edit."""

    counts: tuple[bool, ...]
    """One per probe: whether it counts (step 2)."""
    answers: pd.DataFrame
    """As `ask` gives them."""


def probes_of(request: EditRequest, most: int = MOST) -> tuple[Probe, ...]:
    """Every probe of one edit, at most `most` per metric."""
    return _probes(request, related.tests_of(request), related.chains_of(request), most)


def of_case(case: Case, most: int = MOST) -> tuple[Probe, ...]:
    """Every probe of a case's first edit: RS, CI, CII and SA from the case's tests, the others as in `probes_of`.

    Tests without an answer, and those of axes that are no metric here (LG, FN), have none.
    """
    return _probes(case.request, case.tests, case.chains, most)


def _probes(request: EditRequest, tests: Sequence[AxisTest], chains: Sequence[Chain], most: int) -> tuple[Probe, ...]:
    fact = fact_of(request)
    new, old = request.target_new, request.target_true or (fact.object if fact else None)
    listed = [Probe("Acc", request.prompt, (new,), old), *_doubts(request, old)]
    if fact is None:
        listed += [Probe("Gen", prompt, (new,), old) for prompt in request.paraphrases]
        listed += [Probe("Spec", prompt, (old,), new) for prompt in request.neighbours if old is not None]
    else:
        listed += [
            Probe("Gen", fact.prompt(form), (new,), old) for form in fact.templates_held_out if form != request.template
        ]
        listed += [
            Probe("Spec", facts.fill(request.template, other.subject), (fact.object,), new)
            for other in facts.neighbours(fact, most)
        ]
    listed += _of_tests(tests, chains, new, old)
    chosen: list[Probe] = []
    for metric in METRICS:
        own = {probe.prompt: probe for probe in listed if probe.metric == metric}
        ranked = sorted(own, key=lambda prompt: facts.unit_hash(request.subject, request.template, prompt))
        chosen += [own[prompt] for prompt in ranked[:most]]
    return tuple(chosen)


def ask(lm: ModelAdapter, probes: Sequence[Probe]) -> pd.DataFrame:
    """What the model says now, one row per probe.

    Columns: metric, prompt, accept, reject, success (by first token, step 3), exact, p_accept and p_reject
    (probability of the first accepted and of the rejected object's telling token), said (the most likely token).
    """
    reads = [Read.of(lm, probe.prompt, probe.accept, probe.reject) for probe in probes]
    found = _distributions(lm, reads)
    rows = []
    for probe, read in zip(probes, reads, strict=True):
        good, bad = read.chances(found)
        rows.append(
            {
                "metric": probe.metric,
                "prompt": probe.prompt,
                "accept": probe.accept[0],
                "reject": probe.reject,
                "success": good > bad if probe.metric == "Spec" else read.begun(found),
                "exact": read.whole(found),
                "p_accept": good,
                "p_reject": bad,
                "said": tokens.token_strings(lm.tokenizer, [found[read.context].best])[0],
            }
        )
    return pd.DataFrame(rows, columns=_COLUMNS)


def baseline(lm: ModelAdapter, probes: Sequence[Probe]) -> Base:
    """The unedited model's answers, and which probes count by them. Call it without any change applied."""
    answers = ask(lm, probes)
    asked = list(dict.fromkeys(question for probe in probes for question in probe.conditions))
    reads = [Read.of(lm, question.prompt, question.accept, None) for question in asked]
    found = _distributions(lm, reads)
    knows = {question: read.begun(found) for question, read in zip(asked, reads, strict=True)}
    return Base(
        tuple(
            bool(answers["success"].iloc[i]) if probe.metric == "Spec" else all(knows[one] for one in probe.conditions)
            for i, probe in enumerate(probes)
        ),
        answers,
    )


def score(lm: ModelAdapter, probes: Sequence[Probe], base: Base, change: Change | None = None) -> dict[str, Tally]:
    """Metric -> successes, n, exact for one edit, with the change applied here or by the caller."""
    with change.applied(lm) if change is not None else nullcontext():
        answers = ask(lm, probes)
    return tally(answers, base)


def tally(answers: pd.DataFrame, base: Base) -> dict[str, Tally]:
    """The counting of `score`, for answers already at hand. Metrics without a probe that counts are absent.

    Raises ValueError when the answers are not to the probes of `base`.
    """
    if list(answers["prompt"]) != list(base.answers["prompt"]):
        raise ValueError("the answers are to other probes than the base's: ask both the same tuple of probes")
    edit = answers[answers["metric"] == "Acc"].iloc[0]
    taken = bool(edit["p_accept"] > edit["p_reject"])  # p_reject is 0 where no object is known
    found: dict[str, Tally] = {}
    for metric, own in answers[list(base.counts)].groupby("metric", sort=False):
        name = str(metric)
        if name in ONLY_IF_TAKEN and not taken:
            found[name] = Tally(0, 0, 0)
        else:
            found[name] = Tally(int(own["success"].sum()), len(own), int(own["exact"].sum()))
    return {name: found[name] for name in METRICS if name in found}


def means(scores: Sequence[Mapping[str, Tally]], exact: bool = False) -> dict[str, float]:
    """Metric -> mean over edits of the edit's own share of successes (or of exact answers).

    An edit without probes of a metric leaves that metric's mean alone. A metric that no edit could be judged on because
    none took is 0, so that failing can't raise the average; one that no edit has a probe for is absent.
    """
    found: dict[str, float] = {}
    for metric in METRICS:
        present = [edit[metric] for edit in scores if metric in edit]
        shares = [(one.exact if exact else one.successes) / one.n for one in present if one.n]
        if present:
            found[metric] = sum(shares) / len(shares) if shares else 0.0
    return found


def average(scores: Sequence[Mapping[str, Tally]]) -> float:
    """The mean over the metrics that `means` gives, each counting once. NaN without any."""
    found = means(scores)
    return sum(found.values()) / len(found) if found else float("nan")


# The probes of each metric -------------------------------------------------------------------------------------------


def _doubts(request: EditRequest, old: str | None) -> Iterator[Probe]:
    """DI and DII: said, doubted, asked again."""
    said = f"{request.prompt} {request.target_new}. "
    for text, names in corpus.OBJECTIONS:
        if old is not None or not names:
            doubt = text.replace("{other}", old or "")
            yield Probe("DII" if names else "DI", f"{said}{doubt}{request.prompt}", (request.target_new,), old)


def _of_tests(tests: Sequence[AxisTest], chains: Sequence[Chain], new: str, old: str | None) -> Iterator[Probe]:
    """RS, CI, CII and SA. What they compete with: in CII and SA the original object, in CI the chain's old answer."""
    before = {prompt: chain.answers[0] for chain in chains for prompt in chain.questions if chain.answers}
    for test in tests:
        query = test.queries[0]
        accept = _accepted(query)
        if test.axis not in METRICS or not accept:
            continue
        given = [Question(one.prompt, _accepted(one)) for one in test.conditions if one.answers]
        reject = None
        if test.axis == "RS":
            given = given or [Question(query.prompt, accept)]
        elif test.axis == "CI":
            reject = before.get(query.prompt)
        elif new in accept:
            reject = old
        if reject in accept:
            reject = None
        yield Probe(test.axis, query.prompt, accept, reject, given[0] if given else None, tuple(given[1:]))


def _accepted(query: Query) -> tuple[str, ...]:
    """Every name of every answer."""
    return tuple(dict.fromkeys(name for names in query.answers for name in names))


# Reading the model ---------------------------------------------------------------------------------------------------

_COLUMNS = ["metric", "prompt", "accept", "reject", "success", "exact", "p_accept", "p_reject", "said"]


@dataclass(frozen=True, slots=True)
class Read:
    """A prompt with its objects as token rows."""

    accept: tuple[tokens.Row, ...]
    reject: tokens.Row | None

    @classmethod
    def of(cls, lm: ModelAdapter, prompt: str, accept: Sequence[str], reject: str | None) -> Read:
        """Objects without leading space. Raises BadInput on a prompt or object that the model can't read."""
        rows = tuple(tokens.with_target(lm.tokenizer, prompt, text) for text in accept)
        return cls(rows, None if reject is None else tokens.with_target(lm.tokenizer, prompt, reject))

    @property
    def context(self) -> Context:
        """The prompt."""
        return _at(self.accept[0], 0)

    def tells(self, row: tokens.Row) -> int:
        """Which token of an accepted object is the first that the rejected one does not share (step 3)."""
        if self.reject is None:
            return 0
        return next((i for i, (a, b) in enumerate(zip(row.target, self.reject.target, strict=False)) if a != b), 0)

    def wanted(self) -> Iterator[tuple[Context, int]]:
        """Contexts to ask, each with a token whose probability is needed."""
        for row in (*self.accept, *((self.reject,) if self.reject else ())):
            for i, token in enumerate(row.target):
                yield _at(row, i), token

    def begun(self, found: Mapping[Context, NextToken]) -> bool:
        """Whether the most likely tokens begin one of the accepted objects."""
        return any(self._said(found, row, self.tells(row) + 1) for row in self.accept)

    def whole(self, found: Mapping[Context, NextToken]) -> bool:
        """Whether the greedy answer is one of the accepted objects."""
        return any(self._said(found, row, len(row.target)) for row in self.accept)

    def chances(self, found: Mapping[Context, NextToken]) -> tuple[float, float]:
        """Probability of the telling token of the first accepted object and of the rejected one (0 without)."""
        i = self.tells(self.accept[0])
        first, other = self.accept[0], self.reject
        good = exp(found[_at(first, i)].logprob[first.target[i]])
        return good, exp(found[_at(other, i)].logprob[other.target[i]]) if other is not None else 0.0

    @staticmethod
    def _said(found: Mapping[Context, NextToken], row: tokens.Row, count: int) -> bool:
        return all(found[_at(row, i)].best == row.target[i] for i in range(count))


def _at(row: tokens.Row, i: int) -> Context:
    """The text before the i-th token of the row's object."""
    return Context(row.ids[: row.target_start + i], row.target_start)


def _distributions(lm: ModelAdapter, reads: Sequence[Read]) -> dict[Context, NextToken]:
    wanted: dict[Context, list[int]] = defaultdict(list)
    for read in reads:
        for context, token in read.wanted():
            wanted[context].append(token)
    return looks.distributions(lm, wanted)
