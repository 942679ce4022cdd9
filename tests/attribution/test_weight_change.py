from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mega_core.attribution import weight_change
from mega_core.attribution.weight_change import leading, spectrum
from mega_core.changes import Chain, DenseDelta, MatrixDelta, PromptPrefix, WeightDelta
from mega_core.models.adapter import ModelAdapter


def low(lm: ModelAdapter, layer: int, rank: int, site: str = "mlp_down", seed: int = 0) -> MatrixDelta:
    draw = torch.Generator().manual_seed(seed)
    out, into = lm.read_weight(layer, site).shape
    return MatrixDelta(
        layer, site, torch.randn(out, rank, generator=draw), torch.randn(into, rank, generator=draw), 1.0
    )


def dense(lm: ModelAdapter, layer: int, seed: int = 1) -> DenseDelta:
    shape = lm.read_weight(layer, "mlp_down").shape
    return DenseDelta(layer, "mlp_down", torch.randn(shape, generator=torch.Generator().manual_seed(seed)), 1.0)


def expected(parts, count: int) -> np.ndarray:
    whole = sum(part.update(torch.device("cpu")).double() for part in parts)
    return torch.linalg.svdvals(whole)[:count].numpy()


@pytest.mark.parametrize("kinds", ["low", "low low", "dense", "low dense", "dense dense low"])
def test_it_is_the_dense_decomposition(lm: ModelAdapter, kinds: str) -> None:
    parts = [low(lm, 1, 3, seed=i) if kind == "low" else dense(lm, 1, seed=i) for i, kind in enumerate(kinds.split())]
    change = WeightDelta(tuple(parts))
    found = spectrum(change, lm)
    singular, base = found["singular"].to_numpy(), found["base_singular"].to_numpy()
    np.testing.assert_allclose(singular, expected(parts, len(found)), atol=1e-4)
    np.testing.assert_allclose(base, torch.linalg.svdvals(lm.read_weight(1, "mlp_down"))[: len(found)], atol=1e-4)
    assert (np.diff(singular) <= 0).all()
    assert (np.diff(base) <= 0).all()
    assert math.sqrt((singular**2).sum()) == pytest.approx(change.summary()["norm"].iloc[0], rel=1e-5)
    assert list(found["index"]) == list(range(len(found)))


def test_a_rank_beyond_the_matrix_and_beyond_the_listed_is_whole(tiny_lm, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("qwen3")
    monkeypatch.setattr(weight_change, "LEADING", 2)
    for rank in (1, 5, 40):  # the matrix is 32 by 56
        change = WeightDelta((low(lm, 0, rank),))
        found = spectrum(change, lm)
        assert len(found) == min(max(2, rank), 32)
        assert math.sqrt((found["singular"] ** 2).sum()) == pytest.approx(change.summary()["norm"].iloc[0], rel=1e-5)


def test_changes_in_a_chain_and_matrices_at_several_places(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    first, second, other = low(lm, 0, 1), low(lm, 0, 2, seed=5), low(lm, 2, 1, "attn_out")
    inner = Chain((WeightDelta((second,)), PromptPrefix("Rome is here. ")))
    found = spectrum(Chain((WeightDelta((first, other)), inner)), lm)
    assert list(found[["layer", "site"]].drop_duplicates().itertuples(index=False, name=None)) == [
        (0, "mlp_down"), (2, "attn_out"),
    ]  # fmt: skip
    mlp = found[found["layer"] == 0]["singular"].to_numpy()
    np.testing.assert_allclose(mlp, expected([first, second], len(mlp)), atol=1e-4)
    assert (mlp > 1e-3).sum() == 3


def test_what_changes_no_weight_has_no_rows(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    for change in (PromptPrefix("Rome is here. "), Chain(()), WeightDelta(())):
        assert spectrum(change, lm).empty
    broken = MatrixDelta(0, "mlp_down", torch.full((lm.d_model, 1), torch.inf), torch.ones(lm.d_mlp, 1), 1.0)
    fine = low(lm, 1, 1)
    assert set(spectrum(WeightDelta((broken, fine)), lm)["layer"]) == {1}


@pytest.mark.parametrize("shape", [(300, 500), (500, 300)])
def test_the_iteration_finds_the_greatest_values(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))  # a flat spectrum, the hardest kind
    exact = torch.linalg.svdvals(matrix.double())[:8]
    torch.testing.assert_close(leading(matrix, 8), exact, rtol=1e-6, atol=0)
    monkeypatch.setattr(weight_change, "EXACT", 10)
    found = leading(matrix, 8)
    torch.testing.assert_close(found, exact, rtol=2e-3, atol=0)
    assert not torch.equal(found, leading(matrix, 9)[:8])  # that it was the iteration
    assert torch.equal(found, leading(matrix, 8))


def test_low_rank_changes_are_never_multiplied_out(tiny_lm, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the dense product was made")

    monkeypatch.setattr(MatrixDelta, "update", refuse)
    seen: list[tuple[int, ...]] = []
    svdvals = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda m: seen.append(tuple(m.shape)) or svdvals(m))
    lm = tiny_lm("llama")
    spectrum(WeightDelta((low(lm, 0, 2), low(lm, 0, 3, seed=1))), lm)
    assert seen == [(5, 5)]
