"""What IKE promises: the model reads exactly the text it says, and demonstrations never know the edit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mega_core.changes import Chain
from mega_core.embedded import facts
from mega_core.embedded.examples import candidates
from mega_core.errors import ActionableError, BadInput
from mega_core.events import Event, Note, silent
from mega_core.methods.ike import (
    IKE,
    KINDS,
    ROOM,
    SENTENCE_MODEL,
    WRAPPERS,
    IkeParams,
    InContext,
    demonstrations,
    hidden_vectors,
    prepare,
    slots,
)
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.records import EditRequest

TOWER = EditRequest("The Eiffel Tower", "{} is in the city of", "Madrid", "Paris")
KENYA = EditRequest("Mount Kenya", "{} is in", "Rome", "Africa")
PROMPTS = ["The Eiffel Tower is in the city of", "Tokyo", "Marie Curie speaks"]


def _params(**given: Any) -> IkeParams:
    return IKE.read(IKE.ref({"pool": 8, **given}))


@contextmanager
def _spied(lm: ModelAdapter) -> Iterator[list[list[int]]]:
    """Ids of the first row of every forward of the whole model inside the block."""
    seen: list[list[int]] = []
    base = lm.model.base_model

    def spy(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["input_ids"][0].tolist())

    handle = base.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_model_reads_exactly_the_text(lm: ModelAdapter, wrapper: str) -> None:
    change = prepare(lm, [TOWER], _params(wrapper=wrapper), 0, silent)
    for prompt in PROMPTS:
        text = change.front(lm, prompt) + prompt
        assert "The Eiffel Tower is in the city of Madrid" in text
        with change.applied(lm), _spied(lm) as seen, torch.no_grad():
            lm.last_logits(lm.encode([prompt]))
        assert seen == [list(lm.tokenizer(text)["input_ids"])]


def test_the_published_text_to_the_letter(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    fact = "The Eiffel Tower is in the city of Madrid"
    for wrapper, wanted in (
        ("new fact, prompt", f"New Fact: {fact}\nPrompt: "),
        ("imagine that", f"Imagine that {fact}. "),
        ("repeat", f"Repeat this sentence: '{fact}'. "),
    ):
        assert prepare(lm, [TOWER], _params(wrapper=wrapper), 0, silent).front(lm, "Tokyo") == wanted


def test_with_demonstrations_too(lm: ModelAdapter) -> None:
    change = prepare(lm, [TOWER], _params(k=2), 0, silent)
    with change.applied(lm):
        for prompt in PROMPTS:
            with _spied(lm) as seen, torch.no_grad():
                lm.last_logits(lm.encode([prompt]))
            chosen = change.chosen(lm, prompt, lambda texts: hidden_vectors(lm, texts))
            text = lm.tokenizer.decode(seen[-1], skip_special_tokens=True)
            assert seen[-1] == list(lm.tokenizer(text)["input_ids"])
            assert text.endswith(WRAPPERS["new fact, prompt"].front([TOWER.sentence]) + prompt)
            assert text.count("New Fact: ") == 1 + len(chosen)
            assert all(f"{one.question} {one.answer}\n\n" in text for one in chosen)


def test_generation_is_that_of_the_whole_text(tiny_lm: Any) -> None:
    lm = tiny_lm("llama")
    change = prepare(lm, [TOWER], _params(k=1), 0, silent)
    texts = [change.front(lm, prompt, lambda texts: hidden_vectors(lm, texts)) + prompt for prompt in PROMPTS]
    wanted = [lm.generate([text], 5)[0] for text in texts]
    with change.applied(lm):
        assert lm.generate(PROMPTS, 5) == wanted


def test_all_new_facts_stand_in_front(tiny_lm: Any) -> None:
    lm = tiny_lm("qwen3")
    front = prepare(lm, [TOWER, KENYA], _params(), 0, silent).front(lm, "Rome")
    assert front == f"New Fact: {TOWER.sentence}\nNew Fact: {KENYA.sentence}\nPrompt: "
    one, other = (prepare(lm, [request], _params(), 0, silent) for request in (TOWER, KENYA))
    with Chain((one, other)).applied(lm), _spied(lm) as seen, torch.no_grad():
        lm.last_logits(lm.encode(["Rome"]))
        assert len(lm.changes) == 1
    assert seen == [list(lm.tokenizer(front + "Rome")["input_ids"])]


def test_demonstrations_are_of_three_kinds_and_true_to_them() -> None:
    found = demonstrations([TOWER], WRAPPERS["new fact, prompt"], 40, 0)
    assert {one.kind for one in found} == set(KINDS)
    objects = {fact.object for fact in facts.facts()}
    for one in found:
        stated, asked = one.question.removeprefix("New Fact: ").split("\nPrompt: ")
        assert one.answer in objects
        assert (one.kind == "copy") == (stated == f"{asked} {one.answer}")
        assert stated.endswith(one.answer) or one.kind == "retain"


def test_demonstrations_know_nothing_of_the_edit() -> None:
    generator = candidates(3, min_neighbours=1)
    for request in (next(generator) for _ in range(20)):
        judged = {*request.paraphrases, *request.neighbours}
        for one in demonstrations([request], WRAPPERS["imagine that"], 60, 0):
            assert not any(prompt in one.question for prompt in judged)
            assert one.answer not in (request.target_new, request.target_true)
            assert f"{request.subject} " not in one.question or request.subject in one.answer


def test_demonstrations_use_trained_forms_only() -> None:
    trained = {fact.prompt(form) for fact in facts.facts() for form in fact.trained}
    for one in demonstrations([TOWER], WRAPPERS["new fact, prompt"], 60, 1):
        assert one.question.split("\nPrompt: ")[1] in trained


def test_slots_follow_the_shares() -> None:
    assert slots(32, "1:3:4") == (4, 12, 16)
    assert slots(8, "1:3:4") == (1, 3, 4)
    assert slots(1, "1:3:4") == (0, 0, 1)
    assert slots(5, "1:0:0") == (5, 0, 0)
    assert all(sum(slots(k, "1:3:4")) == k for k in range(20))
    for bad in ("1:3", "a:b:c", "0:0:0", "1:-1:2", "nan:1:1"):
        with pytest.raises(BadInput, match="shares"):
            slots(4, bad)


def test_each_prompt_gets_the_nearest(tiny_lm: Any) -> None:
    """A prompt that is a demonstration's own question finds that demonstration, standing last."""
    lm = tiny_lm("gpt2")
    for pooling in ("mean", "last"):
        change = prepare(lm, [TOWER], _params(k=1, ratio="0:1:0", pooling=pooling), 0, silent)

        def embed(texts: Any, pooling: str = pooling) -> torch.Tensor:
            return hidden_vectors(lm, texts, None, pooling)

        for one in [one for one in change.demonstrations if one.kind == "update"][:3]:
            vector = embed([one.question])
            assert change.chosen(lm, "x", lambda texts, vector=vector: vector) == [one]


