from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mega_core import contrast_study, frames
from mega_core import regions as region_files
from mega_core.attribution.contrast import Rules
from mega_core.commands.common import plans_of, with_regions
from mega_core.embedded import examples
from mega_core.errors import ActionableError, BadInput, OutOfMemory, StoreError, UnknownName
from mega_core.events import Cancelled, Event, Note
from mega_core.methods.base import METHODS
from mega_core.records import EditRequest, Report
from mega_core.regions import Count, Lever, Region, layers_text
from mega_core.service import Service
from mega_core.service.studies import Studies
from mega_core.settings import Settings
from tests.service.reports import make_report
from tests.service.toy import TOY, write_catalogue

DIGEST = "0123456789abcdef" * 4
REGION = Region(
    model="little",
    weights=DIGEST,
    n_layers=3,
    methods=("rome", "memit"),
    edits=200,
    seed=3,
    basis="D",
    counts={"rome": Count(190, 10, 0, "natural"), "memit": Count(199, 1, 0, "induced: steps 2")},
    layers=(1, 2),
    value_layers=(1,),
    query_layers=(0,),
    leverage=tuple(Lever(layer, 0.1 + layer, 0.1, 0.3 * layer, 1 / 3, 0.5) for layer in range(3)),
    rules={"basis": "D", "mass": 0.5},
    versions={"torch": "2.13"},
)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_catalogue(tmp_path_factory.mktemp("models"), little="gpt2", other="gpt_neox")


@pytest.fixture
def service(catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METHODS._entries, "toy", TOY)
    env = {"MEGA_CACHE_DIR": str(tmp_path / "cache"), "MEGA_MODELS": str(catalogue), "MEGA_DEVICE": "cpu"}
    with Service.open(Settings.read(env)) as opened:
        yield opened


# The file ------------------------------------------------------------------------------------------------------------


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    REGION.save(tmp_path / "new" / "region.json")
    found = Region.load(tmp_path / "new" / "region.json")
    assert found == REGION
    assert found.text() == "1-2 (measured: rome, memit)"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["region.json"]


def test_a_file_that_can_not_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "region.json"
    REGION.save(path)
    whole = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(StoreError, match="No space"):
        replace(REGION, edits=1).save(path)
    assert path.read_bytes() == whole
    assert [one.name for one in tmp_path.iterdir()] == ["region.json"]


def changed(**values: Any) -> bytes:
    return json.dumps({**REGION.as_plain(), **values}).encode()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1, 2]", "not a region file"),
        (b'{"kind": "report"}', "not a region file"),
        (b" " * (2**20 + 1), "too large"),
        (changed(schema_version=99), "schema 99"),
        (changed(layers=[2, 1]), "layers are not layers"),
        (changed(layers=[]), "layers are not layers"),
        (changed(layers=[1, 3]), "layers are not layers"),
        (changed(layers=[True]), "not a whole number"),
        (changed(value_layers=["1"]), "not a whole number"),
        (changed(query_layers=None), "damaged"),
        (changed(methods=["rome (x)"]), "no names"),
        (changed(methods=[]), "no names"),
        (changed(model={"name": "little"}), "'weights' is missing"),
        (changed(model={"name": "../x", "weights": DIGEST}), "no name"),
        (changed(model={"name": "little", "weights": "nice"}), "no digest"),
        (changed(counts=[1]), "damaged"),
        (changed(leverage=[{"layer": 1}]), "damaged"),
    ],
)
def test_a_damaged_file_is_refused_by_name(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    with pytest.raises(BadInput, match=said) as caught:
        Region.load(path)
    assert "bad.json" in str(caught.value)
    assert "mega_core contrast" in caught.value.next_step


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="can't be read"):
        Region.load(tmp_path / "none.json")
    with pytest.raises(BadInput, match="can't be read"):
        Region.load(tmp_path)


def test_another_models_region_is_refused_naming_both() -> None:
    assert REGION.check("little", DIGEST) is REGION
    with pytest.raises(BadInput, match="mega.region: was measured on little, not on other"):
        REGION.check("other", DIGEST, "mega.region")
    with pytest.raises(BadInput, match="other weights of little .0123456789ab, here ffffffffffff."):
        REGION.check("little", "f" * 64)


