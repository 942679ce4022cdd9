from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, pairwise

import numpy as np
import pandas as pd
import pytest
import torch

from mega_core.attribution import VIEWS, look_at, query, read_view, recording
from mega_core.attribution.query import AttentionNeuron, ValueNeuron
from mega_core.attribution.recording import Recording
from mega_core.attribution.settings import QueryParams
from mega_core.changes import PromptPrefix
from mega_core.errors import BadInput
from mega_core.events import Note, silent
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture, intervene
from mega_core.records import EditRequest
from tests.attribution.test_heads import FRANCE, REQUESTS, plain
from tests.reference import query_reference

FEW = "query?values=5&top=20&value_top=10"


def look(
    lm: ModelAdapter, requests: Sequence[EditRequest] = REQUESTS, view: str = FEW, report=silent
) -> dict[str, pd.DataFrame]:
    (found,) = look_at(lm, [read_view(view)], requests, "before", report).values()
    return found


def record(lm: ModelAdapter, requests: Sequence[EditRequest] = REQUESTS) -> Recording:
    return recording.record(lm, requests, query.READS)


def some_neurons(lm: ModelAdapter) -> tuple[list[ValueNeuron], list[AttentionNeuron]]:
    """One of each in every layer; of the last head, which shares its values where heads do."""
    layers = range(lm.n_layers)
    ffn = [ValueNeuron(layer, 7 * layer + 3, 1.0 + layer) for layer in layers]
    return ffn, [AttentionNeuron(layer, lm.n_heads - 1 - layer % 2, layer + 1, layer, 2.0 + layer) for layer in layers]


def test_shares_add_up_to_what_the_neuron_read(lm: ModelAdapter) -> None:
    seen, params = record(lm), QueryParams()
    ffn, attn = some_neurons(lm)
    for i in range(2):
        at_last, at_source = query.ffn_shares(seen, i, ffn, params), query.attention_shares(seen, i, attn, params)
        for found, neurons in ((at_last, ffn), (at_source, attn)):
            assert found.kept.all()
            torch.testing.assert_close(found.shares.sum(0), torch.ones(len(neurons), dtype=torch.float64))
            assert float(found.scores(neurons).sum()) == pytest.approx(sum(one.score for one in neurons))
        for n, one in enumerate(attn):
            stream = seen.part(one.layer, "block_in")[i, one.position].double()
            assert float(at_source.totals[n]) == pytest.approx(float(stream @ at_source.keys[n]), abs=1e-5)
            assert not at_source.shares[2 * one.layer + 1 :, n].any()
        for n, one in enumerate(ffn):
            # A parallel block's MLP reads what the block reads.
            end = 2 * one.layer + (1 if lm.spec.parallel else 2)
            stream = seen.states[end - 1, i].double()
            assert float(at_last.totals[n]) == pytest.approx(float(stream @ at_last.keys[n]), abs=1e-5)
            assert not at_last.shares[end:, n].any()


def test_a_value_key_is_what_the_value_grows_along(lm: ModelAdapter) -> None:
    """The value is key . h / sigma + constant: over the positions of a prompt, so read off two, it fits all others."""
    seen = record(lm, [FRANCE])
    eps = {name: getattr(lm.attn_norm(0), name, None) for name in ("eps", "variance_epsilon")}
    for layer in range(lm.n_layers):
        stream = seen.part(layer, "block_in")[0].double()
        centred = stream - stream.mean(-1, keepdim=True) if lm.spec.norm == "layernorm" else stream
        sigma = (centred.square().mean(-1) + float(eps["eps"] or eps["variance_epsilon"])).sqrt()
        heads, dims = list(range(lm.n_heads)), [layer + 2] * lm.n_heads
        keys = query.value_keys(lm, layer, heads, dims)
        values = seen.part(layer, "value")[0].double().unflatten(-1, (lm.n_kv_heads, lm.head_dim))
        for head, key in zip(heads, keys, strict=True):
            constant = values[:, lm.kv_head(head), layer + 2] - stream @ key / sigma
            torch.testing.assert_close(constant, constant[:1].expand_as(constant), atol=1e-5, rtol=0)


def test_the_linearised_key_is_the_activations_derivative(lm: ModelAdapter) -> None:
    """By autograd through the module, down to the stream before the norm with the norm's scale held fixed."""
    seen = record(lm)
    neurons = [0, 5, lm.d_mlp - 1]
    for i in range(2):
        for layer in range(lm.n_layers):
            norm, stream = lm.mlp_norm(layer), seen.base(layer, "attn" if lm.spec.parallel else "ffn")[i]
            x = norm(stream[None, None]).detach().requires_grad_()
            got: list[torch.Tensor] = []
            spy = intervene(lm, {Site(layer, "mlp_down_in"): lambda value, got=got: got.append(value) or value})
            with torch.enable_grad(), spy:
                lm.mlp(layer)(x)
            slopes = [torch.autograd.grad(got[0][0, 0, n], x, retain_graph=True)[0][0, 0] for n in neurons]
            expected = torch.stack(slopes).double() * norm.weight.detach().double()
            if lm.spec.norm == "layernorm":
                expected = expected - expected.mean(-1, keepdim=True)
            keys = query.mlp_keys(seen, i, layer, neurons, QueryParams())
            if not lm.spec.gated:  # one factor per neuron cancels in its shares
                keys, expected = (k / k[:, :1] for k in (keys, expected))
            torch.testing.assert_close(keys, expected, atol=1e-4, rtol=1e-4)


