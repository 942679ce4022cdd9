"""RippleEdits (Cohen, Biran, Yoran, Globerson, Geva; TACL 2024, arXiv 2307.12976): an edit with tests on six axes.

1. `edit`: the new fact as a sentence, Wikidata's ids of subject, relation and object, and the original fact.
2. Six lists of tests, each with `test_queries`, `test_condition` (OR, AND) and `condition_queries`. One axis is spelled
   "Relation_Specifity" in places; both are read.
3. The files name subject and object by id only. Their names are found in the record's own texts, without a request:
   a. the object: what follows a query's prompt in the sentence; an answer of a query whose target has its id; what a
      test of forgetting excepts (", which is not ..., is"); what follows the last verb of what the new and the original
      sentence begin alike with; what follows the last verb of the sentence ("is", "are", "follows", "is followed by").
   b. the subject: an answer of a query whose target has its id; the longest run of words that all prompts about it
      share with the sentence, from its first capitalised word to the verb; without such prompts, the sentence's
      longest run between two capitalised words.
   Whatever is found: the template filled with the subject is the sentence without its object.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from mega_core.cases import AXES, AxisTest, Case, Query
from mega_core.datasets.base import (
    Format,
    Record,
    id_of,
    inner,
    objects,
    template_of,
    text,
    text_or_none,
    texts,
    within,
)
from mega_core.errors import BadInput
from mega_core.records import EditRequest

FORMAT = Format(
    "ripple",
    "RippleEdits",
    "One edit as a sentence with tests on six axes, each with its conditions.",
    """{"edit": {"prompt": "The builder of Orrin Lighthouse is Ada Finch.", "subject_id": "Q1", "relation": "BUILDER",
  "target_id": "Q2", "original_fact": {"prompt": "The builder of Orrin Lighthouse is Tomas Bray."}},
 "Relation_Specificity": [{"test_queries": [{"prompt": "The town of Orrin Lighthouse is",
   "answers": [{"value": "Tarn", "aliases": ["Tarn-on-Sea"]}], "query_type": "regular", "subject_id": "Q1"}],
  "test_condition": "OR", "condition_queries": []}],
 "Logical_Generalization": [], "Subject_Aliasing": [], "Compositionality_I": [], "Compositionality_II": [],
 "Forgetfulness": []}""",
)
SPELLINGS = {"Relation_Specifity": "RS", **{name: axis for axis, name in AXES.items()}}
_FUNCTION_WORDS = {
    *("a", "an", "the", "of", "in", "on", "at", "by", "for", "from", "to", "with", "and", "as", "which", "who"),
    *("whom", "that", "is", "are", "was", "were", "has", "have", "had", "be"),
}


_VERBS = {"is", "are", "has", "was", "were", "which", "won", "plays", "follows"}
_VERB = re.compile(r"\b(?:is followed by|follows|is|are) ")
_EXCEPT = re.compile(r", which is not (.+), (?:is|are)$")
_LONGEST, _COMPARED = 20, 50
"""Words of a subject, and prompts that are compared, at most."""


class _Asked(NamedTuple):
    axis: str
    query: Query
    subject_id: str | None
    targets: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    """Of each target."""


def fits(record: Record) -> bool:
    """Whether a record looks like this format."""
    edit = record.get("edit")
    return isinstance(edit, dict) and "prompt" in edit or any(axis in record for axis in SPELLINGS)


def case(record: Record, number: int) -> Case:
    """One record as a case. Raises BadInput naming the field."""
    edit = inner(record, "edit")
    asked: list[_Asked] = []
    tests = tuple(_tests(record, asked))
    said = _sentence(text(edit, "prompt", "edit."))
    original = None
    if edit.get("original_fact") is not None:
        fact = inner(edit, "original_fact", "edit.")
        original = _sentence(text(fact, "prompt", "edit.original_fact."))
    prompt, new = _split(said, original, _identity(edit.get("target_id")), asked)
    subject = _subject(prompt, _identity(edit.get("subject_id")), asked)
    true = original[len(prompt) :].strip() if original is not None and original.startswith(f"{prompt} ") else None
    return Case(
        id=id_of(record, number, "case_id", "id"),
        requests=(EditRequest(subject, template_of(prompt, subject, "edit.prompt"), new, true),),
        relation=text_or_none(edit, "relation", "edit.") or "",
        tests=tests,
    )


# 2. Tests ------------------------------------------------------------------------------------------------------------


def _tests(record: Record, asked: list[_Asked]) -> Iterator[AxisTest]:
    for key, axis in SPELLINGS.items():
        for i, test in enumerate(objects(record, key, optional=True)):
            inside = f"{key}[{i}]."
            condition = test.get("test_condition", "OR")
            if condition not in ("OR", "AND"):
                raise BadInput(f"{inside}test_condition", "is neither OR nor AND.", "Write one of them.")
            queries = list(_queries(test, "test_queries", inside, axis))
            conditions = list(_queries(test, "condition_queries", inside, axis))
            asked += [*queries, *conditions]
            yield AxisTest(
                axis, tuple(one.query for one in queries), condition == "OR", tuple(one.query for one in conditions)
            )


def _queries(test: Record, key: str, inside: str, axis: str) -> Iterator[_Asked]:
    for i, query in enumerate(objects(test, key, inside, optional=key == "condition_queries")):
        at = f"{inside}{key}[{i}]."
        answers = []
        for j, answer in enumerate(objects(query, "answers", at)):
            there = f"{at}answers[{j}]."
            answers.append(
                (text_or_none(answer, "value", there) or "", *texts(answer, "aliases", there, optional=True))
            )
        hop = "second_hop_target_ids" if query.get("second_hop_target_ids") is not None else "target_ids"
        yield _Asked(
            axis,
            Query(text(query, "prompt", at), tuple(answers), text_or_none(query, "query_type", at) or ""),
            _identity(query.get("subject_id")),
            _identities(query.get(hop)),
            tuple(answers),
        )


# 3. Names ------------------------------------------------------------------------------------------------------------


def _identity(value: Any) -> str | None:
    """An id of Wikidata, or a number in its place; the first of a list. Only a clue: anything else counts as none."""
    if isinstance(value, list) and value:
        value = value[0]
    return str(value) if isinstance(value, str | int | float) and str(value) else None


def _identities(value: Any) -> tuple[str, ...]:
    return tuple(_identity(one) or "" for one in value) if isinstance(value, list) else ()


def _sentence(prompt: str) -> str:
    return prompt.strip().removesuffix(".").strip()


def _named(identity: str | None, asked: Sequence[_Asked]) -> Iterator[str]:
    """Names of answers whose target has this id, the usual name of each first."""
    if identity is not None:
        for one in asked:
            if len(one.targets) == len(one.names):
                for target, names in zip(one.targets, one.names, strict=True):
                    if target == identity:
                        yield from filter(None, map(str.strip, names))


def _split(said: str, original: str | None, target: str | None, asked: Sequence[_Asked]) -> tuple[str, str]:
    """3a. (prompt, object) of the new fact's sentence."""
    begins = [one.query.prompt for one in asked if said.startswith(f"{one.query.prompt} ")]
    if begins:
        prompt = max(begins, key=len)
        return prompt, said[len(prompt) :].strip()
    excepted = (found.group(1) for one in asked if one.axis == "FN" and (found := _EXCEPT.search(one.query.prompt)))
    for name in (*_named(target, asked), *excepted):
        if said.endswith(f" {name}"):
            return said[: -len(name)].strip(), name
    for shared in ([_alike(said, original)] if original is not None else []) + [said]:
        verbs = list(_VERB.finditer(shared))
        if verbs and said[verbs[-1].end() :].strip():
            return said[: verbs[-1].end()].strip(), said[verbs[-1].end() :].strip()
    raise BadInput("edit.prompt", "where the new object begins can't be told.", 'End the sentence "... is <object>.".')


