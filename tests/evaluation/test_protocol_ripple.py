from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from mega_core.cases import AXES, AxisTest, Case, Query
from mega_core.changes import PromptPrefix
from mega_core.datasets import builtin
from mega_core.embedded import examples
from mega_core.evaluation import asking, intervals, suite
from mega_core.evaluation.asking import Told
from mega_core.evaluation.protocols import PROTOCOLS
from mega_core.evaluation.protocols.base import summarise
from mega_core.evaluation.protocols.ripple import Sheet, says
from mega_core.models.adapter import ModelAdapter
from mega_core.records import EditRequest
from tests.evaluation.scripted import wanted_by

RIPPLE = PROTOCOLS["ripple"]
EDIT = EditRequest("Ada", "{} works for", "Orrin", "Bray")


def ask(prompt: str, *answers: tuple[str, ...]) -> Query:
    return Query(prompt, answers)


BOSS = AxisTest(
    "CI", (ask("The boss of Ada is", ("Mr Lund", "Lund")),), conditions=(ask("The boss of Orrin is", ("Mr Lund",)),)
)
CHILDREN = AxisTest("RS", (ask("The children of Ada are", ("Tim", "Timothy"), ("Sue",)),))
EITHER = AxisTest("LG", (ask("Orrin employs", ("Ada",)), ask("Staff of Orrin:", ("Ada",))), any_query=True)
BOTH = replace(EITHER, any_query=False)
CASE = Case("1", (EDIT,), tests=(BOSS, CHILDREN, EITHER))
BASE = {EDIT.prompt: " Bray, of course", "The boss of Orrin is": " Mr Lund.", "The children of Ada are": " Tim and Sue"}
GOOD = {
    EDIT.prompt: " Orrin since May",
    "The boss of Ada is": " old Lund",
    "The children of Ada are": " Sue and Timothy.",
    "Orrin employs": " nobody",
    "Staff of Orrin:": " Ada, Bo",
}  # fmt: skip


def told(sheet: Sheet, texts: dict[str, str], base: Told | None = None) -> Told:
    return Told({}, {prompt: texts.get(prompt, " nothing") for prompt in wanted_by(sheet, base).texts})


def judge(case: Case, base: dict[str, str], texts: dict[str, str]) -> suite.Judged:
    sheet = Sheet(case)
    before = told(sheet, base)
    (judged,) = suite.Questions((("ripple", sheet),)).judge(told(sheet, texts, before), before)
    return judged


def scores(case: Case, base: dict[str, str], texts: dict[str, str]) -> dict[str, tuple[float, int]]:
    return {one.metric: (one.value, one.n) for one in judge(case, base, texts).scores}


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        (" in Rome", (("Rome",),), True),
        (" in rome", (("Rome",),), False),
        (" Romeo", (("Rome",),), True),
        (" the US", (("United States", "US"),), True),
        (" Tim", (("Tim",), ("Sue",)), False),
        (" Sue, Tim", (("Tim",), ("Sue", "Susan")), True),
        ("", (("Rome",),), False),
        (" the Rhine", (("R", "Rhône"),), False),
        (" R", (("R",),), True),
    ],
)
def test_any_name_of_every_answer(text: str, answers: tuple[tuple[str, ...], ...], expected: bool) -> None:
    assert says(text, answers) is expected


def test_nothing_to_answer_is_no_success() -> None:
    with pytest.raises(ValueError, match="answer"):
        says("anything", ())


def test_a_good_edit_passes_every_test() -> None:
    assert scores(CASE, BASE, GOOD) == {"edit_success": (1, 1), "CI": (1, 1), "RS": (1, 1), "LG": (1, 1)}


@pytest.mark.parametrize(
    ("test", "texts", "expected"),
    [
        (EITHER, {}, 1),
        (BOTH, {}, 0),
        (BOTH, {"Orrin employs": " Ada"}, 1),
        (EITHER, {"Staff of Orrin:": " Bo"}, 0),
        (EITHER, {"Orrin employs": " Ada"}, 1),
    ],
)
def test_and_or(test: AxisTest, texts: dict[str, str], expected: float) -> None:
    case = replace(CASE, tests=(BOSS, test))
    judged = judge(case, BASE, GOOD | texts)
    assert {one.metric: (one.value, one.n) for one in judged.scores}["LG"] == (expected, 1)
    # Every question is shown with its own text and its own judgement.
    rows = [row for row in judged.rows if row.metric == "LG"]
    assert [(row.prompt, row.said, row.value) for row in rows] == [
        (query.prompt, (GOOD | texts)[query.prompt], float("Ada" in (GOOD | texts)[query.prompt]))
        for query in test.queries
    ]
    assert {row.group for row in rows} == {1}


def test_a_test_counts_if_the_unedited_model_answers_all_its_conditions() -> None:
    gone = scores(CASE, BASE | {"The boss of Orrin is": " Ms Sund"}, GOOD)
    assert gone == {"edit_success": (1, 1), "RS": (1, 1), "LG": (1, 1)}
    two = replace(BOSS, conditions=(*BOSS.conditions, ask("Lund is at", ("Orrin",))))
    assert "CI" not in scores(replace(CASE, tests=(two,)), BASE, GOOD)
    assert scores(replace(CASE, tests=(two,)), BASE | {"Lund is at": " Orrin"}, GOOD)["CI"] == (1, 1)
    # What the edited model says to a condition does not matter: it is not asked.
    assert scores(CASE, BASE, GOOD | {"The boss of Orrin is": " Ms Sund"})["CI"] == (1, 1)


