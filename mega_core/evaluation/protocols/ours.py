"""Ours: success twice, what happened to the neighbours, and signs of damage. Every choice here is our own.

1. Success is shown forced (every token of the answer is the most likely one, the tokens before it given) and generated
   (the greedy text, which sees no answer, says it). Forced scores leak the answer and its length, and are far above
   what a person gets to read ("The Mirage of Model Editing", arXiv 2502.11177). Texts are compared as
   evaluation/answers_text.py says.
2. Neighbours, which an edit must leave alone: the same three against their own answer, whether their greedy text is the
   unedited model's, how far their next-token distribution moved, and whether the new object leaks to them. That
   specificity needs the distribution and not only success: arXiv 2305.17553, whose NKL this divergence is after.
3. KL(unedited || edited) over the unedited model's most likely tokens and one bucket for all others: cutting a
   distribution into coarser parts never raises the divergence, so this is a lower bound of the full one.
4. Damage: entropy of the greedy texts, perplexity of a fixed text and the alarms, where they were measured
   (a single edit can make a model collapse: arXiv 2402.09656).

All requests of a case count. Questions that a dataset calls locality are neighbours here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, isfinite, log
from typing import TYPE_CHECKING

from mega_core.evaluation import answers_text, fluency
from mega_core.evaluation.asking import Candidate, Row, Told, Wanted
from mega_core.evaluation.protocols.base import Metric, Protocol

if TYPE_CHECKING:
    from mega_core.cases import Case
    from mega_core.evaluation.looks import Context
    from mega_core.models.adapter import ModelAdapter

LIKELIEST = 64
"""How many of the unedited model's tokens the divergence tells apart."""
GENERATION_PROMPTS = 3
"""How many different ones are continued for the entropy."""
COLLAPSE = 1.1
"""Perplexity over the unedited model's that counts as a collapse; the alarm of a report has the same limit."""
_LEAST = 1e-12
"""The share of all other tokens never counts as smaller: below float32's precision it would be noise."""
_HUGE = 1e12
"""Stands for a ratio of perplexities that is infinite or missing."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A prompt and the names of its answer, as teacher forcing and as text."""

    kind: str
    """"efficacy", "paraphrase" or "neighbourhood": how its metrics' names begin."""
    prompt: str
    names: tuple[str, ...]
    candidate: Candidate


@dataclass(frozen=True, slots=True)
class _Neighbour:
    """A prompt whose answer must not move."""

    prompt: str
    context: Context
    new: tuple[str, ...]
    begins: frozenset[int]
    """The tokens that the new objects begin with there."""
    own: int | None
    """The token that its own answer begins with; None where that is not known."""


