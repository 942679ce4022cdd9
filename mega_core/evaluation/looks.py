"""What the model says: the same questions, put to the unedited and to the edited model.

1. A context is the beginning of a text as token ids: a prompt, or a prompt followed by the first tokens of a candidate.
2. Every context is asked once for its next token. A prompt that begins another context of its own is read off there (no
   token sees what follows it), so a prompt and its candidates share rows, and only what is needed passes the head.
3. Teacher forcing: log p(candidate | prompt) is the sum over its tokens of log p(token | context so far).
4. Generations are greedy and see no target: they show what 3 can't, the text a person would get.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from typing import NamedTuple

import pandas as pd
import torch

from mega_core import frames
from mega_core.errors import ActionableError
from mega_core.events import Reporter, silent, stage
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.records import EditRequest

VERSION = 1
"""Part of the key under which the unedited model's looks are kept; raise it whenever the numbers change."""

TOKENS_AT_ONCE = 4096
LOGITS_AT_ONCE = 2**25
WIDE = 48
"""Tokens from which on a batch keeps to rows of at least half of them."""
TOP = 10
NEW_TOKENS = 20
GENERATED_PROMPTS = 2
"""Of the paraphrases, and of the neighbours; the edit prompt always is."""
ROWS_GENERATED_AT_ONCE = 32


class Context(NamedTuple):
    """The beginning of a text."""

    ids: tuple[int, ...]
    start: int
    """Where the prompt ends. A steered model answers a prompt otherwise than the same tokens inside a longer one."""


@dataclass(frozen=True, slots=True)
class NextToken:
    """A context's next-token distribution, reduced to what was asked."""

    best: int
    """The id with the greatest logit."""
    top: tuple[int, ...]
    """The most likely ids, greatest first."""
    logprob: Mapping[int, float]
    """id -> log-probability (nats), for the ids asked and those in `top`."""
    rank: Mapping[int, int]
    """id -> 1 + how many ids are more likely, for the same ids; empty where ranks were not asked for."""


@dataclass(frozen=True, slots=True)
class _Question:
    """How likely is this candidate after this prompt?"""

    case: int
    kind: str
    prompt: str
    candidate: str
    row: tokens.Row

    @property
    def context(self) -> Context:
        """The prompt."""
        return self.at(self.row.target_start)

    def at(self, position: int) -> Context:
        """The row up to, and without, this position."""
        return Context(self.row.ids[:position], self.row.target_start)


def look(
    lm: ModelAdapter, requests: Sequence[EditRequest], state: str, report: Reporter = silent
) -> dict[str, pd.DataFrame]:
    """Every frame of this file: `answers`, `next_tokens` and `generations`."""
    questions = list(_questions(lm, requests))
    found = _ask(lm, questions, report)
    return {
        "answers": _answers(lm, questions, found, state),
        "next_tokens": _next_tokens(lm, questions, found, state),
        "generations": generations(lm, requests, state, report),
    }


def answers(lm: ModelAdapter, requests: Sequence[EditRequest], state: str, report: Reporter = silent) -> pd.DataFrame:
    """The frame `answers`: new and true object after every prompt of every request."""
    questions = list(_questions(lm, requests))
    return _answers(lm, questions, _ask(lm, questions, report), state)


def next_tokens(
    lm: ModelAdapter, requests: Sequence[EditRequest], state: str, report: Reporter = silent
) -> pd.DataFrame:
    """The frame `next_tokens`: the edit prompts' ten most likely tokens, and the first token of each object."""
    questions = [question for question in _questions(lm, requests) if question.kind == "edit"]
    return _next_tokens(lm, questions, _ask(lm, questions, report), state)


def generations(
    lm: ModelAdapter,
    requests: Sequence[EditRequest],
    state: str,
    report: Reporter = silent,
    max_new_tokens: int = NEW_TOKENS,
) -> pd.DataFrame:
    """The frame `generations`: greedy continuations of the edit prompt, two paraphrases and two neighbours."""
    wanted = [
        (case, kind, prompt)
        for case, request in enumerate(requests)
        for kind, prompts in _prompts(request)
        for prompt in prompts[:GENERATED_PROMPTS]
    ]
    prompts = list(dict.fromkeys(prompt for _, _, prompt in wanted))
    chunks = [prompts[i : i + ROWS_GENERATED_AT_ONCE] for i in range(0, len(prompts), ROWS_GENERATED_AT_ONCE)]
    texts: dict[str, str] = {}
    with stage(report, "generations", total=len(chunks)) as step:
        for chunk in chunks:
            texts.update(zip(chunk, lm.generate(chunk, max_new_tokens), strict=True))
            step()
    rows: list[dict[str, object]] = [
        {"state": state, "case": case, "prompt_kind": kind, "prompt": prompt, "text": texts[prompt]}
        for case, kind, prompt in wanted
    ]
    return frames.from_rows(rows, "generations")


