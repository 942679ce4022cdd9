"""zsRE in MEND's schema (Mitchell, Lin, Bosselut, Finn, Manning; ICLR 2022, arXiv 2110.11309): edited questions.

1. `src` is the question about `subject`, `alt` the new answer, `answers` the true ones, `rephrase` a paraphrase.
2. `loc` and `loc_ans` are an unrelated question from Natural Questions, here without its label "nq question: ".
3. Where the true answer equals the new one, the request has no true answer.
4. EasyEdit's `portability` ("New Question", "New Answer"), where a file has it.
`pred` (a model's answer) and `cond` (the record in one line) are not read.
"""

from __future__ import annotations

from mega_core.cases import Case, Query
from mega_core.datasets.base import (
    Format,
    Record,
    id_of,
    inner,
    one_or_more,
    other_than,
    template_of,
    text,
    text_or_none,
)
from mega_core.records import EditRequest

FORMAT = Format(
    "zsre",
    "zsRE",
    "One edited question with a rephrasing and an unrelated question, as in MEND's files.",
    """{"subject": "Orrin Lighthouse", "src": "Who built Orrin Lighthouse?", "alt": "Ada Finch",
 "answers": ["Tomas Bray"], "rephrase": "By whom was Orrin Lighthouse built?",
 "loc": "nq question: when was the tarn bridge opened", "loc_ans": "1931"}""",
)
LABEL = "nq question: "


def fits(record: Record) -> bool:
    """Whether a record looks like this format."""
    return "src" in record and "alt" in record


def case(record: Record, number: int) -> Case:
    """One record as a case. Raises BadInput naming the field."""
    subject, question = text(record, "subject").strip(), text(record, "src")
    new, true = text(record, "alt"), one_or_more(record, "answers")
    rephrase, unrelated = text_or_none(record, "rephrase"), text_or_none(record, "loc")
    portability: tuple[Query, ...] = ()
    if record.get("portability") is not None:
        asked = inner(record, "portability")
        answer = text(asked, "New Answer", "portability.")
        portability = (Query(text(asked, "New Question", "portability."), ((answer,),), "portability"),)
    return Case(
        id=id_of(record, number, "case_id"),
        requests=(
            EditRequest(
                subject=subject,
                template=template_of(question, subject, "src"),
                target_new=new,
                target_true=other_than(new, true),
                paraphrases=(rephrase,) if rephrase else (),
            ),
        ),
        locality=(
            (Query(unrelated.removeprefix(LABEL), ((text(record, "loc_ans"),),), "nq"),)
            if unrelated is not None
            else ()
        ),
        portability=portability,
    )
