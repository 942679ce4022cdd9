"""Steering: where it acts, where it does not, and that it leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mega_core.changes import Chain, PromptPrefix
from mega_core.methods.gate import ALWAYS, Gate
from mega_core.methods.steering import Registry, SteeredEdit, Steering
from mega_core.methods.transport import AffineMap
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture, intervene

PROMPTS = ("The capital of France is", "Paris", "In Rome they say that Mount Kenya is in", "It rained. France speaks")
PARTS = ("attn", "resid_mid", "mlp", "block_out")


def shift(d: int, seed: int, size: float = 3.0) -> AffineMap:
    vector = torch.randn(d, generator=torch.Generator().manual_seed(seed))
    return AffineMap(torch.zeros(d), size * vector, torch.zeros(d, 0), torch.zeros(0, 0))


def bend(d: int, seed: int, rank: int = 3) -> AffineMap:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, rank, generator=generator)).Q
    inner = torch.randn(rank, rank, generator=generator)
    return AffineMap(torch.randn(d, generator=generator), torch.randn(d, generator=generator), basis, inner + inner.T)


def an_edit(lm: ModelAdapter, name: str = "one", seed: int = 0, **changes: Any) -> SteeredEdit:
    target = changes.pop("target", (5, 6, 7))
    part = changes.pop("part", "attn")
    sites = [Site(layer, part) for layer in (1, 2)]
    maps = {(site, j): bend(lm.d_model, 10 * seed + 3 * i + j) for i, site in enumerate(sites) for j in range(2)}
    given = {"subject": "France", "aliases": (), "maps": maps, "alpha": 1.5, "gate": ALWAYS, "target": target}
    return SteeredEdit(name=name, **{**given, **changes})


def every_logit(lm: ModelAdapter, batch: tokens.TokenBatch) -> torch.Tensor:
    with torch.no_grad():
        return lm.logits(batch)


@pytest.mark.parametrize("how", ["alpha", "gate", "empty", "removed"])
@pytest.mark.parametrize("part", PARTS)
def test_nothing_to_do_is_bit_identical(lm: ModelAdapter, how: str, part: str) -> None:
    edit = an_edit(lm, part=part)
    change = {
        "alpha": Steering((edit,)).with_alpha(0.0),
        "gate": Steering((an_edit(lm, part=part, gate=Gate("subject", ("Nobody",))),)),
        "empty": Steering(()),
        "removed": Registry([edit]).change(),
    }[how]
    if how == "removed":
        registry = Registry([edit])
        registry.remove("one")
        change = registry.change()
    batch = lm.encode(PROMPTS)
    before, said = every_logit(lm, batch), lm.generate(PROMPTS, 4)
    with change.applied(lm):
        assert torch.equal(every_logit(lm, batch), before)
        assert lm.generate(PROMPTS, 4) == said
    assert (lm.hook_count(), lm.readers, lm.changes) == (0, [], [])


def test_only_the_position_that_predicts_is_moved_and_by_alpha_times_the_map(lm: ModelAdapter) -> None:
    site = Site(1, "attn")
    step = bend(lm.d_model, 1)
    edit = an_edit(lm, maps={(site, 0): step}, alpha=0.5)
    batch = lm.encode(PROMPTS)
    with capture(lm, [site]) as got:
        lm.forward(batch)
    before = got[site]
    with Steering((edit,)).applied(lm), capture(lm, [site]) as got:
        lm.forward(batch)
    rows = torch.arange(len(PROMPTS))
    expected = before.clone()
    expected[rows, batch.last] += 0.5 * step.move(before[rows, batch.last])
    torch.testing.assert_close(got[site][batch.mask], expected[batch.mask])


def test_mixed_lengths_together_are_the_same_as_one_by_one(lm: ModelAdapter) -> None:
    change = Steering((an_edit(lm),))
    rows = [tokens.prompt_ids(lm.tokenizer, prompt) for prompt in PROMPTS]
    rows = [row + (5, 6)[: i % 3] for i, row in enumerate(rows)]
    starts = [len(row) - i % 3 for i, row in enumerate(rows)]
    batch = tokens.pack(lm.tokenizer, rows, lm.device, starts)
    with change.applied(lm):
        together = every_logit(lm, batch)
        said = lm.generate(PROMPTS, 5)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            alone = every_logit(lm, tokens.pack(lm.tokenizer, [row], lm.device, [start]))
            torch.testing.assert_close(together[i, : len(row)], alone[0], rtol=1e-4, atol=1e-4)
        assert said == [lm.generate([prompt], 5)[0] for prompt in PROMPTS]


def _towards(lm: ModelAdapter, target: tuple[int, ...]) -> SteeredEdit:
    """An edit that makes the model say the ids, one map per token, at the last place before the head."""
    site = Site(lm.n_layers - 1, "block_out")
    maps = {}
    for j, token in enumerate(target):
        direction = lm.head_weight[token].float()
        maps[site, j] = AffineMap(
            torch.zeros(lm.d_model), 1e3 * direction, torch.zeros(lm.d_model, 0), torch.zeros(0, 0)
        )
    return an_edit(lm, maps=maps, target=target, alpha=1.0)


def _sayable(lm: ModelAdapter, count: int) -> tuple[int, ...]:
    """Ids that a large push towards their own unembedding makes the most likely ones."""
    weight = lm.head_weight.float()
    found = []
    for token in range(300, lm.vocab_size - 3):
        with torch.no_grad():
            if int(lm.unembed(1e3 * weight[token]).argmax()) == token:
                found.append(token)
    return tuple(found[:count])


def test_what_is_read_along_and_what_is_generated_are_steered_alike(lm: ModelAdapter) -> None:
    target = _sayable(lm, 3)
    assert len(target) == 3
    with Steering((_towards(lm, target),)).applied(lm):
        rows = [tokens.prompt_ids(lm.tokenizer, prompt) for prompt in PROMPTS]
        batch = tokens.pack(lm.tokenizer, [row + target for row in rows], lm.device, [len(row) for row in rows])
        read = every_logit(lm, batch).argmax(-1)
        with torch.no_grad():
            new = lm._greedy(lm.encode(PROMPTS), 6)
        for i, row in enumerate(rows):
            forced = read[i, len(row) - 1 :][:3].tolist()
            assert tuple(forced) == target == tuple(new[i][:3])


def test_a_row_that_says_something_else_is_left_alone(lm: ModelAdapter) -> None:
    site = Site(1, "attn")
    edit = an_edit(lm, maps={(site, 1): shift(lm.d_model, 0)})
    row = tokens.prompt_ids(lm.tokenizer, PROMPTS[0])
    other = tokens.pack(lm.tokenizer, [(*row, 9, 6)], lm.device, [len(row)])
    own = tokens.pack(lm.tokenizer, [(*row, 5, 6)], lm.device, [len(row)])
    before = every_logit(lm, other), every_logit(lm, own)
    with Steering((edit,)).applied(lm):
        assert torch.equal(every_logit(lm, other), before[0])
        after = every_logit(lm, own)
    assert torch.equal(after[:, : len(row)], before[1][:, : len(row)])
    assert not torch.equal(after[:, len(row)], before[1][:, len(row)])


def test_two_edits_do_not_disturb_each_other_and_one_can_go(lm: ModelAdapter) -> None:
    first = an_edit(lm, "one", 1, gate=Gate("subject", ("France",)))
    second = an_edit(lm, "two", 2, gate=Gate("subject", ("Rome",)))
    registry = Registry([first])
    batch = lm.encode(PROMPTS)
    with registry.change().applied(lm):
        alone = every_logit(lm, batch)
    registry.add(second)
    with registry.change().applied(lm):
        both = every_logit(lm, batch)
    plain = every_logit(lm, batch)
    assert torch.equal(both[0], alone[0])
    assert torch.equal(both[1], plain[1])
    assert not torch.equal(both[2], alone[2])
    assert not torch.equal(alone[3], plain[3])
    assert registry.remove("two") is second
    with registry.change().applied(lm):
        assert torch.equal(every_logit(lm, batch), alone)
    with pytest.raises(KeyError):
        registry.remove("two")


def test_at_most_one_edit_acts_and_the_nearest_wins(tiny_lm: Any) -> None:
    lm = tiny_lm("qwen3")
    batch = lm.encode(PROMPTS[:1])
    here = Site(1, "block_out")
    with capture(lm, [here]) as got:
        lm.forward(batch)
    state = got[here][:, -1]
    none = state[:0]

    def at(distance: float) -> Gate:
        return Gate("centroid", ("France",), 1, state + distance / state.shape[1] ** 0.5, none)

    near, far = an_edit(lm, "near", 1, gate=at(1.0)), an_edit(lm, "far", 2, gate=at(2.0))
    named, always = an_edit(lm, "named", 3, gate=Gate("subject", ("France",))), an_edit(lm, "always", 4)
    for edits, winner in (
        ((near, far), near),
        ((far, near), near),
        ((named, far), far),
        ((always, named), named),
        ((an_edit(lm, "older", 5), always), always),
    ):
        with Steering((winner,)).applied(lm):
            wanted = every_logit(lm, batch)
        with Steering(edits).applied(lm):
            assert torch.equal(every_logit(lm, batch), wanted)


def test_of_two_merged_edits_of_one_name_the_later_stays(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    old, new, other = an_edit(lm, "a", 1), an_edit(lm, "a", 2), an_edit(lm, "b", 3)
    assert Steering.merged([Steering((old, other)), Steering((new,))]).edits == (other, new)
    chain = Chain((Steering((old,)), Steering((other,))))
    assert len(chain.parts()) == 1
    with chain.applied(lm):
        assert len(lm.readers) == 1


def test_a_prefix_and_steering_together(lm: ModelAdapter) -> None:
    prefix = "New fact: the sky is green. "
    edit = an_edit(lm, gate=Gate("subject", ("France",)))
    prompts = [prompt for prompt in PROMPTS if "France" in prompt]
    with PromptPrefix(prefix).applied(lm), Steering((edit,)).applied(lm):
        behind = torch.stack([lm.last_logits(lm.encode([prompt]))[0].detach() for prompt in prompts])
        said = lm.generate(prompts, 4)
        together = lm.last_logits(lm.encode(prompts)).detach()
    torch.testing.assert_close(behind, together, rtol=1e-4, atol=1e-4)
    whole = [prefix + prompt for prompt in prompts]
    own, full = lm.encode(prompts).rows(), lm.encode(whole).rows()
    skip = tokens.leading_specials(lm.tokenizer, own[0])
    if all(b[-len(a) + skip :] == a[skip:] for a, b in zip(own, full, strict=True)):  # the same tokens, read whole
        with Steering((an_edit(lm),)).applied(lm):
            torch.testing.assert_close(behind, lm.last_logits(lm.encode(whole)).detach(), rtol=1e-4, atol=1e-4)
            assert lm.generate(whole, 4) == said


def test_the_gate_looks_once_and_beside_the_model(tiny_lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, texts = tiny_lm("gpt2"), []
    state = torch.zeros(1, lm.d_model)
    edit = an_edit(lm, gate=Gate("centroid", ("France",), 1, state, state[:0]))
    real = lm.encode

    def spy(prompts: Any) -> Any:
        texts.extend(prompts)
        return real(prompts)

    batch = real(PROMPTS)
    monkeypatch.setattr(lm, "encode", spy)
    with Steering((edit,)).applied(lm):
        first = every_logit(lm, batch)
        assert texts == ["The capital of France is", "France speaks"]
        assert torch.equal(every_logit(lm, batch), first)
        assert len(texts) == 2
        # Somebody else's look beside is not steered.
        with lm.aside():
            unsteered = every_logit(lm, batch)
    assert torch.equal(unsteered, every_logit(lm, batch))


def test_an_error_half_way_leaves_nothing(lm: ModelAdapter) -> None:
    batch = lm.encode(PROMPTS)
    before = every_logit(lm, batch)

    def fail(value: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Steering((an_edit(lm),)).applied(lm), intervene(lm, {Site(2, "mlp"): fail}):
        every_logit(lm, batch)
    assert (lm.hook_count(), lm.readers, lm.changes) == (0, [], [])
    assert torch.equal(every_logit(lm, batch), before)


def test_blocks_that_somebody_runs_alone_are_not_steered(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    batch = lm.encode(PROMPTS)
    with torch.no_grad(), Steering((an_edit(lm),)).applied(lm):
        every_logit(lm, batch)  # leaves nothing to be met by what follows
        steered = lm.model(input_ids=batch.ids, attention_mask=torch.ones_like(batch.ids)).logits
    assert torch.equal(steered, every_logit(lm, batch))


def test_gradients_pass_through(tiny_lm: Any) -> None:
    lm = tiny_lm("qwen3")
    added = torch.zeros(lm.d_model, requires_grad=True)
    with Steering((an_edit(lm),)).applied(lm), intervene(lm, {Site(0, "mlp"): lambda value: value + added}):
        lm.last_logits(lm.encode(PROMPTS)).sum().backward()
    assert added.grad is not None
    assert float(added.grad.abs().sum()) > 0


def test_the_summary_says_how_far_it_moves(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    site = Site(1, "attn")
    step = shift(lm.d_model, 0)
    edit = an_edit(lm, maps={(site, 0): step}, alpha=2.0, norms={site: 4.0})
    row = Steering((edit,)).summary().iloc[0]
    assert (row["layer"], row["site"], row["kind"], row["rank"], row["parameters"]) == (1, "attn", "steering", 0, 0)
    assert row["norm"] == pytest.approx(2 * float(step.shift.norm()))
    assert row["relative_norm"] == pytest.approx(row["norm"] / 4)
    assert Steering(()).summary().empty


def test_packing_keeps_every_bit(tiny_lm: Any) -> None:
    lm = tiny_lm("llama")
    centroids = torch.randn(2, lm.d_model, generator=torch.Generator().manual_seed(0))
    gate = Gate("centroid", ("France", "République"), 1, centroids, centroids[:0], 3.5)
    change = Steering((an_edit(lm, gate=gate, norms={Site(1, "attn"): 2.5}), an_edit(lm, "two", 2)))
    plain, tensors = change.pack()
    again = Steering.unpack(plain, tensors)
    assert again.pack()[0] == plain
    assert all(torch.equal(tensor, again.pack()[1][name]) for name, tensor in tensors.items())
    assert again.edits[0].gate.names == gate.names
    with pytest.raises(KeyError):
        Steering.unpack(plain, {})


def test_strength_changes_without_a_new_fit(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    change = Steering((an_edit(lm, alpha=1.0),))
    stronger = change.with_alpha(2.0)
    assert stronger.edits[0].maps is change.edits[0].maps
    assert float(stronger.summary()["norm"].iloc[0]) == pytest.approx(2 * float(change.summary()["norm"].iloc[0]))
