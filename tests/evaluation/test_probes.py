from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice

import pytest
import torch

from mega_core.changes import MatrixDelta, PromptPrefix, WeightDelta
from mega_core.embedded import examples, facts
from mega_core.evaluation import probes
from mega_core.evaluation.probes import METRICS, Base, Probe, Question, Tally
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.records import EditRequest

EDITS = tuple(islice(examples.candidates(5, min_neighbours=1), 120))
FACTS = facts.load()


def says(monkeypatch: pytest.MonkeyPatch, lm: ModelAdapter, prompt: str, text: str) -> None:
    """Make the model continue the prompt with the text: +100 on each of its tokens in turn."""
    told = tokens.with_target(lm.tokenizer, prompt, text)
    real = lm.logits_at

    def logits_at(batch: tokens.TokenBatch, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits = real(batch, rows, positions)
        for i, (row, at) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
            sofar = tuple(batch.ids[row, : at + 1].tolist())
            if len(sofar) >= told.target_start and told.ids[: at + 1] == sofar and at + 1 < len(told.ids):
                logits[i, told.ids[at + 1]] += 100
        return logits

    monkeypatch.setattr(lm, "logits_at", logits_at)


def nudge(lm: ModelAdapter) -> WeightDelta:
    noise = torch.Generator().manual_seed(3)
    left = 9 * torch.randn(lm.d_model, 1, generator=noise)
    return WeightDelta((MatrixDelta(1, "mlp_down", left, torch.randn(lm.d_mlp, 1, generator=noise), 1.0),))


# What is asked -------------------------------------------------------------------------------------------------------


def test_what_tests_generalisation_was_never_trained_with_the_subject() -> None:
    for edit in EDITS:
        fact = probes.fact_of(edit)
        assert fact is not None
        trained = {fact.prompt(form) for form in fact.trained}
        asked = [probe.prompt for probe in probes.probes_of(edit) if probe.metric == "Gen"]
        assert len(asked) >= 2
        assert not trained.intersection(asked)
        assert edit.prompt not in asked


def test_other_relations_are_asked_in_forms_never_trained_with_the_subject() -> None:
    for edit in EDITS:
        own = FACTS.by_subject[edit.subject]
        trained = {fact.prompt(form) for fact in own for form in fact.trained}
        assert not trained.intersection(probe.prompt for probe in probes.probes_of(edit) if probe.metric == "RS")


def test_two_hop_questions_keep_out_the_form_that_may_be_fitted_on() -> None:
    free = {hop.prompt(form) for hop in FACTS.hops for form in hop.templates_fit}
    asked = [probe for edit in EDITS for probe in probes.probes_of(edit) if probe.metric in ("CI", "CII")]
    assert asked
    assert not free.intersection(probe.prompt for probe in asked)
    assert all(hop.templates_fit and hop.templates_judge for hop in FACTS.hops)


def test_every_metric_is_asked_and_none_too_often() -> None:
    seen: Counter[str] = Counter()
    for edit in EDITS:
        listed = probes.probes_of(edit)
        assert listed == probes.probes_of(edit)
        counts = Counter(probe.metric for probe in listed)
        assert counts["Acc"] == 1
        assert max(counts.values()) <= probes.MOST
        assert len({(probe.metric, probe.prompt) for probe in listed}) == len(listed)
        seen.update(counts.keys())
    named = facts.find("United Kingdom", "capital")
    seen.update(probe.metric for probe in probes.probes_of(examples.request_of(named, "Rome")))
    assert set(seen) == set(METRICS)


def test_each_metric_expects_what_the_tables_say() -> None:
    for edit in EDITS:
        fact = facts.find(edit.subject, probes.fact_of(edit).relation)  # type: ignore[union-attr]
        for probe in probes.probes_of(edit):
            if probe.metric in ("Acc", "Gen", "DI", "DII", "CII", "SA"):
                assert (probe.accept, probe.reject) == ((edit.target_new,), fact.object)
            elif probe.metric == "Spec":
                assert (probe.accept, probe.reject) == ((fact.object,), edit.target_new)
                assert edit.subject not in probe.prompt
            elif probe.metric == "RS":
                assert probe.given == Question(probe.prompt, probe.accept)
                assert probe.accept[0] in {other.object for other in facts.siblings(fact)}
            else:
                assert probe.accept[0] != probe.reject
                assert probe.given is not None
                assert edit.target_new in probe.given.prompt
            if probe.metric == "DI":
                assert fact.object not in probe.prompt.replace(edit.prompt, "")
            if probe.metric == "DII":
                assert fact.object in probe.prompt
            if probe.metric in ("DI", "DII"):
                assert probe.prompt.startswith(f"{edit.prompt} {edit.target_new}. ")
                assert probe.prompt.endswith(edit.prompt)


def test_what_the_edit_says_of_another_relation_is_no_side_effect() -> None:
    """A tower moved to Rome stands in Italy: its country may change."""
    fact = facts.find("Eiffel Tower", "landmark_city")
    assert {other.relation for other in facts.siblings(fact)} == {"landmark_country"}
    asked = {probe.metric for probe in probes.probes_of(examples.request_of(fact, "Rome"))}
    assert "RS" not in asked
    assert "Spec" in asked


def test_an_unknown_fact_is_judged_by_its_own_prompts() -> None:
    edit = EditRequest("Atlantis", "{} lies in", "Rome", "Paris", ("Where Atlantis is:",), ("Lyon lies in",))
    found = Counter(probe.metric for probe in probes.probes_of(edit))
    assert found == {"Acc": 1, "Gen": 1, "Spec": 1, "DI": 5, "DII": 4}
    assert Counter(probe.metric for probe in probes.probes_of(replace(edit, target_true=None))) == {
        "Acc": 1, "Gen": 1, "DI": 5,
    }  # fmt: skip
    known = EDITS[0]
    assert probes.fact_of(replace(known, target_true=known.target_new, target_new="nothing")) is None


# How it is answered --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["none", "weights", "prefix"])
def test_answers_equal_one_prompt_at_a_time(lm: ModelAdapter, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand-made probes against the logits of one row alone, and against greedy text."""
    if change != "prefix":
        says(monkeypatch, lm, "France speaks", "Tokyo")
    listed = [
        Probe("Acc", "The capital of France is", ("Rome", "Berlin"), "Paris"),
        Probe("Gen", "France is", ("Marie Curie",), "Paris"),
        Probe("Spec", "The capital of Spain is", ("Paris",), "Rome"),
        Probe("RS", "France speaks", ("Madrid", "Tokyo"), None),
    ]
    made = {"none": None, "weights": nudge(lm), "prefix": PromptPrefix("Spain is here. ")}[change]
    with nullcontext() if made is None else made.applied(lm):
        found = probes.ask(lm, listed)
        for row, probe in zip(found.itertuples(), listed, strict=True):
            with torch.no_grad():
                logs = lm.last_logits(lm.encode([probe.prompt]))[0].double().log_softmax(-1)
            whole = [tokens.target_ids(lm.tokenizer, probe.prompt, text) for text in probe.accept]
            assert row.p_accept == pytest.approx(math.exp(logs[whole[0][0]]), rel=1e-3)
            assert row.said == tokens.token_strings(lm.tokenizer, [int(logs.argmax())])[0]
            if probe.reject is None:
                assert row.p_reject == 0
            else:
                other = tokens.target_ids(lm.tokenizer, probe.prompt, probe.reject)[0]
                assert row.p_reject == pytest.approx(math.exp(logs[other]), rel=1e-3)
            if probe.metric != "Spec":
                assert row.success == (int(logs.argmax()) in [ids[0] for ids in whole])
            else:
                assert row.success == (row.p_accept > row.p_reject)
            texts = [greedy(lm, probe.prompt, len(ids)) for ids in whole]
            assert row.exact == any(list(ids) == text for ids, text in zip(whole, texts, strict=True))
    if change != "prefix":
        assert list(found["success"][[1, 3]]) == [False, True]
        assert found["exact"][3]


def greedy(lm: ModelAdapter, prompt: str, count: int) -> list[int]:
    """Greedy ids after a prompt, one row alone, the added tokens read along as a target."""
    ids = list(tokens.prompt_ids(lm.tokenizer, prompt))
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(lm.last_logits(tokens.pack(lm.tokenizer, [ids], starts=[start])).argmax()))
    return ids[start:]


def test_objects_that_begin_alike_are_told_apart(
    tiny_lm: Callable[[str], ModelAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "Rome Q" and "Rome X" share their first token: with both at hand the second one tells."""
    lm = tiny_lm("gpt2")
    prompt = "The city is"
    told, rival = (tokens.target_ids(lm.tokenizer, prompt, text) for text in ("Rome Q", "Rome X"))
    assert told[0] == rival[0]
    says(monkeypatch, lm, prompt, "Rome Q")
    row = probes.ask(
        lm,
        [
            Probe("Acc", prompt, ("Rome X",), "Rome Q"),
            Probe("Acc", prompt, ("Rome X",), None),
            Probe("Acc", prompt, ("Rome Q",), "Rome X"),
            Probe("Spec", prompt, ("Rome X",), "Rome Q"),
        ],
    )
    assert list(row["success"]) == [False, True, True, False]
    assert list(row["exact"]) == [False, False, True, False]
    assert row["p_accept"][0] < row["p_reject"][0]
    assert row["p_accept"][2] > row["p_reject"][2]


# What counts ---------------------------------------------------------------------------------------------------------


def test_the_unedited_model_settles_what_counts(
    tiny_lm: Callable[[str], ModelAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("gpt2")
    prompt, best = "Here we see France", "Paris"
    says(monkeypatch, lm, prompt, best)
    right, wrong = Question(prompt, ("QQ", best)), Question(prompt, ("QQ",))
    listed = (
        Probe("Acc", prompt, ("QQ",), best),
        Probe("Spec", prompt, (best,), "QQ"),
        Probe("Spec", prompt, ("QQ",), best),
        Probe("RS", prompt, (best,), None, right),
        Probe("RS", prompt, ("QQ",), None, wrong),
        Probe("CI", prompt, (best,), "QQ", right),
    )
    base = probes.baseline(lm, listed)
    assert base.counts == (True, True, False, True, False, True)
    assert probes.tally(base.answers, base) == {
        "Acc": (0, 1, 0), "Spec": (1, 1, 1), "RS": (1, 1, 1), "CI": (0, 0, 0),
    }  # fmt: skip
    taken = (replace(listed[0], accept=(best,), reject="QQ"), *listed[1:])
    assert probes.score(lm, taken, probes.baseline(lm, taken))["CI"] == (1, 1, 1)


def test_scoring_leaves_the_model_as_it_was(lm: ModelAdapter) -> None:
    edit = EditRequest("France", "The capital of {} is", "Rome", "Paris", ("In France",), ("The capital of Spain is",))
    listed = [probe for probe in probes.probes_of(edit) if len(probe.prompt) < 60]
    digest = lm.live_digest()
    base = probes.baseline(lm, listed)
    first = probes.score(lm, listed, base, nudge(lm))
    assert not probes.ask(lm, listed)["p_accept"].empty
    assert (lm.live_digest(), lm.hook_count(), lm.changes) == (digest, 0, [])
    with nudge(lm).applied(lm):
        assert probes.score(lm, listed, base) == first


def test_means_weigh_edits_and_metrics_once() -> None:
    scores = [
        {"Acc": Tally(1, 1, 0), "Spec": Tally(1, 4, 1), "CI": Tally(0, 0, 0)},
        {"Acc": Tally(0, 1, 0), "Spec": Tally(2, 2, 2)},
        {"Acc": Tally(1, 1, 1)},
    ]
    found = probes.means(scores)
    assert found == {"Acc": pytest.approx(2 / 3), "Spec": pytest.approx(5 / 8), "CI": 0.0}
    assert probes.means(scores, exact=True)["Acc"] == pytest.approx(1 / 3)
    assert probes.average(scores) == pytest.approx((2 / 3 + 5 / 8) / 3)
    assert math.isnan(probes.average([]))
    assert list(found) == [name for name in METRICS if name in found]


def test_an_edit_that_fails_does_not_gain_by_dropped_questions() -> None:
    """CI without a single edit that took is 0, not absent; with one that took, only that one counts."""
    failed, took = {"Acc": Tally(0, 1, 0), "CI": Tally(0, 0, 0)}, {"Acc": Tally(1, 1, 1), "CI": Tally(2, 4, 2)}
    assert probes.average([failed]) == 0
    assert probes.means([failed, took])["CI"] == 0.5


def test_a_base_of_other_probes_is_refused(tiny_lm: Callable[[str], ModelAdapter]) -> None:
    lm = tiny_lm("gpt2")
    base = probes.baseline(lm, [Probe("Acc", "France is", ("Rome",), "Paris")])
    with pytest.raises(ValueError, match="probes"):
        probes.tally(probes.ask(lm, [Probe("Acc", "France is", ("Rome",), None)] * 2), Base(base.counts, base.answers))
