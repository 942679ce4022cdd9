"""Intervals against published and hand-made values, and means over cases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mega_core.evaluation import intervals
from mega_core.evaluation.asking import Row, Score
from mega_core.evaluation.protocols import PROTOCOLS
from mega_core.evaluation.protocols.base import Derived, Metric, Protocol, score, summarise


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (1, 10, 0.0179, 0.4042),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(successes: int, n: int, low: float, high: float) -> None:
    found = intervals.wilson(successes, n)
    assert found == pytest.approx((low, high), abs=5e-5)
    values = [1.0] * successes + [0.0] * (n - successes)
    assert intervals.of_mean(values, share=True) == found


def test_wilson_needs_trials() -> None:
    with pytest.raises(ValueError, match="nothing"):
        intervals.wilson(0, 0)


def test_drawing_cases_anew_is_repeatable_and_holds_the_mean() -> None:
    values = np.random.default_rng(3).normal(5, 2, 400).tolist()
    low, high = intervals.of_mean(values, share=False)
    assert (low, high) == intervals.of_mean(values, share=False)
    assert (low, high) != intervals.of_mean(values, share=False, seed=1)
    half = 1.96 * np.std(values) / 20  # the normal approximation, good at 400 cases
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.25 * half)


def test_it_covers_the_true_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        low, high = intervals.of_mean(generator.uniform(0, 1, 60).tolist(), share=True, draws=200, seed=seed)
        hits += low <= 0.5 <= high
    assert 180 <= hits <= 198  # 95 % of 200 is 190


def test_cases_that_are_all_alike_are_no_certainty() -> None:
    assert intervals.of_mean([0.5] * 30, share=True) == intervals.wilson(15, 30)
    assert intervals.of_mean([0.5] * 30, share=False) == (0.5, 0.5)
    derived = intervals.of_derived([[1.0] * 8], [None], sum, share=True)
    assert derived is not None
    assert derived.low == pytest.approx(intervals.wilson(8, 8)[0])
    assert intervals.of_mean([0.0, 1.0], share=False) == (0.0, 1.0)


def test_a_derived_number_draws_whole_cases() -> None:
    # In each case b = 1 - a: their sum is 1 in every draw, as long as a case's numbers stay together.
    a: list[float | None] = [0.1, 0.9, 0.4, 0.7]
    b: list[float | None] = [0.9, 0.1, 0.6, 0.3]
    found = intervals.of_derived([a, b], [None, None], sum)
    assert found == pytest.approx((1.0, 1.0, 1.0))


def test_a_derived_number_of_columns_with_gaps() -> None:
    a: list[float | None] = [1.0, None, 0.0, 1.0]
    none: list[float | None] = [None] * 4
    assert intervals.of_derived([a], [None], sum).value == pytest.approx(2 / 3)  # type: ignore[union-attr]
    assert intervals.of_derived([a, none], [None, None], sum) is None
    assert intervals.of_derived([a, none], [None, 0.0], sum).value == pytest.approx(2 / 3)  # type: ignore[union-attr]


# Rows to scores ------------------------------------------------------------------------------------------------------


def metric(name: str, **more: object) -> Metric:
    return Metric(name, name, "", "text", "", "", **more)  # type: ignore[arg-type]


def rows(name: str, values: Sequence[float], groups: Sequence[int] = (), counts: Sequence[bool] = ()) -> list[Row]:
    groups, counts = groups or [0] * len(values), counts or [True] * len(values)
    return [Row(name, "", "", "", *row) for row in zip(values, counts, groups, strict=True)]


def test_a_score_is_the_mean_of_rows_that_count() -> None:
    (found,) = score(rows("m", [1, 0, 1, 1], counts=[True, True, False, True]), [metric("m"), metric("not asked")])
    assert found == Score("m", pytest.approx(2 / 3), 3)
    assert score(rows("m", [1], counts=[False]), [metric("m")]) == [Score("m", 0.0, 0)]


def test_rows_of_a_group_count_together() -> None:
    given = rows("m", [1, 0, 1, 1, 0], groups=[1, 1, 2, 2, 3])
    assert score(given, [metric("m", combine="all")]) == [Score("m", pytest.approx(1 / 3), 3)]
    assert score(given, [metric("m", combine="any")]) == [Score("m", pytest.approx(2 / 3), 3)]
    some = rows("m", [1, 0, 0], groups=[1, 1, 2], counts=[True, False, False])
    assert score(some, [metric("m", combine="all")]) == [Score("m", 1.0, 1)]


# Scores to means -----------------------------------------------------------------------------------------------------


def protocol(*metrics: Metric, derived: tuple[Derived, ...] = ()) -> Protocol:
    return Protocol("p", "", "", "", metrics, lambda case: None, lambda lm, case: None, derived)  # type: ignore[arg-type,return-value]


def test_within_a_record_first() -> None:
    # 10 prompts of one record and one of another: records weigh the same, prompts don't.
    (found,) = summarise(protocol(metric("m")), [[Score("m", 0.1, 10)], [Score("m", 1.0, 1)]])
    assert found.value == pytest.approx(0.55)
    assert found.n == 2


def test_cases_without_the_metric_leave_the_mean_alone() -> None:
    cases = [[Score("m", 1.0, 2)], [], [Score("m", 0.0, 0)], [Score("m", 0.0, 3)]]
    (found,) = summarise(protocol(metric("m")), cases)
    assert (found.value, found.n) == (0.5, 2)
    assert (found.low, found.high) == intervals.wilson(1, 2)


def test_what_stands_for_a_mean_of_nothing() -> None:
    nothing = [[Score("m", 0.0, 0)]]
    assert summarise(protocol(metric("m")), nothing) == []
    assert summarise(protocol(metric("m", if_none=0.0)), nothing)[0][1:] == (0.0, 0, 0.0, 0.0)
    assert summarise(protocol(metric("m", if_none=0.0)), [[]]) == []  # never asked


def test_a_derived_number_wants_all_of_its_metrics_unless_told_otherwise() -> None:
    def made(partly: bool) -> Protocol:
        return protocol(metric("a"), metric("b"), derived=(Derived("d", "", "", ("a", "b"), sum, partly),))

    cases = [[Score("a", 0.5, 1)], [Score("a", 0.25, 1)]]
    assert [one.metric for one in summarise(made(False), cases)] == ["a"]
    assert summarise(made(True), cases)[-1][:3] == ("d", 0.375, 2)


def test_s_is_the_harmonic_mean_of_means() -> None:
    cases = [
        [Score("ES", 1.0, 1), Score("PS", 0.5, 2), Score("NS", 0.9, 10)],
        [Score("ES", 1.0, 1), Score("PS", 0.0, 2), Score("NS", 0.7, 10)],
    ]
    found = {one.metric: one for one in summarise(PROTOCOLS["rome"], cases)}
    assert found["S"].value == pytest.approx(3 / (1 / 1.0 + 1 / 0.25 + 1 / 0.8))  # of the means, not a mean of cases
    assert found["S"].low <= found["S"].value <= found["S"].high
    failed = summarise(PROTOCOLS["rome"], [[Score("ES", 0.0, 1), Score("PS", 1.0, 1), Score("NS", 1.0, 1)]])
    assert failed[-1][:2] == ("S", 0.0)
    assert "S" not in {one.metric for one in summarise(PROTOCOLS["rome"], [[Score("ES", 1.0, 1)]])}
