from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import torch

from mega_core.attribution import VIEWS, frozen, heads, look_at, read_view, recording
from mega_core.attribution.recording import Recording
from mega_core.changes import PromptPrefix
from mega_core.events import silent
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture, intervene
from mega_core.records import EditRequest
from tests.reference import query_reference
from tests.reference.query_reference import Prompt

FRANCE = EditRequest("France", "The capital of {} is", "Rome", "Paris")
TOWER = EditRequest("Eiffel Tower", "{} is in the city of", "London", "Paris")
SHORT = EditRequest("Italy", "{}", "Tokyo")
REQUESTS = (FRANCE, TOWER, SHORT)


def look(lm: ModelAdapter, requests: Sequence[EditRequest] = REQUESTS, view: str = "heads") -> dict[str, pd.DataFrame]:
    (found,) = look_at(lm, [read_view(view)], requests, "before", silent).values()
    return found


def record(lm: ModelAdapter, requests: Sequence[EditRequest] = REQUESTS) -> Recording:
    return recording.record(lm, requests, heads.READS)


def plain(lm: ModelAdapter, request: EditRequest) -> Prompt:
    """The prompt alone, as the reference reads it."""
    names = ("block_in", "resid_mid", "block_out", "pattern", "value", "mlp_down_in")
    with torch.no_grad(), capture(lm, [Site(n, name) for n in range(lm.n_layers) for name in names]) as got:
        lm.forward(lm.encode([request.prompt]))

    def part(layer: int, name: str) -> np.ndarray:
        return got[Site(layer, name)][0].double().numpy()

    layers = range(lm.n_layers)
    norm = lm.final_norm
    beta = getattr(norm, "bias", None)
    value = [part(n, "value").reshape(-1, lm.n_kv_heads, lm.head_dim) for n in layers]
    w_o = [lm.read_weight(n, "attn_out").T.double().numpy() for n in layers]
    return Prompt(
        stream=np.stack([part(0, "block_in"), *(part(n, x) for n in layers for x in ("resid_mid", "block_out"))]),
        pattern=np.stack([part(n, "pattern") for n in layers]),
        value=np.stack(value),
        neurons=np.stack([part(n, "mlp_down_in") for n in layers]),
        w_o=np.stack([w.reshape(lm.n_heads, lm.head_dim, lm.d_model) for w in w_o]),
        w_down=np.stack([lm.read_weight(n, "mlp_down").T.double().numpy() for n in layers]),
        gain=norm.weight.detach().double().numpy(),
        beta=np.zeros(lm.d_model) if beta is None else beta.detach().double().numpy(),
        eps=norm.eps if hasattr(norm, "eps") else norm.variance_epsilon,
        centre=lm.spec.norm == "layernorm",
        head=lm.head_weight.double().numpy(),
        bias=np.zeros(lm.vocab_size) if lm.head_bias is None else lm.head_bias.double().numpy(),
    )


def test_the_heads_and_the_bias_are_what_attention_writes(lm: ModelAdapter) -> None:
    seen = record(lm)
    vectors = heads.head_vectors(seen)
    for layer in range(lm.n_layers):
        torch.testing.assert_close(vectors[layer].sum(0), seen.written(layer, "attn"), atol=1e-5, rtol=0)
        bias = lm.bias(layer, "attn_out")
        rest = torch.zeros(lm.d_model) if bias is None else bias
        torch.testing.assert_close(vectors[layer, -1], rest.expand(len(REQUESTS), -1), atol=1e-5, rtol=0)


