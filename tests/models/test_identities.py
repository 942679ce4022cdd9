"""What every architecture must obey: parts add up, padding changes nothing, matrices lie as they claim."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mega_core.errors import BadInput, UnsupportedModel
from mega_core.models import adapter as adapter_module
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter, bit_sums, check_parts
from mega_core.models.arch import ARCHS, REFUSED, spec_of
from mega_core.models.hooks import PARTS, Site, capture, intervene
from mega_core.records import ModelRef
from tests.conftest import ARCH_NAMES
from tests.tiny import LAYERS, MAX_PARAMETERS, tiny

PROMPTS = ["The capital of France is", "Rome", "Marie Curie is a citizen of Poland and speaks"]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_every_architecture_of_the_table_has_a_tiny_model():
    assert tuple(ARCHS) == ARCH_NAMES


def test_sizes(lm: ModelAdapter):
    assert sum(p.numel() for p in lm.model.parameters()) < MAX_PARAMETERS
    assert (lm.n_layers, lm.n_heads, lm.d_model, lm.d_mlp) == (LAYERS, 4, 32, 56)
    assert lm.n_kv_heads == (2 if lm.spec.gated else 4)
    assert lm.head_dim == (12 if lm.spec.model_type in ("llama", "mistral", "qwen3") else 8)
    assert lm.head_weight.shape == (lm.vocab_size, lm.d_model)
    assert lm.name == f"tiny-{lm.spec.model_type}"
    assert lm.spec.parallel == (lm.spec.model_type in ("gptj", "gpt_neox"))
    assert (lm.head_bias is not None) == (lm.spec.model_type == "gptj")
    check_parts(lm)


def test_the_head_of_the_last_block_gives_the_logits(lm: ModelAdapter):
    batch = lm.encode(PROMPTS)
    last = Site(lm.n_layers - 1, "block_out")
    with capture(lm, [last], stop=False) as got:
        logits = lm.logits(batch)
    torch.testing.assert_close(lm.unembed(got[last]), logits, atol=1e-5, rtol=1e-5)
    reference = lm.model(input_ids=batch.ids, attention_mask=batch.mask).logits
    torch.testing.assert_close(logits[batch.mask], reference[batch.mask], atol=1e-5, rtol=1e-5)
    by_hand = lm.final_norm(got[last]) @ lm.head_weight.T
    if lm.head_bias is not None:
        assert lm.head_bias.abs().min() > 0, "a bias of zero would hide that it is forgotten"
        by_hand = by_hand + lm.head_bias
    torch.testing.assert_close(by_hand, logits, atol=1e-5, rtol=1e-5)


def test_a_block_adds_attention_and_mlp(lm: ModelAdapter):
    for layer in range(lm.n_layers):
        parts = ("block_in", "attn", "resid_mid", "mlp", "block_out")
        with capture(lm, [Site(layer, part) for part in parts]) as got:
            lm.forward(lm.encode(PROMPTS))
        x, attn, mid, mlp, out = (got[Site(layer, part)] for part in parts)
        torch.testing.assert_close(out - x, attn + mlp, atol=1e-5, rtol=1e-5)
        assert torch.equal(mid, x + attn)
        read_by_mlp = x if lm.spec.parallel else mid
        torch.testing.assert_close(lm.mlp(layer)(lm.mlp_norm(layer)(read_by_mlp)), mlp, atol=1e-5, rtol=1e-5)


def test_a_block_starts_where_the_one_before_ends(lm: ModelAdapter):
    with capture(lm, [Site(0, "block_out"), Site(1, "block_in")]) as got:
        lm.forward(lm.encode(PROMPTS))
    assert torch.equal(got[Site(0, "block_out")], got[Site(1, "block_in")])


@pytest.mark.parametrize(
    ("site", "before", "after"), [("mlp_down", "mlp_down_in", "mlp"), ("attn_out", "attn_out_in", "attn")]
)
def test_matrices_are_out_by_in(lm: ModelAdapter, site: str, before: str, after: str):
    with capture(lm, [Site(1, before), Site(1, after)]) as got:
        lm.forward(lm.encode(PROMPTS))
    matrix = lm.read_weight(1, site)
    module = lm.mlp_down(1) if site == "mlp_down" else lm.attn_out(1)
    width = lm.d_mlp if site == "mlp_down" else lm.n_heads * lm.head_dim
    assert matrix.shape == (lm.d_model, width)
    assert got[Site(1, before)].shape[-1] == width
    by_hand = got[Site(1, before)] @ matrix.T
    if module.bias is not None:
        assert module.bias.abs().min() > 0
        by_hand = by_hand + module.bias
    torch.testing.assert_close(by_hand, got[Site(1, after)], atol=1e-5, rtol=1e-5)


def test_read_weight_is_a_view_of_the_stored_matrix(lm: ModelAdapter):
    for site in ("mlp_down", "attn_out"):
        stored, seen = lm.weight(0, site), lm.read_weight(0, site)
        assert stored.data_ptr() == seen.data_ptr()
        assert lm.conv1d(0, site) == (lm.spec.model_type == "gpt2")
        assert torch.equal(seen, stored.T if lm.conv1d(0, site) else stored)


def test_attention_weights_are_a_causal_distribution(lm: ModelAdapter):
    batch = lm.encode(["The capital of France is"])
    before = lm.logits(batch)
    kernel = lm.model.config._attn_implementation
    with capture(lm, [Site(2, "pattern")]) as got:
        lm.forward(batch)
    assert lm.model.config._attn_implementation == kernel
    pattern = got[Site(2, "pattern")]
    n = batch.ids.shape[1]
    assert pattern.shape == (1, lm.n_heads, n, n)
    torch.testing.assert_close(pattern.sum(-1), torch.ones(1, lm.n_heads, n))
    assert pattern.triu(1).abs().max() < 1e-6
    assert torch.equal(lm.logits(batch), before)


# Batches --------------------------------------------------------------------------------------------------------------


def test_a_batch_equals_its_rows(lm: ModelAdapter):
    batch = lm.encode(PROMPTS)
    assert len(set(batch.lengths)) == len(PROMPTS)
    together = lm.logits(batch)
    last = lm.last_logits(batch)
    for row, prompt in enumerate(PROMPTS):
        alone = lm.logits(lm.encode([prompt]))[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-4, rtol=0)
        torch.testing.assert_close(last[row], alone[-1], atol=1e-4, rtol=0)


def test_the_content_of_padding_does_not_matter(lm: ModelAdapter):
    batch = lm.encode(PROMPTS)
    other = torch.where(batch.mask, batch.ids, 7)
    changed = replace(batch, ids=other)
    assert torch.equal(lm.last_logits(batch), lm.last_logits(changed))


def test_activations_of_a_batch_equal_those_of_its_rows(lm: ModelAdapter):
    sites = [Site(1, part) for part in PARTS if part != "pattern"]
    with capture(lm, sites) as together:
        lm.forward(lm.encode(PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        with capture(lm, sites) as alone:
            lm.forward(lm.encode([prompt]))
        for site in sites:
            n = alone[site].shape[1]
            torch.testing.assert_close(together[site][row, :n], alone[site][0], atol=1e-4, rtol=0)


def test_logits_at_chosen_places(lm: ModelAdapter):
    batch = lm.encode(PROMPTS)
    rows, positions = torch.tensor([2, 0, 2]), torch.tensor([1, 0, 4])
    torch.testing.assert_close(
        lm.logits_at(batch, rows, positions), lm.logits(batch)[rows, positions], atol=1e-5, rtol=1e-5
    )


def test_the_head_runs_on_needed_rows_only(lm: ModelAdapter):
    seen: list[tuple[int, ...]] = []
    handle = lm.head.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    try:
        lm.last_logits(lm.encode(PROMPTS))
    finally:
        handle.remove()
    assert seen == [(len(PROMPTS), lm.d_model)]


def test_too_long_a_prompt_names_the_limit(lm: ModelAdapter):
    with pytest.raises(BadInput, match=f"at most {lm.max_positions}"):
        lm.logits(lm.encode(["a b" * 200]))


# Text -----------------------------------------------------------------------------------------------------------------


def test_generation_equals_row_by_row_and_the_library(lm: ModelAdapter):
    together = lm.generate(PROMPTS, 10)
    assert together == [lm.generate([prompt], 10)[0] for prompt in PROMPTS]
    for prompt, text in zip(PROMPTS, together, strict=True):
        batch = lm.encode([prompt])
        out = lm.model.generate(
            batch.ids, attention_mask=batch.mask, max_new_tokens=10, do_sample=False, pad_token_id=0
        )
        new = [i for i in out[0, batch.ids.shape[1] :].tolist() if i != lm.tokenizer.eos_token_id]
        assert text == tokens.continuation(lm.tokenizer, batch.rows()[0], new)


def test_generation_without_cache_is_the_same(lm: ModelAdapter):
    ids = list(lm.encode([PROMPTS[0]]).rows()[0])
    start = len(ids)
    for _ in range(8):
        best = int(lm.last_logits(tokens.pack(lm.tokenizer, [ids]))[0].argmax())
        if best == lm.tokenizer.eos_token_id:
            break
        ids.append(best)
    assert lm.generate([PROMPTS[0]], 8) == [tokens.continuation(lm.tokenizer, ids[:start], ids[start:])]


def test_generation_stops_at_the_end_of_text_and_of_the_context(lm: ModelAdapter):
    with pytest.MonkeyPatch.context() as patch:
        first = int(lm.last_logits(lm.encode([PROMPTS[0]]))[0].argmax())
        patch.setattr(lm.model.generation_config, "eos_token_id", [first])
        assert lm.generate([PROMPTS[0]], 5) == [""]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "max_positions", lm.encode([PROMPTS[0]]).ids.shape[1] + 2)
        patch.setattr(type(lm), "_end_ids", lambda self: frozenset())
        new: list[list[int]] = []
        greedy = ModelAdapter._greedy

        def watch(self, batch, steps, choosers=None):
            new.extend(greedy(self, batch, steps, choosers))
            return new

        patch.setattr(type(lm), "_greedy", watch)
        lm.generate([PROMPTS[0]], 50)
        assert len(new[0]) == 2


def test_a_sliding_window_does_not_count_padding():
    lm = tiny("mistral")
    lm.model.config.sliding_window = 16
    assert lm.generate(PROMPTS, 12) == [lm.generate([prompt], 12)[0] for prompt in PROMPTS]


# Digest and refusals --------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_model_and_a_changed_bit_another_digest():
    one, two, three = tiny("gpt2", 1), tiny("gpt2", 1), tiny("gpt2", 2)
    assert one.live_digest() == two.live_digest() != three.live_digest()
    weight = one.weight(2, "mlp_down")
    saved = weight[3, 4].item()
    weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    assert one.live_digest() != two.live_digest()
    weight[3, 4] = saved
    assert one.live_digest() == two.live_digest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.bool])
def test_bit_sums_see_changes_and_swaps(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adapter_module, "_CHUNK", 16)  # several chunks
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(7, 13, generator=generator).to(dtype)
    base = bit_sums(tensor).tolist()
    assert bit_sums(tensor.clone()).tolist() == base
    for place in ((0, 0), (3, 5), (6, 12)):
        changed = tensor.clone()
        changed[place] = ~changed[place] if dtype == torch.bool else changed[place] + 1
        assert bit_sums(changed).tolist() != base
    swapped = tensor.clone()
    swapped[0, 0], swapped[6, 0] = ~tensor[6, 0] if dtype == torch.bool else tensor[6, 0], tensor[0, 0]
    assert bit_sums(swapped).tolist() != base
    assert bit_sums(tensor.T).tolist() == bit_sums(tensor.T.contiguous()).tolist()
    assert bit_sums(torch.tensor(1.0)).shape == (2,)


@pytest.mark.parametrize("model_type", [*REFUSED, "mamba", ""])
def test_other_architectures_are_refused_with_a_reason(model_type: str):
    with pytest.raises(UnsupportedModel) as error:
        spec_of(model_type)
    assert "gpt2" in error.value.next_step
    assert model_type in error.value.what


def test_a_missing_part_is_named():
    lm = tiny("llama")
    del lm.model.model.layers[1].mlp.down_proj
    with pytest.raises(UnsupportedModel, match=r"mlp\.down_proj"):
        ModelAdapter(lm.model, lm.tokenizer, ModelRef("broken"))


def test_a_block_that_does_not_add_up_is_refused():
    lm = tiny("llama")
    lm.model.model.layers[0].register_forward_hook(lambda module, args, out: out * 1.5)
    with pytest.raises(UnsupportedModel, match="not attention plus MLP"):
        check_parts(lm)


def test_logits_that_are_scaled_afterwards_are_refused():
    lm = tiny("qwen3")
    lm.head.register_forward_hook(lambda module, args, out: out * 2 if out.ndim == 3 and out.shape[0] == 1 else out)
    lm.model.model.norm.register_forward_hook(lambda module, args, out: out + (args[0].shape[1] == 3) * torch.rand(32))
    with pytest.raises(UnsupportedModel, match="final norm"):
        check_parts(lm)


def test_unknown_layers_and_sites_name_the_known_ones(lm: ModelAdapter):
    for layer in (-1, lm.n_layers):
        with pytest.raises(BadInput, match="0 to 2"):
            lm.block(layer)
    with pytest.raises(BadInput, match="mlp_down or attn_out"):
        lm.weight(0, "mlp_up")


def test_values_are_what_the_value_rows_make_of_the_normalised_stream(lm: ModelAdapter):
    with torch.no_grad(), capture(lm, [Site(1, "value"), Site(1, "block_in")]) as got:
        lm.forward(lm.encode(["The capital of France is"]))
        normed = lm.attn_norm(1)(got[Site(1, "block_in")])
    expected = torch.einsum("bpd,hjd->bphj", normed, lm.value_weight(1))
    bias = lm.value_bias(1)
    if bias is not None:
        expected = expected + bias
    torch.testing.assert_close(got[Site(1, "value")], expected.flatten(-2))


def test_heads_and_their_bias_are_what_attention_writes(lm: ModelAdapter):
    with torch.no_grad(), capture(lm, [Site(1, "attn_out_in"), Site(1, "attn")]) as got:
        lm.forward(lm.encode(["The capital of France is"]))
    heads = got[Site(1, "attn_out_in")].unflatten(-1, (lm.n_heads, lm.head_dim))
    written = torch.einsum("bphj,hjd->bpd", heads, lm.head_out(1))
    bias = lm.bias(1, "attn_out")
    torch.testing.assert_close(got[Site(1, "attn")], written if bias is None else written + bias)


def test_patterns_mix_values_into_what_the_heads_say(lm: ModelAdapter):
    with torch.no_grad(), capture(lm, [Site(1, part) for part in ("pattern", "value", "attn_out_in")]) as got:
        lm.forward(lm.encode(["The capital of France is"]))
    values = got[Site(1, "value")].unflatten(-1, (lm.n_kv_heads, lm.head_dim))
    served = values[:, :, [lm.kv_head(head) for head in range(lm.n_heads)]]
    mixed = torch.einsum("bhqk,bkhj->bqhj", got[Site(1, "pattern")], served)
    torch.testing.assert_close(got[Site(1, "attn_out_in")], mixed.flatten(-2))


def test_replacing_values_is_what_attention_reads(lm: ModelAdapter):
    batch = lm.encode(["The capital of France is"])
    with (
        torch.no_grad(),
        intervene(lm, {Site(1, "value"): torch.zeros_like}),
        capture(lm, [Site(1, "attn_out_in")]) as got,
    ):
        lm.forward(batch)
    assert not got[Site(1, "attn_out_in")].any()


def test_neurons_look_for_the_rows_of_the_first_matrix(lm: ModelAdapter):
    x = torch.randn(2, lm.d_model)
    with torch.no_grad(), capture(lm, [Site(0, "mlp_down_in")], stop=False) as got:
        lm.mlp(0)(x)
    changed = x + 10 * lm.mlp_in(0)[3] / lm.mlp_in(0)[3].norm()
    with torch.no_grad(), capture(lm, [Site(0, "mlp_down_in")], stop=False) as after:
        lm.mlp(0)(changed)
    moved = (after[Site(0, "mlp_down_in")] - got[Site(0, "mlp_down_in")]).abs().mean(0)
    assert lm.mlp_in(0).shape == (lm.d_mlp, lm.d_model)
    assert moved[3] > moved.median()
    if lm.spec.gated:
        assert lm.mlp_in(0, "gate").shape == (lm.d_mlp, lm.d_model)
    else:
        with pytest.raises(BadInput, match="no MLP matrix"):
            lm.mlp_in(0, "gate")
