"""How ROME and MEMIT score CounterFact (Meng et al. 2022, arXiv 2202.05262, 2210.07229).

1. nll(o | x) = mean over the tokens of o of -log p(token | x, tokens before it): teacher-forced, nats.
2. Edit prompt and paraphrases: ES, PS = 1[nll(true) > nll(new)]; EM, PM = e^-nll(new) - e^-nll(true).
3. Neighbourhood prompts: NS = 1[nll(true) < nll(new)]; NM = e^-nll(true) - e^-nll(new).
4. Means within a record first, then over records; S = harmonic mean of the three means ES, PS, NS.

The formulas themselves are those of evaluation/metrics.py, which the reports of single edits use too. A prompt that
stands twice in a record counts once (three of 510 records of a CounterFact sample have such a pair).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from mega_core.evaluation import metrics
from mega_core.evaluation.asking import Candidate, Row, Told, Wanted
from mega_core.evaluation.protocols.base import Derived, Metric, Protocol

if TYPE_CHECKING:
    from mega_core.cases import Case
    from mega_core.models.adapter import ModelAdapter

_OF = {one.name: one for one in metrics.METRICS if one.protocol == "rome"}
_COUNTED = {"edit": "the edit prompt", "paraphrase": "the paraphrases", "neighbourhood": "the neighbourhood prompts"}


def harmonic(values: Sequence[float]) -> float:
    """The harmonic mean; 0 when one of the values is not above 0."""
    return len(values) / sum(1 / value for value in values) if values and min(values) > 0 else 0.0


class Sheet:
    """Both objects after every prompt of every request."""

    def __init__(self, lm: ModelAdapter, case: Case) -> None:
        self.pairs: list[tuple[str, str, str, str, Candidate, Candidate]] = []
        for request in case.requests:
            if request.target_true is None:
                continue
            new, true = request.target_new, request.target_true
            kinds = (
                ("edit", (request.prompt,)),
                ("paraphrase", request.paraphrases),
                ("neighbourhood", request.neighbours),
            )
            for kind, prompts in kinds:
                for prompt in prompts:
                    both = Candidate.of(lm, prompt, new), Candidate.of(lm, prompt, true)
                    self.pairs.append((kind, prompt, new, true, *both))

    def want(self, wanted: Wanted, base: Told | None) -> None:
        """Both objects, token by token."""
        for *_, new, true in self.pairs:
            wanted.target(new)
            wanted.target(true)

    def rows(self, told: Told, base: Told) -> list[Row]:
        """A row per prompt and metric."""
        rows = []
        for metric in _OF.values():
            chosen = [pair for pair in self.pairs if pair[0] == metric.prompt_kind]
            logprobs = [(of_new.mean_logprob(told), of_true.mean_logprob(told)) for *_, of_new, of_true in chosen]
            frame = pd.DataFrame(logprobs, columns=["mean_logprob_new", "mean_logprob_true"], dtype="float64")
            values = metric.score(frame).astype("float64").tolist()
            for (kind, prompt, new, true, *_), (of_new, of_true), value in zip(chosen, logprobs, values, strict=True):
                expected = f"{true} over {new}" if kind == "neighbourhood" else f"{new} over {true}"
                said = f"{-of_new:.2f} against {-of_true:.2f} nats"
                rows.append(Row(metric.name, prompt, expected, said, value))
        return rows


def _needs(case: Case) -> str | None:
    known = any(request.target_true is not None for request in case.requests)
    return None if known else "the original object is not known"


ROME = Protocol(
    name="rome",
    title="ROME and MEMIT",
    summary="Which of the two objects is likelier, token by token, after the edit prompt, paraphrases and neighbours.",
    paper="arXiv 2202.05262, 2210.07229",
    metrics=tuple(
        Metric(
            one.name,
            one.title,
            one.formula,
            "forced",
            "sum over prompts" if one.name.endswith("M") else "prompts where it holds",
            f"{_COUNTED[one.prompt_kind]} of a record; then records",
            unit="difference" if one.name.endswith("M") else "share",
        )
        for one in _OF.values()
    ),
    needs=_needs,
    sheet=Sheet,
    derived=(Derived("S", "Score", "harmonic mean of the means ES, PS, NS", ("ES", "PS", "NS"), harmonic),),
    notes="The paper's GE is in the protocol rome_text; its RS needs reference texts that no dataset here has. A "
    "prompt that stands twice in a record counts once.",
)
