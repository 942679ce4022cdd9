from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from mega_core import frames
from mega_core.attribution import contrast
from mega_core.attribution.contrast import Rules
from mega_core.errors import ActionableError, BadInput, FrameError

NEW, TRUE = ("attn", 1, "new"), ("attn", 1, "true")


def tables(edits, n_layers=3, editor="rome", induced="") -> tuple[pd.DataFrame, pd.DataFrame]:
    """From (success, {(state, (module, layer, candidate)): nats}) per edit; what isn't named is 0."""
    runs, scores = [], []
    for number, (success, values) in enumerate(edits):
        key = {"editor": editor, "edit": number, "induced": induced}
        runs.append({**key, "success": success, "likelier": True, "prob_new": 0.5, "prob_true": 0.1})
        for state in ("before", "after"):
            for module in contrast.MODULES:
                for layer in range(n_layers):
                    for candidate in contrast.CANDIDATES:
                        place = (module, layer, candidate)
                        value = values.get((state, place), 0.0)
                        row = {"state": state, "layer": layer, "module": module, "candidate": candidate}
                        scores.append({**key, **row, "contribution": value})
    return frames.from_rows(runs, "contrast_runs"), frames.from_rows(scores, "run_scores")


def both(*parts) -> tuple[pd.DataFrame, pd.DataFrame]:
    return pd.concat([runs for runs, _ in parts]), pd.concat([scores for _, scores in parts])


def moved(before: float, after: float, true: float = 0.0) -> dict:
    """Attention of layer 1 from `before` to `after` for the new object; to `true` for the old one."""
    return {("before", NEW): before, ("after", NEW): after, ("after", TRUE): true}


# 8 successes that gain 2 or 4, 10 failures that gain 0.5 from a lower start.
WORK = [(True, moved(1.0, 3.0 + 2 * (i % 2), true=-1.0)) for i in range(8)]
FAIL = [(False, moved(0.5, 1.0)) for _ in range(10)]


def value(found: contrast.Contrast, statistic: str, place=NEW, failures: str | None = None) -> pd.Series:
    table = found.frames["contrast"]
    module, layer, candidate = place
    rows = table[
        (table["statistic"] == statistic) & (table["module"] == module) & (table["layer"] == layer)
        & (table["candidate"] == candidate) & ((table["failures"] == failures) | (failures is None))
    ]  # fmt: skip
    (row,) = (row for _, row in rows.iterrows())
    return row


# Curves --------------------------------------------------------------------------------------------------------------


def test_the_three_statistics_are_their_definitions() -> None:
    found = contrast.contrast(*tables(WORK + FAIL))
    assert value(found, "D")["mean"] == pytest.approx(3.0)  # half gain 2, half 4
    assert value(found, "C")["mean"] == pytest.approx(4.0 - 1.0)
    assert value(found, "K")["mean"] == pytest.approx(3.0 - 0.5)
    assert value(found, "D", TRUE)["mean"] == value(found, "K", TRUE)["mean"] == pytest.approx(-1.0)
    assert value(found, "D", ("ffn", 1, "new"))["mean"] == 0
    row = value(found, "K")
    assert (row["failures"], row["n_success"], row["n_failure"]) == ("natural", 8, 10)
    assert value(found, "D")["failures"] == "none"


def test_the_order_of_rows_and_the_numbers_of_edits_say_nothing() -> None:
    runs, scores = tables(WORK + FAIL)
    mixed = [frame.sample(frac=1, random_state=0) for frame in (runs, scores)]
    for frame in mixed:
        frame["edit"] = 7 * frame["edit"] + 3
    there, here = contrast.contrast(runs, scores), contrast.contrast(*mixed)
    for name in there.frames:
        pd.testing.assert_frame_equal(there.frames[name], here.frames[name])


def test_with_few_failures_only_the_delta_is_told() -> None:
    found = contrast.contrast(*tables(WORK + FAIL[:9]))
    assert set(found.frames["contrast"]["statistic"]) == {"D"}
    assert value(found, "D")["n_failure"] == 9
    with pytest.raises(ActionableError, match="10 failures"):
        contrast.contrast(*tables(WORK + FAIL[:9]), rules=Rules(basis="K"))