class Sheet:
    """Every prompt of every request, its locality questions, and beginnings of texts."""

    def __init__(self, lm: ModelAdapter, case: Case) -> None:
        self.tokenizer = lm.tokenizer
        asked: dict[tuple[str, str, tuple[str, ...]], _Asked] = {}
        neighbours: dict[str, _Neighbour] = {}

        def ask(kind: str, prompt: str, names: tuple[str, ...]) -> None:
            key = kind, prompt, names
            if names and key not in asked:
                asked[key] = _Asked(kind, prompt, names, Candidate.of(lm, prompt, names[0]))

        def keep(prompt: str, names: tuple[str, ...], new: tuple[str, ...]) -> None:
            ask("neighbourhood", prompt, names)
            if prompt not in neighbours:
                news = [Candidate.of(lm, prompt, one) for one in new]
                own = Candidate.of(lm, prompt, names[0]).row.target[0] if names else None
                begins = frozenset(one.row.target[0] for one in news)
                neighbours[prompt] = _Neighbour(prompt, news[0].context(), new, begins, own)

        for request in case.requests:
            ask("efficacy", request.prompt, (request.target_new,))
            for prompt in request.paraphrases:
                ask("paraphrase", prompt, (request.target_new,))
            for prompt in request.neighbours:
                keep(prompt, (request.target_true,) if request.target_true else (), (request.target_new,))
        every_new = tuple(dict.fromkeys(request.target_new for request in case.requests))
        for query in case.locality:
            keep(query.prompt, query.answers[0] if query.answers else (), every_new)

        self.asked = tuple(asked.values())
        self.neighbours = tuple(neighbours.values())
        texts = [one.prompt for one in self.asked if one.kind != "neighbourhood"]
        texts += list(dict.fromkeys(case.generation_prompts))[:GENERATION_PROMPTS]
        self.texts = tuple(dict.fromkeys(texts))

    def want(self, wanted: Wanted, base: Told | None) -> None:
        """Answers token by token, texts, and the neighbours' distributions."""
        for one in self.asked:
            wanted.target(one.candidate)
            wanted.text(one.prompt)
        for neighbour in self.neighbours:
            wanted.text(neighbour.prompt)
            if base is None:
                wanted.next(neighbour.context, likeliest=LIKELIEST)
            else:
                wanted.next(neighbour.context, base.next[neighbour.context].top[:LIKELIEST])
        for prompt in self.texts:
            wanted.text(prompt)

    def rows(self, told: Told, base: Told) -> list[Row]:
        """A row per prompt and metric."""
        rows = [row for one in self.asked for row in self._success(one, told)]
        rows += [row for one in self.neighbours for row in self._kept(one, told, base)]
        for prompt in self.texts:
            text = told.texts[prompt]
            rows.append(Row("fluency", prompt, "", text, fluency.entropy(f"{prompt} {text}")))
        rows += _damage(told, base)
        return rows

    # 1.
    def _success(self, one: _Asked, told: Told) -> Iterator[Row]:
        text, expected = told.texts[one.prompt], one.names[0]
        likeliest = self._label([told.next[context].best for context, _ in one.candidate.steps()])
        found: tuple[tuple[str, str, bool], ...] = (
            ("forced", likeliest, all(one.candidate.hits(told))),
            ("exact", text, answers_text.is_exactly_any(text, one.names)),
            ("contains", text, answers_text.contains_any(text, one.names)),
        )
        for how, said, value in found:
            yield Row(f"{one.kind}_{how}", one.prompt, expected, said, float(value))

    # 2.
    def _kept(self, one: _Neighbour, told: Told, base: Told) -> Iterator[Row]:
        now, before = told.next[one.context], base.next[one.context]
        text, was = told.texts[one.prompt], base.texts[one.prompt]
        said, first = self._label([now.best]), self._label([before.best])
        yield Row("neighbourhood_kept", one.prompt, was, text, float(text == was))
        shared = before.top[:LIKELIEST]
        moved = divergence([before.logprob[i] for i in shared], [now.logprob[i] for i in shared])
        yield Row("neighbourhood_kl", one.prompt, first, said, moved)
        new = " or ".join(one.new)
        tells = one.own not in one.begins
        yield Row("leak", one.prompt, f"not {new}", said, float(now.best in one.begins), counts=tells)

    def _label(self, ids: Sequence[int]) -> str:
        from mega_core.models import tokens

        return "".join(tokens.token_strings(self.tokenizer, ids))


# 3.
def divergence(before: Sequence[float], after: Sequence[float]) -> float:
    """KL(before || after), nats, from the log-probabilities of the same ids; what is left of both is one more part."""
    total = sum(exp(p) * (p - q) for p, q in zip(before, after, strict=True))
    rest = [max(1 - sum(map(exp, listed)), _LEAST) for listed in (before, after)]
    return max(0.0, total + rest[0] * log(rest[0] / rest[1]))


# 4.
def _damage(told: Told, base: Told) -> Iterator[Row]:
    if told.perplexity is not None and base.perplexity is not None:
        ratio = told.perplexity / base.perplexity if base.perplexity else _HUGE
        ratio = min(ratio, _HUGE) if isfinite(ratio) else _HUGE
        said = f"perplexity {told.perplexity:.4g} against {base.perplexity:.4g}"
        yield Row("perplexity_ratio", "a short fixed text", "1", said, ratio)
        collapsed = ratio > COLLAPSE and (told.raised is None or bool(told.raised))
        yield Row("collapse", "a short fixed text", f"at most {COLLAPSE:g}", said, float(collapsed))
    if told.raised is not None:
        yield Row("alarms", "the change", "none", " ".join(told.raised), float(bool(told.raised)))


