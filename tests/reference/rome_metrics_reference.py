"""ROME's scores computed plainly: one text at a time, the library's model called directly, full logits.

Uses nothing of the project. `model` and `tokenizer` are transformers' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import Any

import torch


def target_ids(tokenizer: Any, target: str) -> list[int]:
    return tokenizer(f" {target}", add_special_tokens=False)["input_ids"]


def text_ids(tokenizer: Any, prompt: str, target: str) -> list[int]:
    ids = tokenizer(prompt)["input_ids"] + target_ids(tokenizer, target)
    assert ids == tokenizer(f"{prompt} {target}")["input_ids"], "the border of prompt and target was merged"
    return ids


def target_logprobs(logits: torch.Tensor, ids: Sequence[int], n: int) -> tuple[float, bool]:
    """(mean log p, all are the argmax) of the last n ids; logits: (pos, vocab) of the whole text."""
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    places = range(len(ids) - n - 1, len(ids) - 1)
    found = [logprobs[place, ids[place + 1]].item() for place in places]
    best = [logprobs[place].argmax().item() == ids[place + 1] for place in places]
    return sum(found) / n, all(best)


def one_by_one(model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Of each (prompt, target), alone and without padding."""
    found = []
    for prompt, target in texts:
        ids = text_ids(tokenizer, prompt, target)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        found.append(target_logprobs(logits, ids, len(target_ids(tokenizer, target))))
    return found


def padded_left(model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """The same in one batch, padded on the left, with positions that begin at each text's first token."""
    rows = [text_ids(tokenizer, *text) for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    return [
        target_logprobs(own[width - len(row) :], row, len(target_ids(tokenizer, target)))
        for own, row, (_, target) in zip(logits, rows, texts, strict=True)
    ]


def scores(pairs: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """(log p new, log p true), both means per token, by kind of prompt -> the six metrics of one record."""
    found = {}
    kinds = (("edit", "E", 1), ("paraphrase", "P", 1), ("neighbourhood", "N", -1))
    for kind, letter, sign in kinds:
        if pairs.get(kind):
            margins = [sign * (new - true) for new, true in pairs[kind]]
            sizes = [sign * (exp(new) - exp(true)) for new, true in pairs[kind]]
            found[f"{letter}S"] = sum(margin > 0 for margin in margins) / len(margins)
            found[f"{letter}M"] = sum(sizes) / len(sizes)
    return found


def means(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """Over records, with S."""
    names = ("ES", "EM", "PS", "PM", "NS", "NM")
    listed = {name: [record[name] for record in records if name in record] for name in names}
    found = {name: sum(values) / len(values) for name, values in listed.items() if values}
    three = [found["ES"], found["PS"], found["NS"]]
    found["S"] = 3 / sum(1 / value for value in three) if min(three) > 0 else 0.0
    return found
