"""The embedded models' own facts as cases, with everything the tables know about an edit.

1. Requests: "builtin" or "builtin:reported" are the edits that results are reported on, "builtin:SEED" draws others;
   one per subject.
2. Tests (RS, CI, CII, SA) and two-hop chains: `embedded.related`.
3. Attributes: other subjects whose object is the new one, in the edit's words. Generation prompts: forms trained with
   the subject, the edited relation's before the others'.

How many: 100 unless told (ours), as in docs/results.md.
"""

from __future__ import annotations

from collections.abc import Iterator

from mega_core.cases import Case
from mega_core.datasets.base import Format
from mega_core.embedded import examples, facts, related
from mega_core.errors import BadInput
from mega_core.records import EditRequest

FORMAT = Format(
    "builtin",
    "Built in",
    "Edits of facts that the embedded models know, with all tests that their tables allow.",
    "builtin:reported, or builtin:SEED to draw other edits",
)
COUNT, MOST = 100, 1000
ATTRIBUTES, GENERATED = 10, 8
TRIES = 2000
"""Draws without a new subject after which there is taken to be none left."""


def cases(which: str = "reported", limit: int | None = None) -> tuple[Case, ...]:
    """The cases of "reported", or of a seed. Raises BadInput on another name, or when there are fewer than `limit`."""
    count = COUNT if limit is None else limit
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST:
        raise BadInput("limit", f"{count!r} built-in edits.", f"Ask for 1 to {MOST}.")
    if which == "reported":
        requests = examples.reported(count)
    elif which.isascii() and which.isdecimal() and len(which) < 10:
        requests = list(_drawn(int(which), count))
    else:
        raise BadInput(
            "dataset", f"there are no built-in edits {which[:40]!r}.", "Write builtin, or builtin:7 for seed 7."
        )
    return tuple(case_of(request, i) for i, request in enumerate(requests, 1))


def _drawn(seed: int, count: int) -> Iterator[EditRequest]:
    taken: set[str] = set()
    idle = 0
    for request in examples.candidates(seed, min_neighbours=1):
        idle += 1
        if request.subject not in taken:
            taken.add(request.subject)
            idle = 0
            yield request
        if len(taken) == count:
            return
        if idle > TRIES:
            raise BadInput("limit", f"there are only {len(taken)} built-in edits.", "Ask for fewer.")


def case_of(request: EditRequest, number: int) -> Case:
    """A request of `examples` as a case. Raises BadInput when no table knows its fact."""
    fact = related.fact_of(request)
    if fact is None:
        raise BadInput("request", "is about no fact of the tables.", "Take one from the built-in edits.")
    same = facts.load().by_answer.get((fact.relation, request.target_new), ())
    others = [other for other in same if other.subject != fact.subject]
    others.sort(key=lambda other: facts.unit_hash(fact.subject, fact.relation, other.subject, "attribute"))
    forms = [fact.prompt(form) for form in fact.trained if form != request.template]
    forms += [other.prompt(other.templates_edit[0]) for other in facts.siblings(fact)]
    return Case(
        id=str(number),
        requests=(request,),
        relation=fact.relation,
        attributes=tuple(facts.fill(request.template, other.subject) for other in others[:ATTRIBUTES]),
        generation_prompts=tuple(forms[:GENERATED]),
        tests=related.tests_of(request),
        chains=related.chains_of(request),
    )
