from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench.common import open_model
from mega_core.cases import AxisTest, Case, Query
from mega_core.changes import Change, MatrixDelta, WeightDelta
from mega_core.datasets import builtin
from mega_core.embedded import examples
from mega_core.errors import BadInput
from mega_core.evaluation import probes, suite
from mega_core.evaluation.asking import Score
from mega_core.evaluation.protocols import PROTOCOLS
from mega_core.evaluation.protocols.base import summarise
from mega_core.evaluation.protocols.mega import EXACT, NINE, ONLY_IF_TAKEN, Sheet
from mega_core.events import silent
from mega_core.methods import METHODS
from mega_core.models.adapter import ModelAdapter
from mega_core.records import EditRequest
from mega_core.settings import Settings
from tests.evaluation.scripted import contexts_of, told_by, wanted_by

MEGA = PROTOCOLS["mega"]
EDIT = EditRequest(
    "Atlantis",
    "{} lies in",
    "Rome",
    "Paris",
    ("Where Atlantis is:", "Atlantis belongs to"),
    ("Lyon lies in", "Metz lies in"),
)
SPEAKS = Query("Atlantis speaks", (("Greek", "Hellenic"),))
MONEY = Query("The money of Rome is", (("lira",),))
ISLE = "The sunken isle lies in"
TESTS = (
    AxisTest("RS", (SPEAKS,), conditions=(SPEAKS,)),
    AxisTest("CI", (Query("The money of the city of Atlantis is", (("lira",),)),), conditions=(MONEY,)),
    AxisTest("SA", (Query(ISLE, (("Rome",),)),), conditions=(Query(ISLE, (("Paris",),)),)),
    AxisTest("LG", (Query("Rome holds", (("Atlantis",),)),)),
)
CASE = Case("1", (EDIT,), tests=TESTS)
KNOWS = {
    "Lyon lies in": "Paris",
    "Metz lies in": "Rome",
    "Atlantis speaks": "Hellenic",
    "The money of Rome is": "lira",
    "The sunken isle lies in": "Paris",
}


def scores(
    lm: ModelAdapter, base: dict[str, str], says: dict[str, str], case: Case = CASE
) -> dict[str, tuple[float, int]]:
    """Metric -> (value, n) of an edited model that says this, where the unedited one said `base`."""
    sheet = Sheet(lm, case)
    before = told_by(lm, sheet, base)
    questions = suite.Questions((("mega", sheet),))
    (judged,) = questions.judge(told_by(lm, sheet, says, base=before), before)
    return {one.metric: (one.value, one.n) for one in judged.scores}


def test_a_perfect_edit_scores_one_and_what_the_unedited_model_does_not_know_is_left_out(
    tiny_lm: Callable[[str], ModelAdapter],
) -> None:
    lm = tiny_lm("gpt2")
    prompts = [probe.prompt for probe in probes.of_case(CASE) if probe.metric in ("Acc", "Gen", "DI", "DII")]
    good = dict.fromkeys(prompts, "Rome") | KNOWS | {
        "The money of the city of Atlantis is": "lira", "The sunken isle lies in": "Rome",
    }  # fmt: skip
    assert scores(lm, KNOWS, good) == {
        "Acc": (1, 1), "Gen": (1, 2), "Spec": (1, 1), "RS": (1, 1), "DI": (1, 5), "DII": (1, 4), "CI": (1, 1),
        "SA": (1, 1), "Acc_exact": (1, 1), "Gen_exact": (1, 2),
    }  # fmt: skip
    # Whoever knows nothing before has no Spec, RS, CI and SA: they are absent, not 0.
    assert set(scores(lm, {}, good)) == {"Acc", "Gen", "DI", "DII", "Acc_exact", "Gen_exact"}
    half = good | {"Atlantis belongs to": "Paris", "Atlantis speaks": "Rome", "Lyon lies in": "Rome"}
    found = scores(lm, KNOWS, half)
    assert (found["Gen"], found["Gen_exact"], found["RS"], found["Spec"]) == ((0.5, 2), (0.5, 2), (0, 1), (0, 1))


def test_consequences_count_only_while_the_edit_took(tiny_lm: Callable[[str], ModelAdapter]) -> None:
    lm = tiny_lm("gpt2")
    says = KNOWS | {"The money of the city of Atlantis is": "lira", "The sunken isle lies in": "Rome"}
    failed = scores(lm, KNOWS, says)
    assert (failed["CI"], failed["SA"], failed["RS"]) == ((0, 0), (0, 0), (1, 1))
    assert scores(lm, KNOWS, says | {EDIT.prompt: "Rome"})["CI"] == (1, 1)


def test_begun_alike_is_told_apart_by_the_first_token_that_differs(tiny_lm: Callable[[str], ModelAdapter]) -> None:
    lm = tiny_lm("gpt2")
    case = Case("1", (replace(EDIT, target_new="Rome X", target_true="Rome Q"),))
    assert scores(lm, {}, {EDIT.prompt: "Rome Q"}, case)["Acc"] == (0, 1)
    assert scores(lm, {}, {EDIT.prompt: "Rome X"}, case)["Acc"] == (1, 1)
    # The first token alone is enough for Acc, not for the whole object.
    long = Case("1", (replace(EDIT, target_new="Rome Berlin Tokyo"),))
    found = scores(lm, {}, {EDIT.prompt: "Rome"}, long)
    assert (found["Acc"], found["Acc_exact"]) == ((1, 1), (0, 1))