def prompt_tokens(lm: ModelAdapter, requests: Sequence[EditRequest]) -> pd.DataFrame:
    """The frame `tokens`: how the model reads the edit prompts, and which tokens are the subject."""
    rows: list[dict[str, object]] = []
    for case, request in enumerate(requests):
        labels = tokens.token_strings(lm.tokenizer, tokens.prompt_ids(lm.tokenizer, request.prompt))
        first, end = tokens.subject_span(lm.tokenizer, request.template, request.subject)
        rows += [
            {"case": case, "position": position, "token": label, "is_subject": first <= position < end}
            for position, label in enumerate(labels)
        ]
    return frames.from_rows(rows, "tokens")


def most_likely(lm: ModelAdapter, prompt: str, count: int = TOP) -> tuple[tuple[str, float], ...]:
    """The next tokens of any prompt with their probabilities, most likely first."""
    ids = tokens.prompt_ids(lm.tokenizer, prompt)
    context = Context(ids, len(ids))
    found = distributions(lm, {context: ()}, top=count)[context]
    return tuple(
        (label, exp(found.logprob[i]))
        for i, label in zip(found.top, tokens.token_strings(lm.tokenizer, found.top), strict=True)
    )


def distributions(
    lm: ModelAdapter,
    wanted: Mapping[Context, Collection[int]],
    top: int = 0,
    report: Reporter = silent,
    ranks: bool = True,
) -> dict[Context, NextToken]:
    """Next-token distributions at each context, for the ids wanted there and the `top` most likely (step 2).

    A rank is a pass over the vocabulary per id: whoever reads none leaves them out.
    Raises ActionableError when the model's numbers are not finite.
    """
    batches = list(_batches(_rows(wanted), lm.vocab_size))
    found: dict[Context, NextToken] = {}
    with stage(report, "answers", total=len(batches)) as step, torch.no_grad():
        for batch in batches:
            found.update(_read(lm, batch, wanted, top, ranks))
            step()
    return found


def _rows(contexts: Iterable[Context]) -> dict[Context, list[Context]]:
    """Row to run -> the contexts read off it, each the beginning of that row; longest first."""
    listed = sorted(set(contexts), key=lambda context: (-len(context.ids), context))
    holder: dict[Context, Context] = {}
    rows: dict[Context, list[Context]] = {}
    for context in listed:
        row = holder.get(context)
        if row is None:
            row = context
            rows[row] = []
            for n in range(row.start, len(row.ids) + 1):
                holder.setdefault(Context(row.ids[:n], row.start), row)
        rows[row].append(context)
    return rows


def _batches(rows: Mapping[Context, list[Context]], vocab: int) -> Iterator[dict[Context, list[Context]]]:
    """Rows of similar length together, within TOKENS_AT_ONCE and LOGITS_AT_ONCE (a single row always runs).

    A short row does not join a wide batch: padding it would take longer than another forward.
    """
    batch: dict[Context, list[Context]] = {}
    width = asked = 0
    for row, contexts in rows.items():
        too_wide = max(width, len(row.ids)) * (len(batch) + 1) > TOKENS_AT_ONCE
        if batch and (
            too_wide or (width > WIDE and 2 * len(row.ids) <= WIDE) or (asked + len(contexts)) * vocab > LOGITS_AT_ONCE
        ):
            yield batch
            batch, width, asked = {}, 0, 0
        batch[row] = contexts
        width, asked = max(width, len(row.ids)), asked + len(contexts)
    if batch:
        yield batch