_PROMPTS: Mapping[str, tuple[str, str, str]] = {
    "efficacy": ("Efficacy", "the new object", "edit prompts"),
    "paraphrase": ("Paraphrase", "the new object", "paraphrases"),
    "neighbourhood": ("Neighbourhood", "its own answer", "neighbour prompts with a known answer"),
}


def _success_metrics() -> Iterator[Metric]:
    for kind, (title, answer, prompts) in _PROMPTS.items():
        counted = f"{prompts} of a record; then records"
        yield Metric(
            f"{kind}_forced",
            f"{title}, forced",
            f"every token of {answer} is the most likely one, given those before it",
            "forced",
            f"prompts where every token of {answer} is the most likely one",
            counted,
        )
        yield Metric(
            f"{kind}_exact",
            f"{title}, generated: exact",
            f"the greedy text, up to its first stop, is {answer}; case, articles and punctuation aside",
            "generated",
            f"prompts whose text is {answer}",
            counted,
        )
        yield Metric(
            f"{kind}_contains",
            f"{title}, generated: contains",
            f"the greedy text holds {answer} as whole words",
            "generated",
            f"prompts whose text holds {answer}",
            counted,
        )


OURS = Protocol(
    name="ours",
    title="Edit Anatomy",
    summary="Success twice, forced and as greedy text; what neighbours still say; signs of damage.",
    paper="ours; after arXiv 2502.11177, 2305.17553, 2402.09656",
    metrics=(
        *_success_metrics(),
        Metric(
            "neighbourhood_kept",
            "Neighbourhood, text kept",
            "the greedy text is the unedited model's, letter by letter",
            "generated",
            "neighbour prompts with the same text",
            "neighbour prompts of a record; then records",
        ),
        Metric(
            "neighbourhood_kl",
            "Neighbourhood, divergence",
            f"KL(unedited || edited) of the next token, over the unedited model's {LIKELIEST} most likely tokens and "
            "one bucket for the rest: a lower bound of the full KL",
            "forced",
            "sum of the divergences",
            "neighbour prompts of a record; then records",
            better="lower",
            unit="nats",
        ),
        Metric(
            "leak",
            "Leak",
            "the most likely next token begins the new object",
            "forced",
            "neighbour prompts where it does",
            "neighbour prompts whose own answer begins otherwise; then records",
            better="lower",
        ),
        Metric(
            "fluency",
            "Fluency",
            "(2/3 H2 + 4/3 H3) / 2 of the words of prompt and greedy text, H_n the entropy of n-grams",
            "generated",
            "sum of the texts' entropies",
            f"edit prompts, paraphrases and up to {GENERATION_PROMPTS} beginnings of texts of a record; then records",
            unit="bits",
        ),
        Metric(
            "perplexity_ratio",
            "Perplexity, ratio",
            "perplexity of a short fixed text, edited over unedited; where it was measured",
            "text",
            "sum of the ratios",
            "records where both were measured",
            better="lower",
            unit="ratio",
        ),
        Metric(
            "collapse",
            "Collapse",
            f"the perplexity ratio is above {COLLAPSE:g}, and alarms, where they were looked at, were raised",
            "text",
            "records where it is",
            "records where both perplexities were measured",
            better="lower",
        ),
        Metric(
            "alarms",
            "Alarms",
            "the change raised an alarm: its size, its direction, perplexity, or numbers that are not finite",
            "text",
            "records with an alarm",
            "records whose change was looked at",
            better="lower",
        ),
    ),
    needs=lambda case: None,
    sheet=Sheet,
    notes="Forced and generated stand side by side: where they part, only the text shows what a person would read. A "
    "text that holds a short answer by chance counts as containing it. A text is at most 32 tokens long; short "
    "answers lower its entropy, so compare entropies with the unedited model's. A neighbour whose own answer begins "
    "with the new object's first token tells nothing of a leak and is left out. A text put in front of prompts raises "
    "perplexity without any damage: that is why a collapse needs an alarm too.",
)