@pytest.mark.parametrize(
    ("layers", "text"), [((4, 5, 6), "4-6"), ((3,), "3"), ((1, 2, 5, 7, 8), "1-2,5,7-8"), ((0, 2), "0,2")]
)
def test_layers_in_words(layers: tuple[int, ...], text: str) -> None:
    from mega_core.methods.spread import parse_layers

    assert layers_text(layers) == text
    assert parse_layers(text, 9) == layers


# By name in parameters -----------------------------------------------------------------------------------------------


def here(service: Service) -> Region:
    return replace(REGION, weights=service.studies.weights("little"))


def asked(*params: str, method: str = "mega") -> argparse.Namespace:
    return argparse.Namespace(
        model="little", param=list(params), file=None, subject="France", template="The capital of {} is",
        target_new="Rome", target_true="Paris", paraphrase=[], neighbour=[], seed=0,
    )  # fmt: skip


def test_a_question_holds_layers_and_never_a_files_name(service: Service, tmp_path: Path) -> None:
    here(service).save(tmp_path / "one.json")
    here(service).save(tmp_path / "two.json")
    (typed,) = plans_of(asked("region=1-2 (measured: rome, memit)"), service, ["mega"])
    for name in ("one", "two"):
        (plan,) = plans_of(asked(f"region={tmp_path / name}.json"), service, ["mega"])
        assert dict(plan.method.params)["region"] == "1-2 (measured: rome, memit)"
        assert service.digest(plan) == service.digest(typed)


