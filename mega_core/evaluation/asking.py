"""One round of questions for many protocols: everything they want to know of a model, asked together.

1. Each protocol says what it wants: next-token distributions at contexts, greedy continuations of prompts, and sampled
   ones (`Wanted`). The same context or prompt wanted twice is asked once.
2. `ask` runs the batches that answer all of it (`Told`).
3. Each protocol reads its numbers off the answers. What is read needs no model.

No torch here until something is asked, so that forms can list protocols.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mega_core.events import Reporter, silent, stage

if TYPE_CHECKING:
    from mega_core.evaluation.looks import Context, NextToken
    from mega_core.models import tokens
    from mega_core.models.adapter import ModelAdapter

VERSION = 1
"""Part of the key of everything that is asked; raise it when the numbers are made otherwise."""
NEW_TOKENS = 32
"""Longest greedy continuation; it ends before with the end of text (ours; RippleEdits reads about 30)."""
SAMPLED_TOKENS, SAMPLED_FROM = 100, 5
"""Longest sampled text, its prompt included, and from how many of the most likely tokens it is drawn (as ROME)."""


class Wanted:
    """What has to be known of a model; protocols add to it (step 1)."""

    def __init__(self) -> None:
        self.tokens: dict[Context, dict[int, None]] = defaultdict(dict)
        """Context -> ids whose log-probability is wanted there."""
        self.likeliest: dict[Context, int] = {}
        """Context -> how many of the most likely ids are wanted there."""
        self.texts: dict[str, None] = {}
        """Prompts to continue, in the order they were asked for."""
        self.samples: dict[tuple[str, int], None] = {}
        """(prompt, seed) to continue by sampling."""

    def next(self, context: Context, ids: Sequence[int] = (), likeliest: int = 0) -> None:
        """The distribution at a context: of these ids, and of the most likely ones."""
        self.tokens[context].update(dict.fromkeys(ids))
        if likeliest > self.likeliest.get(context, 0):
            self.likeliest[context] = likeliest

    def target(self, candidate: Candidate) -> None:
        """Everything about a candidate after its prompt, token by token (teacher forcing)."""
        for context, token in candidate.steps():
            self.next(context, (token,))

    def text(self, prompt: str) -> None:
        """The greedy continuation of a prompt."""
        self.texts[prompt] = None

    def sample(self, prompt: str, seed: int) -> None:
        """A sampled continuation of a prompt; another seed, another one."""
        self.samples[prompt, seed] = None


@dataclass(frozen=True)
class Told:
    """What a model said (step 2)."""

    next: Mapping[Context, NextToken]
    texts: Mapping[str, str]
    """Prompt -> its greedy continuation, without the prompt."""
    perplexity: float | None = None
    """Of a fixed text, where whoever asked has measured it."""
    raised: tuple[str, ...] | None = None
    """The alarms that the change raised, where whoever asked has looked; a sentence each."""
    samples: Mapping[tuple[str, int], str] = field(default_factory=dict)
    """(prompt, seed) -> its sampled continuation, without the prompt."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An object after a prompt, as tokens."""

    row: tokens.Row

    @classmethod
    def of(cls, lm: ModelAdapter, prompt: str, target: str) -> Candidate:
        """`target` without leading space; spacing is the tokenizer's affair."""
        from mega_core.models import tokens

        return cls(tokens.with_target(lm.tokenizer, prompt, target))

    def context(self, step: int = 0) -> Context:
        """The text before the step-th token of the object; step 0 is the prompt."""
        from mega_core.evaluation.looks import Context

        return Context(self.row.ids[: self.row.target_start + step], self.row.target_start)

    def steps(self) -> list[tuple[Context, int]]:
        """(context, the object's token there), in order."""
        return [(self.context(step), token) for step, token in enumerate(self.row.target)]

    def logprobs(self, told: Told) -> list[float]:
        """log p of each of the object's tokens after the prompt and the tokens before it, nats."""
        return [told.next[context].logprob[token] for context, token in self.steps()]

    def mean_logprob(self, told: Told) -> float:
        """The mean of `logprobs`: minus what ROME and MEMIT call the candidate's nll."""
        found = self.logprobs(told)
        return sum(found) / len(found)

    def hits(self, told: Told) -> list[bool]:
        """For each of the object's tokens: whether it is the most likely one there."""
        return [told.next[context].best == token for context, token in self.steps()]