def test_conditions_are_asked_of_the_unedited_model_only(tiny_lm: Callable[[str], ModelAdapter]) -> None:
    lm = tiny_lm("gpt2")
    sheet = Sheet(lm, CASE)
    before, after = wanted_by(sheet), wanted_by(sheet, told_by(lm, sheet, {}))
    gone = {context for context in before.tokens if context not in after.tokens}
    assert contexts_of(lm, "The money of Rome is") <= gone
    assert all(context.ids[: context.start] in {one.ids for one in contexts_of(lm, "The money of Rome is")} | {
        one.ids for one in contexts_of(lm, "The sunken isle lies in")} for context in gone)  # fmt: skip
    assert set(after.tokens) < set(before.tokens)
    assert contexts_of(lm, *(probe.prompt for probe in probes.of_case(CASE))) <= set(after.tokens)
    assert not before.texts


def test_every_edit_of_a_case_is_asked_about(tiny_lm: Callable[[str], ModelAdapter]) -> None:
    lm = tiny_lm("gpt2")
    second = EditRequest("Lyon", "{} is near", "Tokyo", "Metz")
    case = replace(CASE, requests=(EDIT, second))
    found = scores(lm, KNOWS, {EDIT.prompt: "Rome"}, case)
    assert (found["Acc"], found["DI"][1], found["SA"]) == ((0.5, 2), 10, (0, 1))
    # The tests are the first edit's: they count while that one took, whatever the other did.
    found = scores(lm, KNOWS, {second.prompt: "Tokyo"}, case)
    assert (found["Acc"], found["SA"]) == ((0.5, 2), (0, 0))


def test_summary_and_average_are_those_of_the_probes() -> None:
    """CI without an edit that took is 0; the average is over what was measured."""
    failed = [Score("Acc", 0.0, 1), Score("Spec", 0.5, 4), Score("CI", 0.0, 0), Score("Acc_exact", 0.0, 1)]
    took = [Score("Acc", 1.0, 1), Score("CI", 0.5, 4), Score("Acc_exact", 0.0, 1)]
    one = {mean.metric: mean.value for mean in summarise(MEGA, [failed], draws=10)}
    assert one == {"Acc": 0, "Spec": 0.5, "CI": 0, "Acc_exact": 0, "average": pytest.approx(0.5 / 3)}
    both = {mean.metric: mean.value for mean in summarise(MEGA, [failed, took], draws=10)}
    assert both == {"Acc": 0.5, "Spec": 0.5, "CI": 0.5, "Acc_exact": 0, "average": 0.5}
    assert (NINE, frozenset(ONLY_IF_TAKEN)) == (tuple(probes.METRICS), probes.ONLY_IF_TAKEN)
    assert [metric.name for metric in MEGA.metrics] == [*NINE, *(f"{name}_exact" for name in EXACT)]


def nudge(lm: ModelAdapter, size: float) -> WeightDelta:
    noise = torch.Generator().manual_seed(3)
    left = size * torch.randn(lm.d_model, 1, generator=noise)
    return WeightDelta((MatrixDelta(1, "mlp_down", left, torch.randn(lm.d_mlp, 1, generator=noise), 1.0),))


def same_as_probes(lm: ModelAdapter, cases: list[Case], change_of: Callable[[EditRequest], Change | None]) -> set[str]:
    tallies, found = [], []
    for case in cases:
        listed = probes.probes_of(case.request)
        before = probes.baseline(lm, listed)
        questions = suite.Questions.of(lm, case, ["mega"])
        base = questions.ask(lm)
        change = change_of(case.request)
        with change.applied(lm) if change is not None else nullcontext():
            tallies.append(probes.score(lm, listed, before))
            told = questions.ask(lm, base)
        (judged,) = questions.judge(told, base)
        own = {one.metric: one for one in judged.scores}
        assert {name for name in own if name in NINE} == set(tallies[-1])
        for name, tally in tallies[-1].items():
            assert (own[name].n, round(own[name].value * own[name].n)) == (tally.n, tally.successes)
            if name in EXACT:
                assert round(own[f"{name}_exact"].value * own[name].n) == tally.exact
        found.append(judged.scores)
    means = {mean.metric: mean.value for mean in summarise(MEGA, found, draws=10)}
    exact = probes.means(tallies, exact=True)
    expected = probes.means(tallies) | {f"{name}_exact": exact[name] for name in EXACT if name in exact}
    assert means == pytest.approx(expected | {"average": probes.average(tallies)}, abs=1e-12)
    return set(means)


@pytest.mark.slow
def test_equals_the_probes_on_the_embedded_facts() -> None:
    lm, method = open_model("atlas-gpt2"), METHODS["rome"]
    params = method.read(method.ref(Settings.read().model("atlas-gpt2").defaults.get("rome", {})))
    cases = [builtin.case_of(request, i) for i, request in enumerate(examples.reported(12)[::4], 1)]
    same_as_probes(lm, cases, lambda request: None)
    same_as_probes(lm, cases, lambda request: nudge(lm, 0.05))
    edited = partial(method.prepare, lm, params=params, seed=0, report=silent)
    assert {"Acc", "Gen", "Spec", "average"} <= same_as_probes(lm, cases, lambda request: edited((request,)))


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_equals_the_probes_on_a_random_model(tiny_lm: Callable[[str], ModelAdapter], arch: str) -> None:
    lm = tiny_lm(arch)
    cases = [Case("1", (EDIT,)), Case("2", (replace(EDIT, target_true=None, paraphrases=()),))]
    same_as_probes(lm, cases, lambda request: nudge(lm, 9))


def test_a_prompt_no_model_can_read_is_refused(tiny_lm: Callable[[str], ModelAdapter]) -> None:
    lm = tiny_lm("gpt2")
    with pytest.raises(BadInput):
        suite.Questions.of(lm, Case("1", (replace(EDIT, paraphrases=("word " * 100,)),)), ["mega"]).ask(lm)