def test_every_score_is_the_definitions(lm: ModelAdapter) -> None:
    found = look(lm)
    seen = record(lm)
    layers = found["query_layers"].set_index(["case", "candidate", "values", "layer", "module"])["score"]
    names = [(-1, "embedding"), *((layer, m) for layer in range(lm.n_layers) for m in ("attn", "ffn"))]
    assert len(layers) == 5 * 2 * len(names)
    for case, request in enumerate(REQUESTS[:2]):
        prompt = plain(lm, request)
        for candidate, w in seen.candidates[case].items():
            reads = []
            known = query_reference.ffn_values(prompt, w, 10)
            for layer, n, imp in known[:5]:
                (key,) = query.mlp_keys(seen, case, layer, [n], QueryParams()).numpy()
                reads.append((2 * layer + (1 if lm.spec.parallel else 2), -1, key, imp))
            expected = query_reference.query_layers(prompt, reads)
            mine = [layers[case, candidate, "ffn", *name] for name in names]
            np.testing.assert_allclose(mine, expected, atol=1e-4)
            reads, sources = [], []
            for layer, head, dim, p, imp in query_reference.attention_values(prompt, w, 5):
                (key,) = query.value_keys(lm, layer, [head], [dim]).numpy()
                reads.append((2 * layer + 1, p, key, imp))
                sources.append((layer, p, key, imp))
            expected = query_reference.query_layers(prompt, reads)
            mine = [layers[case, candidate, "attn", *name] for name in names]
            np.testing.assert_allclose(mine, expected, atol=1e-4)
            q = query_reference.query_neurons(prompt, sources)
            rows = found["query_neurons"]
            rows = rows[(rows["case"] == case) & (rows["candidate"] == candidate)]
            best = np.sort(q[q > 0])[::-1][:20]
            np.testing.assert_allclose(rows["score"], best, atol=1e-4)
            assert rows["rank"].tolist() == list(range(1, len(best) + 1))
            for row in rows.itertuples():
                assert row.score == pytest.approx(q[row.layer, row.neuron], abs=1e-4)
                assert row.coefficient == pytest.approx(prompt.neurons[row.layer, row.position, row.neuron], abs=1e-5)
                alone = [query_reference.query_neurons(prompt, [one])[row.layer, row.neuron] for one in sources]
                assert sources[np.abs(alone).argmax()][1] == row.position
                assert row.is_value == any((row.layer, row.neuron) == one[:2] for one in known)


def test_a_query_neurons_write_has_its_share_of_the_value(tiny_lm) -> None:
    """Doing it: without that neuron's write, and the norm's scale kept, the value changes by the share Q / Imp."""
    lm = tiny_lm("llama")
    seen = record(lm, [FRANCE])
    attn = [AttentionNeuron(2, 3, 4, 1, 1.0)]
    found = query.attention_shares(seen, 0, attn, QueryParams())
    layer, n = 0, 11
    q, positions = query.query_scores(seen, 0, layer, attn, found, lm.read_weight(layer, "mlp_down").float())
    write = seen.part(layer, "mlp_down_in")[0, 1, n] * lm.read_weight(layer, "mlp_down")[:, n]
    stream = seen.part(2, "block_in")[0, 1]
    scale = (stream.square().mean() + lm.attn_norm(2).variance_epsilon).rsqrt()
    row = lm.value_weight(2)[lm.kv_head(3), 4] * lm.attn_norm(2).weight
    with_it, without = row @ stream * scale, row @ (stream - write) * scale
    assert float(q[n]) == pytest.approx(float((with_it - without) / with_it), abs=1e-5)
    assert int(positions[n]) == 1