def _alike(a: str, b: str) -> str:
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]


def _subject(prompt: str, identity: str | None, asked: Sequence[_Asked]) -> str:
    """3b."""
    named = [name for name in _named(identity, asked) if within(name, prompt) >= 0]
    if named:
        return max(named, key=len)
    about = (one.query.prompt for one in asked if one.subject_id == identity is not None and one.axis != "SA")
    others = list(islice(dict.fromkeys(other for other in about if other != prompt), _COMPARED))
    words = prompt.split()
    found = set()
    spans = ((i, j) for i in range(len(words)) for j in range(i + 1, min(i + _LONGEST, len(words)) + 1))
    for i, j in spans:
        run = " ".join(words[i:j])
        if others and all(within(run, other) >= 0 for other in others):
            found.add(_trimmed(words, i, j))
        elif not others and _capital(words, i) and _capital(words, j - 1):
            found.add((i, j))
    best = max(found, key=lambda run: (_capital(words, run[0]), run[1] - run[0], run[1]), default=(0, 0))
    if best[0] == best[1]:
        raise BadInput("edit.prompt", "which words name its subject can't be told.", "Leave the record out.")
    return " ".join(words[best[0] : best[1]])


def _trimmed(words: Sequence[str], start: int, end: int) -> tuple[int, int]:
    """The run from its first capitalised word to the verb after its last, without function words at its ends."""
    capitals = [i for i in range(start, end) if _capital(words, i)]
    after = capitals[-1] if capitals else start
    end = next((i for i in range(after, end) if words[i] in _VERBS), end)
    while end > start and words[end - 1].casefold() in _FUNCTION_WORDS:
        end -= 1
    if capitals:
        return capitals[0], end
    while start < end and words[start].casefold() in _FUNCTION_WORDS:
        start += 1
    return start, end


def _capital(words: Sequence[str], i: int) -> bool:
    """Whether a word is written like a name; the first of a sentence is, unless it is "The"."""
    return i < len(words) and not words[i].islower() and not (i == 0 and words[i].casefold() in _FUNCTION_WORDS)