def test_a_share_within_a_case_then_the_mean_over_cases() -> None:
    tests = (BOSS, *(AxisTest("CI", (ask(f"Question {i} is", ("yes",)),)) for i in range(3)))
    half = scores(replace(CASE, tests=tests), BASE, GOOD | {"Question 0 is": " yes"})
    assert half["CI"] == (0.5, 4)
    cases = [
        judge(replace(CASE, tests=tests), BASE, GOOD | {"Question 0 is": " yes"}).scores,
        judge(CASE, BASE, GOOD).scores,
    ]
    means = {one.metric: (one.value, one.n) for one in summarise(RIPPLE, cases, draws=10)}
    assert means == {
        "edit_success": (1, 2), "CI": (0.75, 2), "RS": (1, 1), "LG": (1, 1),
        "average": (pytest.approx(2.75 / 3), 2),
    }  # fmt: skip


def test_a_failed_edit_counts_as_failed_and_its_tests_do_not() -> None:
    failed = judge(CASE, BASE, GOOD | {EDIT.prompt: " Bray"})
    assert {one.metric: (one.value, one.n) for one in failed.scores} == {
        "edit_success": (0, 1), "CI": (0, 0), "RS": (0, 0), "LG": (0, 0),
    }  # fmt: skip
    assert len(failed.rows) == 5  # shown all the same
    means = {
        one.metric: one.value for one in summarise(RIPPLE, [failed.scores, judge(CASE, BASE, GOOD).scores], draws=10)
    }
    assert means == {"edit_success": 0.5, "CI": 1, "RS": 1, "LG": 1, "average": 1}
    # A draw of cases may hold no successful edit; the interval is made of the others.
    drawn = summarise(RIPPLE, [failed.scores, judge(CASE, BASE, GOOD).scores], draws=10)[-1]
    assert (drawn.metric, drawn.low, drawn.high) == ("average", *intervals.wilson(2, 2))
    assert [one.metric for one in summarise(RIPPLE, [failed.scores], draws=10)] == ["edit_success"]
    # An axis that only failed edits could have leaves the average of the others alone.
    other = judge(replace(CASE, tests=(CHILDREN,)), BASE, GOOD).scores
    means = {one.metric: one.value for one in summarise(RIPPLE, [failed.scores, other], draws=10)}
    assert means == {"edit_success": 0.5, "RS": 1, "average": 1}


def test_a_case_counts_if_the_original_fact_was_known() -> None:
    assert scores(CASE, BASE | {EDIT.prompt: " Velm"}, GOOD) == {}
    recent = replace(CASE, requests=(replace(EDIT, target_true=None),))
    assert scores(recent, BASE, GOOD)["edit_success"] == (1, 1)
    assert scores(recent, BASE | {EDIT.prompt: " Orrin"}, GOOD) == {}


def test_several_edits_succeed_together() -> None:
    second = EditRequest("Bo", "{} works for", "Orrin", "Bray")
    case = replace(CASE, requests=(EDIT, second))
    base = BASE | {second.prompt: " Bray"}
    assert scores(case, base, GOOD)["edit_success"] == (0, 1)
    assert scores(case, base, GOOD | {second.prompt: " Orrin"})["edit_success"] == (1, 1)
    assert scores(case, BASE, GOOD) == {}


def test_what_is_asked() -> None:
    sheet = Sheet(CASE)
    before, after = wanted_by(sheet), wanted_by(sheet, told(sheet, BASE))
    assert not before.tokens
    assert set(before.texts) - set(after.texts) == {"The boss of Orrin is"}
    assert set(after.texts) == set(GOOD)
    # A condition that is a test's question too is asked of both.
    same = Sheet(replace(CASE, tests=(replace(BOSS, conditions=BOSS.queries),)))
    known = BASE | {"The boss of Ada is": " Lund"}
    assert set(wanted_by(same, told(same, known)).texts) == {EDIT.prompt, "The boss of Ada is"}


def test_tests_that_can_not_count_are_not_run() -> None:
    sheet = Sheet(CASE)
    unmet = told(sheet, BASE | {"The boss of Orrin is": " Ms Sund"})
    assert set(wanted_by(sheet, unmet).texts) == set(GOOD) - {"The boss of Ada is"}
    row = next(row for row in sheet.rows(told(sheet, GOOD, unmet), unmet) if row.metric == "CI")
    assert (row.said, row.value, row.counts) == ("", 0, False)
    unknown = told(sheet, BASE | {EDIT.prompt: " Velm"})
    assert set(wanted_by(sheet, unknown).texts) == {EDIT.prompt}
    assert len(sheet.rows(told(sheet, GOOD, unknown), unknown)) == 5


def test_tests_without_answers_are_left_out() -> None:
    bare = AxisTest("FN", (ask("What of it"),))
    assert RIPPLE.needs(Case("1", (EDIT,))) is not None
    assert RIPPLE.needs(replace(CASE, tests=(bare,))) is not None
    assert RIPPLE.needs(replace(CASE, tests=(bare, BOSS))) is None
    assert "FN" not in scores(replace(CASE, tests=(bare, BOSS)), BASE, GOOD)
    assert [metric.name for metric in RIPPLE.metrics] == ["edit_success", *AXES]


def test_runs_on_a_model_and_however_the_prompts_are_batched(
    tiny_lm: Callable[[str], ModelAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("llama")
    monkeypatch.setattr(asking, "NEW_TOKENS", 4)
    case = builtin.case_of(next(iter(examples.reported(1))), 1)
    questions = suite.Questions.of(lm, case, ["ripple"])
    base = questions.ask(lm)
    assert all(lm.generate([prompt], 4) == [text] for prompt, text in base.texts.items())
    with PromptPrefix("Imagine that this holds. ").applied(lm):
        told_now = questions.ask(lm, base)
    assert set(told_now.texts) <= set(base.texts)
    (judged,) = questions.judge(told_now, base)
    assert {row.metric for row in judged.rows} == {"edit_success", *(test.axis for test in case.tests)}