def ask(lm: ModelAdapter, wanted: Wanted, report: Reporter = silent) -> Told:
    """Answer everything that is wanted (step 2). The model is asked as it is now.

    Raises ActionableError when the model's numbers are not finite, BadInput on a prompt it can't read.
    """
    from mega_core.evaluation import looks

    plain = {context: tuple(ids) for context, ids in wanted.tokens.items() if context not in wanted.likeliest}
    found = looks.distributions(lm, plain, report=report, ranks=False) if plain else {}
    by_count: dict[int, dict[Context, tuple[int, ...]]] = defaultdict(dict)
    for context, count in wanted.likeliest.items():
        by_count[count][context] = tuple(wanted.tokens[context])
    for count, contexts in by_count.items():
        found |= looks.distributions(lm, contexts, top=count, report=report, ranks=False)
    texts = continuations(lm, tuple(wanted.texts), report)
    return Told(found, texts, samples=samples(lm, tuple(wanted.samples), report) if wanted.samples else {})


def continuations(lm: ModelAdapter, prompts: Sequence[str], report: Reporter = silent) -> dict[str, str]:
    """Prompt -> its greedy continuation, at most NEW_TOKENS long; prompts of similar length run together."""
    from mega_core.evaluation.looks import ROWS_GENERATED_AT_ONCE

    listed = sorted(prompts, key=len)
    chunks = [listed[i : i + ROWS_GENERATED_AT_ONCE] for i in range(0, len(listed), ROWS_GENERATED_AT_ONCE)]
    texts: dict[str, str] = {}
    with stage(report, "texts", total=len(chunks)) as step:
        for chunk in chunks:
            texts.update(zip(chunk, lm.generate(chunk, NEW_TOKENS), strict=True))
            step()
    return texts


def samples(
    lm: ModelAdapter, asked: Sequence[tuple[str, int]], report: Reporter = silent
) -> dict[tuple[str, int], str]:
    """(prompt, seed) -> a continuation drawn from the SAMPLED_FROM most likely tokens, to SAMPLED_TOKENS in total.

    The random numbers of a text depend on its prompt and seed only, not on what is asked for beside it.
    """
    from mega_core.evaluation import sampling
    from mega_core.evaluation.looks import ROWS_GENERATED_AT_ONCE
    from mega_core.models import tokens

    room = {prompt: SAMPLED_TOKENS - len(tokens.prompt_ids(lm.tokenizer, prompt)) for prompt, _ in asked}
    listed = sorted(asked, key=lambda one: -room[one[0]])
    chunks = [listed[i : i + ROWS_GENERATED_AT_ONCE] for i in range(0, len(listed), ROWS_GENERATED_AT_ONCE)]
    texts: dict[tuple[str, int], str] = {}
    with stage(report, "samples", total=len(chunks)) as step:
        for chunk in chunks:
            prompts = [prompt for prompt, _ in chunk]
            choosers = [sampling.TopK(SAMPLED_FROM, room[prompt], prompt, seed) for prompt, seed in chunk]
            longest = max(0, *(room[prompt] for prompt in prompts))
            texts.update(zip(chunk, lm.generate(prompts, longest, choosers), strict=True))
            step()
    return texts


# Counting ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt behind a metric."""

    metric: str
    prompt: str
    expected: str
    """What would be right; for a comparison both objects."""
    said: str
    """What the model said: its most likely token, or its text."""
    value: float
    """What it adds: 1 for a success, a share, a magnitude."""
    counts: bool = True
    """False: asked and shown, but left out of the numbers, because a condition does not hold."""
    group: int = 0
    """Rows of a metric that count together, where its `combine` is "all" or "any"."""
    eligible: bool = True
    """False: the unedited model fails its condition, so that no method could make it count. A metric of which a case
    has only such rows is not asked about there."""


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one case."""

    metric: str
    value: float
    """0 where nothing counted."""
    n: int
    """How many prompts, or groups of prompts, counted: value * n is the numerator."""
