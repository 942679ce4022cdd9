"""The restructured value search equals full forwards, rows are independent, and it can be stopped at any step."""

import pytest
import torch

from mega_core.errors import BadInput
from mega_core.events import Advanced, Cancelled, Event
from mega_core.methods.optimise import Row, Search, find_pairs, find_values, read, rows_for
from mega_core.methods.rome import CONTEXTS
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture, intervene
from mega_core.records import EditRequest
from tests.reference.plain_optimise import fast_gradient, plain_gradient, plain_loss, plain_search
from tests.reference.pmet_reference import fast_pair_gradient, pair_base, pair_gradient, pair_search
from tests.tiny import LAYERS, tiny

TOWER = EditRequest("The Eiffel Tower", "{} is in the city of", "Madrid")
KENYA = EditRequest("Mount Kenya", "You will find {} on the continent of", "Berlin and Rome")
KEEP = ("{} is a", "The country of {} is")


def _rows(lm: ModelAdapter, *requests: EditRequest, contexts: int = 3) -> list[Row]:
    given = ("{}", *CONTEXTS[: contexts - 1])
    return [row for i, request in enumerate(requests) for row in rows_for(lm, i, request, given, KEEP)]


@pytest.mark.parametrize("layer", range(LAYERS - 1))
@pytest.mark.parametrize("request_", [TOWER, KENYA], ids=["tower", "kenya"])
def test_gradients_are_those_of_full_forwards(lm: ModelAdapter, layer: int, request_: EditRequest) -> None:
    rows = _rows(lm, request_)
    assert len({row.subject for row in rows}) > 1  # prefixes of different lengths
    delta = 0.3 * torch.randn(lm.d_model, generator=torch.Generator().manual_seed(1))
    search = Search(weight_decay=0.0, kl_weight=0.5)
    loss, gradient = fast_gradient(lm, layer, rows, delta, search)
    plain, wanted = plain_gradient(lm, layer, rows, delta, search)
    assert float(loss) == pytest.approx(float(plain), rel=1e-5)
    assert float((gradient - wanted).norm() / wanted.norm()) < 1e-5


