"""What a model would have said, written by hand: answers to questions without running one."""

from __future__ import annotations

from collections.abc import Mapping
from math import log

from mega_core.evaluation.asking import Told, Wanted
from mega_core.evaluation.looks import Context, NextToken
from mega_core.evaluation.protocols.base import Sheet
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter

SAID, OTHER = 0.6, 0.01
"""Probabilities of the token that is said, and of any other."""


def wanted_by(sheet: Sheet, base: Told | None = None) -> Wanted:
    wanted = Wanted()
    sheet.want(wanted, base)
    return wanted


def told_by(
    lm: ModelAdapter,
    sheet: Sheet,
    says: Mapping[str, str],
    texts: Mapping[str, str] | None = None,
    base: Told | None = None,
) -> Told:
    """Answers to what the sheet wants: `says` gives the most likely continuation of a prompt by tokens, `texts` the
    greedy text. A prompt without either gets the end of text."""
    wanted = wanted_by(sheet, base)
    best: dict[tuple[int, ...], int] = {}
    for prompt, text in says.items():
        row = tokens.with_target(lm.tokenizer, prompt, text)
        best |= {row.ids[:at]: row.ids[at] for at in range(row.target_start, len(row.ids))}
    found = {
        context: NextToken(
            best.get(context.ids, 0),
            (),
            {i: log(SAID if best.get(context.ids) == i else OTHER) for i in ids},
            {},
        )
        for context, ids in wanted.tokens.items()
    }
    return Told(found, {prompt: (texts or {}).get(prompt, "") for prompt in wanted.texts})


def contexts_of(lm: ModelAdapter, *prompts: str) -> set[Context]:
    listed = [tokens.prompt_ids(lm.tokenizer, prompt) for prompt in prompts]
    return {Context(ids, len(ids)) for ids in listed}
