"""A person's own facts: a table (CSV, TSV) or JSON records with the same names.

1. `subject`, `target_new`, and `template` with {} or `prompt` with the subject in it.
2. Optional: `target_true`, `paraphrases`, `neighbours`, `relation`, `id`. Lists are JSON lists, or texts with |
   between.

Columns with other names are not read.
"""

from __future__ import annotations

import json

from mega_core.cases import Case
from mega_core.datasets.base import Format, Record, id_of, kind, template_of, text, text_or_none, texts
from mega_core.errors import BadInput
from mega_core.records import EditRequest

FORMAT = Format(
    "table",
    "Your own table",
    "CSV, TSV, JSON or JSON Lines with subject, template (or prompt), target_new and optional columns.",
    """subject,template,target_new,target_true,paraphrases,neighbours
Orrin Lighthouse,{} was built by,Ada Finch,Tomas Bray,The builder of Orrin Lighthouse was,Bray Hall was built by|...""",
)
NEEDED = (
    "Write JSON, or a table with the columns subject, template (or prompt), target_new and, if known, target_true, "
    "paraphrases, neighbours."
)
_LISTS = {"paraphrases": ("paraphrase",), "neighbours": ("neighbors", "neighbour", "neighbor")}


def fits(record: Record) -> bool:
    """Whether a record looks like this format."""
    return "subject" in record and "target_new" in record and ("template" in record or "prompt" in record)


def case(record: Record, number: int) -> Case:
    """One record as a case. Raises BadInput naming the field."""
    subject = text(record, "subject").strip()
    template = text_or_none(record, "template")
    if template is None:
        template = template_of(text(record, "prompt"), subject) if "prompt" in record else text(record, "template")
    return Case(
        id=id_of(record, number, "id", "case_id"),
        requests=(
            EditRequest(
                subject=subject,
                template=template,
                target_new=text(record, "target_new"),
                target_true=text_or_none(record, "target_true"),
                paraphrases=_list(record, "paraphrases"),
                neighbours=_list(record, "neighbours"),
            ),
        ),
        relation=text_or_none(record, "relation") or "",
    )


def _list(record: Record, name: str) -> tuple[str, ...]:
    """2."""
    key = next((key for key in (name, *_LISTS[name]) if record.get(key) is not None), name)
    value = record.get(key)
    if value is None:
        return ()
    if isinstance(value, list):
        return texts(record, key)
    if not isinstance(value, str):
        raise BadInput(key, f"is {kind(value)}, not a list.", "Write a list, or texts with | between.")
    if value.lstrip().startswith("["):
        try:
            listed = json.loads(value)
        except (ValueError, RecursionError):
            listed = None
        if isinstance(listed, list):
            return texts({key: listed}, key)
    return tuple(part.strip() for part in value.split("|") if part.strip())
