"""Several methods on one edit as one job, and comparisons that are kept."""

from __future__ import annotations

import pytest

from mega_core.errors import BadInput
from mega_core.service import MAX_COMPARED, Service
from mega_core.settings import Settings
from tests.service.test_service import FRANCE, PROMPTS, finished, make_plan

ME = "o" * 32


def test_each_answer_is_there_under_its_own_digest(service):
    plans = [make_plan(service, strength=strength) for strength in (0.1, 0.2)]
    job = service.submit_several(plans, ME)
    view = finished(service, job)
    assert view.state == "done"
    assert view.kind == "compare"
    digests = [service.digest(plan) for plan in plans]
    assert service.result(job, ME) == dict.fromkeys(digests, "")
    assert [service.cached(digest).digest for digest in digests] == digests
    assert {entry.run.digest for entry in service.runs(session=ME)} == set(digests)
    stage = next(stage for stage in view.stages if stage.name == "methods")
    assert (stage.done, stage.total) == (2, 2)


@pytest.mark.parametrize(("fail", "says"), [("memory", "ran out of memory"), ("error", "error id")])
def test_one_that_fails_costs_the_others_nothing(service, fail, says):
    plans = [make_plan(service, fail=fail), make_plan(service, strength=0.3)]
    job = service.submit_several(plans, ME)
    view = finished(service, job)
    assert view.state == "done"
    bad, good = (service.digest(plan) for plan in plans)
    result = service.result(job, ME)
    assert says in result[bad]
    assert "somebody" not in result[bad]
    assert result[good] == ""
    assert service.cached(bad) is None
    assert service.cached(good) is not None
    assert any(says in note for note in view.notes)


def test_cancelling_keeps_what_was_found(service):
    plans = [make_plan(service, strength=0.4), make_plan(service, strength=0.5, sleep=5.0)]
    job = service.submit_several(plans, ME)
    while service.cached(service.digest(plans[0])) is None:
        assert not service.wait(job, 0.05).over
    service.cancel(job, ME)
    assert finished(service, job).state == "cancelled"
    assert service.cached(service.digest(plans[0])) is not None
    assert service.cached(service.digest(plans[1])) is None


def test_none_too_many_or_two_models_are_refused(service):
    plan = make_plan(service)
    with pytest.raises(BadInput, match="0 chosen"):
        service.submit_several([], ME)
    with pytest.raises(BadInput, match="Choose 1 to"):
        service.submit_several([plan] * (MAX_COMPARED + 1), ME)
    other = service.plan("atlas-gpt2", "toy", **FRANCE, **PROMPTS, views=())
    with pytest.raises(BadInput, match="more than one model"):
        service.submit_several([plan, other], ME)


def test_a_comparison_is_found_again_also_after_a_restart(service, settings: Settings):
    plans = (make_plan(service, strength=0.1), make_plan(service, seed=4))
    name = service.comparisons.save(plans)
    assert service.comparisons.save(plans) == name
    assert service.comparisons.save(plans[::-1]) != name
    with Service.open(settings) as again:
        assert again.comparisons.find(name) == plans


@pytest.mark.parametrize("name", ["", "0" * 64, "../../secret", "A" * 64, None, "x\x00", "0" * 63 + "\n"])
def test_no_text_finds_what_is_not_there(service, name):
    assert service.comparisons.find(name) is None


def test_a_damaged_file_is_no_comparison(service, settings: Settings):
    name = service.comparisons.save([make_plan(service)])
    file = settings.cache_dir / "comparisons" / f"{name}.json"
    whole = file.read_bytes()
    for damage in (
        b"",
        b"[]",
        b"{}",
        b'{"plans": 3}',
        b'{"plans": []}',
        whole[:-9],
        whole.replace(b"France", b"Francx"),
    ):
        file.write_bytes(damage)
        assert service.comparisons.find(name) is None
    file.write_bytes(whole)
    assert service.comparisons.find(name) is not None


def test_a_disk_that_refuses_is_told_and_costs_nothing(service, settings: Settings):
    (settings.cache_dir / "comparisons").write_text("a file where the folder should be")
    assert len(service.comparisons.save([make_plan(service)])) == 64
    assert any("Comparisons can't be kept" in notice for notice in service.status().notices)
