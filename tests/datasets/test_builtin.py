from __future__ import annotations

from itertools import islice

import pytest

from mega_core import datasets
from mega_core.cases import AXES, AxisTest, Case, Query
from mega_core.embedded import examples, facts, related
from mega_core.errors import BadInput
from mega_core.evaluation import probes
from mega_core.evaluation.probes import Probe, Question
from mega_core.records import EditRequest
from tests.datasets.samples import as_file, records

BUILTIN = datasets.load("builtin")
WORLD = facts.load()


def test_the_built_in_edits_are_those_reported_or_drawn() -> None:
    assert (BUILTIN.format, BUILTIN.name, BUILTIN.source) == ("builtin", "builtin:reported", "builtin:reported")
    assert [case.request for case in BUILTIN.cases] == examples.reported(100)
    assert datasets.load("builtin:reported", limit=30) == datasets.load("builtin", limit=30)
    assert datasets.load("builtin", limit=30).cases == BUILTIN.cases[:30]
    drawn = [case.request for case in datasets.load("builtin:7", limit=60).cases]
    first: dict[str, EditRequest] = {}
    for request in islice(examples.candidates(7, min_neighbours=1), 500):
        first.setdefault(request.subject, request)
    assert drawn == list(first.values())[:60]
    assert datasets.load("builtin", seed=3, limit=5) == BUILTIN.limited(5, 3)
    for wrong in ("builtin:", "builtin:x", "builtin:-1", "builtin:²", "builtin:99999999999"):
        if wrong == "builtin:":
            assert datasets.load(wrong).cases == BUILTIN.cases
        else:
            with pytest.raises(BadInput, match="no built-in edits"):
                datasets.load(wrong)
    for count in (0, -1, 10**6, True):
        with pytest.raises(BadInput, match="limit"):
            datasets.load("builtin", limit=count)


def test_what_is_built_in_follows_from_the_tables() -> None:
    free = {hop.prompt(form) for hop in WORLD.hops for form in hop.templates_fit}
    seen = {"attributes": 0, "through": 0, "towards": 0, "tests": set()}
    for case in (*BUILTIN.cases, *datasets.load("builtin:5", limit=200).cases):
        request, new = case.request, case.request.target_new
        fact = facts.find(request.subject, case.relation)
        assert fact.object == request.target_true
        for prompt in case.attributes:
            (subject,) = (f.subject for f in WORLD.by_answer[fact.relation, new]
                          if facts.fill(request.template, f.subject) == prompt)  # fmt: skip
            assert subject != request.subject
            seen["attributes"] += 1
        trained = {one.prompt(form) for one in WORLD.by_subject[fact.subject] for form in one.trained}
        assert case.generation_prompts
        assert trained.issuperset(case.generation_prompts)
        assert request.prompt not in case.generation_prompts
        for test in case.tests:
            assert (len(test.queries), len(test.conditions)) == (1, 1)
            seen["tests"].add(test.axis)
        for chain in case.chains:
            assert len(chain.hops) == len(chain.new_hops) == 2
            assert not free.intersection(chain.questions)
            edited = [i for i in (0, 1) if chain.hops[i].cloze == request.prompt]
            (i,) = edited
            assert chain.new_hops[i].cloze == request.prompt
            assert (chain.hops[i].answers[0], chain.new_hops[i].answers[0]) == (fact.object, new)
            assert chain.answers == chain.hops[1].answers
            assert chain.new_answers == chain.new_hops[1].answers
            assert chain.answers[0] != chain.new_answers[0]
            if i == 0:
                assert fact.object in chain.hops[1].cloze
                assert new in chain.new_hops[1].cloze
                seen["through"] += 1
            else:
                assert chain.hops[0] == chain.new_hops[0]
                assert chain.hops[0].answers[0] == request.subject
                seen["towards"] += 1
            for hop in (*chain.hops, *chain.new_hops):
                assert hop.question != hop.cloze
    assert min(seen["attributes"], seen["through"], seen["towards"]) > 10
    assert seen["tests"] == {"RS", "CI", "CII", "SA"} <= set(AXES)


