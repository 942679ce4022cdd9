"""Capturing changes nothing, replacing changes exactly what it says, and nothing stays behind however a block ends."""

from __future__ import annotations

import pytest
import torch

from mega_core.errors import BadInput
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import FINAL, PARTS, Site, capture, intervene

PROMPTS = ["The capital of France is", "Rome", "Marie Curie is a citizen of"]
WRITABLE = [part for part in PARTS if part != "pattern"]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_capturing_changes_no_value(lm: ModelAdapter):
    batch = lm.encode(PROMPTS)
    before = lm.logits(batch)
    sites = [Site(layer, part) for layer in range(lm.n_layers) for part in WRITABLE]
    with capture(lm, sites, stop=False) as got:
        assert torch.equal(lm.logits(batch), before)
    assert set(got) == set(sites)
    for site in sites:  # alone and with an early stop: the same numbers
        with capture(lm, [site]) as alone:
            lm.forward(batch)
        assert torch.equal(alone[site], got[site])


def test_stopping_skips_everything_deeper(lm: ModelAdapter):
    ran: list[int] = []
    handles = [
        lm.block(layer).register_forward_pre_hook(lambda module, args, layer=layer: ran.append(layer))
        for layer in range(lm.n_layers)
    ]
    try:
        for part in WRITABLE:
            ran.clear()
            with capture(lm, [Site(0, "block_in"), Site(1, part)]) as got:
                lm.forward(lm.encode(PROMPTS))
            assert len(got) == 2
            assert ran == [0, 1]
    finally:
        for handle in handles:
            handle.remove()


def test_nested_captures_both_get_their_values(lm: ModelAdapter):
    batch = lm.encode(PROMPTS)
    shallow, deep = Site(0, "attn"), Site(2, "mlp")
    for outer, inner in ((shallow, deep), (deep, shallow)):
        with capture(lm, [outer]) as first, capture(lm, [inner]) as second:
            lm.forward(batch)
        assert outer in first
        assert inner in second
    with capture(lm, [shallow]) as first, capture(lm, [deep], stop=False):
        lm.logits(batch)  # the inner one asked for the whole forward
    assert shallow in first


def test_logits_of_a_stopped_forward_are_refused(lm: ModelAdapter):
    with capture(lm, [Site(0, "mlp")]):
        with pytest.raises(RuntimeError, match="stop=False"):
            lm.last_logits(lm.encode(PROMPTS))
        with pytest.raises(RuntimeError, match="stop=False"):
            lm.generate(PROMPTS)


def test_what_was_not_captured_says_what_was(lm: ModelAdapter):
    with capture(lm, [Site(0, "mlp")]) as got:
        lm.forward(lm.encode(PROMPTS))
    with pytest.raises(KeyError, match="layer=0, part='mlp'"):
        got[Site(1, "mlp")]


@pytest.mark.parametrize("part", WRITABLE)
def test_replacing_by_the_same_is_bit_exact(lm: ModelAdapter, part: str):
    batch = lm.encode(PROMPTS)
    before = lm.logits(batch)
    with intervene(lm, {Site(layer, part): torch.clone for layer in range(lm.n_layers)}):
        assert torch.equal(lm.logits(batch), before)


@pytest.mark.parametrize("part", WRITABLE)
def test_replacing_reaches_what_reads_it(lm: ModelAdapter, part: str):
    batch = lm.encode(PROMPTS)
    before = lm.logits(batch)
    site = Site(1, part)
    with intervene(lm, {site: torch.zeros_like}), capture(lm, [site], stop=False) as got:
        after = lm.logits(batch)
    assert not torch.allclose(after, before)
    if part == "resid_mid":  # the stream minus itself, up to rounding
        assert got[site].abs().max() < 1e-5
    else:
        assert not got[site].any()
    assert torch.equal(lm.logits(batch), before)


