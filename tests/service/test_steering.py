"""Strengths of a steered run: one fit, then any strength, and the model as it was."""

from __future__ import annotations

import pytest

from mega_core.errors import BadInput, UnsupportedMethod
from mega_core.service import Service
from mega_core.service.steering import KEPT_FITS, Dial, Strength, _reach
from tests.service.reports import make_report

ME = "o" * 32


def steered(service: Service, **params: object):
    """A run by the plainest steering method on a tiny model."""
    plan = service.plan(
        "little", "mean_shift", "Eiffel Tower", "{} stands in", "Rome", "Paris",
        paraphrases=("Where is the Eiffel Tower? In", "The Eiffel Tower is in", "Go to the Eiffel Tower in"),
        neighbours=tuple(f"{name} stands in" for name in ("Louvre", "Big Ben", "Colosseum", "Kremlin")),
        params={"prompts": 2, "gate": "subject", "alpha": 1.5, "target": "contexts", **params}, views=(),
    )  # fmt: skip
    return service.run(plan)


def fitted(service: Service, report) -> Dial:
    job = service.steering.prepare(report, ME)
    assert service.wait(job, 60).state == "done"
    return service.result(job, ME)


def test_a_fit_gives_a_dial_and_any_strength_and_the_model_is_as_before(service):
    report = steered(service)
    before = service.condition("little")
    assert service.steering.dial(report.digest) is None
    dial = fitted(service, report)
    assert service.steering.dial(report.digest) is dial
    assert (dial.own, dial.reach) == (1.5, 3.0)
    assert dial.curve["alpha"].is_monotonic_increasing
    assert {0.0, 1.5, 3.0} <= set(dial.curve["alpha"])
    found = service.steering.at(report.digest, 0.7, ME, patience=60)
    assert isinstance(found, Strength)
    assert [said.kind for said in found.said] == ["edit"] + ["paraphrase"] * 2 + ["neighbourhood"] * 3
    assert found.said[0].continuation
    assert sum(prob for _, prob in found.next_tokens) <= 1 + 1e-6
    assert service.condition("little") == before
    assert service.steering.at(report.digest, 0.7, ME) is found  # kept: no wait, no job


def test_the_own_strength_gives_the_run_and_zero_the_base_model(service):
    report = steered(service)
    fitted(service, report)
    answers = report.frames["answers"]
    new = answers[(answers["prompt_kind"] == "edit") & (answers["candidate"] == "new")].set_index("state")["prob"]
    own = service.steering.at(report.digest, 1.5, ME, patience=60)
    assert own.said[0].prob_new == pytest.approx(new["after"], rel=1e-5)
    assert new["after"] != pytest.approx(new["before"], rel=1e-3)
    off = service.steering.at(report.digest, 0.0, ME, patience=60)
    assert off.said[0].prob_new == pytest.approx(new["before"], rel=1e-5)


def test_what_cannot_be_turned_is_told(service):
    with pytest.raises(UnsupportedMethod, match="no strength"):
        service.steering.prepare(make_report(), ME)
    with pytest.raises(BadInput, match="Prepare the slider again"):
        service.steering.at("0" * 64, 1.0, ME)
    report = steered(service)
    fitted(service, report)
    for alpha in (-0.1, 3.01, float("nan"), float("inf")):
        with pytest.raises(BadInput, match="beyond"):
            service.steering.at(report.digest, alpha, ME)


def test_a_run_of_other_weights_is_refused(service):
    from dataclasses import replace

    report = steered(service)
    with pytest.raises(BadInput, match="other weights"):
        service.steering.prepare(replace(report, digest="1" * 64), ME)


def test_a_strength_asked_twice_at_a_time_is_worked_once(service):
    report = steered(service)
    fitted(service, report)
    first, second = (service.steering.at(report.digest, 0.9, ME) for _ in range(2))
    assert first == second or isinstance(second, Strength)
    assert isinstance(service.steering.at(report.digest, 0.9, ME, patience=60), Strength)


def test_the_oldest_fits_go_first(service):
    reports = [steered(service, alpha=0.1 * (i + 1)) for i in range(KEPT_FITS + 1)]
    for report in reports:
        fitted(service, report)
    assert service.steering.dial(reports[0].digest) is None
    assert all(service.steering.dial(report.digest) is not None for report in reports[1:])


@pytest.mark.parametrize(
    ("own", "limits", "reach"), [(1.25, [8.0], 3.0), (2.0, [8.0], 4.0), (0.0, [None], 3.0), (3.0, [4.0], 4.0)]
)
def test_how_far_the_dial_goes(own, limits, reach):
    assert _reach(own, limits) == reach
