"""The transport map against POT and the textbook formula, its promises, and what it refuses."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mega_core.errors import BadInput
from mega_core.methods.transport import KINDS, AffineMap, fit_map, linear_transport
from tests.reference.transport_reference import plain_map, principal_directions

D = 9


def _sample(n: int, seed: int, d: int = D, offset: float = 0.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + offset)


@pytest.fixture
def made() -> tuple[torch.Tensor, torch.Tensor]:
    return _sample(60, 1, offset=2.0), _sample(40, 2, offset=-1.0)


@pytest.mark.parametrize(
    ("rows", "reg"), [((60, 40), 1e-4), ((60, 40), 0.5), ((6, 5), 1e-2), ((6, 5), 0.5)]
)  # fewer rows than dimensions and a tiny lambda: a matrix of condition 1e6, where both lose digits
def test_the_full_map_is_pots_and_the_textbooks(rows: tuple[int, int], reg: float) -> None:
    source, target = _sample(rows[0], 1, offset=2.0), _sample(rows[1], 2, offset=-1.0)
    matrix, bias = linear_transport(source, target, reg)
    theirs, theirs_bias = ot.gaussian.empirical_bures_wasserstein_mapping(source.numpy(), target.numpy(), reg=reg)
    np.testing.assert_allclose(matrix.numpy(), theirs, atol=1e-8)
    np.testing.assert_allclose(bias.numpy(), theirs_bias[0], atol=1e-8)
    plain, plain_bias = plain_map(source.numpy(), target.numpy(), reg)
    np.testing.assert_allclose(matrix.numpy(), plain, atol=1e-8)
    np.testing.assert_allclose(bias.numpy(), plain_bias, atol=1e-8)
    fitted = ot.da.LinearTransport(reg=reg).fit(Xs=source.numpy(), Xt=target.numpy())
    moved = fitted.transform(Xs=source.numpy())
    np.testing.assert_allclose((source @ matrix.T + bias).numpy(), moved, atol=1e-8)


def test_the_map_is_symmetric_without_negative_eigenvalues(made) -> None:
    for reg in (0.0, 1e-2):
        matrix, _ = linear_transport(*made, reg)
        assert torch.equal(matrix, matrix.T)
        assert torch.linalg.eigvalsh(matrix).min() > 0


def test_mean_and_covariance_arrive(made) -> None:
    source, target = made
    matrix, bias = linear_transport(source, target, 1e-9)
    moved = source @ matrix.T + bias
    np.testing.assert_allclose(moved.mean(0), target.mean(0), atol=1e-10)
    np.testing.assert_allclose(np.cov(moved.T, ddof=0), np.cov(target.numpy().T, ddof=0), atol=1e-6)


def _as_full(found: AffineMap) -> tuple[np.ndarray, np.ndarray]:
    """(A, b) of a low-rank map, in float64."""
    mean, shift, basis, inner = (t.double().numpy() for t in (found.mean, found.shift, found.basis, found.inner))
    matrix = np.eye(len(mean)) + basis @ inner @ basis.T
    return matrix, mean + shift - matrix @ mean


@pytest.mark.parametrize("rows", [(4, 3), (6, 2), (30, 20)])
@pytest.mark.parametrize("reg", [1e-2, 0.5])
def test_all_directions_of_the_rank_make_the_full_map(rows: tuple[int, int], reg: float, monkeypatch) -> None:
    """SAKE at another site is `ot-full`: with few rows, inside their span only. To 1e-8 before storing in float32."""
    source, target = _sample(rows[0], 3, offset=1.0), _sample(rows[1], 4)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)  # keep what is stored in float64, for the comparison
    found = fit_map(source, target, "ot-full", shrinkage=reg, absolute=True)
    matrix, bias = linear_transport(source, target, reg)
    assert found.rank() == min(D, sum(rows) - 2)
    mine, mine_bias = _as_full(found)
    np.testing.assert_allclose(mine, matrix.numpy(), atol=1e-8)
    np.testing.assert_allclose(mine_bias, bias.numpy(), atol=1e-8)


def test_few_components_are_the_textbook_map_of_the_projected_rows(made) -> None:
    source, target = made
    found = fit_map(source, target, "ot", components=3, energy=1.0, shrinkage=0.7)
    stack = torch.cat((source - source.mean(0), target - target.mean(0))).numpy()
    basis = principal_directions(stack, 3)
    s, t = (source - source.mean(0)).numpy() @ basis, (target - target.mean(0)).numpy() @ basis
    small, _ = plain_map(s, t, 0.7 * np.trace(np.cov(s.T, ddof=0)) / 3)
    np.testing.assert_allclose(_as_full(found)[0], np.eye(D) + basis @ (small - np.eye(3)) @ basis.T, atol=1e-5)


def test_how_many_directions_are_kept(made) -> None:
    source, target = made
    assert fit_map(source, target, "ot-full").rank() == D
    assert fit_map(source, target, "ot", components=4, energy=1.0).rank() == 4
    assert fit_map(source, target, "ot", components=0).rank() == 0
    assert fit_map(source[:3], target[:2], "ot", components=16, energy=1.0).rank() == 3  # 3 - 1 and 2 - 1
    stack = torch.cat((source - source.mean(0), target - target.mean(0)))
    share = torch.linalg.svdvals(stack).square()
    share = share.cumsum(0) / share.sum()
    kept = fit_map(source, target, "ot", energy=0.9).rank()
    assert share[kept - 1] >= 0.9
    assert kept == 1 or share[kept - 2] < 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_sends_the_mean_to_the_mean(made, kind: str) -> None:
    source, target = made
    found = fit_map(source, target, kind)
    mean = source.mean(0).float()
    torch.testing.assert_close(mean + found.move(mean), target.mean(0).float(), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose((source.float() + found.move(source.float())).mean(0), target.mean(0), atol=1e-4)


def test_the_mean_is_a_shift_and_strong_shrinkage_comes_near_it(made) -> None:
    source, target = made
    shift = (target.mean(0) - source.mean(0)).float()
    x = torch.randn(4, 5, D, generator=torch.Generator().manual_seed(0))
    plain = fit_map(source, target, "mean")
    assert plain.rank() == 0
    assert torch.equal(plain.move(x), shift.expand_as(x))
    torch.testing.assert_close(fit_map(source, target, "ot", shrinkage=1e6).move(x), plain.move(x), atol=1e-4, rtol=0)


def test_it_moves_any_dtype_and_shape_in_float32(made) -> None:
    found = fit_map(*made, "ot")
    x = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    moved = found.move(x)
    assert (moved.dtype, moved.shape) == (torch.bfloat16, x.shape)
    assert torch.equal(moved, found.move(x.float()).to(torch.bfloat16))
    matrix, bias = _as_full(found)
    expected = x.double().numpy() @ matrix.T + bias - x.double().numpy()
    np.testing.assert_allclose(found.move(x.float()), expected, atol=1e-4)


def test_samples_without_a_spread_only_shift() -> None:
    many, one = _sample(5, 1), _sample(1, 2)
    for source, target in ((many, one), (one, many), (many[:1].repeat(4, 1), many), (one, one)):
        found = fit_map(source, target, "ot", shrinkage=0.0)
        assert found.rank() == 0
        torch.testing.assert_close(found.shift.double(), target.mean(0) - source.mean(0), atol=1e-6, rtol=1e-6)


def test_it_packs_and_comes_back(made) -> None:
    found = fit_map(*made, "ot", components=3)
    again = AffineMap.from_tensors(found.tensors())
    x = torch.randn(2, D)
    assert torch.equal(again.move(x), found.move(x))
    assert torch.equal(found.basis.T @ found.basis > 0.5, torch.eye(3, dtype=torch.bool))
    wrong = {**found.tensors(), "inner": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match="parts of one map"):
        AffineMap.from_tensors(wrong)


def test_what_it_refuses(made) -> None:
    source, target = made
    with pytest.raises(BadInput, match="ot-full"):
        fit_map(source, target, "sinkhorn")
    with pytest.raises(ValueError, match="9 numbers, target rows 4"):
        fit_map(source, target[:, :4])
    with pytest.raises(ValueError, match="at least one"):
        fit_map(source[:0], target)
    with pytest.raises(ValueError, match="not finite"):
        fit_map(source, target * float("nan"))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 12), st.integers(2, 12), st.integers(0, 2**16), st.sampled_from([1e-3, 1.0]), st.floats(1e-3, 1e3)
)
def test_no_sample_gives_a_wild_map(n: int, m: int, seed: int, shrinkage: float, scale: float) -> None:
    """A stays between 0 and the root of the largest ratio of variances that lambda allows."""
    source, target = scale * _sample(n, seed), scale * _sample(m, seed + 1)
    found = fit_map(source, target, "ot", shrinkage=shrinkage)
    values = torch.linalg.eigvalsh(found.inner.double() + torch.eye(found.rank(), dtype=torch.float64))
    lam = shrinkage * float((source - source.mean(0)).square().sum() / n) / max(found.rank(), 1)
    most = float((target - target.mean(0)).square().sum() / m)
    assert values.min() > -1e-5
    assert values.max() <= ((most + lam) / (0.5 * lam)) ** 0.5 + 1e-3
