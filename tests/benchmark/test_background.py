"""Benchmarks that outlast the browser: started through the service, stopped, listed, gone on with after a restart."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from mega_core.benchmark import plan as plans
from mega_core.errors import BadInput, Busy, UnknownName
from mega_core.evaluation import asking
from mega_core.methods import METHODS
from mega_core.service import Service
from mega_core.service.benchmarks import MAX_UPLOAD
from mega_core.settings import Settings
from tests.cli.test_bench import record
from tests.service.toy import TOY, write_catalogue


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_catalogue(tmp_path_factory.mktemp("models"), little="gpt2")


@pytest.fixture(autouse=True)
def _tiny(catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "_entries", {"toy": TOY})
    monkeypatch.setattr(asking, "NEW_TOKENS", 2)
    monkeypatch.setattr(plans, "BESIDE", "")
    monkeypatch.setenv("MEGA_MODELS", str(catalogue))
    monkeypatch.setenv("MEGA_DEVICE", "cpu")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facts.json").write_text(json.dumps([record(i, name) for i, name in enumerate(("France", "Spain"))]))


@pytest.fixture
def opened() -> Iterator[Callable[[], Service]]:
    services: list[Service] = []

    def open_one() -> Service:
        for old in services:
            old.close()
        services.append(Service.open(Settings.read()))
        return services[-1]

    yield open_one
    services[-1].close()


def until(true: Callable[[], bool], seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_benchmark_in_the_background_has_no_time_limit_and_goes_on_after_a_restart(opened, tmp_path, monkeypatch):
    monkeypatch.setenv("MEGA_JOB_SECONDS", "1")
    service = opened()
    slow = {"toy": {"sleep": 0.4}}  # 2 s an edit, twice the limit of a question
    setup = service.benchmarks.plan("little", ["toy"], "facts.json", protocols=["rome"], params=slow)
    name = service.benchmarks.start(setup)
    assert service.benchmarks.start(setup) == name  # the same one
    until(lambda: service.benchmarks.all()[0].done >= 3)
    (one,) = service.benchmarks.all()
    assert (one.name, one.total, one.state) == (name, 4, "running")
    (tmp_path / "facts.json").unlink()  # an upload is gone, too
    service = opened()
    (one,) = service.benchmarks.all()
    assert (one.done, one.total, one.state) == (3, 4, "stopped")
    assert len(service.benchmarks.of(name).lines) == 3
    assert service.benchmarks.resume(name) == name
    until(lambda: service.benchmarks.all()[0].state == "done")
    assert service.benchmarks.of(name).complete
    assert (service.benchmarks.all()[0].folder / "report.html").is_file()


def test_others_get_the_model_between_two_cases(opened):
    service = opened()
    slow = {"toy": {"sleep": 0.1}}
    name = service.benchmarks.start(
        service.benchmarks.plan("little", ["toy"], "facts.json", protocols=["rome"], params=slow)
    )
    until(lambda: service.benchmarks.all()[0].state == "running")
    job = service.ask("little", "The capital of France is", "amy")
    assert service.wait(job, 60).state == "done"
    service.benchmarks.stop(name)
    until(lambda: service.benchmarks.all()[0].state in ("stopped", "done"))
    service.benchmarks.stop("no such name")


def test_a_failure_is_told(opened, monkeypatch):
    def prepare(lm, requests, params, seed, report):
        lm.changes.append("something")
        return TOY.prepare(lm, requests, params, seed, report)

    monkeypatch.setattr(METHODS, "_entries", {"toy": replace(TOY, prepare=prepare)})
    service = opened()
    service.benchmarks.start(service.benchmarks.plan("little", ["toy"], "facts.json", protocols=["rome"]))
    until(lambda: service.benchmarks.all()[0].state == "failed")
    assert "a change was left" in service.benchmarks.all()[0].error


def test_names_that_are_none_and_damaged_folders_are_refused(opened):
    service = opened()
    assert service.benchmarks.all() == ()
    for name in ("../results", "", "0" * 32):
        with pytest.raises(BadInput):
            service.benchmarks.of(name)
        with pytest.raises(BadInput):
            service.benchmarks.resume(name)
    name = service.benchmarks.start(service.benchmarks.plan("little", ["toy"], "facts.json", protocols=["rome"]))
    until(lambda: service.benchmarks.all()[0].state == "done")
    folder = service.benchmarks.all()[0].folder
    text = (folder / "setup.json").read_text().replace("France", "Norway")
    (folder / "setup.json").write_text(text)
    with pytest.raises(BadInput, match="can't be read"):
        service.benchmarks.resume(name)
    (folder / "plan.json").write_text("{}")
    assert service.benchmarks.all() == ()


def test_tables_and_answers_are_there_for_a_page(opened, tmp_path):
    service = opened()
    desk = service.benchmarks
    setup = desk.plan("little", ["toy"], "facts.json", protocols=["rome"])
    ahead = desk.outlook(setup, {"toy": 3.0})
    assert (ahead.cases, ahead.measurements, ahead.seconds, ahead.known_as) == (2, 4, 6.0, "")
    name = desk.start(setup)
    until(lambda: desk.sweep(name).state == "done")
    tables = desk.tables(name)
    assert (tables.done, tables.total) == (4, 4)
    assert list(dict.fromkeys(tables.scores["method"])) == ["unedited", "toy"]
    for row in tables.scores.itertuples():
        measure = tables.measure(row.protocol, row.metric)
        behind = desk.behind(name, measure, row.method)
        assert len(behind), row
        if len(measure.of) == 1:
            mean = behind[behind["counts"]].groupby("case")["value"].mean()
            assert mean.mean() == pytest.approx(row.value, abs=1e-6), row
            assert len(mean) == row.n
    assert len(desk.answers(name)) == len(desk.of(name).answers)
    assert desk.files(name) == ("report.html", "plan.json")
    assert desk.file(name, "report.html").lower().startswith(b"<!doctype html>")
    with pytest.raises(UnknownName):
        desk.file(name, "../setup.json")
    case = desk.case(name, tables.plan.ids[0])
    question = desk.question(name, "toy", case.id)
    assert question.requests == case.requests
    assert question.method == tables.plan.entrant("toy").method
    again = desk.outlook(setup, {})
    assert again.known_as == name
    assert again.seconds is not None  # by its own pace, which was kept
    with pytest.raises(BadInput):
        desk.case(name, "no such case")


def test_answers_are_read_from_the_lines_while_the_file_is_old(opened):
    service = opened()
    desk = service.benchmarks
    name = desk.start(desk.plan("little", ["toy"], "facts.json", protocols=["rome"]))
    until(lambda: desk.sweep(name).state == "done")
    measure = desk.tables(name).measure("rome", "ES")
    whole = desk.behind(name, measure, "toy")
    (desk.sweep(name).folder / "answers.parquet").write_bytes(b"PAR1 damaged")
    pd.testing.assert_frame_equal(desk.behind(name, measure, "toy"), whole)
    (desk.sweep(name).folder / "answers.parquet").unlink()
    pd.testing.assert_frame_equal(desk.behind(name, measure, "toy"), whole)


def test_why_it_failed_is_told_after_a_restart_until_it_is_gone_on_with(opened, monkeypatch):
    broken = []

    def prepare(lm, requests, params, seed, report):
        if not broken:
            broken.append(1)
            lm.changes.append("something")
        return TOY.prepare(lm, requests, params, seed, report)

    monkeypatch.setattr(METHODS, "_entries", {"toy": replace(TOY, prepare=prepare)})
    service = opened()
    name = service.benchmarks.start(service.benchmarks.plan("little", ["toy"], "facts.json", protocols=["rome"]))
    until(lambda: service.benchmarks.sweep(name).state == "failed")
    service = opened()
    told = service.benchmarks.sweep(name)
    assert told.state == "failed"
    assert "a change was left" in told.error
    service.benchmarks.resume(name)
    until(lambda: service.benchmarks.sweep(name).state == "done")
    assert service.benchmarks.sweep(name).error == ""


def test_a_third_one_is_refused_and_leaves_nothing(opened):
    service = opened()
    desk = service.benchmarks
    slow = {"toy": {"sleep": 0.2}}
    names = [
        desk.start(desk.plan("little", ["toy"], "facts.json", protocols=["rome"], params=slow, seed=seed))
        for seed in (1, 2)
    ]
    with pytest.raises(Busy, match="no room for a third"):
        desk.start(desk.plan("little", ["toy"], "facts.json", protocols=["rome"], params=slow, seed=3))
    assert {one.name for one in desk.all()} == set(names)
    for name in names:
        desk.stop(name)
    until(lambda: not any(one.live for one in desk.all()))


def test_an_upload_is_kept_by_its_digest(opened, tmp_path):
    service = opened()
    desk = service.benchmarks
    data = json.dumps([record(1, "France"), {"case_id": 2}]).encode()
    mark, found = desk.upload(data, "facts.json")
    assert (len(found.cases), [one.record for one in found.problems]) == (1, ["2"])
    assert desk.uploaded(mark, "facts.json").digest == found.digest
    assert len(desk.plan("little", ["toy"], found, protocols=["rome"]).problems) == 1
    for damaged in ("../facts", "0" * 64, ""):
        with pytest.raises(BadInput, match="not here any more"):
            desk.uploaded(damaged, "facts.json")
    with pytest.raises(BadInput, match="larger than 5 MB"):
        desk.upload(b"[" + b" " * MAX_UPLOAD + b"]", "big.json")
    assert len(list((service.settings.cache_dir / "uploads").iterdir())) == 1