def test_adding_to_the_mlp_is_adding_to_the_block(lm: ModelAdapter):
    batch = lm.encode(PROMPTS)
    delta = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0))
    outcomes = []
    for part in ("mlp", "block_out", "attn", "resid_mid"):
        with intervene(lm, {Site(2, part): lambda value: value + delta}):
            outcomes.append(lm.logits(batch))
    torch.testing.assert_close(outcomes[0], outcomes[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outcomes[2], outcomes[3], atol=1e-4, rtol=1e-4)
    if lm.spec.parallel:  # nothing inside the block reads what attention wrote
        torch.testing.assert_close(outcomes[0], outcomes[2], atol=1e-4, rtol=1e-4)


def test_a_neuron_writes_its_column(lm: ModelAdapter):
    batch = lm.encode(PROMPTS)
    column = lm.read_weight(1, "mlp_down")[:, 5]

    def louder(neurons: torch.Tensor) -> torch.Tensor:
        return neurons + 2.0 * torch.nn.functional.one_hot(torch.tensor(5), lm.d_mlp)

    with capture(lm, [Site(1, "mlp")]) as base:
        lm.forward(batch)
    with intervene(lm, {Site(1, "mlp_down_in"): louder}), capture(lm, [Site(1, "mlp")]) as changed:
        lm.forward(batch)
    difference = changed[Site(1, "mlp")] - base[Site(1, "mlp")]
    torch.testing.assert_close(difference, (2.0 * column).expand_as(difference), atol=1e-5, rtol=1e-4)


def test_the_final_state_is_what_the_head_reads(lm: ModelAdapter):
    batch, site = lm.encode(PROMPTS), Site(lm.n_layers - 1, FINAL)
    before, text = lm.logits(batch), lm.generate(PROMPTS, 4)
    with capture(lm, [site]) as got, capture(lm, [Site(lm.n_layers - 1, "block_out")], stop=False) as deep:
        assert torch.equal(lm.logits(batch), before)
    assert torch.equal(lm.head(got[site]), before)
    torch.testing.assert_close(lm.final_norm(deep[Site(lm.n_layers - 1, "block_out")]), got[site])
    with capture(lm, [site]) as alone:
        lm.forward(batch)
    assert torch.equal(alone[site], got[site])
    with intervene(lm, {site: torch.clone}):
        assert torch.equal(lm.logits(batch), before)
        assert lm.generate(PROMPTS, 4) == text
    push = 100.0 * lm.head_weight[9]
    with intervene(lm, {site: lambda value: value + push}):
        torch.testing.assert_close(lm.logits(batch), lm.head(got[site] + push))
        assert lm.generate(PROMPTS, 4) != text
        with capture(lm, [Site(lm.n_layers - 1, "block_out")], stop=False) as inner:  # the head alone is no forward
            lm.logits(batch)
        assert torch.equal(lm.unembed(inner[Site(lm.n_layers - 1, "block_out")]), before)
    assert torch.equal(lm.logits(batch), before)
    assert lm.hook_count() == 0
    with pytest.raises(BadInput, match="last layer"), capture(lm, [Site(0, FINAL)]):
        pytest.fail("the block must not be entered")


def test_the_final_state_behind_a_prefix(lm: ModelAdapter):
    """Hooks there see the prompt's own positions too."""
    site, push = Site(lm.n_layers - 1, FINAL), 100.0 * lm.head_weight[9]
    with lm.behind(lambda prompt: "Rome is a city. "):
        batch = lm.encode(PROMPTS)
        with capture(lm, [site], stop=False) as got:
            before = lm.logits(batch)
        assert got[site].shape[:2] == batch.ids.shape
        with intervene(lm, {site: lambda value: value + push}):
            after = lm.logits(batch)
    torch.testing.assert_close(after[batch.mask], (before + push @ lm.head_weight.T)[batch.mask], atol=1e-3, rtol=1e-3)


def test_gradients_flow_through_an_intervention(lm: ModelAdapter):
    batch = lm.encode(PROMPTS)
    with torch.enable_grad():
        delta = torch.zeros(lm.d_model, requires_grad=True)
        with intervene(lm, {Site(1, "mlp"): lambda mlp: mlp + delta}), capture(lm, [Site(1, "mlp")], stop=False) as got:
            lm.last_logits(batch).log_softmax(-1)[:, 3].sum().backward()
    assert delta.grad is not None
    assert delta.grad.abs().min() > 0
    assert not got[Site(1, "mlp")].requires_grad
    assert all(p.grad is None for p in lm.model.parameters())


def test_generation_honours_hooks_at_every_step(lm: ModelAdapter):
    widths: list[tuple[int, int]] = []

    def watch(value: torch.Tensor) -> torch.Tensor:
        widths.append((lm.past, value.shape[1]))
        return value

    plain = lm.generate(PROMPTS, 6)
    with intervene(lm, {Site(0, "mlp"): watch}):
        assert lm.generate(PROMPTS, 6) == plain
    prompt = lm.encode(PROMPTS).ids.shape[1]
    assert widths[0] == (0, prompt)
    assert widths[1:] == [(prompt + i, 1) for i in range(len(widths) - 1)]
    assert lm.past == 0
    push = 100.0 * lm.head_weight[9]
    with intervene(lm, {Site(lm.n_layers - 1, "block_out"): lambda value: value + push}):
        pushed = lm.generate(PROMPTS, 6)
        assert pushed == [lm.generate([prompt], 6)[0] for prompt in PROMPTS]
    assert pushed != plain


def test_a_hook_that_counts_positions_finds_them_in_a_padded_batch(lm: ModelAdapter):
    """The same replacement at the same index gives the same text in a batch and alone."""

    def at_second(value: torch.Tensor) -> torch.Tensor:
        if lm.past:
            return value
        changed = value.clone()
        changed[:, 1] = 0.5
        return changed

    prompts = ["Marie Curie", "Rome and Paris are in the country of Italy"]
    with intervene(lm, {Site(1, "block_out"): at_second}):
        assert lm.generate(prompts, 6) == [lm.generate([prompt], 6)[0] for prompt in prompts]


# Nothing stays behind -------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """As a framework ends a script."""


@pytest.mark.parametrize("error", [ValueError, Stopped])
def test_hooks_are_gone_after_an_exception_in_the_forward(lm: ModelAdapter, error: type[BaseException]):
    def fail(value: torch.Tensor) -> torch.Tensor:
        raise error("no")

    batch = lm.encode(PROMPTS)
    before = lm.logits(batch)
    sites = [Site(1, part) for part in PARTS]
    with pytest.raises(error, match="no"), capture(lm, sites), intervene(lm, {Site(1, "mlp"): fail}):
        lm.forward(batch)
    assert lm.hook_count() == 0
    assert lm.capture_limits == []
    assert torch.equal(lm.logits(batch), before)
    with pytest.raises(error, match="no"), intervene(lm, {Site(1, "mlp"): fail}):
        lm.generate(PROMPTS)
    assert (lm.hook_count(), lm.past) == (0, 0)


def test_hooks_are_gone_after_an_exception_while_placing_them(lm: ModelAdapter):
    good, bad = Site(0, "mlp"), Site(99, "mlp")
    with pytest.raises(Exception, match="no layer 99"), capture(lm, [good, bad]):
        pytest.fail("the block must not be entered")
    with pytest.raises(Exception, match="no layer 99"), intervene(lm, {good: torch.clone, bad: torch.clone}):
        pytest.fail("the block must not be entered")
    with (
        pytest.raises(ValueError, match="captured, not replaced"),
        intervene(lm, {good: torch.clone, Site(0, "pattern"): torch.clone}),
    ):
        pytest.fail("the block must not be entered")
    assert lm.hook_count() == 0
    assert lm.capture_limits == []


def test_a_wrong_shape_names_the_site(lm: ModelAdapter):
    for fn in (lambda value: value[:, :1], lambda value: None):
        with pytest.raises(ValueError, match="part='attn'"), intervene(lm, {Site(0, "attn"): fn}):
            lm.forward(lm.encode(PROMPTS))


def test_wrong_sites_are_refused():
    with pytest.raises(ValueError, match="block_in"):
        Site(0, "residual")


def test_capture_needs_a_site(lm: ModelAdapter):
    with pytest.raises(ValueError, match="at least one"), capture(lm, []):
        pass


def test_another_dtype_is_cast_back(lm: ModelAdapter):
    batch = lm.encode(PROMPTS)
    with intervene(lm, {Site(0, "mlp"): lambda value: value.double()}):
        assert lm.logits(batch).dtype == torch.float32


def test_hooks_that_the_library_keeps_for_itself_do_not_count(lm: ModelAdapter):
    lm.model(lm.encode(PROMPTS[:1]).ids, output_hidden_states=True)
    assert lm.hook_count() == 0


def test_a_left_hook_is_counted(lm: ModelAdapter):
    handles = [
        lm.mlp(1).register_forward_hook(lambda *args: None),
        lm.block(0).register_full_backward_hook(lambda *args: None),
    ]
    assert lm.hook_count() == 2
    for handle in handles:
        handle.remove()