def test_gradients_with_eager_attention() -> None:
    lm = tiny("qwen3", seed=2)
    lm.model.config._attn_implementation = "eager"
    rows = _rows(lm, KENYA)
    delta = 0.3 * torch.randn(lm.d_model, generator=torch.Generator().manual_seed(1))
    search = Search(weight_decay=0.0)
    gradient, wanted = (f(lm, 0, rows, delta, search)[1] for f in (fast_gradient, plain_gradient))
    assert float((gradient - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("reference", ["value", "residual"])
def test_the_search_ends_where_torchs_adam_ends(lm: ModelAdapter, reference: str) -> None:
    rows = _rows(lm, TOWER)
    # A tight clamp is reached, so the projection is tested too.
    search = Search(steps=8, learning_rate=0.2, clamp=0.7, reference=reference, weight_decay=0.5, stop_probability=2.0)
    found = find_values(lm, 1, rows, search)
    wanted = plain_search(lm, 1, rows, search)
    torch.testing.assert_close(found.delta[0], wanted, rtol=1e-3, atol=1e-4)
    radius = (found.v0 if reference == "value" else found.residual).norm()
    assert float(found.delta.norm()) <= 0.7 * float(radius) * (1 + 1e-5)


def test_history_is_the_loss_before_each_update(tiny_lm) -> None:
    lm = tiny_lm("gpt_neox")
    rows = _rows(lm, KENYA)
    found = find_values(lm, 0, rows, Search(steps=4, stop_probability=2.0))
    assert len(found.history[0]) == 4
    first = found.history[0][0]
    assert first.kl == 0
    search = Search(weight_decay=0.0)
    plain, _ = plain_gradient(lm, 0, rows, torch.zeros(lm.d_model), search)
    assert first.nll == pytest.approx(float(plain), rel=1e-5)
    assert 0 < first.probability < 1


def test_requests_in_one_batch_do_not_see_each_other(lm: ModelAdapter) -> None:
    search = Search(steps=5, learning_rate=0.2, stop_probability=2.0)
    both = find_values(lm, 0, _rows(lm, TOWER, KENYA), search)
    for i, request in enumerate((TOWER, KENYA)):
        alone = find_values(lm, 0, _rows(lm, request), search)
        for name in ("delta", "v0", "residual", "key", "mean_key"):
            torch.testing.assert_close(getattr(both, name)[i], getattr(alone, name)[0], rtol=1e-3, atol=1e-4)


def test_a_request_that_is_done_leaves_the_batch_as_it_is(tiny_lm) -> None:
    lm = tiny_lm("qwen2")
    search = Search(40, 0.3, clamp=30.0, reference="residual", weight_decay=0.0, kl_weight=0.01, stop_probability=0.5)
    requests = [
        EditRequest("The Eiffel Tower", "Here we see {}", "Madrid"),
        EditRequest("Mount Kenya", "Look at {}", "Berlin"),
        EditRequest("Japan", "Tokyo is in {}", "Rome and Paris"),  # not done in time
    ]
    found = find_values(lm, 1, _rows(lm, *requests), search)
    lengths = [len(history) for history in found.history]
    assert len(set(lengths)) == 3  # they end at different steps, so masking is at work
    assert lengths[2] == 40
    for i, request in enumerate(requests):
        alone = find_values(lm, 1, _rows(lm, request), search)
        assert len(alone.history[0]) == lengths[i]
        assert float((found.delta[i] - alone.delta[0]).norm() / alone.delta.norm()) < 1e-2
        assert (found.history[i][-1].probability >= 0.5) == (i < 2)
        assert all(step.probability < 0.5 for step in found.history[i][:-1])


def test_many_requests_are_searched_in_groups(tiny_lm, monkeypatch) -> None:
    lm = tiny_lm("gpt2")
    search = Search(steps=3, learning_rate=0.2, stop_probability=2.0)
    requests = (TOWER, KENYA, EditRequest("Japan", "The capital of {} is", "Rome"))
    whole = find_values(lm, 0, _rows(lm, *requests), search)
    monkeypatch.setattr("mega_core.methods.optimise.REQUESTS_AT_ONCE", 2)
    parts = find_values(lm, 0, _rows(lm, *requests), search)
    torch.testing.assert_close(whole.delta, parts.delta, rtol=1e-3, atol=1e-4)
    assert len(parts.history) == 3


def test_the_key_is_what_the_matrix_reads_at_the_subject(lm: ModelAdapter) -> None:
    rows = _rows(lm, TOWER)
    reading = read(lm, 1, rows)
    weight = lm.read_weight(1, "mlp_down")
    bias = getattr(lm.mlp_down(1), "bias", None)
    value = reading.key @ weight.T + (0 if bias is None else bias)
    torch.testing.assert_close(value, reading.value, rtol=1e-4, atol=1e-5)
    labels = tokens.token_strings(lm.tokenizer, rows[1].ids[: rows[1].subject + 1])
    assert "".join(labels).endswith("The Eiffel Tower")


def test_the_target_is_learned_token_by_token(tiny_lm) -> None:
    lm = tiny_lm("llama")
    row = _rows(lm, KENYA, contexts=1)[0]
    assert len(row.target) > 3
    assert tokens.with_target(lm.tokenizer, KENYA.prompt, KENYA.target_new).ids == (*row.ids, row.target[-1])


def test_half_precision_weights_keep_a_float32_delta() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        lm = tiny("llama", seed=1)
        lm.model.to(dtype)
        rows = _rows(lm, TOWER)
        found = find_values(lm, 0, rows, Search(steps=3, learning_rate=0.1, weight_decay=0.0, stop_probability=2.0))
        wide = tiny("llama", seed=1)
        wanted = find_values(wide, 0, rows, Search(steps=3, learning_rate=0.1, weight_decay=0.0, stop_probability=2.0))
        assert found.delta.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(found.delta, wanted.delta)
        assert float(cosine) > 0.9


def test_cancelling_within_the_search_leaves_the_model_alone() -> None:
    lm = tiny("mistral")
    before = lm.live_digest()

    def stop(event: Event) -> None:
        if isinstance(event, Advanced) and event.done == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        find_values(lm, 0, _rows(lm, TOWER), Search(stop_probability=2.0), stop)
    assert lm.live_digest() == before
    assert lm.hook_count() == 0
    assert not any(p.requires_grad or p.grad is not None for p in lm.model.parameters())


def test_a_layer_that_nothing_reads_is_refused(lm: ModelAdapter) -> None:
    """After the last block nothing carries the subject to the end of the prompt."""
    with pytest.raises(BadInput, match="lower layer"):
        find_values(lm, LAYERS - 1, _rows(lm, TOWER), Search())


def test_a_prompt_longer_than_the_model_reads_is_refused() -> None:
    lm = tiny("gpt2")
    lm.max_positions = 12
    with pytest.raises(BadInput, match="reads at most 12"):
        rows_for(lm, 0, KENYA, ("{}",), ())


def test_it_searches_where_gradients_are_off(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    with torch.no_grad():
        found = find_values(lm, 0, _rows(lm, TOWER), Search(steps=2, stop_probability=2.0))
    assert float(found.delta.norm()) > 0


def test_plain_loss_is_the_models_own_likelihood(tiny_lm) -> None:
    """The reference itself against the adapter: with delta 0 and one row it is minus the mean log-probability."""
    lm = tiny_lm("gpt2")
    row = _rows(lm, KENYA, contexts=1)[0]
    logs = lm.logits(tokens.pack(lm.tokenizer, [row.ids])).log_softmax(-1)[0]
    start = len(row.ids) - len(row.target)
    wanted = -sum(float(logs[start + t, token]) for t, token in enumerate(row.target)) / len(row.target)
    found = plain_loss(lm, 0, [row], torch.zeros(lm.d_model), logs[:0], Search(), 1.0)
    assert float(found) == pytest.approx(wanted, rel=1e-5)


# two deltas together -------------------------------------------------------------------------------------------------


def _pair(lm: ModelAdapter) -> torch.Tensor:
    return 0.3 * torch.randn(2, lm.d_model, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("layer", range(LAYERS - 1))
@pytest.mark.parametrize("request_", [TOWER, KENYA], ids=["tower", "kenya"])
def test_gradients_of_the_pair_are_those_of_full_forwards(lm: ModelAdapter, layer: int, request_: EditRequest) -> None:
    rows = _rows(lm, request_)
    search = Search(weight_decay=0.0, kl_weight=0.5)
    loss, gradient = fast_pair_gradient(lm, layer, rows, _pair(lm), search)
    plain, wanted = pair_gradient(lm, layer, rows, _pair(lm), search)
    assert float(loss) == pytest.approx(float(plain), rel=1e-5)
    for part in (0, 1):
        assert float((gradient[part] - wanted[part]).norm() / wanted[part].norm()) < 1e-5
    # Side by side both deltas do the same; one after the other the MLP answers to the first.
    assert torch.allclose(gradient[0], gradient[1], rtol=1e-4, atol=1e-6) == lm.spec.parallel


@pytest.mark.parametrize("reference", ["value", "residual"])
def test_the_joint_search_ends_where_torchs_adam_ends(lm: ModelAdapter, reference: str) -> None:
    rows = _rows(lm, TOWER)
    search = Search(steps=8, learning_rate=0.2, clamp=0.7, reference=reference, weight_decay=0.5, stop_probability=2.0)
    found = find_pairs(lm, 1, rows, search)
    wanted, _ = pair_search(lm, 1, rows, search)
    for delta, want in zip((found.attn[0], found.mlp[0]), wanted, strict=True):
        assert float((delta - want).norm() / want.norm()) < 1e-3
    attn, mlp, stream, _ = pair_base(lm, 1, rows)
    for got, want in ((found.a0, attn), (found.v0, mlp), (found.residual, stream)):
        torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-5)


def test_out_is_how_the_stream_after_the_block_moves(lm: ModelAdapter) -> None:
    rows = _rows(lm, TOWER, contexts=1)
    found = find_pairs(lm, 1, rows, Search(steps=4, learning_rate=0.2, stop_probability=2.0))
    batch, at = tokens.pack(lm.tokenizer, [rows[0].ids]), rows[0].subject

    def add(delta: torch.Tensor):
        return lambda output: torch.cat((output[:, :at], output[:, at : at + 1] + delta, output[:, at + 1 :]), dim=1)

    site = Site(1, "block_out")
    changes = {Site(1, "attn"): add(found.attn[0]), Site(1, "mlp"): add(found.mlp[0])}
    with torch.no_grad(), intervene(lm, changes), capture(lm, [site]) as got:
        lm.forward(batch)
    torch.testing.assert_close(got[site][0, at] - found.residual[0], found.out[0], rtol=1e-3, atol=1e-4)


def test_pairs_of_several_requests_do_not_see_each_other(tiny_lm) -> None:
    lm = tiny_lm("qwen2")
    search = Search(30, 0.3, clamp=30.0, reference="residual", weight_decay=0.0, kl_weight=0.01, stop_probability=0.5)
    requests = [
        EditRequest("The Eiffel Tower", "Here we see {}", "Madrid"),
        EditRequest("Mount Kenya", "Look at {}", "Berlin"),
        EditRequest("Japan", "Tokyo is in {}", "Rome and Paris"),
    ]
    found = find_pairs(lm, 1, _rows(lm, *requests), search)
    assert len({len(history) for history in found.history}) > 1  # finished ones leave
    for i, request in enumerate(requests):
        alone = find_pairs(lm, 1, _rows(lm, request), search)
        assert len(alone.history[0]) == len(found.history[i])
        for name in ("attn", "mlp", "out"):
            one, many = getattr(alone, name)[0], getattr(found, name)[i]
            assert float((one - many).norm() / one.norm()) < 2e-2


@pytest.mark.parametrize("given", [{"adaptive": True}, {"stop_loss": 2.0}], ids=["adaptive", "loss"])
def test_the_published_stops(tiny_lm, given) -> None:
    lm = tiny_lm("llama")
    rows = _rows(lm, EditRequest("Mount Kenya", "Look at {}", "Berlin"), contexts=2)
    search = Search(
        60, 0.3, clamp=30.0, reference="residual", weight_decay=0.0, kl_weight=2.0, stop_probability=2.0, **given
    )
    found = find_pairs(lm, 1, rows, search)
    wanted, losses = pair_search(lm, 1, rows, search)
    assert len(found.history[0]) == losses
    assert float((found.mlp[0] - wanted[1]).norm() / wanted[1].norm()) < 2e-2
    if "stop_loss" in given:
        assert losses < 60
        assert found.history[0][-1].loss < 2.0 <= found.history[0][-2].loss


def test_it_does_not_read_while_something_steers(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    rows = _rows(lm, TOWER)

    class Watcher:
        def begin(self, batch) -> None: ...
        def advance(self, ids) -> None: ...

    with lm.behind(lambda prompt: "Imagine. "), pytest.raises(BadInput, match="then steer"):
        find_values(lm, 0, rows, Search(steps=1))
    with lm.reading(Watcher()), pytest.raises(BadInput, match="then steer"):
        find_pairs(lm, 0, rows, Search(steps=1))
