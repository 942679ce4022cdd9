"""GE: how varied the texts of a model are, as ROME measures them (Meng et al. 2022, arXiv 2202.05262, section 3.4).

1. Every generation prompt of a record is continued by sampling from the 5 most likely tokens, to 100 tokens in total.
2. Each text, with its prompt, gets its weighted n-gram entropy (evaluation/fluency.py), bits; GE is their mean. The
   paper prints it times 100.

Random numbers depend on the prompt and on how often it has been asked for before, and on nothing else: the unedited
model and every method meet the same ones.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from mega_core.evaluation import fluency
from mega_core.evaluation.asking import Row, Told, Wanted
from mega_core.evaluation.protocols.base import Metric, Protocol

if TYPE_CHECKING:
    from mega_core.cases import Case
    from mega_core.models.adapter import ModelAdapter


class Sheet:
    """The generation prompts; one that stands there twice is sampled twice."""

    def __init__(self, lm: ModelAdapter, case: Case) -> None:
        before: Counter[str] = Counter()
        self.asked: list[tuple[str, int]] = []
        for prompt in case.generation_prompts:
            self.asked.append((prompt, before[prompt]))
            before[prompt] += 1

    # 1.
    def want(self, wanted: Wanted, base: Told | None) -> None:
        """A sampled text of each."""
        for prompt, seed in self.asked:
            wanted.sample(prompt, seed)

    # 2.
    def rows(self, told: Told, base: Told) -> list[Row]:
        """A row per text."""
        texts = [(prompt, told.samples[prompt, seed]) for prompt, seed in self.asked]
        return [Row("GE", prompt, "", text, fluency.entropy(f"{prompt} {text}")) for prompt, text in texts]


def _needs(case: Case) -> str | None:
    return None if case.generation_prompts else "there are no generation prompts"


ROME_TEXT = Protocol(
    name="rome_text",
    title="ROME: sampled text",
    summary="How varied sampled texts about the subject are: low when the model repeats itself.",
    paper="arXiv 2202.05262, 2210.07229",
    metrics=(
        Metric(
            "GE",
            "Generation entropy",
            "(2/3 H2 + 4/3 H3) / 2 of each text's words, H_n the entropy of its n-grams",
            "text",
            "sum of the texts' entropies",
            "generation prompts of a record; then records",
            unit="bits",
        ),
    ),
    needs=_needs,
    sheet=Sheet,
    notes="In bits, as the formula gives it; the paper prints it times 100. Words are cut by a simple rule of ours and "
    "not by NLTK, and a text ends with the end of text, where the published code goes on. Text that makes no sense "
    "but does not repeat itself scores high. The random numbers are fixed.",
)