def _read(
    lm: ModelAdapter,
    rows: Mapping[Context, list[Context]],
    wanted: Mapping[Context, Collection[int]],
    top: int,
    ranks: bool,
) -> Iterator[tuple[Context, NextToken]]:
    """Run one batch and read every context's distribution off it."""
    batch = tokens.pack(lm.tokenizer, [row.ids for row in rows], lm.device, [row.start for row in rows])
    places = [(row, context) for row, contexts in enumerate(rows.values()) for context in contexts]
    at_row = torch.tensor([row for row, _ in places])
    at_position = torch.tensor([len(context.ids) - 1 for _, context in places])
    logits = lm.logits_at(batch, at_row, at_position).float()  # (n, vocab)
    partition = logits.logsumexp(-1)  # (n,)
    if not torch.isfinite(partition).all():
        raise ActionableError(
            f"{lm.name} gives probabilities that are not finite numbers.",
            "Use a weaker edit, or load the model as float32.",
        )
    best = logits.argmax(-1)  # (n,)
    likely = logits.topk(min(max(top, 1), logits.shape[-1])).indices  # (n, top)
    asked = [list(dict.fromkeys(wanted[context])) for _, context in places]
    most = max(map(len, asked))
    padded = torch.tensor([ids + [0] * (most - len(ids)) for ids in asked], dtype=torch.int64).reshape(len(places), -1)
    ids = torch.cat((padded.to(logits.device), likely), dim=1)  # (n, m)
    picked = logits.gather(1, ids)  # (n, m)
    logprob = picked.double() - partition.double()[:, None]
    # Column by column: all at once would hold (n, m, vocab).
    counted = picked.T if ranks else ()
    rank = [((logits > column[:, None]).sum(-1) + 1).tolist() for column in counted]  # (m, n)
    columns = [*range(most, ids.shape[1])]
    table = zip(places, asked, best.tolist(), ids.tolist(), logprob.tolist(), strict=True)
    for row, ((_, context), own, first, row_ids, row_logprob) in enumerate(table):
        use = [*range(len(own)), *columns]
        yield (
            context,
            NextToken(
                best=first,
                top=tuple(row_ids[most:]) if top else (),
                logprob={row_ids[i]: row_logprob[i] for i in use},
                rank={row_ids[i]: rank[i][row] for i in use} if ranks else {},
            ),
        )


def _prompts(request: EditRequest) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (
        ("edit", (request.prompt,)),
        ("paraphrase", request.paraphrases),
        ("neighbourhood", request.neighbours),
    )


def _questions(lm: ModelAdapter, requests: Sequence[EditRequest]) -> Iterator[_Question]:
    for case, request in enumerate(requests):
        for kind, prompts in _prompts(request):
            for prompt in prompts:
                for candidate, target in (("new", request.target_new), ("true", request.target_true)):
                    if target is not None:
                        row = tokens.with_target(lm.tokenizer, prompt, target)
                        yield _Question(case, kind, prompt, candidate, row)


def _ask(lm: ModelAdapter, questions: Sequence[_Question], report: Reporter) -> dict[Context, NextToken]:
    wanted: dict[Context, list[int]] = defaultdict(list)
    for question in questions:
        ids = question.row.ids
        for position in range(question.row.target_start, len(ids)):
            wanted[question.at(position)].append(ids[position])
    return distributions(lm, wanted, TOP, report)


def _answers(
    lm: ModelAdapter, questions: Sequence[_Question], found: Mapping[Context, NextToken], state: str
) -> pd.DataFrame:
    labels = tokens.token_strings(lm.tokenizer, [question.row.target[0] for question in questions])
    rows: list[dict[str, object]] = []
    for question, label in zip(questions, labels, strict=True):
        ids, start = question.row.ids, question.row.target_start
        said = [(found[question.at(position)], ids[position]) for position in range(start, len(ids))]
        logprob = sum(next_token.logprob[token] for next_token, token in said)  # 3.
        first, token = said[0]
        rows.append(
            {
                "state": state,
                "case": question.case,
                "prompt_kind": question.kind,
                "prompt": question.prompt,
                "candidate": question.candidate,
                "token": label,
                "logprob": logprob,
                "mean_logprob": logprob / len(said),
                "prob": exp(logprob),
                "first_prob": exp(first.logprob[token]),
                "rank": first.rank[token],
                "is_top": first.best == token,
                "is_greedy": all(next_token.best == token for next_token, token in said),
            }
        )
    return frames.from_rows(rows, "answers")


def _next_tokens(
    lm: ModelAdapter, questions: Sequence[_Question], found: Mapping[Context, NextToken], state: str
) -> pd.DataFrame:
    shown: dict[tuple[int, str], tuple[NextToken, list[int]]] = {}
    for question in questions:
        if question.kind == "edit":
            next_token = found[question.context]
            key = (question.case, question.prompt)
            shown.setdefault(key, (next_token, list(next_token.top)))[1].append(question.row.target[0])
    rows: list[dict[str, object]] = []
    for (case, prompt), (next_token, listed) in shown.items():
        ids = list(dict.fromkeys(listed))
        rows += [
            {
                "state": state,
                "case": case,
                "prompt": prompt,
                "token_id": i,
                "token": label,
                "prob": exp(next_token.logprob[i]),
                "rank": next_token.rank[i],
            }
            for i, label in zip(ids, tokens.token_strings(lm.tokenizer, ids), strict=True)
        ]
    return frames.from_rows(rows, "next_tokens")
