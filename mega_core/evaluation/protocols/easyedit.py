"""How EasyEdit scores edits (Wang et al., ACL 2024, arXiv 2308.07269): token accuracy, with partial credit.

1. accuracy(o | x) = share of the tokens of o that are the most likely one after x and the tokens of o before them
   (teacher-forced): a right last token of three counts 0.33, and so does a shared last name.
2. rewrite_acc on the edit prompt, rephrase_acc on paraphrases, portability on questions that follow from the edit.
3. locality: share of positions of the dataset's answer at which the most likely token is the unedited model's. Whether
   that token is right plays no part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mega_core.evaluation.asking import Candidate, Row, Told, Wanted
from mega_core.evaluation.protocols.base import Metric, Protocol

if TYPE_CHECKING:
    from mega_core.cases import Case
    from mega_core.models.adapter import ModelAdapter

NEIGHBOURS = "neighborhood"
"""What EasyEdit calls CounterFact's neighbours among its locality prompts."""


class Sheet:
    """Every answer after every prompt, once each."""

    def __init__(self, lm: ModelAdapter, case: Case) -> None:
        self.tokenizer = lm.tokenizer
        wanted: dict[tuple[str, str, str, str], None] = {}  # (metric, name of the kind of question, prompt, answer)
        for request in case.requests:
            wanted["rewrite_acc", "", request.prompt, request.target_new] = None
            for prompt in request.paraphrases:
                wanted["rephrase_acc", "", prompt, request.target_new] = None
            for prompt in request.neighbours if request.target_true else ():
                wanted["locality_acc", NEIGHBOURS, prompt, request.target_true or ""] = None
        for metric, queries in (("locality_acc", case.locality), ("portability_acc", case.portability)):
            for query in queries:
                for names in query.answers:
                    wanted[metric, query.name, query.prompt, names[0]] = None
        self.asked = [
            (metric, f"{name}: {prompt}" if name else prompt, answer, Candidate.of(lm, prompt, answer))
            for metric, name, prompt, answer in wanted
        ]

    def want(self, wanted: Wanted, base: Told | None) -> None:
        """Every answer, token by token."""
        for *_, candidate in self.asked:
            wanted.target(candidate)

    def rows(self, told: Told, base: Told) -> list[Row]:
        """A row per prompt and answer; what is said are the most likely tokens."""
        rows = []
        for metric, prompt, answer, candidate in self.asked:
            contexts = [context for context, _ in candidate.steps()]
            now = [told.next[context].best for context in contexts]
            before = [base.next[context].best for context in contexts]
            local = metric == "locality_acc"
            right = before if local else list(candidate.row.target)  # 3. or 1.
            share = sum(one == other for one, other in zip(now, right, strict=True)) / len(right)
            expected = f"{self._label(before)} (asked: {answer})" if local else answer
            rows.append(Row(metric, prompt, expected, self._label(now), share))
        return rows

    def _label(self, ids: list[int]) -> str:
        from mega_core.models import tokens

        return "".join(tokens.token_strings(self.tokenizer, ids))


def _metric(name: str, title: str, formula: str, numerator: str, prompts: str) -> Metric:
    return Metric(name, title, formula, "forced", numerator, f"{prompts} of a record; then records")


_RIGHT = "share of the answer's tokens that are the most likely one, given those before it"
_SUM = "sum over prompts of the share of tokens that are right"

EASYEDIT = Protocol(
    name="easyedit",
    title="EasyEdit",
    summary="The share of the answer's tokens that are the most likely one, the tokens before it given.",
    paper="arXiv 2308.07269",
    metrics=(
        _metric("rewrite_acc", "Reliability", f"{_RIGHT}; edit prompt", _SUM, "edit prompts"),
        _metric("rephrase_acc", "Generalisation", f"{_RIGHT}; paraphrases", _SUM, "paraphrases"),
        _metric(
            "locality_acc",
            "Locality",
            "share of the positions of the dataset's answer where the most likely token is the unedited model's",
            "sum over prompts of the share of tokens that agree",
            "locality prompts",
        ),
        _metric(
            "portability_acc",
            "Portability",
            f"{_RIGHT}; questions whose answer follows from the edit",
            _SUM,
            "portability prompts",
        ),
    ),
    needs=lambda case: None,
    sheet=Sheet,
    notes="Partial credit: half of an answer counts half, and an unedited model may score above 0. The tokens before "
    "each one are given, so this is no statement about generated text. EasyEdit has one number per name of locality "
    "and portability prompts; here each has one over all names, and every row begins with its name. CounterFact's "
    "neighbours count as locality, with the original object as the answer that is read along. Of several names of an "
    "answer the first counts; several answers count one row each. EasyEdit's fluency is the GE of rome_text.",
)
