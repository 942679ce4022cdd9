"""Chains of facts: built from the tables, asked on a tiny model before and after edits, kept and read again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mega_core.errors import BadInput, StoreError, UnknownName
from mega_core.records import EditRequest
from mega_core.service import Service
from mega_core.service.chains import PATH, Went

OWNER = "o" * 32


def links(service: Service, *relations: str):
    return service.chains.links("Accord", relations)


def route(service: Service, edited: int = 0, new: str = "Apple"):
    return service.chains.build(links(service, "maker", "company_country"), edited, new)


# Building ------------------------------------------------------------------------------------------------------------


def test_a_chain_of_two_known_facts(service: Service) -> None:
    found = route(service)
    assert found.request.prompt == "Accord is a product made by"
    assert (found.request.target_true, found.request.target_new) == ("Honda", "Apple")
    assert [hop.answers[0] for hop in found.chain.hops] == ["Honda", "Japan"]
    assert [hop.answers[0] for hop in found.chain.new_hops] == ["Apple", "United States"]
    assert "Apple" in found.chain.new_hops[1].cloze
    assert found.chain.questions == (
        "The home country of the maker of Accord is",
        "The nation where the producer of Accord is based is",
    )


def test_a_chain_of_three_names_the_first_as_a_noun(service: Service) -> None:
    three = links(service, "maker", "company_country", "capital")
    found = service.chains.build(three, 1, "Italy")
    assert found.request.prompt.startswith("Honda")
    assert [hop.answers[0] for hop in found.chain.new_hops] == ["Honda", "Italy", "Rome"]
    assert "the maker of the product Accord" in found.chain.questions[0]


def test_new_objects_lead_elsewhere(service: Service) -> None:
    two = links(service, "maker", "company_country")
    for new in service.chains.objects(two, 0):
        assert service.chains.build(two, 0, new).chain.new_answers[0] != "Japan"
    with pytest.raises(BadInput, match="same answer"):
        service.chains.build(two, 0, "Toyota")
    with pytest.raises(BadInput, match="know no"):
        service.chains.build(two, 0, "Nobody")


def test_starts_and_what_follows(service: Service) -> None:
    starts = {start.relation: start for start in service.chains.starts()}
    assert "Accord" in starts["maker"].subjects
    assert {link.relation for link in service.chains.onward(links(service, "maker")[0])} >= {"company_country"}
    with pytest.raises(BadInput, match="no fact"):
        service.chains.links("Nobody", ("maker",))


def test_chains_of_a_request(service: Service) -> None:
    known = service.chains.of(EditRequest("Accord", "{} is a product made by", "Apple", "Honda"))
    assert any(one.chain.new_answers[0] == "United States" for one in known)
    assert service.chains.of(EditRequest("Nobody", "{} likes", "tea", "milk")) == ()


# Asking --------------------------------------------------------------------------------------------------------------


def asked(service: Service, methods: tuple[str, ...] = ("toy",)) -> str:
    name, job = service.chains.start("little", route(service), methods, OWNER)
    assert job is not None
    view = service.wait(job, 120)
    assert view.state == "done", view.error
    assert service.result(job, OWNER) == name
    return name


def test_it_is_asked_before_and_after_and_kept(service: Service) -> None:
    name = asked(service)
    found = service.chains.traced(name)
    assert found is not None
    assert found.edited == 0
    assert [len(found.before.hops), len(found.before.questions)] == [2, 2]
    (went,) = found.after
    assert went.method == "toy"
    assert [hop.expected for hop in went.hops] == ["Apple", "United States"]
    assert [hop.expected for hop in found.before.hops] == ["Honda", "Japan"]
    assert went.broke_at == "hop 1"  # a random model knows nothing
    assert found.knew == (False, False)
    assert set(found.path) == set(PATH)
    for table in found.path.values():
        assert set(zip(table["method"], table["state"], strict=True)) == {("", "before"), ("toy", "after")}
        assert set(table["case"]) == {0, 1}
    again, job = service.chains.start("little", route(service), ("toy",), OWNER)
    assert (again, job) == (name, None)
    assert [one.id for one in service.chains.listed(OWNER)] == [name]
    assert service.chains.listed("somebody else") == ()
    assert OWNER not in (service.settings.cache_dir / "chains" / name / "chain.json").read_text()


def test_the_model_is_given_back_and_an_edit_that_fails_costs_the_others_nothing(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mega_core.methods.base import METHODS

    def refuse(*_: object) -> None:
        raise BadInput("toy", "has no room.", "Choose another.")

    monkeypatch.setitem(METHODS._entries, "sulky", replace(METHODS["toy"], name="sulky", prepare=refuse))
    clean = service.condition("little")
    name = asked(service, ("sulky", "toy"))
    found = service.chains.traced(name)
    assert found is not None
    assert "has no room" in found.after[0].refused
    assert found.after[1].hops
    assert service.condition("little") == clean


def test_wrong_questions_are_refused(service: Service) -> None:
    other = replace(route(service), request=EditRequest("Civic", "{} is a product made by", "Apple", "Honda"))
    with pytest.raises(BadInput, match="does not go through"):
        service.chains.start("little", other, ("toy",), OWNER)
    with pytest.raises(BadInput, match="different"):
        service.chains.start("little", route(service), ("toy", "toy"), OWNER)
    with pytest.raises(UnknownName):
        service.chains.start("little", route(service), ("rom",), OWNER)


@pytest.mark.parametrize("name", ["", "..", "../../etc/passwd", "0" * 32, "A" * 32, "0" * 31 + "\n"])
def test_a_name_of_nothing(service: Service, name: str) -> None:
    assert service.chains.traced(name) is None


def test_damage_is_told_and_passed_over(service: Service) -> None:
    folder: Path = service.settings.cache_dir / "chains" / ("0" * 32)
    folder.mkdir(parents=True)
    for text in ("{", "[]", json.dumps({"schema_version": 1, "kind": "chain"}), "\x00"):
        (folder / "chain.json").write_text(text)
        with pytest.raises(StoreError, match="damaged"):
            service.chains.traced("0" * 32)
        assert service.chains.listed(OWNER) == ()


def test_where_it_broke() -> None:
    from mega_core.service.chains import Said

    good, bad = Said("p", "e", "e", True), Said("p", "e", "x", False)
    assert Went("m", (good, good), (bad, good), (False, False)).broke_at == ""
    assert Went("m", (good, good), (bad,), (True,)).broke_at == "composition"
    assert Went("m", (good, bad), (good,), (False,)).broke_at == "hop 2"
