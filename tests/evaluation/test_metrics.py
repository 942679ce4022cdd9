"""Every number here can be done by hand."""

from __future__ import annotations

from math import exp, log

import pandas as pd
import pytest

from mega_core import frames
from mega_core.evaluation import metrics


def answer(kind: str, prompt: str, candidate: str, probs: list[float], top: bool, greedy: bool, **key: object) -> dict:
    total = sum(map(log, probs))
    return {
        "state": "after", "case": 0, "prompt_kind": kind, "prompt": prompt, "candidate": candidate, "token": "x",
        "logprob": total, "mean_logprob": total / len(probs), "prob": exp(total), "first_prob": probs[0], "rank": 1,
        "is_top": top, "is_greedy": greedy, **key,
    }  # fmt: skip


# New objects have two tokens: 0.9 * 0.4 = 0.36, whose geometric mean is 0.6. True ones have one.
TABLE = [
    answer("edit", "e", "new", [0.9, 0.4], True, False),
    answer("edit", "e", "true", [0.5], False, False),
    answer("paraphrase", "p1", "new", [0.9, 0.4], True, True),
    answer("paraphrase", "p1", "true", [0.7], False, False),
    answer("paraphrase", "p2", "new", [0.36, 1.0], False, False),
    answer("paraphrase", "p2", "true", [0.2], False, False),
    answer("neighbourhood", "n1", "new", [0.1, 0.1], False, False),
    answer("neighbourhood", "n1", "true", [0.8], True, True),
    answer("neighbourhood", "n2", "new", [0.5, 0.5], True, True),
    answer("neighbourhood", "n2", "true", [0.25], False, False),
    answer("neighbourhood", "n3", "new", [0.25, 0.25], False, False),
    answer("neighbourhood", "n3", "true", [0.25], True, False),
]

BY_HAND = {
    "ES": (1.0, 1),  # 0.6 > 0.5, although the sequence probability 0.36 is smaller: length-normalised
    "EM": (0.1, 1),
    "PS": (1 / 2, 2),  # 0.6 < 0.7, 0.6 > 0.2
    "PM": (((0.6 - 0.7) + (0.6 - 0.2)) / 2, 2),
    "NS": (1 / 3, 3),  # a tie (n3) is not kept: strict
    "NM": (((0.8 - 0.1) + (0.25 - 0.5) + 0.0) / 3, 3),
    "accuracy": (1.0, 1),
    "paraphrase_accuracy": (1 / 2, 2),
    "neighbourhood_accuracy": (2 / 3, 3),
    "exact": (0.0, 1),
    "paraphrase_exact": (1 / 2, 2),
    "neighbourhood_exact": (1 / 3, 3),
}


def frame(rows: list[dict]) -> pd.DataFrame:
    return frames.from_rows(rows, "answers")


def test_the_table_by_hand() -> None:
    found = metrics.measure(frame(TABLE)).set_index("metric")
    assert set(found.index) == set(BY_HAND) == {metric.name for metric in metrics.METRICS}
    for name, (value, n) in BY_HAND.items():
        assert found.loc[name, "value"] == pytest.approx(value), name
        assert found.loc[name, "n"] == n, name


def test_order_of_rows_does_not_matter() -> None:
    key = ["state", "case", "protocol", "metric"]
    straight, backwards = metrics.measure(frame(TABLE)), metrics.measure(frame(TABLE[::-1]))
    pd.testing.assert_frame_equal(
        straight.sort_values(key, ignore_index=True), backwards.sort_values(key, ignore_index=True)
    )


def test_without_a_true_object_only_what_needs_none() -> None:
    rows = [row for row in TABLE if row["candidate"] == "new"]
    found = metrics.measure(frame(rows))
    assert set(found["metric"]) == {"accuracy", "paraphrase_accuracy", "exact", "paraphrase_exact"}


def test_states_and_cases_are_kept_apart() -> None:
    other = [{**row, "case": 1, "state": "before"} for row in TABLE if row["prompt_kind"] == "edit"]
    other += [{**row, "state": "before", "is_top": False} for row in TABLE]
    found = metrics.measure(frame(TABLE + other)).set_index(["state", "case", "metric"])["value"]
    assert found["after", 0, "accuracy"] == 1.0
    assert found["before", 0, "accuracy"] == 0.0
    assert found["before", 1, "ES"] == 1.0
    assert ("before", 1, "PS") not in found.index


def test_prompts_that_are_not_there_give_no_metric() -> None:
    found = metrics.measure(frame([row for row in TABLE if row["prompt_kind"] == "edit"]))
    assert set(found["metric"]) == {"ES", "EM", "accuracy", "exact"}
    assert metrics.measure(frames.empty("answers")).empty


def test_every_metric_says_what_it_is() -> None:
    names = [metric.name for metric in metrics.METRICS]
    assert len(set(names)) == len(names)
    for metric in metrics.METRICS:
        assert metric.protocol in ("rome", "argmax", "exact")
        assert metric.title
        assert metric.formula
        assert metric.better == "higher"
        assert metric.score.__doc__
