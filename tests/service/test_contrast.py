"""Studies in the background: queued, stopped, kept on disk, of random facts or of a person's own runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from mega_core import contrast_study
from mega_core.contrast_study import Study
from mega_core.errors import BadInput, StoreError, UnsupportedMethod
from mega_core.events import Cancelled, Event
from mega_core.records import EditRequest, Report
from mega_core.service import Service, contrasted
from mega_core.service.studies import FEWEST_MINE, Studies
from tests.service.reports import make_report
from tests.service.toy import TOY
from tests.test_regions import report as made_by_hand
from tests.test_regions import scores

OWNER, OTHER = "o" * 32, "p" * 32
EDITS = contrast_study.draw(12, seed=0)


@pytest.fixture
def made(service: Service) -> Study:
    """A study of this model, by hand."""

    def ask(method: str, request: EditRequest, params: Mapping[str, object]) -> Report:
        return made_by_hand(True)

    found = contrast_study.study(ask, ["rome"], EDITS, induced=0)
    return replace(found, region=replace(found.region, model="little", weights=service.studies.weights("little")))


def start(service: Service, owner: str = OWNER, **asked: Any) -> tuple[str, str | None]:
    return service.studies.start_contrast("little", ["toy"], 6, owner, induced=0, **asked)


# Kept ----------------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_read(made: Study, tmp_path) -> None:
    contrasted.keep(made, "a" * 32, contrasted.DRAWN, {"edits": 12}, tmp_path)
    found = contrasted.load("a" * 32, tmp_path)
    assert found is not None
    assert found.region == made.region
    assert (found.verdict, found.claims) == (made.in_words, dict(made.verdicts))
    pd.testing.assert_frame_equal(found.curves, made.frames["contrast"])
    pd.testing.assert_frame_equal(found.leverage, made.frames["leverage"])
    (row,) = contrasted.listed(tmp_path, "little")
    assert (row["id"], row["methods"], row["edits"]) == ("a" * 32, ("rome",), 12)
    assert contrasted.listed(tmp_path, "other") == []


@pytest.mark.parametrize("name", ["", "..", "../a", "A" * 32, "b" * 32, "a" * 31 + "\n"])
def test_a_name_of_nothing(made: Study, tmp_path, name: str) -> None:
    contrasted.keep(made, "a" * 32, contrasted.DRAWN, {}, tmp_path)
    assert contrasted.load(name, tmp_path) is None


@pytest.mark.parametrize("file", ["study.json", "contrast.parquet"])
def test_damage_is_told_and_passed_over(made: Study, tmp_path, file: str) -> None:
    contrasted.keep(made, "a" * 32, contrasted.DRAWN, {}, tmp_path)
    (tmp_path / ("a" * 32) / file).write_bytes(b"\xff{")
    with pytest.raises(StoreError, match="damaged"):
        contrasted.load("a" * 32, tmp_path)
    assert len(contrasted.listed(tmp_path, "little")) == (file != "study.json")


def test_leverage_of_every_module_follows_from_the_curves(made: Study, tmp_path) -> None:
    contrasted.keep(made, "a" * 32, contrasted.DRAWN, {}, tmp_path)
    found = contrasted.load("a" * 32, tmp_path)
    assert found is not None
    table = found.map.set_index(["module", "layer"])["leverage"]
    assert [table["attn", layer] for layer in range(3)] == [0.0, 1.0, 2.0]  # gain 1 per layer, in the new object only
    assert table["ffn"].abs().max() == 0


# Queued --------------------------------------------------------------------------------------------------------------


def test_a_study_runs_in_a_lane_of_its_own_and_is_kept(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"success": True, "likelier": True, "prob_new": 0.5, "prob_true": 0.1}
    monkeypatch.setattr(contrast_study, "_run", lambda answer: good)  # a random model knows nothing
    name, job = start(service)
    assert job is not None
    view = service.wait(job, 120)
    assert view.state == "done", view.error
    assert (view.kind, view.model) == ("contrast", "study of little")
    assert [(one.name, one.done, one.total) for one in view.stages] == [(TOY.title, 6, 6)]
    assert service.result(job, OWNER) == name
    found = service.studies.contrasted(name)
    assert found is not None
    assert found.region.edits == 6
    assert start(service) == (name, None)
    assert start(service, seed=1)[0] != name
    assert [row["id"] for row in service.studies.studies("little", OTHER)] == [name]


def test_a_stop_is_noticed_inside_a_question(service: Service) -> None:
    def stop(event: Event) -> None:
        raise Cancelled

    clean = service.condition("little")
    with pytest.raises(Cancelled):
        service.studies.contrast("little", ["toy"], EDITS[:2], induced=0, tick=stop)
    assert service.condition("little") == clean
    _, job = start(service)
    assert job is not None
    assert service.cancel(job, OWNER).state == "cancelled"
    assert service.studies.studies("little", OWNER) == []


def test_nothing_that_counts_is_told(service: Service) -> None:
    _, job = start(service)
    assert job is not None
    view = service.wait(job, 120)
    assert view.state == "failed"
    assert view.error is not None
    assert "No edit counts" in view.error.what


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"edits": 4}, "5 to 200"),
        ({"edits": 201}, "5 to 200"),
        ({"methods": []}, "1 to 4"),
        ({"methods": ["toy", "toy"]}, "different"),
        ({"label": "x"}, "argmax"),
        ({"basis": "Z"}, "Choose one of"),
        ({"induced": -1}, "0 to 200"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_questions_are_refused(service: Service, asked: dict[str, Any], match: str) -> None:
    given = {"methods": ["toy"], "edits": 6, **asked}
    with pytest.raises(BadInput, match=match):
        service.studies.start_contrast("little", given.pop("methods"), given.pop("edits"), OWNER, **given)


def test_a_method_that_can_not_edit_the_model_is_refused(service: Service) -> None:
    with pytest.raises(UnsupportedMethod):
        service.studies.start_contrast("refused", ["toy"], 6, OWNER)


# Own runs ------------------------------------------------------------------------------------------------------------


def lived(service: Service, works: int, fails: int, owner: str = OWNER) -> None:
    """So many runs in a history, with their reports in the store."""
    for number in range(works + fails):
        request = replace(EDITS[number % 12], subject=f"Tower {number}", paraphrases=(), neighbours=())
        base = make_report(request=request, says_new=number < works)
        question = replace(base.question, model=replace(base.question.model, name="little"))
        report = replace(
            base, question=question, model_digest=service.studies.weights("little"), digest=question.key("1" * 64),
            frames={**base.frames, "module_scores": scores(1.0)},
        )  # fmt: skip
        service.core.store.put_report(report)
        service.visited(report, owner)


def test_own_runs_are_counted_by_outcome(service: Service) -> None:
    lived(service, 3, 2)
    (one,) = service.studies.own_runs("little", OWNER)
    assert (one.editor, one.worked, one.failed) == ("rome", 3, 2)
    assert service.studies.own_runs("little", OTHER) == ()
    with pytest.raises(BadInput, match=f"It takes {FEWEST_MINE}"):
        service.studies.start_contrast_of_mine("little", ["rome"], OWNER)


def test_a_study_of_own_runs_computes_nothing_and_is_nobody_elses(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    lived(service, FEWEST_MINE, FEWEST_MINE)
    monkeypatch.setattr(Studies, "contrast", lambda *_, **__: pytest.fail("it asked a model"))
    name, job = service.studies.start_contrast_of_mine("little", ["rome"], OWNER)
    assert job is not None
    view = service.wait(job, 120)
    assert view.state == "done", view.error
    found = service.studies.contrasted(name)
    assert found is not None
    assert found.source == "mine"
    assert (found.region.counts["rome"].success, found.region.counts["rome"].failure) == (FEWEST_MINE, FEWEST_MINE)
    assert set(found.curves["statistic"]) == {"D", "K", "C"}
    assert [row["id"] for row in service.studies.studies("little", OWNER)] == [name]
    assert service.studies.studies("little", OTHER) == []
