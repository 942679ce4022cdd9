"""What a model says, written by hand: distributions and texts for the prompts of a sheet."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any

from mega_core.evaluation.asking import Candidate, Told, Wanted
from mega_core.evaluation.looks import Context, NextToken
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter

ELSE = 2
"""The id that a model says where it says nothing expected."""


class Script:
    """Answers as they are told."""

    def __init__(self, lm: ModelAdapter) -> None:
        self.lm = lm
        self.best: dict[Context, int] = {}
        self.top: dict[Context, tuple[int, ...]] = {}
        self.logprob: dict[Context, dict[int, float]] = {}
        self.texts: dict[str, str] = {}

    def says(self, prompt: str, target: str, hits: Sequence[bool] = (), probs: Sequence[float] = ()) -> None:
        """The target's tokens: which of them are the most likely one, and how likely they are."""
        steps = Candidate.of(self.lm, prompt, target).steps()
        assert {len(hits), len(probs)} <= {0, len(steps)}, f"{target!r} has {len(steps)} tokens"
        for (context, token), hit in zip(steps, hits, strict=False):
            self.best[context] = token if hit else self.best.get(context, ELSE)
        for (context, token), prob in zip(steps, probs, strict=False):
            self.logprob.setdefault(context, {})[token] = log(prob)

    def most_likely(self, prompt: str, probs: dict[str, float]) -> None:
        """The next tokens after a prompt, most likely first: word -> probability."""
        ids = [tokens.target_ids(self.lm.tokenizer, prompt, word)[0] for word in probs]
        context = Candidate.of(self.lm, prompt, "x").context()
        self.top[context] = tuple(ids)
        self.best[context] = ids[0]
        self.logprob.setdefault(context, {}).update(zip(ids, map(log, probs.values()), strict=True))

    def told(self, sheet: Any, base: Told | None = None, **more: Any) -> Told:
        """Everything that a sheet wants; what the script doesn't say is unlikely, and text is empty."""
        wanted = Wanted()
        sheet.want(wanted, base)
        found = {}
        for context, ids in wanted.tokens.items():
            known = self.logprob.get(context, {})
            top = self.top.get(context, ())
            logprob = {i: known.get(i, log(1e-6)) for i in (*ids, *top)}
            found[context] = NextToken(self.best.get(context, ELSE), top, logprob, {})
        return Told(found, {prompt: self.texts.get(prompt, "") for prompt in wanted.texts}, **more)


def by_metric(rows: Sequence[Any]) -> dict[str, list[Any]]:
    """Metric -> its rows."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(row.metric, []).append(row)
    return found
