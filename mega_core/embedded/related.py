"""What follows from an edit of a known fact, and what must not: tests and two-hop questions from the tables.

1. `tests_of`, one question each, in the words of RippleEdits (Cohen, Biran, Yoran, Globerson, Geva; 2023, arXiv
   2307.12976). A test counts if the unedited model answers its condition.
     RS   other relations of the subject, in forms never trained with it; condition: it knows them
     CI   a second relation asked through the edited one; condition: it knows that of the new object
     CII  questions about others that lead to the subject; condition: it knows that they lead there
     SA   the edit prompt with another name of the subject; condition: it knows the original object under that name
2. `chains_of`: the two-hop questions behind CI and CII, with their hops before and after the edit (MQuAKE).
3. Two-hop questions are asked in the forms kept for judging (`Hop.templates_judge`).

No torch here. These judge; no method may read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from mega_core import cases
from mega_core.cases import AxisTest, Chain, Query
from mega_core.embedded import facts
from mega_core.records import EditRequest


def fact_of(request: EditRequest) -> facts.Fact | None:
    """The known fact that this request rewrites, or None."""
    for fact in facts.load().by_subject.get(request.subject, ()):
        if request.template in (*fact.trained, *fact.templates_held_out) and request.target_true in (None, fact.object):
            return fact
    return None


def names(name: str) -> tuple[str, ...]:
    """The name, then its other names."""
    return (name, *facts.load().aliases.get(name, ()))


def tests_of(request: EditRequest) -> tuple[AxisTest, ...]:
    """The tests of an edit (1); none when no table knows the fact."""
    fact = fact_of(request)
    if fact is None:
        return ()
    new = request.target_new
    return (*_same_subject(fact), *_through(fact, new), *_towards(fact, new), *_other_names(fact, request))


def chains_of(request: EditRequest) -> tuple[Chain, ...]:
    """The two-hop questions through the edited fact, then those towards it (2); none when no table knows the fact."""
    fact = fact_of(request)
    if fact is None:
        return ()
    edited, new = _hop(fact, prompt=request.prompt), request.target_new
    rewritten = _hop(fact, new, prompt=request.prompt)
    found = [
        Chain(_asked(hop), (edited, _hop(facts.find(hop.bridge, hop.second))), (rewritten, _hop(then)),
              names(hop.answer), names(then.object))
        for hop, then in _hops_through(fact, new)
    ]  # fmt: skip
    for hop in _hops_towards(fact):
        first = _hop(facts.find(hop.subject, hop.first))
        found.append(Chain(_asked(hop), (first, edited), (first, rewritten), names(fact.object), names(new)))
    return tuple(found)


# 1. Tests ------------------------------------------------------------------------------------------------------------


def _test(axis: str, prompt: str, answers: tuple[str, ...], condition: Query) -> AxisTest:
    return AxisTest(axis, (Query(prompt, (answers,)),), conditions=(condition,))


def _same_subject(fact: facts.Fact) -> Iterator[AxisTest]:
    """RS. Left out: relations that the edit speaks of too (a landmark's city and its country)."""
    relations = facts.load().relations
    through = relations[fact.relation].derived
    for other in facts.siblings(fact):
        derived = relations[other.relation].derived
        bound = (derived and derived[0] == fact.relation) or (through and through[0] == other.relation)
        if not bound:
            answers = names(other.object)
            for form in other.templates_held_out:
                yield _test("RS", other.prompt(form), answers, Query(other.prompt(form), (answers,)))


def _through(fact: facts.Fact, new: str) -> Iterator[AxisTest]:
    """CI: two hops whose first is the edited fact, where the new object leads elsewhere."""
    for hop, then in _hops_through(fact, new):
        answers = names(then.object)
        for prompt in _asked(hop):
            yield _test("CI", prompt, answers, Query(then.prompt(_form(then)), (answers,)))


def _towards(fact: facts.Fact, new: str) -> Iterator[AxisTest]:
    """CII: two hops whose second is the edited fact."""
    for hop in _hops_towards(fact):
        first = facts.find(hop.subject, hop.first)
        for prompt in _asked(hop):
            yield _test("CII", prompt, (new,), Query(first.prompt(_form(first)), (names(hop.bridge),)))


def _other_names(fact: facts.Fact, request: EditRequest) -> Iterator[AxisTest]:
    """SA."""
    for alias in facts.load().aliases.get(fact.subject, ()):
        prompt = facts.fill(request.template, alias)
        yield _test("SA", prompt, (request.target_new,), Query(prompt, (names(fact.object),)))


# 2. Chains -----------------------------------------------------------------------------------------------------------


def _hops_through(fact: facts.Fact, new: str) -> Iterator[tuple[facts.Hop, facts.Fact]]:
    """Two hops that begin with the fact, each with the second step from the new object."""
    known = facts.load().by_key
    for hop in _hops_by_step()[0].get((fact.subject, fact.relation), ()):
        if (new, hop.second) in known and known[new, hop.second].object != hop.answer:
            yield hop, known[new, hop.second]


def _hops_towards(fact: facts.Fact) -> Sequence[facts.Hop]:
    """Two hops that end with the fact."""
    return _hops_by_step()[1].get((fact.subject, fact.relation), ())


@lru_cache(maxsize=1)
def _hops_by_step() -> tuple[Mapping[tuple[str, str], list[facts.Hop]], Mapping[tuple[str, str], list[facts.Hop]]]:
    """The two hops by (subject, relation) of their first, and of their second step."""
    first: dict[tuple[str, str], list[facts.Hop]] = {}
    second: dict[tuple[str, str], list[facts.Hop]] = {}
    for hop in facts.hops():
        first.setdefault((hop.subject, hop.first), []).append(hop)
        second.setdefault((hop.bridge, hop.second), []).append(hop)
    return first, second


def _asked(hop: facts.Hop) -> tuple[str, ...]:
    """3."""
    return tuple(hop.prompt(form) for form in hop.templates_judge)


def _hop(fact: facts.Fact, answer: str | None = None, *, prompt: str | None = None) -> cases.Hop:
    """One step. The embedded models continue sentences and answer no questions: both forms are beginnings (ours)."""
    cloze = fact.prompt(_form(fact)) if prompt is None else prompt
    others = [text for form in fact.trained if (text := fact.prompt(form)) != cloze]
    question = min(others, key=lambda text: facts.unit_hash(fact.subject, fact.relation, text, "question"))
    return cases.Hop(question, cloze, names(answer or fact.object))


def _form(fact: facts.Fact) -> str:
    """One trained template, chosen by the fact alone."""
    return min(fact.templates_edit, key=lambda form: facts.unit_hash(fact.subject, fact.relation, form, "probe"))
