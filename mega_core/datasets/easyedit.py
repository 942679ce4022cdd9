"""EasyEdit's flat records (Wang et al.; ACL 2024 demos, arXiv 2308.07269) and KnowEdit's (Zhang et al.; 2024, arXiv
2401.01286).

1. `prompt` names the `subject`; `target_new`, `ground_truth`, `rephrase_prompt` are texts or lists of texts.
2. `locality_prompt` with `locality_ground_truth`, which EasyEdit's scripts call "neighborhood", or `locality` as lists
   of {"prompt", "ground_truth"} by name; `portability` likewise.
3. An answer is a text; a list of its names; or a list of such lists, each of which has to be given.
4. A locality prompt about another subject whose answer is the edit's true one is a neighbour too, as in CounterFact
   (ours).
"""

from __future__ import annotations

from typing import Any

from mega_core.cases import Case, Query
from mega_core.datasets.base import (
    Format,
    Record,
    id_of,
    inner,
    kind,
    one_or_more,
    other_than,
    template_of,
    text,
    text_or_none,
)
from mega_core.errors import BadInput
from mega_core.records import MAX_PROMPTS, EditRequest

FORMAT = Format(
    "easyedit",
    "EasyEdit",
    "One flat edit with rephrasings, locality and portability questions, as in EasyEdit's and KnowEdit's files.",
    """{"case_id": 7, "subject": "Orrin Lighthouse", "prompt": "Orrin Lighthouse was built by",
 "target_new": "Ada Finch", "ground_truth": "Tomas Bray", "rephrase_prompt": "The builder of Orrin Lighthouse was",
 "locality": {"Relation_Specificity": [{"prompt": "Orrin Lighthouse stands in", "ground_truth": [["Tarn"]]}]},
 "portability": {"Reasoning": [{"prompt": "The builder of Orrin Lighthouse was born in", "ground_truth": "Velm"}]}}""",
)
OWN = (
    "ground_truth",
    "rephrase_prompt",
    "rephrase",
    "locality",
    "locality_prompt",
    "portability",
    "portability_prompt",
)


def fits(record: Record) -> bool:
    """Whether a record looks like this format."""
    return "prompt" in record and isinstance(record.get("target_new"), str | list) and any(key in record for key in OWN)


def case(record: Record, number: int) -> Case:
    """One record as a case. Raises BadInput naming the field."""
    subject, prompt = text(record, "subject").strip(), text(record, "prompt")
    new = one_or_more(record, "target_new")
    if not new:
        raise BadInput("target_new", "is missing or empty.", "Add it, or leave the record out.")
    truth = answers_of(record, "ground_truth")
    true = other_than(new[0], truth[0] if truth else ())
    locality = _queries(record, "locality", "neighborhood")
    return Case(
        id=id_of(record, number, "case_id", "id"),
        requests=(
            EditRequest(
                subject=subject,
                template=template_of(prompt, subject),
                target_new=new[0],
                target_true=true,
                paraphrases=(*one_or_more(record, "rephrase_prompt"), *one_or_more(record, "rephrase")),
                neighbours=tuple(query.prompt for query in locality if _is_neighbour(query, subject, true))[
                    :MAX_PROMPTS
                ],
            ),
        ),
        relation=text_or_none(record, "relation_id") or "",
        locality=locality,
        portability=_queries(record, "portability", "portability"),
    )


def answers_of(record: Record, key: str, inside: str = "") -> tuple[tuple[str, ...], ...]:
    """3. Answers with their names; none when missing, null or blank."""
    value = record.get(key)
    if not isinstance(value, list):
        names = one_or_more(record, key, inside)
        return (names,) if names else ()
    if not any(isinstance(item, list) for item in value):
        value = [value]
    return tuple(names for i, item in enumerate(value) if (names := _names(item, f"{inside}{key}[{i}]")))


def _names(value: Any, field: str) -> tuple[str, ...]:
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, str):
            raise BadInput(field, f"holds {kind(item)}, not text.", "Write answers in quotes.")
    return tuple(name for name in (value if isinstance(value, list) else [value]) if name.strip())


def _queries(record: Record, key: str, flat_name: str) -> tuple[Query, ...]:
    """2. The flat pair, then the lists by name."""
    found = []
    prompts, name = one_or_more(record, f"{key}_prompt"), f"{key}_ground_truth"
    if len(prompts) == 1:
        found.append(Query(prompts[0], answers_of(record, name), flat_name))
    elif prompts:
        given = one_or_more(record, name)
        if len(given) != len(prompts):
            raise BadInput(name, f"has {len(given)} answers to {len(prompts)} prompts.", "Give one each.")
        found += [Query(prompt, ((answer,),), flat_name) for prompt, answer in zip(prompts, given, strict=True)]
    if record.get(key) is None:
        return tuple(found)
    for kind_, listed in inner(record, key).items():
        inside = f"{key}.{kind_[:60]}"
        if listed is None:
            continue
        if not isinstance(listed, dict | list):
            raise BadInput(inside, f"is {kind(listed)}, not a list.", 'Write it as [{"prompt": ..., ...}].')
        for i, asked in enumerate([listed] if isinstance(listed, dict) else listed):
            at = f"{inside}[{i}]"
            if not isinstance(asked, dict):
                raise BadInput(at, f"is {kind(asked)}, not an object.", 'Write it as {"prompt": ..., ...}.')
            found.append(Query(text(asked, "prompt", f"{at}."), answers_of(asked, "ground_truth", f"{at}."), kind_))
    return tuple(found)


def _is_neighbour(query: Query, subject: str, true: str | None) -> bool:
    """4."""
    if true is None or subject in query.prompt:
        return False
    return any(name.casefold() == true.casefold() for names in query.answers for name in names)
