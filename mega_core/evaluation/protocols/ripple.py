"""RippleEdits' protocol: what follows from an edit, and what must not change (Cohen et al. 2023, arXiv 2307.12976).

1. An answer is right when one of its names stands in the greedy text; of several answers each has to stand there.
   Letters are compared as they are, and a name may be part of a longer word: as in the published code. So are names of
   one letter passed over where there are others: any text holds them.
2. A case counts if the unedited model knows the original object after the edit prompt; one without an original object
   (a recent fact), if it does not know the new one.
3. A test is run, and counts, if the unedited model answers all its conditions.
4. `edit_success`: the edit prompts give the new objects. Where one fails, the case's tests do not count.
5. A test of one or several questions passes when all are right, or one, as the dataset says (AND, OR). An axis is
   passed tests / tests that count within a case; then the mean over cases. `average` over the axes that were measured.

A row is one question, its group the test. In a passed OR test the wrong answers are shown and do not count, so that a
group passes when every row of it that counts is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mega_core.cases import AXES
from mega_core.evaluation.asking import NEW_TOKENS, Row, Told, Wanted
from mega_core.evaluation.protocols.base import Derived, Metric, Protocol

if TYPE_CHECKING:
    from mega_core.cases import AxisTest, Case, Query
    from mega_core.models.adapter import ModelAdapter

_AXES = {
    "RS": ("Relation specificity", "other relations of the subject keep their objects"),
    "LG": ("Logical generalization", "what follows by logic (symmetry, transitivity) holds"),
    "SA": ("Subject aliasing", "another name of the subject gives the new object"),
    "CI": ("Compositionality I", "questions that pass through the edited fact follow the new object"),
    "CII": ("Compositionality II", "questions about others that lead to the subject give the new object"),
    "FN": ("Forgetfulness", "the other objects of a relation with several are kept"),
}


# 1.
def says(text: str, answers: Sequence[Sequence[str]]) -> bool:
    """Whether a text gives every answer under one of its names. Raises ValueError without an answer."""
    if not answers:
        raise ValueError("a question without an answer can't be judged")
    return all(any(name in text for name in _telling(names)) for names in answers)


def _telling(names: Sequence[str]) -> Sequence[str]:
    """The names that are longer than a letter, or a digit; all where there is none."""
    return [name for name in names if len(name) > 1 or name.isdigit()] or names


def right(query: Query, told: Told) -> bool:
    """Whether the greedy text answers the question."""
    return says(told.texts[query.prompt], query.answers)


@dataclass(frozen=True)
class Sheet:
    """The edit prompts, the tests and their conditions; all answered by greedy text. Tokenised when they are asked."""

    case: Case

    @property
    def tests(self) -> tuple[AxisTest, ...]:
        """The tests whose questions and conditions all have answers."""
        return tuple(test for test in self.case.tests if _judged(test))

    def want(self, wanted: Wanted, base: Told | None) -> None:
        """Texts; the conditions only of the unedited model, and after it only the tests that count."""
        for request in self.case.requests:
            wanted.text(request.prompt)
        for test in self.tests:
            if base is None or self._counts(test, base):
                for query in (*test.queries, *(test.conditions if base is None else ())):
                    wanted.text(query.prompt)

    def rows(self, told: Told, base: Told) -> list[Row]:
        """A row per edit prompt and per question of a test; one of a test that is not run has no text."""
        known, taken, rows = self._known(base), True, []
        for request in self.case.requests:
            said, new = told.texts[request.prompt], request.target_new
            taken &= new in said  # 4.
            rows.append(Row("edit_success", request.prompt, new, said, float(new in said), known, eligible=known))
        for group, test in enumerate(self.tests):
            met = self._counts(test, base)
            good = [met and right(query, told) for query in test.queries]
            for query, passed in zip(test.queries, good, strict=True):
                spare = test.any_query and any(good) and not passed  # 5.
                rows.append(
                    Row(
                        test.axis,
                        query.prompt,
                        ", ".join(names[0] for names in query.answers),
                        told.texts.get(query.prompt, ""),
                        float(passed),
                        met and taken and not spare,
                        group,
                        met,
                    )
                )
        return rows

    def _known(self, base: Told) -> bool:
        """2."""
        return all(
            request.target_new not in base.texts[request.prompt]
            if request.target_true is None
            else request.target_true in base.texts[request.prompt]
            for request in self.case.requests
        )

    def _counts(self, test: AxisTest, base: Told) -> bool:
        """3, and 2."""
        return self._known(base) and all(right(query, base) for query in test.conditions)


def _judged(test: AxisTest) -> bool:
    return all(query.answers for query in (*test.queries, *test.conditions))


def _sheet(lm: ModelAdapter, case: Case) -> Sheet:
    from mega_core.models import tokens

    sheet, wanted = Sheet(case), Wanted()
    sheet.want(wanted, None)
    for prompt in wanted.texts:
        tokens.prompt_ids(lm.tokenizer, prompt)  # raises on what can't be read
    return sheet


def _needs(case: Case) -> str | None:
    return None if any(map(_judged, case.tests)) else "there are no tests of what follows from the edit"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


RIPPLE = Protocol(
    name="ripple",
    title="RippleEdits",
    summary="Tests of what follows from an edit and of what must not change, judged by the greedy text.",
    paper="arXiv 2307.12976",
    metrics=(
        Metric(
            "edit_success",
            "Edit success",
            "the greedy text after every edit prompt holds the new object",
            "generated",
            "cases whose edits are all answered",
            "cases whose original object the unedited model knows",
            combine="all",
        ),
        *(
            Metric(
                axis,
                _AXES[axis][0],
                f"{_AXES[axis][1]}: a name of every answer stands in the greedy text",
                "generated",
                "tests passed",
                "tests of a case whose edit succeeded and whose conditions the unedited model answers; then cases",
                combine="all",
            )
            for axis in AXES
        ),
    ),
    needs=_needs,
    sheet=_sheet,
    derived=(Derived("average", "Average", "mean of the axes that were measured", tuple(AXES), _mean, partly=True),),
    notes=f"Ours: texts of {NEW_TOKENS} tokens (the published code stops near 30), judged without their prompts (it "
    "judges prompt and text together, so that a name in the question counts); edit prompts by the object's own name, "
    "since requests hold no others. Tests with a question or condition without an answer are left out. A case without "
    "a successful edit has no axes: compare them only beside edit success.",
)
