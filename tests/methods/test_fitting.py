"""The texts and activations that steered edits are fitted on."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from mega_core.embedded import facts
from mega_core.embedded.examples import candidates
from mega_core.errors import ActionableError, BadInput
from mega_core.events import Cancelled, Event, Note, silent
from mega_core.methods import fitting
from mega_core.methods.fitting import (
    activations,
    context_texts,
    donors,
    fit_prompts,
    followed,
    rows,
    target_sets,
)
from mega_core.methods.rome import CONTEXTS
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import FINAL, Site, capture
from mega_core.records import EditRequest

KNOWN = next(candidates(5, min_neighbours=2))
FACT = next(fact for fact in facts.facts() if (fact.subject, fact.object) == (KNOWN.subject, KNOWN.target_true))
UNKNOWN = EditRequest("The Tall Tower", "{} stands in the town of", "Madrid", "Paris")


# Texts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", islice(candidates(3), 12), ids=lambda request: request.subject)
def test_prompts_are_trained_templates_bare_and_behind_neutral_texts(request_: EditRequest) -> None:
    fact = fitting.known_fact(request_)
    assert fact is not None
    found = fit_prompts(request_, 30, 0)
    assert found[0] == request_.prompt
    assert len(set(found)) == len(found) == 30
    trained = [fact.prompt(template) for template in fact.trained]
    assert set(found[: len(trained)]) == set(trained)  # bare ones first
    behind = {text.replace("{}", prompt) for text in CONTEXTS for prompt in trained}
    assert set(found[len(trained) :]) <= behind
    held_out = [fact.prompt(template) for template in fact.templates_held_out]
    assert not any(prompt in text for text in found for prompt in held_out)


def test_prompts_repeat_under_their_seed_and_differ_under_another() -> None:
    assert fit_prompts(KNOWN, 20, 1) == fit_prompts(KNOWN, 20, 1)
    assert fit_prompts(KNOWN, 20, 1) != fit_prompts(KNOWN, 20, 2)
    assert fit_prompts(KNOWN, 1, 1) == (KNOWN.prompt,)


def test_an_unknown_fact_has_its_own_template_only() -> None:
    found = fit_prompts(UNKNOWN, 100, 0)
    assert found[0] == "The Tall Tower stands in the town of"
    assert set(found[1:]) == {text.replace("{}", UNKNOWN.prompt) for text in CONTEXTS}
    assert donors(UNKNOWN) == ()


def test_what_is_for_evaluation_only_changes_nothing() -> None:
    other = EditRequest(
        KNOWN.subject, KNOWN.template, KNOWN.target_new, KNOWN.target_true, ("Ask me something",), ("And me",)
    )
    assert (KNOWN.paraphrases, KNOWN.neighbours) != (other.paraphrases, other.neighbours)
    assert fit_prompts(KNOWN, 40, 0) == fit_prompts(other, 40, 0)
    assert context_texts(KNOWN, ("p",)) == context_texts(other, ("p",))
    assert donors(KNOWN) == donors(other)


def test_contexts_word_by_word() -> None:
    p, q = "The Tall Tower stands in the town of", "Indeed, The Tall Tower stands in the town of"
    assert context_texts(UNKNOWN, (q,), "sake") == (f"Do not mention 'Paris'. Repeat this sentence: '{q} Madrid'. {q}",)
    assert context_texts(UNKNOWN, (q,), "new") == (f"New fact: {p} Madrid. {q}",)
    assert context_texts(UNKNOWN, (q,), "pool") == (
        f"New fact: {p} Madrid. {q}",
        f"Repeat this sentence: '{p} Madrid'. {q}",
        f"New fact: {p} Madrid. {p} Madrid. {q}",
    )
    assert fitting.forced_texts(UNKNOWN, (q,)) == (f"Repeat this sentence: '{q} Paris'. {q}",)
    nameless = EditRequest("The Tall Tower", "{} stands in the town of", "Madrid")
    assert fitting.forced_texts(nameless, (q,)) == ()
    assert context_texts(nameless, (q,), "sake") == (f"Repeat this sentence: '{q} Madrid'. {q}",)
    with pytest.raises(BadInput, match="pool, sake, new"):
        context_texts(UNKNOWN, (q,), "shout")


def test_contexts_state_the_fact_in_its_other_templates_too() -> None:
    prompts = fit_prompts(KNOWN, 8, 0)
    said = context_texts(KNOWN, prompts, "new")
    stated = {text.removeprefix("New fact: ").split(f" {KNOWN.target_new}. ")[0] for text in said}
    assert stated == set(prompts)
    assert len(set(context_texts(KNOWN, prompts, "pool"))) == 24


def test_the_old_object_comes_from_the_tables_when_it_is_not_named() -> None:
    silent_about_it = EditRequest(KNOWN.subject, KNOWN.template, KNOWN.target_new)
    assert fitting.old_object(silent_about_it) == FACT.object
    assert fitting.old_object(EditRequest("The Tall Tower", "{} is in", "Rome")) is None


@pytest.mark.parametrize("request_", islice(candidates(4), 8), ids=lambda request: request.subject)
def test_donors_are_trained_prompts_of_others_with_the_new_object(request_: EditRequest) -> None:
    fact = fitting.known_fact(request_)
    found = donors(request_)
    assert fact is not None
    others = facts.load().by_answer[fact.relation, request_.target_new]
    assert set(found) == {one.prompt(t) for one in others for t in one.trained if one.subject != request_.subject}
    assert len(set(found[: len(others)])) == len(others)
    firsts = [next(one.subject for one in others if text in {one.prompt(t) for t in one.trained}) for text in found]
    assert len(set(firsts[: len(others)])) == len(others)  # one prompt of each before a second one of any


# Which texts are followed --------------------------------------------------------------------------------------------


def test_ranking_is_by_the_probability_of_the_token(tiny_lm) -> None:
    lm: ModelAdapter = tiny_lm("llama")
    texts = ("Rome", "Look at Berlin and Rome", "Madrid is here", "the", "wordy " * 90)
    with torch.no_grad():
        probs = {text: lm.last_logits(lm.encode([text]))[0].softmax(-1) for text in texts[:4]}
    token = int(probs["the"].argmax())
    found = fitting.ranked(lm, texts, token)
    assert [text for text, _ in found] == sorted(probs, key=lambda text: -float(probs[text][token]))  # no too long one
    assert dict(found) == {text: int(probs[text].argmax()) == token for text in probs}
    wins = [text for text, win in found if win]
    assert followed(lm, texts, [token, 3], 10) == tuple(wins)
    assert followed(lm, texts, [token], 0) == ()


@pytest.fixture
def obeys(monkeypatch: pytest.MonkeyPatch):
    """Make the model follow so many of the contexts and of the donors."""

    def set_(contexts: int, donors: int) -> None:
        def ranked(lm, texts, token, report=silent):
            taken = contexts if any(f"{KNOWN.target_new}. " in text for text in texts) else donors
            return [(text, i < taken) for i, text in enumerate(texts)]

        monkeypatch.setattr(fitting, "ranked", ranked)

    return set_


def _notes(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Note)]


def test_auto_takes_contexts_then_donors_then_few_contexts(tiny_lm, obeys) -> None:
    lm, events = tiny_lm("gpt2"), []
    obeys(30, 5)
    fit = target_sets(lm, KNOWN, "auto", 10, report=events.append)
    assert (fit.how, len(fit.prompts), len(fit.forced), len(fit.contexts)) == ("contexts", 10, 10, 10)
    assert fit.source() == fit.prompts + fit.forced
    assert fit.source(False) == fit.prompts
    assert not _notes(events)

    obeys(7, 5)
    fit = target_sets(lm, KNOWN, "auto", 10, report=events.append)
    assert (fit.how, len(fit.forced), fit.contexts) == ("donors", 0, donors(KNOWN)[:5])
    assert "23 of 30 contexts" in _notes(events)[0]
    assert target_sets(lm, KNOWN, "auto", 6).how == "contexts"  # 7 of 18 are as many as were asked for

    obeys(7, 0)
    fit = target_sets(lm, KNOWN, "auto", 10, report=events.append)
    assert (fit.how, len(fit.contexts)) == ("contexts", 7)
    assert "expect little" in _notes(events)[1]

    obeys(0, 0)
    with pytest.raises(ActionableError, match="behind any context"):
        target_sets(lm, KNOWN, "auto", 10)


def test_asked_for_by_name(tiny_lm, obeys) -> None:
    lm, events = tiny_lm("gpt2"), []
    obeys(0, 5)
    fit = target_sets(lm, KNOWN, "contexts", 10, report=events.append)
    assert len(fit.contexts) == 10
    assert "30 of 30" in _notes(events)[0]
    assert target_sets(lm, KNOWN, "donors", 3).contexts == donors(KNOWN)[:3]
    obeys(30, 0)
    with pytest.raises(ActionableError, match="No other subject"):
        target_sets(lm, KNOWN, "donors", 10)
    with pytest.raises(BadInput, match="auto, contexts, donors"):
        target_sets(lm, KNOWN, "prayer")


def test_texts_longer_than_the_model_reads_are_left_out(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    long = EditRequest("Rome", "wordy " * 30 + "{} is", "Madrid", "Paris")
    assert len(tokens.prompt_ids(lm.tokenizer, long.prompt)) < lm.max_positions
    with pytest.raises(ActionableError, match="Shorten"):
        target_sets(lm, long, "contexts", 4)


# Activations ---------------------------------------------------------------------------------------------------------


def test_rows_hold_the_beginning_of_the_target(tiny_lm) -> None:
    lm = tiny_lm("llama")
    target = tokens.target_ids(lm.tokenizer, "Look at Rome", "Berlin and Madrid")
    made = rows(lm, ("Look at Rome", "Here is Rome"), target, 3)
    assert [row.ids[row.target_start :] for row in made] == [target[:2]] * 2
    assert made[0].ids[: made[0].target_start] == tokens.prompt_ids(lm.tokenizer, "Look at Rome")
    assert [len(row.ids) - row.target_start for row in rows(lm, ("Rome",), target)] == [0]


def test_activations_are_those_of_each_prefix_read_alone(lm: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "ROWS_AT_ONCE", 2)
    texts = ("Look at the city of Rome", "Rome", "Berlin is here", "In fact, Madrid is")
    target = tokens.target_ids(lm.tokenizer, texts[0], "Berlin and Madrid")
    sites = [Site(1, "attn"), Site(lm.n_layers - 1, FINAL), Site(0, "resid_mid")]
    made = rows(lm, texts, target, 3)
    found = activations(lm, made, sites)
    for i, row in enumerate(made):
        for j in range(3):
            alone = tokens.pack(lm.tokenizer, [row.ids[: row.target_start + j]])
            with torch.no_grad(), capture(lm, sites, stop=False) as got:
                lm.logits(alone)
            for site in sites:
                torch.testing.assert_close(found[site][i, j], got[site][0, -1], atol=1e-4, rtol=1e-4)
    assert {tuple(value.shape) for value in found.values()} == {(4, 3, lm.d_model)}


def test_activations_refuse_rows_that_differ_and_stop_when_told(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    with pytest.raises(ValueError, match="different numbers"):
        activations(lm, [*rows(lm, ("Rome",), (5, 6), 2), *rows(lm, ("Rome",), (5,))], [Site(0, "attn")])

    def stop(event: Event) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        activations(lm, rows(lm, ("Rome",), (5,)), [Site(0, "attn")], stop)
    assert lm.hook_count() == 0