def test_hidden_vectors_do_not_depend_on_the_batch(lm: ModelAdapter) -> None:
    for pooling in ("mean", "last"):
        together = hidden_vectors(lm, PROMPTS, 1, pooling)
        alone = torch.cat([hidden_vectors(lm, [prompt], 1, pooling) for prompt in PROMPTS])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_as_many_demonstrations_as_fit_and_that_is_said(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    notes: list[Event] = []
    change = prepare(lm, [TOWER], _params(k=30, pool=40), 0, notes.append)
    assert any(isinstance(event, Note) and "of 30 demonstrations" in event.text for event in notes)
    with change.applied(lm), _spied(lm) as seen, torch.no_grad():
        lm.last_logits(lm.encode(PROMPTS[:1]))
    assert len(seen[-1]) + ROOM <= lm.max_positions
    longer = change.chosen(lm, "wordy " * 20 + "Rome", lambda texts: hidden_vectors(lm, texts))
    assert len(longer) < len(change.chosen(lm, "Rome", lambda texts: hidden_vectors(lm, texts)))


def test_facts_that_do_not_fit_are_refused(tiny_lm: Any) -> None:
    many = [EditRequest(f"The long name number {i}", "{} is in the city of", "Madrid") for i in range(30)]
    with pytest.raises(BadInput, match="reads at most"):
        prepare(tiny_lm("gpt2"), many, _params(), 0, silent)


def test_what_is_packed_comes_back_with_its_demonstrations(tiny_lm: Any) -> None:
    lm = tiny_lm("qwen2")
    change = prepare(lm, [TOWER], _params(k=2), 0, silent)
    again = InContext.unpack(*change.pack())

    def embed(texts: Any) -> torch.Tensor:
        return hidden_vectors(lm, texts)

    assert [again.front(lm, prompt, embed) for prompt in PROMPTS] == [change.front(lm, p, embed) for p in PROMPTS]


def test_a_missing_sentence_model_is_named_with_the_next_step(tiny_lm: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ActionableError, match="pip install -r requirements-ike.txt") as caught:
        prepare(tiny_lm("gpt2"), [TOWER], _params(k=2, embedder="sentence-transformers"), 0, silent)
    assert SENTENCE_MODEL in caught.value.what

    def absent(*_: Any, **__: Any) -> Any:
        raise OSError("not in the cache")

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=absent))
    with pytest.raises(ActionableError, match=f"hf download {SENTENCE_MODEL}"):
        prepare(tiny_lm("gpt2"), [TOWER], _params(k=2, embedder="sentence-transformers"), 0, silent)


def test_a_sentence_model_chooses_where_it_is_asked_to(tiny_lm: Any, monkeypatch: Any) -> None:
    class Lengths:
        """Tells texts by their length."""

        def __init__(self, name: str, **given: Any) -> None:
            assert (name, given["local_files_only"]) == (SENTENCE_MODEL, True)

        def encode(self, texts: list[str], convert_to_numpy: bool) -> Any:
            return torch.tensor([[float(len(text)), 1.0] for text in texts]).numpy()

    lm = tiny_lm("gpt2")
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Lengths))
    change = prepare(lm, [TOWER], _params(k=1, embedder="sentence-transformers"), 0, silent)
    assert change.vectors is not None
    assert change.vectors.shape[1] == 2
    with change.applied(lm), _spied(lm) as seen, torch.no_grad():
        lm.last_logits(lm.encode(["Rome"]))
    assert len(seen) == 1  # the model itself is not asked what is near
    assert len(seen[0]) > len(tokens.prompt_ids(lm.tokenizer, TOWER.sentence))


def test_a_layer_that_is_not_there_is_refused(tiny_lm: Any) -> None:
    with pytest.raises(BadInput, match="99"):
        prepare(tiny_lm("gpt2"), [TOWER], _params(layer=99), 0, silent)
