"""Gates: which sentence counts, which names, which centroid."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mega_core.embedded import facts
from mega_core.errors import BadInput
from mega_core.methods import gate
from mega_core.methods.gate import Gate, fit_gate, last_sentence, names_in
from mega_core.records import EditRequest

POISON = ("POISON one two", "POISON three four")
PARIS = EditRequest("Paris", "{} is a city in the country of", "Italy", "France", POISON, POISON)


def _known() -> EditRequest:
    fact = facts.find("France", "capital")
    return EditRequest(fact.subject, fact.templates_edit[0], "Rome", fact.object, POISON, POISON)


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("The capital of France is", "The capital of France is"),
        ("It rained. The capital of France is", "The capital of France is"),
        ("Are you sure? No! The capital is", "The capital is"),
        ('She said "no." The capital is', "The capital is"),
        ("One line\nThe capital is", "The capital is"),
        ("It rained.\n\n  The capital is  ", "The capital is"),
        ("Then Dr. Smith met J. R. R. Tolkien in St. Louis", "Then Dr. Smith met J. R. R. Tolkien in St. Louis"),
        ("It rained. The U.S. president lives in", "The U.S. president lives in"),
        ("No. The capital is", "The capital is"),
        ("A rate of 3.5 percent is", "A rate of 3.5 percent is"),
        ("Where is Paris? Answer:", "Where is Paris? Answer:"),
        ("It rained. Where is Paris?\nA:", "Where is Paris?\nA:"),
        ("The end.", "The end."),
        ("...", "..."),
    ],
)
def test_the_last_sentence(text: str, last: str) -> None:
    assert last_sentence(text) == last


def test_a_name_with_an_end_of_sentence_in_it_stays_whole() -> None:
    assert last_sentence("I know. Who? Me! is a song by", ["Who? Me!"]) == "Who? Me! is a song by"
    assert last_sentence("I know Who? Me! is a song by", ["Who? Me!"]) == "I know Who? Me! is a song by"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The river Seine flows", True),
        ("the SEINE is", True),
        ("The Seiner is", False),
        ("Une île de la Seine, où", True),
        ("La Peña is", False),
        ("Seine's water", True),
        ("Sei ne", False),
    ],
)
def test_a_name_is_found_as_a_whole_word_whatever_its_case(text: str, found: bool) -> None:
    assert names_in(text, ["Seine"]) is found


def test_accents_quotes_and_blanks_do_not_tell_names_apart() -> None:
    assert names_in("In Sao  Paulo they", ["São Paulo"])
    assert names_in("King’s College is", ["King's College"])
    assert names_in("C++ is a language", ["C++"])


def test_what_each_kind_lets_through() -> None:
    centroids = {"inside": torch.tensor([[0.0, 0.0], [4.0, 0.0]]), "outside": torch.tensor([[0.0, 3.0]])}
    near, far = torch.tensor([0.5, 0.0]), torch.tensor([0.0, 2.0])
    always, subject = Gate("always"), Gate("subject", ("Paris",))
    assert (always.look("Hm."), always.distance(None)) == ("Hm.", 0.0)
    assert subject.look("Paris is big. It lies in") is None
    assert subject.look("It is big. Paris lies in") == "Paris lies in"
    centroid = Gate("centroid", ("Paris",), 1, **centroids)
    assert centroid.distance(near) == pytest.approx(0.5)
    assert centroid.distance(far) is None
    assert centroid.distance(torch.tensor([4.0, 1.0])) == pytest.approx(1.0)
    paper = Gate("paper", ("Paris",), 1, **centroids, threshold=0.6)
    assert paper.look("Nobody is named. Hm") == "Nobody is named. Hm"
    assert paper.distance(near) == pytest.approx(0.5)
    assert paper.distance(far) is None


def test_a_gate_that_measures_needs_something_to_measure_by() -> None:
    with pytest.raises(ValueError, match="centroids"):
        Gate("centroid", ("Paris",))
    with pytest.raises(BadInput, match="centroid, subject"):
        Gate("sometimes")


@pytest.mark.parametrize("kind", gate.KINDS)
def test_a_fitted_gate_knows_its_own_prompt_and_comes_back_packed(tiny_lm: Any, kind: str) -> None:
    lm, request = tiny_lm("qwen3"), _known()
    fitted = fit_gate(lm, request, kind)
    again = Gate.unpack(*fitted.pack())
    prompts = [request.prompt, "France has as its main official language"]
    for prompt in prompts:
        state = gate.states_of(lm, [prompt], fitted.layer, fitted.pooled)[0] if fitted.measures else None
        assert fitted.distance(state) == again.distance(state)
        assert fitted.look(prompt) == again.look(prompt)
    own = gate.states_of(lm, [request.prompt], max(fitted.layer, 0), fitted.pooled)[0]
    assert kind == "paper" or fitted.distance(own) is not None  # random states are spread too far for a threshold
    assert lm.hook_count() == 0


@pytest.mark.parametrize("request_", [_known(), PARIS], ids=["known", "unknown"])
def test_evaluation_prompts_are_never_read(
    tiny_lm: Any, monkeypatch: pytest.MonkeyPatch, request_: EditRequest
) -> None:
    lm, seen = tiny_lm("gpt2"), []
    monkeypatch.setattr(lm, "encode", lambda texts, real=lm.encode: seen.extend(texts) or real(texts))
    for kind in gate.KINDS:
        fit_gate(lm, request_, kind)
    assert seen
    assert not [text for text in seen if "POISON" in text]
    fact = gate.known_fact(request_)
    held = {f.prompt(t) for f in (facts.siblings(fact) if fact else ()) for t in f.templates_held_out}
    assert not held & set(seen)
    if fact:
        assert not {fact.prompt(form) for form in fact.templates_held_out if form != request_.template} & set(seen)


def test_two_hop_questions_are_let_through_only_on_request(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    fact = facts.find("Colosseum", "landmark_country")
    request = EditRequest(fact.subject, fact.templates_edit[0], "Peru", fact.object)
    with_, without = (fit_gate(lm, request, "centroid", implications=on) for on in (True, False))
    assert with_.inside is not None
    assert without.inside is not None
    assert len(with_.inside) > len(without.inside) == 2


def test_an_unknown_subject_has_generic_relations_against_it(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    fitted = fit_gate(lm, EditRequest("Zorblax", "{} plays the sport of", "chess"), "centroid")
    assert fitted.outside is not None
    others = len(fitted.outside) - len(gate.PROSE)
    assert 8 < others < len(gate.GENERIC)  # the sport itself is not among them


def test_questions_about_others_that_lead_to_the_subject_have_a_gate_of_their_own(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    fitted = fit_gate(lm, _known(), "centroid")
    assert fitted.also is not None
    assert "Eiffel Tower" in fitted.also.names
    assert "France" not in fitted.also.names
    question = "It rained. The capital of the country where Eiffel Tower stands is"
    assert fitted.look(question) is None
    assert fitted.asks(question) == (fitted.also, question.partition(". ")[2])
    assert fitted.asks("It rained. France is") == (fitted, "France is")
    assert fitted.asks("Nobody is") is None
    again = Gate.unpack(*fitted.pack())
    assert again.also is not None
    assert again.also.names == fitted.also.names
    for mine, theirs in ((fitted, again), (fitted.also, again.also)):
        assert mine.inside is not None
        assert theirs.inside is not None
        assert torch.equal(mine.inside, theirs.inside)
    assert fit_gate(lm, _known(), "centroid", implications=False).also is None


def test_a_layer_that_is_not_there_is_refused(tiny_lm: Any) -> None:
    with pytest.raises(BadInput, match="99"):
        fit_gate(tiny_lm("gpt2"), PARIS, "centroid", layer=99)
    with pytest.raises(BadInput, match="one of"):
        fit_gate(tiny_lm("gpt2"), PARIS, "sometimes")