def test_the_positions_of_a_head_are_what_it_writes(lm: ModelAdapter) -> None:
    seen = record(lm)
    vectors = heads.head_vectors(seen)
    every = [(layer, head) for layer in range(lm.n_layers) for head in range(lm.n_heads)]
    for i in range(len(REQUESTS)):
        parts, attention = heads.source_vectors(seen, i, every)
        assert parts.shape[1] == seen.length(i) + 1
        torch.testing.assert_close(parts.sum(1), vectors[:, :-1, i].flatten(0, 1), atol=1e-5, rtol=0)
        torch.testing.assert_close(parts[:, -1], torch.zeros_like(parts[:, -1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(attention.sum(1), torch.ones(len(every)), atol=1e-5, rtol=0)


def test_every_score_is_the_definitions(lm: ModelAdapter) -> None:
    found = look(lm, view="heads?heads=2")
    scores = found["head_scores"].set_index(["case", "candidate", "layer", "head"])["contribution"]
    assert len(scores) == 5 * lm.n_layers * (lm.n_heads + 1)  # five candidates: SHORT has no true object
    sources = found["head_sources"]
    for case, (request, ids) in enumerate(zip(REQUESTS, record(lm).candidates, strict=True)):
        prompt = plain(lm, request)
        for candidate, w in ids.items():
            expected = query_reference.head_scores(prompt, w)
            for place, value in expected.items():
                assert scores[case, candidate, *place] == pytest.approx(value, abs=1e-4)
            mine = sources[(sources["case"] == case) & (sources["candidate"] == candidate)]
            for (layer, head), rows in mine.groupby(["layer", "head"]):
                rows = rows.set_index("position").drop(index=heads.REST).sort_index()
                by_position = query_reference.position_scores(prompt, layer, head, w)
                np.testing.assert_allclose(rows["contribution"], by_position, atol=1e-4)
                np.testing.assert_allclose(rows["attention"], prompt.pattern[layer, head, -1], atol=1e-5)


def test_the_strongest_heads_of_either_candidate_are_split(tiny_lm) -> None:
    lm = tiny_lm("qwen2")
    found = look(lm, view="heads?heads=3")
    scores, sources = found["head_scores"], found["head_sources"]
    for case, request in enumerate(REQUESTS):
        mine = scores[(scores["case"] == case) & (scores["head"] >= 0)]
        size = mine.assign(size=mine["contribution"].abs()).groupby(["layer", "head"])["size"].max()
        split = sources[sources["case"] == case]
        assert set(split.groupby(["layer", "head"]).groups) == set(size.nlargest(3).index)
        one = split[split["candidate"] == "new"].groupby(["layer", "head"])["token"].agg("".join)
        assert set(one) == {request.prompt + heads.IN_FRONT}


def test_slices_groups_and_batches_change_nothing(lm: ModelAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = look(lm)
    monkeypatch.setattr(frozen, "LOGITS_AT_ONCE", 1000)
    monkeypatch.setattr(recording, "CAPTURE_BYTES", 1)
    for name, frame in look(lm).items():
        values = ["contribution", "attention"] if name == "head_sources" else ["contribution"]
        keys = ["case", "layer", "head", "candidate", *(["position"] if name == "head_sources" else [])]
        both = [f.sort_values(keys, ignore_index=True) for f in (frame, whole[name])]
        np.testing.assert_allclose(both[0][values], both[1][values], atol=1e-5)
        assert both[0].drop(columns=values).equals(both[1].drop(columns=values))


def test_steering_shows_as_what_no_head_wrote(lm: ModelAdapter) -> None:
    delta = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0))
    before = heads.head_vectors(record(lm))
    plain_scores = look(lm)["head_scores"]
    with intervene(lm, {Site(1, "attn"): lambda attn: attn + delta}):
        seen = record(lm)
        after = heads.head_vectors(seen)
        scores = look(lm)["head_scores"]
    torch.testing.assert_close(after[1, -1] - before[1, -1], delta.expand_as(after[1, -1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(after[1, :-1], before[1, :-1])
    rows = scores[(scores["layer"] == 1) & (scores["head"] == heads.REST) & (scores["case"] == 0)]
    base = seen.base(1, "attn")
    path = seen.lens.log_probs(torch.stack((base, base + after[1, -1])), seen.ids())[:, 0]
    np.testing.assert_allclose(rows["contribution"], path[1] - path[0], atol=1e-5)
    same = (scores["layer"] == 0) & (scores["case"] == 0)  # scores there move with the frozen norm alone
    assert not np.allclose(scores[same]["contribution"], plain_scores[same]["contribution"], atol=1e-6)


def test_a_text_in_front_is_a_position_of_its_own(lm: ModelAdapter) -> None:
    with PromptPrefix("The capital of France is Rome.\n").applied(lm):
        seen = record(lm, [FRANCE])
        vectors = heads.head_vectors(seen)
        sources = look(lm, [FRANCE])["head_sources"]
        every = [(layer, head) for layer in range(lm.n_layers) for head in range(lm.n_heads)]
        parts, attention = heads.source_vectors(seen, 0, every)
    torch.testing.assert_close(parts.sum(1), vectors[:, :-1, 0].flatten(0, 1), atol=1e-5, rtol=0)
    rest = sources[sources["position"] == heads.REST]
    assert set(rest["token"]) == {heads.IN_FRONT}
    assert (rest["attention"] > 0.05).any()
    assert (rest["contribution"].abs() > 1e-3).any()
    shared = sources[sources["candidate"] == "new"].groupby(["layer", "head"])["attention"].sum()
    np.testing.assert_allclose(shared, 1, atol=1e-5)
    assert (parts[:, -1].norm(dim=-1) > 1e-2).any()
    assert attention.shape == parts.shape[:2]


def test_the_view_reads_what_it_says() -> None:
    assert VIEWS["heads"].reads == heads.READS
