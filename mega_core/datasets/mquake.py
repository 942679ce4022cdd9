"""MQuAKE (Zhong, Wu, Manning, Potts, Chen; EMNLP 2023, arXiv 2305.14795): edits with multi-hop questions.

The files CF, CF-3k, CF-3k-v2 and T are written alike.
1. `requested_rewrite`: one to four edits that are made together.
2. `questions`: the multi-hop question in three forms, `answer` and `new_answer` with aliases.
3. `single_hops` and `new_single_hops`: the hops before and after the edits, each as question and cloze.
An edit's own question stands among the new hops; it is checked and not kept twice.
"""

from __future__ import annotations

from mega_core.cases import Case, Chain, Hop
from mega_core.datasets.base import Format, Record, id_of, objects, text, text_or_none, texts
from mega_core.datasets.counterfact import request_of
from mega_core.errors import BadInput

FORMAT = Format(
    "mquake",
    "MQuAKE",
    "One to four edits with a multi-hop question in three forms and its hops before and after.",
    """{"case_id": 3, "requested_rewrite": [{"prompt": "{} works for", "subject": "Ada Finch", "relation_id": "P108",
  "target_new": {"str": "Orrin Works"}, "target_true": {"str": "Bray and Sons"},
  "question": "Whom does Ada Finch work for?"}],
 "questions": ["In which town is the employer of Ada Finch?"],
 "answer": "Velm", "answer_alias": [], "new_answer": "Tarn", "new_answer_alias": ["Tarn-on-Sea"],
 "single_hops": [
  {"question": "Whom does Ada Finch work for?", "cloze": "Ada Finch works for",
   "answer": "Bray and Sons", "answer_alias": []},
  {"question": "Where is Bray and Sons?", "cloze": "Bray and Sons is in", "answer": "Velm", "answer_alias": []}],
 "new_single_hops": [
  {"question": "Whom does Ada Finch work for?", "cloze": "Ada Finch works for",
   "answer": "Orrin Works", "answer_alias": []},
  {"question": "Where is Orrin Works?", "cloze": "Orrin Works is in",
   "answer": "Tarn", "answer_alias": ["Tarn-on-Sea"]}]}""",
)


def fits(record: Record) -> bool:
    """Whether a record looks like this format."""
    return isinstance(record.get("requested_rewrite"), list) or "new_single_hops" in record


def case(record: Record, number: int) -> Case:
    """One record as a case with one chain. Raises BadInput naming the field."""
    rewrites = objects(record, "requested_rewrite")
    if not rewrites:
        raise BadInput("requested_rewrite", "is empty.", "Give at least one edit, or leave the record out.")
    for i, rewrite in enumerate(rewrites):
        text_or_none(rewrite, "question", f"requested_rewrite[{i}].")
    chain = Chain(
        questions=texts(record, "questions"),
        hops=_hops(record, "single_hops"),
        new_hops=_hops(record, "new_single_hops"),
        answers=(text(record, "answer"), *texts(record, "answer_alias", optional=True)),
        new_answers=(text(record, "new_answer"), *texts(record, "new_answer_alias", optional=True)),
    )
    return Case(
        id=id_of(record, number, "case_id"),
        requests=tuple(request_of(rewrite, f"requested_rewrite[{i}].") for i, rewrite in enumerate(rewrites)),
        relation=text_or_none(rewrites[0], "relation_id", "requested_rewrite[0].") or "",
        chains=(chain,),
    )


def _hops(record: Record, key: str) -> tuple[Hop, ...]:
    found = []
    for i, hop in enumerate(objects(record, key)):
        inside = f"{key}[{i}]."
        answers = (text(hop, "answer", inside), *texts(hop, "answer_alias", inside, optional=True))
        found.append(Hop(text(hop, "question", inside), text(hop, "cloze", inside), answers))
    return tuple(found)