def test_groups_and_batches_change_nothing(lm: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = look(lm)
    monkeypatch.setattr(recording, "CAPTURE_BYTES", 1)
    for name, frame in look(lm).items():
        values = ["score", "coefficient"] if name == "query_neurons" else ["score"]
        keys = [c for c in frame.columns if c not in values]
        both = [f.sort_values(keys, ignore_index=True) for f in (frame, whole[name])]
        assert both[0][keys].equals(both[1][keys])
        np.testing.assert_allclose(both[0][values], both[1][values], atol=1e-4)


def test_keys_can_be_read_in_other_ways(lm: ModelAdapter) -> None:
    seen = record(lm, [FRANCE])
    gain = lm.mlp_norm(1).weight.detach().double()

    def key(**asked) -> torch.Tensor:
        return query.mlp_keys(seen, 0, 1, [9], QueryParams(**asked))[0]

    up = lm.mlp_in(1)[9].double() * gain
    down = lm.read_weight(1, "mlp_down")[:, 9].double() * gain
    torch.testing.assert_close(key(key="up", centre=False), up)
    torch.testing.assert_close(key(key="repo", centre=False), down if lm.spec.gated else up)
    if lm.spec.norm == "layernorm":
        torch.testing.assert_close(key(key="up"), up - up.mean())
    if lm.spec.gated:
        torch.testing.assert_close(key(key="gate"), lm.mlp_in(1, "gate")[9].double() * gain)
    else:
        with pytest.raises(BadInput, match="gate"):
            key(key="gate")


def test_shares_that_cancel_are_passed_over_and_said(tiny_lm, monkeypatch: pytest.MonkeyPatch) -> None:
    dots = torch.tensor([[1.0, 3.0], [1.0, -3.0], [2.0, 1e-9], [5.0, 5.0]], dtype=torch.float64)
    found = query._shares(dots, [3, 3], torch.zeros(2, 4))
    assert found.kept.tolist() == [True, False]
    assert found.shares.tolist() == [[0.25, 0], [0.25, 0], [0.5, 0], [0, 0]]
    said: list[object] = []
    monkeypatch.setattr(query, "SMALLEST", 2.0)  # nothing is that far from cancelling
    frames = look(tiny_lm("gpt2"), report=said.append)
    assert [event.text for event in said if isinstance(event, Note)][0].startswith("100% of the value neurons")
    assert not frames["query_layers"]["score"].any()
    assert frames["query_neurons"].empty


@pytest.mark.parametrize("arch", ["gpt2", "gptj", "qwen3"])
def test_whatever_an_edit_adds_belongs_to_the_module_that_it_acts_on(tiny_lm, arch: str) -> None:
    lm = tiny_lm(arch)
    delta = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0))
    for part, component in (("attn", 1), ("mlp", 2)):
        with intervene(lm, {Site(0, part): lambda value: value + 9 * delta}):
            seen = record(lm, [FRANCE])
            look(lm)
        attn = [AttentionNeuron(2, 0, 1, 2, 1.0)]
        found = query.attention_shares(seen, 0, attn, QueryParams())
        with intervene(lm, {Site(0, part): lambda value: value + 9 * delta}), capture(lm, [Site(0, part)]) as got:
            lm.forward(lm.encode([FRANCE.prompt]))
        expected = got[Site(0, part)][0, 2].double() @ found.keys[0] / found.totals[0]
        assert float(found.shares[component, 0]) == pytest.approx(float(expected), abs=1e-4)
    with PromptPrefix("The capital of France is Rome.\n").applied(lm):
        frames = look(lm)
    plain_frames = look(lm)
    assert len(frames["query_layers"]) == len(plain_frames["query_layers"])
    assert not np.allclose(frames["query_layers"]["score"], plain_frames["query_layers"]["score"])


def test_the_highest_come_first_and_as_many_as_asked(tiny_lm) -> None:
    rows = look(tiny_lm("mistral"), view="query?top=7")["query_neurons"]
    for _, group in rows.groupby(["case", "candidate"]):
        assert len(group) <= 7
        assert all(high >= low for high, low in pairwise(group["score"]))
        assert (group["score"] > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["atlas-gpt2", "atlas-qwen3"])
def test_on_a_trained_model_it_finds_what_knows_the_fact(name: str) -> None:
    """The fact's MLPs lead, and without its query neurons the model forgets it; without others it doesn't."""
    from bench.common import open_model
    from mega_core.embedded import examples

    lm = open_model(name)
    requests = list(islice(examples.candidates(seed=11), 8))
    found = look(lm, requests, "query?top=100")
    layers = found["query_layers"]
    sums = layers[(layers["values"] == "attn") & (layers["candidate"] == "true")].groupby(["layer", "module"])["score"]
    assert sums.mean().idxmax() in ((2, "ffn"), (3, "ffn"))  # where these models look facts up
    rows = found["query_neurons"].query("candidate == 'true'")
    chosen = torch.zeros(len(requests), lm.n_layers, lm.d_mlp, dtype=torch.bool)
    chosen[rows["case"].tolist(), rows["layer"].tolist(), rows["neuron"].tolist()] = True
    order = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(0)).argsort(-1)
    others = chosen.gather(-1, order)  # as many in every layer
    batch = lm.encode([request.prompt for request in requests])
    ids = record(lm, requests).ids()[:, 1:]

    def log_p(off: torch.Tensor) -> torch.Tensor:
        zeros = {Site(n, "mlp_down_in"): lambda x, n=n: x.masked_fill(off[:, n, None], 0) for n in range(lm.n_layers)}
        with torch.no_grad(), intervene(lm, zeros):
            return lm.last_logits(batch).log_softmax(-1).gather(-1, ids)[:, 0]

    plain_log_p = log_p(torch.zeros_like(chosen))
    assert float((plain_log_p - log_p(chosen)).mean()) > 1
    assert float((plain_log_p - log_p(others)).mean()) < 0.2


def test_the_view_reads_what_it_says() -> None:
    assert set(VIEWS["query"].reads) == set(query.READS)