def test_induced_failures_stand_in_and_are_named() -> None:
    worse = [(i < 2, moved(1.0, 2.0)) for i in range(12)]  # ten of them fail
    found = contrast.contrast(*both(tables(WORK + FAIL[:4]), tables(worse, induced="steps 2")))
    row = value(found, "K")
    assert row["failures"] == "induced: steps 2"
    assert row["n_failure"] == 10
    assert row["mean"] == pytest.approx(3.0 - 1.0)
    assert value(found, "D")["n_success"] == 8  # the induced runs that succeeded don't count


def test_natural_failures_come_before_induced_ones() -> None:
    worse = [(False, moved(1.0, 9.0)) for _ in range(12)]
    found = contrast.contrast(*both(tables(WORK + FAIL), tables(worse, induced="steps 2")), rules=Rules(basis="K"))
    assert value(found, "K", failures="natural")["mean"] == pytest.approx(2.5)
    assert value(found, "K", failures="induced: steps 2")["mean"] == pytest.approx(-5.0)
    assert lever(found, "rome")["leverage"].max() == pytest.approx(2.5 + 1.0)


def test_the_softer_label_counts_other_successes() -> None:
    runs, scores = tables(WORK + FAIL)
    found = contrast.contrast(runs, scores, label="likelier")
    assert value(found, "D")["mean"] == pytest.approx((8 * 3.0 + 10 * 0.5) / 18)
    with pytest.raises(BadInput, match="argmax"):
        contrast.contrast(runs, scores, label="nicer")


def test_a_run_without_all_its_scores_is_refused() -> None:
    runs, scores = tables(WORK + FAIL)
    with pytest.raises(FrameError, match="lacks"):
        contrast.contrast(runs, scores[:-1])
    with pytest.raises(ActionableError, match="No edit succeeded"):
        contrast.contrast(*tables(FAIL))


# Intervals -----------------------------------------------------------------------------------------------------------


def test_intervals_are_the_percentiles_of_redrawn_edits() -> None:
    generator = np.random.default_rng(1)
    edits = [(bool(i % 3), moved(0.0, float(generator.normal(3 * bool(i % 3))))) for i in range(45)]
    found = value(contrast.contrast(*tables(edits), resamples=200, seed=5), "K")
    # The plain way: every draw is a list of edits.
    draws = np.random.default_rng(5).multinomial(45, np.full(45, 1 / 45), size=200)
    gains = np.array([values["after", NEW] for _, values in edits])
    good = np.array([success for success, _ in edits])
    means = []
    for counts in draws:
        who = np.repeat(np.arange(45), counts)
        means.append(gains[who][good[who]].mean() - gains[who][~good[who]].mean())
    assert found["low"] == pytest.approx(np.percentile(means, 2.5))
    assert found["high"] == pytest.approx(np.percentile(means, 97.5))


def test_draws_are_seeded() -> None:
    runs, scores = tables(WORK + FAIL)
    one, same, other = (contrast.contrast(runs, scores, seed=seed).frames["contrast"] for seed in (0, 0, 1))
    assert one.equals(same)
    assert not one.equals(other)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for trial in range(40):
        gains = np.random.default_rng(trial).normal(1.0, 2.0, size=40)
        runs, scores = tables([(True, moved(0.0, float(gain))) for gain in gains], n_layers=2)
        row = value(contrast.contrast(runs, scores, resamples=200, seed=trial), "D")
        covered += row["low"] <= 1.0 <= row["high"]
    assert 33 <= covered < 40  # 95 % of 40 is 38


# Leverage and region -------------------------------------------------------------------------------------------------


def lever(found: contrast.Contrast, editor: str, module: str = "attn") -> pd.DataFrame:
    table = found.frames["leverage"]
    return table[(table["editor"] == editor) & (table["module"] == module)]


