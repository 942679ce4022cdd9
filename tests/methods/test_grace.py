"""What GRACE promises: the rules of its codebook, values that say the new object, and silence everywhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mega_core.changes import Chain, PromptPrefix
from mega_core.events import Event, Note, silent
from mega_core.methods.grace import GRACE, GraceParams, default_layer, prepare
from mega_core.methods.memory import LESS_THAN_HALF, Codebook, Entry, GraceMemory, places
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture, intervene
from mega_core.records import EditRequest

SEE = EditRequest("The Eiffel Tower", "Here we see {}", "Madrid")
LOOK = EditRequest("Mount Kenya", "Look at {}", "Rome and Berlin")
FAR = ["The capital of France is", "Rome", "Marie Curie speaks the language of Poland and"]
A, B = (5,), (7, 8)


def _params(**given: Any) -> GraceParams:
    return GRACE.read(GRACE.ref({"learning_rate": 0.3, "radius": 0.05, **given}))


def _key(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers)


def _book(*edits: tuple[float, tuple[int, ...], float]) -> Codebook:
    """Keys (x, 1) on a line, each with label and radius."""
    return Codebook.of([Entry(0, _key(x, 1.0), torch.zeros(2), label, e, "last", 1.0) for x, label, e in edits])


# The codebook's rules ------------------------------------------------------------------------------------------------


def test_a_far_key_is_new() -> None:
    book = _book((0.0, A, 1.0), (2.5, B, 1.0))
    assert (book.radii, book.labels, book.entries) == ((1.0, 1.0), (A, B), (0, 1))


def test_touching_radii_are_not_far() -> None:
    assert len(_book((0.0, A, 1.0), (2.0, B, 1.0)).radii) == 2
    assert _book((0.0, A, 1.0), (2.0, B, 1.0)).radii == (1.0 - LESS_THAN_HALF, 1.0)
    assert _book((0.0, A, 1.0), (2.001, B, 1.0)).radii == (1.0, 1.0)


def test_a_near_key_of_the_same_label_widens_the_radius() -> None:
    book = _book((0.0, A, 1.0), (1.5, A, 1.0))
    assert (book.radii, book.entries) == ((1.5,), (0,))
    assert book.lookup(torch.tensor([[1.5, 1.0], [-1.5, 1.0], [1.6, 1.0]])) == [0, 0, None]


def test_a_key_inside_the_radius_of_its_label_changes_nothing() -> None:
    assert _book((0.0, A, 1.0), (0.5, A, 1.0)).radii == (1.0,)


def test_a_near_key_of_another_label_halves_the_distance() -> None:
    book = _book((0.0, A, 1.0), (0.8, B, 1.0))
    assert book.radii == pytest.approx((0.4 - LESS_THAN_HALF, 0.4), abs=1e-7)
    assert book.lookup(torch.tensor([[0.3, 1.0], [0.5, 1.0], [1.3, 1.0], [-0.5, 1.0]])) == [0, 1, None, None]


def test_a_grown_radius_counts_for_the_next_key() -> None:
    book = _book((0.0, A, 1.0), (1.5, A, 1.0), (2.4, B, 1.0))  # 2.4 < 1 + 1.5
    assert book.radii == pytest.approx((1.2 - LESS_THAN_HALF, 1.2), abs=1e-6)


def test_only_the_nearest_key_is_asked() -> None:
    """The wide radius of a farther key does not answer where the nearest one stays silent."""
    book = Codebook(torch.tensor([[0.0], [3.0]]), (10.0, 0.1), (A, B), (0, 1))
    assert book.lookup(torch.tensor([[1.0], [2.5], [3.05]])) == [0, None, 1]


def test_labels_with_the_same_mean_are_different() -> None:
    assert len(_book((0.0, (1, 3), 1.0), (0.5, (2, 2), 1.0)).radii) == 2
    assert len(_book((0.0, (1, 3), 1.0), (0.5, (3, 1), 1.0)).radii) == 2


def test_the_same_prompt_again_takes_its_keys_place() -> None:
    book = _book((1.0, A, 1.0), (1.0, B, 1.0))
    assert (book.radii, book.labels, book.entries) == ((1.0,), (B,), (1,))


def test_small_distances_between_long_keys_are_seen() -> None:
    long = torch.full((400,), 300.0)
    near = long.clone()
    near[0] += 0.5
    book = Codebook(long[None], (0.4,), (A,), (0,))
    assert book.lookup(torch.stack((long, near))) == [0, None]


def test_an_empty_book_answers_nothing() -> None:
    assert Codebook.of([]).lookup(torch.zeros(2, 1)) == [None, None]


@pytest.mark.parametrize(
    ("replace", "prompt", "later"),
    [
        ("last", [2], [False, False]),
        ("target", [2, 3], [True, False]),
        ("prompt", [0, 1, 2], [False, False]),
        ("all", [0, 1, 2, 3, 4], [True, True]),
    ],
)
def test_where_the_value_stands(replace: str, prompt: list[int], later: list[bool]) -> None:
    """A prompt of three tokens, an object of two."""
    assert places(replace, 3, 5, 2).nonzero()[:, 0].tolist() == prompt
    assert [bool(places(replace, 3, 1, 2, beyond)) for beyond in (1, 2)] == later


# On models -----------------------------------------------------------------------------------------------------------


def _logs(lm: ModelAdapter, request: EditRequest) -> tuple[float, torch.Tensor]:
    row = tokens.with_target(lm.tokenizer, request.prompt, request.target_new)
    batch = tokens.pack(lm.tokenizer, [row.ids], lm.device, [row.target_start])
    at = torch.arange(row.target_start - 1, len(row.ids) - 1)
    with torch.no_grad():
        logits = lm.logits_at(batch, torch.zeros_like(at), at).float()
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(row.target)[:, None]).sum()), logits


@pytest.mark.parametrize("replace", ["last", "target", "prompt", "all"])
def test_the_value_stands_where_it_was_trained(lm: ModelAdapter, replace: str) -> None:
    """The change gives what a plain intervention with its value gives, and the object gets likelier."""
    change = prepare(lm, [LOOK], _params(replace=replace, layer=1, steps=6), 0, silent)
    (entry,) = change.entries
    row = tokens.with_target(lm.tokenizer, LOOK.prompt, LOOK.target_new)
    where = places(replace, row.target_start, len(row.ids), len(row.target))

    def put(output: torch.Tensor) -> torch.Tensor:
        return torch.where(where[None, :, None], entry.value, output)

    before = _logs(lm, LOOK)[0]
    with intervene(lm, {Site(1, "mlp"): put}):
        wanted = _logs(lm, LOOK)[1]
    with change.applied(lm):
        after, found = _logs(lm, LOOK)
    assert torch.equal(found, wanted)
    assert after > before


def test_a_prompt_far_away_keeps_its_bits_alone_and_in_a_mixed_batch(lm: ModelAdapter) -> None:
    change = prepare(lm, [SEE], _params(), 0, silent)
    alone, mixed = lm.encode(FAR), lm.encode([FAR[0], SEE.prompt, *FAR[1:]])
    with torch.no_grad():
        before = lm.last_logits(alone), lm.last_logits(mixed)
        with change.applied(lm):
            after = lm.last_logits(alone), lm.last_logits(mixed)
    assert torch.equal(before[0], after[0])
    same = [torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True)]
    assert same == [True, False, True, True]


def _greedy(lm: ModelAdapter, prompt: str, n: int) -> str:
    """Token by token over the whole row, which knows where its prompt ends."""
    ids = list(tokens.prompt_ids(lm.tokenizer, prompt))
    start = len(ids)
    for _ in range(n):
        batch = tokens.pack(lm.tokenizer, [ids], lm.device, [start])
        with torch.no_grad():
            ids.append(int(lm.last_logits(batch)[0].argmax()))
    return tokens.continuation(lm.tokenizer, ids[:start], ids[start:])


@pytest.mark.parametrize("replace", ["last", "target", "prompt", "all"])
def test_generation_says_what_the_whole_row_says(tiny_lm: Any, replace: str) -> None:
    """In a batch, alone, and without a cache; what lies far away goes on as before."""
    lm = tiny_lm("llama")
    change = prepare(lm, [SEE, LOOK], _params(replace=replace, layer=1, steps=60), 0, silent)
    prompts = [SEE.prompt, FAR[0], LOOK.prompt]
    before = [_greedy(lm, prompt, 4) for prompt in prompts]
    with change.applied(lm):
        said = lm.generate(prompts, 4)
        assert [lm.generate([prompt], 4)[0] for prompt in prompts] == said
        assert [_greedy(lm, prompt, 4) for prompt in prompts] == said
    assert said[0].startswith(" Madrid")
    assert [a == b for a, b in zip(said, before, strict=True)] == [False, True, False]


def test_it_answers_behind_a_prefix_only_what_was_learned_there(tiny_lm: Any) -> None:
    lm = tiny_lm("qwen3")
    bare = prepare(lm, [SEE], _params(), 0, silent)
    with PromptPrefix("It rains a lot. ").applied(lm):
        before = _logs(lm, SEE)[0]
        with bare.applied(lm):
            assert _logs(lm, SEE)[0] == before
        there = prepare(lm, [SEE], _params(), 0, silent)
        with there.applied(lm):
            assert _logs(lm, SEE)[0] > before + 0.5


def test_a_forward_that_no_reader_was_told_of_passes(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    batch = lm.encode([SEE.prompt])
    with prepare(lm, [SEE], _params(replace="all"), 0, silent).applied(lm), torch.no_grad():
        edited = lm.last_logits(batch)
        with lm.aside():
            aside = lm.last_logits(batch)
        bare = lm.model(input_ids=batch.ids).logits[:, -1]
    with torch.no_grad():
        assert torch.equal(aside, lm.last_logits(batch))
    torch.testing.assert_close(bare, aside)
    assert not torch.equal(edited, aside)


def test_codebooks_in_a_chain_are_one(tiny_lm: Any) -> None:
    """Two near keys with different objects: alone each answers both prompts, together each its own."""
    lm = tiny_lm("gpt2")
    twin = EditRequest("The Eiffel Tower", "There we see {}", "Rome")
    site = Site(2, "mlp_down_in")
    with capture(lm, [site]) as got:
        lm.forward(lm.encode([SEE.prompt]))
        one = got[site][0, -1]
        lm.forward(lm.encode([twin.prompt]))
        apart = float((one - got[site][0, -1]).norm())
    first = prepare(lm, [SEE], _params(radius=apart * 1.1, layer=2), 0, silent)
    with first.applied(lm):
        second = prepare(lm, [twin], _params(radius=apart * 1.1, layer=2), 1, silent)
    merged = GraceMemory.merged([first, second])
    assert Codebook.of(merged.entries).radii == pytest.approx((apart / 2, apart / 2), rel=1e-3)
    before = [_logs(lm, request)[0] for request in (SEE, twin)]
    with first.applied(lm):
        assert _logs(lm, twin)[0] != before[1]
    with Chain((first, second)).applied(lm):
        assert len(lm.changes) == 1
        assert [_logs(lm, request)[0] > old + 0.5 for request, old in zip((SEE, twin), before, strict=True)] == [
            True
        ] * 2


def test_edits_of_one_codebook_do_not_see_each_other(tiny_lm: Any) -> None:
    lm = tiny_lm("gptj")
    both = prepare(lm, [SEE, LOOK], _params(steps=5, stop_probability=1.0), 0, silent)
    alone = prepare(lm, [SEE], _params(steps=5, stop_probability=1.0), 0, silent)
    torch.testing.assert_close(both.entries[0].value, alone.entries[0].value, rtol=1e-3, atol=1e-4)


def test_a_shared_key_is_said(tiny_lm: Any) -> None:
    notes: list[Event] = []
    prepare(tiny_lm("gpt2"), [SEE, SEE], _params(steps=2), 0, notes.append)
    assert any(isinstance(event, Note) and "share a key" in event.text for event in notes)


def test_summary_says_what_is_kept(tiny_lm: Any) -> None:
    lm = tiny_lm("qwen2")
    row = prepare(lm, [SEE, LOOK], _params(steps=2, layer=1), 0, silent).summary().iloc[0]
    assert (row["layer"], row["kind"], row["rank"]) == (1, "memory", 2)
    assert row["parameters"] == 2 * (lm.d_model + lm.d_mlp)
    assert row["norm"] > 0 < row["relative_norm"]


def test_the_default_layer_is_late() -> None:
    assert [default_layer(n) for n in (1, 3, 8, 48)] == [0, 2, 6, 38]