def test_every_method_that_takes_layers_takes_its_own(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "region.json"
    here(service).save(path)
    pairs = [f"mega.region={path}", f"value_layers={path}", f"ace.query_layers={path}"]
    mega, ace = plans_of(asked(*pairs), service, ["mega", "ace"])
    assert dict(mega.method.params)["region"] == "1-2 (measured: rome, memit)"
    assert dict(ace.method.params)["value_layers"] == "1 (measured: rome, memit)"
    assert dict(ace.method.params)["query_layers"] == "0 (measured: rome, memit)"
    untouched = {"toy": {"region": str(path), "layer": 1}}
    assert with_regions(untouched, service, "little") == untouched


def test_a_foreign_or_missing_region_is_refused_before_anything_runs(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "region.json"
    REGION.save(path)  # of other weights
    with pytest.raises(BadInput, match="mega.region: was measured on other weights"):
        plans_of(asked(f"region={path}"), service, ["mega"])
    replace(here(service), model="other").save(path)
    with pytest.raises(BadInput, match="measured on other, not on little"):
        plans_of(asked(f"region={path}"), service, ["mega"])
    with pytest.raises(BadInput, match="can't be read"):
        plans_of(asked("region=nowhere.json"), service, ["mega"])


def test_kept_regions_are_listed_by_model_and_found_by_name(service: Service, tmp_path: Path) -> None:
    assert service.studies.regions("little") == {}
    service.studies.keep_region("mine", here(service))
    service.studies.keep_region("foreign", REGION)
    (service.settings.cache_dir / "regions" / "broken.json").write_text("{")
    assert service.studies.regions("little") == {"mine": here(service)}
    assert service.studies.regions("other") == {}
    (plan,) = plans_of(asked("region=mine.json"), service, ["mega"])
    assert dict(plan.method.params)["region"] == "1-2 (measured: rome, memit)"
    for name in ("../up", "", ".hidden", "a/b"):
        with pytest.raises(BadInput, match="no name"):
            service.studies.keep_region(name, here(service))


def test_mega_and_ace_read_the_remark(tiny_lm) -> None:
    from mega_core.events import silent
    from mega_core.methods import ace, mega

    assert mega.read_region(REGION.text(), 3) == ((1, 2), "measured: rome, memit")
    given = METHODS["ace"].ref({name: REGION.text(name) for name in ("value_layers", "query_layers")})
    found = ace.groups(tiny_lm("gpt2"), [], METHODS["ace"].read(given), 0, silent)
    assert found == ((1,), (0,))


# The study -----------------------------------------------------------------------------------------------------------


def scores(gain: float) -> pd.DataFrame:
    rows = [
        {"state": state, "case": 0, "layer": layer, "module": module, "candidate": candidate,
         "contribution": gain * layer if (state, module, candidate) == ("after", "attn", "new") else 0.0}
        for state in ("before", "after") for layer in range(3) for module in ("attn", "ffn")
        for candidate in ("new", "true")
    ]  # fmt: skip
    return frames.from_rows(rows, "module_scores")


def report(says_new: bool, gain: float = 1.0, **changes: Any) -> Report:
    made = make_report(says_new=says_new)
    answers = made.frames["answers"]
    if changes.get("alike"):
        answers = answers.assign(token=" x")
    if changes.get("unknown"):
        answers = answers.assign(is_top=answers["is_top"] & (answers["state"] == "after"))
    if changes.get("no_true"):
        answers = answers[answers["candidate"] == "new"]
    return replace(made, frames={"answers": answers, "module_scores": scores(gain)})


REQUESTS = contrast_study.draw(14, seed=1)


def test_edits_leave_the_reported_split_alone() -> None:
    reported = {request.subject for request in examples.reported(100)}
    drawn = {request.subject for request in contrast_study.draw(60, seed=0)}
    assert len(reported) == 100
    assert len(drawn) == 60
    assert not drawn & reported
    assert contrast_study.draw(3, 0) == contrast_study.draw(60, 0)[:3]
    assert contrast_study.draw(3, 0) != contrast_study.draw(3, 1)
    with pytest.raises(BadInput, match="1 to"):
        contrast_study.draw(0, 0)


def test_a_study_counts_runs_and_says_why_others_are_left_out() -> None:
    odd = {0: {"alike": True}, 1: {"unknown": True}, 2: {"no_true": True}}

    def ask(method: str, request: EditRequest, params: Mapping[str, object]) -> Report:
        number = REQUESTS.index(request)
        if number == 3:
            raise BadInput("subject", "does not stand in the prompt.")
        return report(number != 5, **odd.get(number, {}))

    said: list[Event] = []
    found = contrast_study.study(ask, ["rome"], REQUESTS, induced=0, report=said.append)
    assert found.region.counts["rome"] == Count(9, 1, 4, "too few")
    assert sum(found.left_out["rome"].values()) == 4
    assert len(found.left_out["rome"]) == 4
    assert found.region.layers == (0, 1, 2)
    assert [lever.leverage for lever in found.region.leverage] == sorted(
        lever.leverage for lever in found.region.leverage
    )
    assert len(found.frames["contrast_runs"]) == 10
    assert found.verdicts["rome"][0].holds == "yes"
    assert "unclear" in found.in_words
    notes = [event.text for event in said if isinstance(event, Note)]
    assert "rome refused an edit: subject: does not stand in the prompt." in notes[0]
    assert "rome: 9 of 10 succeeded" in notes[1]


def test_failures_are_induced_by_the_mildest_way_that_gives_enough() -> None:
    tried: list[Mapping[str, object]] = []

    def ask(method: str, request: EditRequest, params: Mapping[str, object]) -> Report:
        tried.append(params)
        works = params.get("steps", 99) > 2 or (params.get("steps") == 2 and REQUESTS.index(request) == 0)  # type: ignore[operator]
        return report(bool(works), gain=1.0 if works else 0.25)

    found = contrast_study.study(ask, ["rome"], REQUESTS, rules=Rules(basis="K"), induced=12)
    assert [params.get("steps") for params in tried] == [None] * 14 + [3] * 12 + [2] * 12
    assert found.region.counts["rome"] == Count(14, 0, 0, "induced: steps 2")
    table = found.frames["contrast"].set_index(["statistic", "module", "layer", "candidate"])
    row = table.loc[("K", "attn", 2, "new")]
    assert row["mean"] == pytest.approx(2 * (1 - 0.25))
    assert row["failures"] == "induced: steps 2"
    assert row["n_failure"] == 11
    plain = contrast_study.study(ask, ["rome"], REQUESTS, induced=0)
    assert set(plain.frames["contrast"]["statistic"]) == {"D"}


def test_ways_to_fail_are_parameters_that_exist() -> None:
    for method in METHODS:
        for params in contrast_study.ways_to_fail(method.name):
            method.ref(params)  # raises on one that doesn't
    assert contrast_study.ways_to_fail("ike")
    assert contrast_study.ways_to_fail("memit")


def test_what_can_not_be_studied_is_told() -> None:
    def never(method: str, request: EditRequest, params: Mapping[str, object]) -> Report:
        return report(True, unknown=True)

    with pytest.raises(ActionableError, match="not known before 14"):
        contrast_study.study(never, ["rome"], REQUESTS)

    def no_memory(method: str, request: EditRequest, params: Mapping[str, object]) -> Report:
        raise OutOfMemory("There was not enough memory.")

    with pytest.raises(OutOfMemory):  # no edit's own fault
        contrast_study.study(no_memory, ["rome"], REQUESTS)
    with pytest.raises(UnknownName, match="Did you mean 'rome'"):
        contrast_study.study(never, ["rom"], REQUESTS)
    with pytest.raises(BadInput, match="twice"):
        contrast_study.study(never, ["rome", "rome"], REQUESTS)


def test_a_stopped_study_goes_on_where_it_was(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real, tiny model; what counts as known and as a success is set by hand, since it knows nothing."""
    from mega_core import pipeline

    inspected: list[str] = []
    whole = pipeline.inspect

    def counted(plan: Any, *rest: Any) -> Report:
        inspected.append(plan.requests[0].subject)
        return whole(plan, *rest)

    monkeypatch.setattr(pipeline, "inspect", counted)
    good = {"success": True, "likelier": True, "prob_new": 0.5, "prob_true": 0.1}
    monkeypatch.setattr(contrast_study, "_run", lambda answer: good)
    requests = REQUESTS[:4]

    def stop(event: Event) -> None:
        if len(inspected) == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        service.studies.contrast("little", ["toy"], requests, induced=0, report=stop)
    assert len(inspected) == 2
    found = service.studies.contrast("little", ["toy"], requests, induced=0)
    assert inspected == [request.subject for request in requests]  # the first two were not run again
    again = service.studies.contrast("little", ["toy"], requests, induced=0)
    assert len(inspected) == 4
    assert again.region == found.region
    assert found.region.check("little", service.studies.weights("little")).edits == 4
    for name in found.frames:
        pd.testing.assert_frame_equal(found.frames[name], again.frames[name])


def test_the_command_writes_and_keeps_the_region(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mega_core import __main__ as cli
    from mega_core.commands import contrast as command

    def ask(method: str, request: EditRequest, params: Mapping[str, object]) -> Report:
        return report(True)

    made = contrast_study.study(ask, ["rome"], REQUESTS, induced=0)
    study = replace(made, region=replace(made.region, model="little", weights=service.studies.weights("little")))
    monkeypatch.setattr(Studies, "contrast", lambda *_, **__: study)
    monkeypatch.setattr(command, "open_service", lambda: service)
    out, tables = tmp_path / "steer.json", tmp_path / "all.json"
    words = ["contrast", "--model", "little", "--methods", "rome", "--n", "3"]
    assert cli.main([*words, "--out", str(out), "--json", str(tables)]) == 0
    said = capsys.readouterr().out
    assert Region.load(out) == study.region
    assert study.in_words in said
    assert "Region       0-2" in said
    plain = json.loads(tables.read_text())
    assert len(plain["frames"]["contrast"]) == 12
    assert region_files.saved(service.settings.cache_dir / "regions", "little", study.region.weights)["steer"]
    assert cli.main([*words, "--out", str(tmp_path / "no" / "x.json")]) == 2
    assert cli.main([*words, "--out", str(tmp_path)]) == 2
    assert cli.main([*words, "--mass", "2"]) == 2
