from __future__ import annotations

import numpy as np
import pytest
import torch

from mega_core.attribution import look_at, read_view, recording
from mega_core.changes import PromptPrefix
from mega_core.events import silent
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture, intervene
from mega_core.records import EditRequest

FRANCE = EditRequest("France", "The capital of {} is", "Rome", "Paris")
TOWER = EditRequest("Eiffel Tower", "{} is in the city of", "London", "Paris")
SHORT = EditRequest("Italy", "{}", "Tokyo")
REQUESTS = (FRANCE, TOWER, SHORT)


def look(lm: ModelAdapter, requests=REQUESTS):
    (found,) = look_at(lm, [read_view("residual")], requests, "before", silent).values()
    return found["residual"]


def direction(lm: ModelAdapter, request: EditRequest, candidate: str) -> np.ndarray:
    return lm.head_weight[recording.candidates(lm, request)[candidate]].double().numpy()


def test_each_row_is_the_plain_dot_product_of_a_prompt_alone(lm: ModelAdapter) -> None:
    found = look(lm).set_index(["case", "candidate", "layer", "module"])
    assert len(found) == 5 * (1 + 2 * lm.n_layers)
    sites = {(-1, "embedding"): Site(0, "block_in")}
    sites |= {(layer, "attn"): Site(layer, "attn") for layer in range(lm.n_layers)}
    sites |= {(layer, "ffn"): Site(layer, "mlp") for layer in range(lm.n_layers)}
    last = Site(lm.n_layers - 1, "block_out")
    for case, request in enumerate(REQUESTS):
        with torch.no_grad(), capture(lm, [*sites.values(), last]) as got:
            lm.forward(lm.encode([request.prompt]))
        for candidate in recording.candidates(lm, request):
            w = direction(lm, request, candidate)
            for place, site in sites.items():
                dot = found.loc[(case, candidate, *place), "dot"]
                assert dot == pytest.approx(float(got[site][0, -1].double().numpy() @ w), abs=2e-5)
            rows = found.loc[(case, candidate)]
            assert rows["dot"].sum() == pytest.approx(float(got[last][0, -1].double().numpy() @ w), abs=2e-5)
            for module in ("attn", "ffn"):
                mine = rows.xs(module, level="module")
                np.testing.assert_allclose(mine["cumulative"], mine["dot"].cumsum(), atol=1e-9)


def test_a_batch_is_its_prompts_one_by_one(lm: ModelAdapter) -> None:
    together = look(lm)
    alone = np.concatenate([look(lm, [request])["dot"] for request in REQUESTS])
    np.testing.assert_allclose(together["dot"], alone, atol=2e-5)


def test_what_steering_adds_belongs_to_its_attention(tiny_lm) -> None:
    lm = tiny_lm("llama")
    pushed = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0))
    keys = ["candidate", "layer", "module"]
    before = look(lm, [FRANCE]).set_index(keys)["dot"]
    with intervene(lm, {Site(2, "attn"): lambda attn: attn + pushed}):
        after = look(lm, [FRANCE]).set_index(keys)["dot"]
        final = recording.record(lm, [FRANCE]).states[-1, 0].double().numpy()
    moved = after - before
    for candidate in ("new", "true"):
        w = direction(lm, FRANCE, candidate)
        assert moved[candidate, 2, "attn"] == pytest.approx(float(pushed.double().numpy() @ w), abs=2e-5)
        assert moved[candidate].loc[:1].abs().max() < 1e-6
        assert after[candidate].sum() == pytest.approx(float(final @ w), abs=2e-5)


def test_behind_a_text_the_rows_add_up_too(lm: ModelAdapter) -> None:
    plain = look(lm, [TOWER])
    with PromptPrefix("Tokyo is in the country of Japan. ").applied(lm):
        found = look(lm, [TOWER])
        final = recording.record(lm, [TOWER]).states[-1, 0].double().numpy()
    assert not np.allclose(plain["dot"], found["dot"], atol=1e-3)
    for candidate, rows in found.groupby("candidate"):
        assert rows["dot"].sum() == pytest.approx(float(final @ direction(lm, TOWER, candidate)), abs=2e-5)