def test_probes_of_a_built_in_case_are_those_of_its_request() -> None:
    for case in BUILTIN.cases:
        for most in (1, probes.MOST):
            assert probes.of_case(case, most) == probes.probes_of(case.request, most)


def test_an_unknown_fact_has_nothing_related() -> None:
    request = EditRequest("Atlantis", "{} lies in", "Rome", "Paris")
    assert (related.tests_of(request), related.chains_of(request)) == ((), ())


def test_probes_of_a_case_come_from_its_own_tests() -> None:
    ask = {name: Query(f"{name} is", ((f"{name} answer", f"{name} alias"),)) for name in "abcdef"}
    case = Case(
        "1",
        (EditRequest("Orrin", "{} is in", "Velm", "Tarn", ("Where Orrin lies:",), ("Quill is in",)),),
        tests=(
            AxisTest("RS", (ask["a"], ask["b"])),
            AxisTest("RS", (ask["c"],), conditions=(ask["d"], ask["e"])),
            AxisTest("CI", (ask["f"],), conditions=(ask["a"],)),
            AxisTest("CII", (Query("beside Orrin is", (("Velm", "V."),)),)),
            AxisTest("SA", (Query("the Orrin is in", (("Velm",),)),), conditions=(Query("nothing"),)),
            AxisTest("SA", (Query("unanswered"),)),
            AxisTest("LG", (ask["b"],)),
            AxisTest("CI", (Query("two of it are", (("x", "X"), ("y",))),)),
        ),
    )

    def question(name: str) -> Question:
        return Question(f"{name} is", (f"{name} answer", f"{name} alias"))

    found = probes.of_case(case)
    assert [probe for probe in found if probe.metric in ("Acc", "Gen", "Spec", "DI", "DII")] == list(
        probes.probes_of(case.request)
    )
    own = {probe.prompt: probe for probe in found if probe.metric in ("RS", "CI", "CII", "SA")}
    assert own == {
        "a is": Probe("RS", "a is", question("a").accept, None, question("a")),
        "c is": Probe("RS", "c is", question("c").accept, None, question("d"), (question("e"),)),
        "f is": Probe("CI", "f is", question("f").accept, None, question("a")),
        "beside Orrin is": Probe("CII", "beside Orrin is", ("Velm", "V."), "Tarn"),
        "the Orrin is in": Probe("SA", "the Orrin is in", ("Velm",), "Tarn"),
        "two of it are": Probe("CI", "two of it are", ("x", "X", "y"), None),
    }
    assert own["c is"].conditions == (question("d"), question("e"))


@pytest.mark.parametrize("name", ["counterfact", "zsre", "mquake", "easyedit", "ripple", "table"])
def test_every_format_can_be_asked_about(name: str) -> None:
    metrics = set()
    for case in datasets.read(as_file(records(name)), "x").cases:
        found = probes.of_case(case)
        metrics |= {probe.metric for probe in found}
        assert found[0] == Probe("Acc", case.request.prompt, (case.request.target_new,), case.request.target_true)
    expected = {"Acc", "DI", "DII"}
    expected |= {"Gen", "Spec"} if name in ("counterfact", "easyedit", "table") else set()
    expected |= {"Gen"} if name == "zsre" else set()
    expected |= {"RS", "CI", "CII", "SA"} if name == "ripple" else set()
    assert metrics == expected


def test_all_conditions_have_to_hold(tiny_lm, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from tests.evaluation.test_probes import says

    lm = tiny_lm("gpt2")
    says(monkeypatch, lm, "Here we see France", "Paris")
    knows, not_ = Question("Here we see France", ("Paris",)), Question("Here we see France", ("QQ",))
    listed = [
        Probe("Acc", "Here we see France", ("QQ",), "Paris"),
        Probe("CI", "Spain is", ("QQ",), None, knows, (knows,)),
        Probe("CI", "Spain is", ("QQ",), None, knows, (not_,)),
        Probe("CI", "Spain is", ("QQ",), None, not_, (knows,)),
    ]
    assert probes.baseline(lm, listed).counts == (True, True, False, False)