def test_leverage_is_promotion_and_suppression_of_attention() -> None:
    work = [
        (True, {("after", ("attn", 0, "new")): -5.0, ("after", ("attn", 1, "new")): 2.0,
                ("after", ("attn", 1, "true")): -3.0, ("after", ("attn", 2, "true")): 4.0,
                ("after", ("ffn", 2, "true")): -7.0})
    ]  # fmt: skip
    found = contrast.contrast(*tables(work * 3), rules=Rules(beta=2.0))
    assert lever(found, "rome")["leverage"].tolist() == [0, 2 + 2 * 3, 0]
    assert lever(found, "rome", "ffn")["leverage"].tolist() == [0, 0, 14]
    assert lever(found, "all")["in_region"].all()  # three layers are the fewest


def test_editors_are_averaged_in_deviations_from_the_lowest_layer() -> None:
    weak = [(True, {("after", ("attn", layer, "new")): 0.1 * height for layer, height in enumerate((0, 3, 0))})]
    strong = [(True, {("after", ("attn", layer, "new")): height for layer, height in enumerate((2, 2, 5))})]
    found = contrast.contrast(*both(tables(weak * 3), tables(strong * 3, editor="ft")))
    deviation = np.std([0, 3, 0])  # that of both, in units of 0.1 and 1
    expected = np.array([0, 3, 0]) / deviation / 2 + np.array([2, 2, 5]) / deviation / 2
    np.testing.assert_allclose(lever(found, "all")["leverage"], expected - expected.min())


def test_smoothing_is_a_mean_of_those_who_are_there() -> None:
    np.testing.assert_allclose(contrast.smoothed(np.array([3.0, 0, 3, 9])), [1.5, 2, 4, 6])
    np.testing.assert_allclose(contrast.smoothed(np.array([3.0, 0, 3, 9]), 1), [3, 0, 3, 9])


def test_the_region_of_a_large_model() -> None:
    """24 layers: from 9 on, without the last two, at most 4; half of the mass is enough, three are the fewest."""
    plain = Rules(smooth=1)
    curve = np.zeros(24)
    curve[[2, 12, 23]] = 50, 10, 50  # too low, right, too high
    assert contrast.region(curve, plain) == (9, 10, 12)  # mass by one, but never fewer than three
    curve[9:22] = 1
    assert contrast.region(curve, plain) == (9, 10, 11, 12)  # 4 of 13 equal ones: the cap comes before half the mass
    curve[[15, 16, 17]] = 20
    assert contrast.region(curve, plain) == (15, 16, 17)
    assert contrast.region(curve, Rules(smooth=1, cap=2, fewest=1)) == (15, 16)
    assert contrast.region(curve, Rules(smooth=1, mass=0.9)) == (9, 15, 16, 17)
    assert contrast.region(curve, Rules(smooth=1, drop_last=0)) == (15, 16, 23)


def test_smoothing_decides_between_a_peak_and_a_range() -> None:
    curve = np.zeros(24)
    curve[[10, 15, 16, 17]] = 6, 5, 5, 5
    assert contrast.region(curve, Rules(fewest=1)) == (15, 16, 17)
    assert contrast.region(curve, Rules(fewest=1, smooth=1, mass=0.25)) == (10,)


def test_a_small_model_keeps_three_layers_and_its_last() -> None:
    assert contrast.region(np.arange(8.0)) == (5, 6, 7)
    assert contrast.region(np.arange(3.0)) == (0, 1, 2)  # fewer than it takes: all it has
    assert Rules().eligible(8) == range(3, 8)
    assert Rules().eligible(48) == range(19, 46)
    assert Rules().most(48) == 8


