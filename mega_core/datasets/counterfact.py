"""CounterFact (Meng, Bau, Andonian, Belinkov; NeurIPS 2022, arXiv 2202.05262): one counterfactual edit per record.

1. `requested_rewrite`: subject, prompt with {}, new and true object, the relation's id.
2. `paraphrase_prompts`, `neighborhood_prompts` (same relation and true object, other subjects), `attribute_prompts`
   (subjects whose object is the new one), `generation_prompts`.
"""

from __future__ import annotations

from mega_core.cases import Case
from mega_core.datasets.base import Format, Record, id_of, inner, text, text_or_none, texts
from mega_core.records import EditRequest

FORMAT = Format(
    "counterfact",
    "CounterFact",
    "One edit with paraphrases, neighbours, attribute and generation prompts, as in ROME's files.",
    """{"case_id": 7, "requested_rewrite": {"prompt": "{} was built by", "subject": "the Orrin Lighthouse",
 "relation_id": "P84", "target_new": {"str": "Ada Finch"}, "target_true": {"str": "Tomas Bray"}},
 "paraphrase_prompts": ["The builder of the Orrin Lighthouse was"],
 "neighborhood_prompts": ["Bray Hall was built by"], "attribute_prompts": ["Finch House was built by"],
 "generation_prompts": ["The Orrin Lighthouse is known for"]}""",
)


def fits(record: Record) -> bool:
    """Whether a record looks like this format."""
    return isinstance(record.get("requested_rewrite"), dict)


def case(record: Record, number: int) -> Case:
    """One record as a case. Raises BadInput naming the field."""
    rewrite = inner(record, "requested_rewrite")
    return Case(
        id=id_of(record, number, "case_id"),
        requests=(request_of(rewrite, "requested_rewrite.", record),),
        relation=text_or_none(rewrite, "relation_id", "requested_rewrite.") or "",
        attributes=texts(record, "attribute_prompts", optional=True),
        generation_prompts=texts(record, "generation_prompts", optional=True),
    )


def request_of(rewrite: Record, inside: str, record: Record | None = None) -> EditRequest:
    """1. The rewrite of CounterFact and MQuAKE; `record` holds its paraphrases and neighbours, where it has some."""
    paraphrases = texts(record, "paraphrase_prompts", optional=True) if record is not None else ()
    neighbours = texts(record, "neighborhood_prompts", optional=True) if record is not None else ()
    new, true = inner(rewrite, "target_new", inside), rewrite.get("target_true")
    return EditRequest(
        subject=text(rewrite, "subject", inside),
        template=text(rewrite, "prompt", inside),
        target_new=text(new, "str", f"{inside}target_new."),
        target_true=None
        if true is None
        else text(inner(rewrite, "target_true", inside), "str", f"{inside}target_true."),
        paraphrases=paraphrases,
        neighbours=neighbours,
    )