def test_layers_for_ace() -> None:
    gain = np.array([9.0, 9, 9, 0, 0, 3, 4, 9])  # too low, ..., the last layer
    assert contrast.value_layers(gain) == (5, 6)
    attention = np.array([0, 0.2, 0.4, 0.5, 1, 4, 3, 6])
    assert contrast.query_layers(attention, (5, 6)) == (2, 3)  # right below 4, the first with a tenth of 6
    assert contrast.query_layers(attention, (3, 4)) == (1, 2)  # and below the value layers
    assert contrast.query_layers(attention[::-1], (5, 6)) == (0,)
    assert contrast.query_layers(np.array([5.0, 0, 0, 0]), (2,)) == (0,)


def test_how_often_draws_choose_a_layer() -> None:
    generator = np.random.default_rng(0)
    edits = []
    for _ in range(20):
        height = {3: 1.0, 4: 3.0, 5: 3.0, 6: 3.0, 7: generator.normal(1.5, 4)}
        edits.append((True, {("after", ("attn", layer, "new")): gain for layer, gain in height.items()}))
    table = lever(contrast.contrast(*tables(edits, n_layers=8)), "all")
    assert table["chosen"].iloc[5] == 1.0
    assert 0 < table["chosen"].iloc[7] < 1
    assert table["chosen"].sum() == pytest.approx(3)


def test_an_unknown_basis_is_refused() -> None:
    with pytest.raises(BadInput, match="D, K, C"):
        Rules(basis="d")


# The pattern ---------------------------------------------------------------------------------------------------------


def pattern(attn: float, old: float, ffn_old: float, ffn: float = 0.0, noise: float = 0.1) -> contrast.Contrast:
    generator = np.random.default_rng(0)
    edits = []
    for _ in range(30):
        shift = generator.normal(0, noise)
        values = {
            ("after", ("attn", 2, "new")): attn + shift,
            ("after", ("attn", 2, "true")): old + shift,
            ("after", ("ffn", 2, "true")): ffn_old + shift,
            ("after", ("ffn", 0, "new")): ffn,
        }
        edits.append((True, values))
    return contrast.contrast(*tables(edits))


def test_the_published_pattern_is_recognised() -> None:
    sums = pattern(3.0, -2.0, -1.0).frames["contrast_sums"]
    claims = contrast.verdict(sums, "rome")
    assert [claim.holds for claim in claims] == ["yes"] * 4
    assert [round(claim.value) for claim in claims] == [3, 3, 2, 1]
    assert all(claim.low < claim.value < claim.high for claim in claims)
    assert "holds for every editor: rome" in contrast.in_words({"rome": claims})


@pytest.mark.parametrize(
    ("given", "holds"),
    [
        ((3.0, -2.0, 0.0), ["yes", "yes", "yes", "unclear"]),
        ((3.0, 2.0, -1.0), ["yes", "yes", "no", "yes"]),
        ((3.0, -2.0, -1.0, 5.0), ["yes", "no", "yes", "yes"]),  # MLPs promote more
        ((-3.0, -2.0, -1.0), ["no", "no", "yes", "yes"]),
    ],
)
def test_what_does_not_hold_is_said(given: tuple[float, ...], holds: list[str]) -> None:
    claims = contrast.verdict(pattern(*given).frames["contrast_sums"], "rome")
    assert [claim.holds for claim in claims] == holds
    whole = contrast.verdict(pattern(3, -2, -1).frames["contrast_sums"], "rome")
    words = contrast.in_words({"rome": claims, "ft": whole})
    assert "holds as a whole for ft." in words
    assert all(claim.text in words for claim in claims if claim.holds != "yes")


def test_sums_have_intervals_of_their_own() -> None:
    """Two layers that pull against each other in every edit: each varies, their sum doesn't."""
    generator = np.random.default_rng(0)
    edits = []
    for _ in range(30):
        pull = generator.normal(0, 5)
        edits.append((True, {("after", ("attn", 1, "new")): 1 + pull, ("after", ("attn", 2, "new")): 1 - pull}))
    sums = contrast.contrast(*tables(edits)).frames["contrast_sums"]
    row = sums[(sums["module"] == "attn") & (sums["span"] == "late") & (sums["candidate"] == "new")].iloc[0]
    assert row["low"] == pytest.approx(2)
    assert row["high"] == pytest.approx(2)
