"""The closed forms against NumPy, and what they refuse."""

import numpy as np
import pytest
import torch

from mega_core.errors import ActionableError, BadInput
from mega_core.methods import solve
from tests.reference import closed_forms
from tests.reference import rome_reference as reference

D_IN, D_OUT = 13, 7


@pytest.fixture
def made() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(C (in, in), keys (n, in), changes (n, out))."""
    rng = np.random.default_rng(3)
    root = rng.normal(size=(D_IN, 40))
    return root @ root.T / 40, rng.normal(size=(4, D_IN)), rng.normal(size=(4, D_OUT))


def _whiten(c: np.ndarray, keys: np.ndarray) -> torch.Tensor:
    return solve.whiten(torch.from_numpy(keys), torch.linalg.cholesky(torch.from_numpy(c)))


def _matrix(update: solve.LowRank) -> np.ndarray:
    return (update.left @ update.right.T).numpy()


def test_one_key_is_romes_rank_one_update(made) -> None:
    c, keys, changes = made
    found = solve.equality_edit(_whiten(c, keys[:1]), torch.from_numpy(keys[:1]), torch.from_numpy(changes[:1]))
    np.testing.assert_allclose(_matrix(found), reference.rome_update(c, keys[0], keys[0], changes[0]), rtol=1e-9)
    np.testing.assert_allclose(_matrix(found) @ keys[0], changes[0], rtol=1e-9)


def test_the_mismatched_form_scales_by_the_other_key(made) -> None:
    c, keys, changes = made
    found = solve.equality_edit(_whiten(c, keys[:1]), torch.from_numpy(keys[1:2]), torch.from_numpy(changes[:1]))
    np.testing.assert_allclose(_matrix(found), reference.rome_update(c, keys[0], keys[1], changes[0]), rtol=1e-9)


def test_several_keys_are_emmets_update_and_one_is_its_special_case(made) -> None:
    c, keys, changes = made
    torch_keys, torch_changes = torch.from_numpy(keys), torch.from_numpy(changes)
    for n, ridge in ((1, 0.0), (4, 0.0), (4, 0.1)):
        found = solve.equality_edit(_whiten(c, keys[:n]), torch_keys[:n], torch_changes[:n], ridge)
        np.testing.assert_allclose(
            _matrix(found), reference.emmet_update(c, keys[:n].T, changes[:n].T, ridge), rtol=1e-8, atol=1e-12
        )
        if not ridge:
            np.testing.assert_allclose(_matrix(found) @ keys[:n].T, changes[:n].T, rtol=1e-8)


def test_without_statistics_c_is_the_identity(made) -> None:
    _, keys, changes = made
    found = solve.equality_edit(
        solve.whiten(torch.from_numpy(keys[:1]), None), torch.from_numpy(keys[:1]), torch.from_numpy(changes[:1])
    )
    np.testing.assert_allclose(
        _matrix(found), reference.rome_update(np.eye(D_IN), keys[0], keys[0], changes[0]), rtol=1e-9
    )


def test_the_update_moves_ordinary_keys_least(made) -> None:
    """No other update that satisfies the constraint has a smaller tr(D C D^T)."""
    c, keys, changes = made
    best = _matrix(solve.equality_edit(_whiten(c, keys), torch.from_numpy(keys), torch.from_numpy(changes)))
    rng = np.random.default_rng(0)
    null = np.eye(D_IN) - keys.T @ np.linalg.pinv(keys.T)  # directions no edited key has
    for _ in range(20):
        other = best + 0.1 * rng.normal(size=best.shape) @ null
        np.testing.assert_allclose(other @ keys.T, changes.T, rtol=1e-8)
        assert np.trace(other @ c @ other.T) > np.trace(best @ c @ best.T)


def test_two_edits_with_one_key_are_refused(made) -> None:
    c, keys, changes = made
    twice = np.stack([keys[0], keys[0]])
    with pytest.raises(BadInput, match="same key"):
        solve.equality_edit(_whiten(c, twice), torch.from_numpy(twice), torch.from_numpy(changes[:2]))


def test_a_vanishing_or_infinite_key_is_refused(made) -> None:
    c, keys, changes = made
    for bad in (np.zeros((1, D_IN)), np.full((1, D_IN), np.inf)):
        with pytest.raises(ActionableError, match="not finite"):
            solve.equality_edit(_whiten(c, bad), torch.from_numpy(bad), torch.from_numpy(changes[:1]))


def test_key_match_is_one_for_the_same_key(made) -> None:
    c, keys, _ = made
    u = _whiten(c, keys)
    torch_keys = torch.from_numpy(keys)
    np.testing.assert_allclose(solve.key_match(u, torch_keys, torch_keys), np.ones(4))
    np.testing.assert_allclose(solve.key_match(u, torch_keys, 0.1 * torch_keys), np.full(4, 0.1))


PRECISION = {torch.float64: 1e-10, torch.float32: 1e-4}


def _off(found: solve.LowRank, wanted: np.ndarray) -> float:
    """Largest difference relative to the largest entry."""
    return float(np.abs(_matrix(found) - wanted).max() / np.abs(wanted).max())


@pytest.fixture
def wide() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys as they are: many with variances over four decades, C from them, 9 new ones (in, n) and changes (out, n)."""
    rng = np.random.default_rng(5)
    scale = np.logspace(0, -2, 60)
    text = rng.normal(size=(60, 2000)) * scale[:, None]
    return text @ text.T / 2000, rng.normal(size=(60, 9)) * scale[:, None], rng.normal(size=(20, 9))


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("weight", [0.01, 1.0, 15000.0])
def test_the_soft_form_is_memits(wide, dtype: torch.dtype, weight: float) -> None:
    c, keys, changes = wide
    factor = torch.linalg.cholesky(torch.from_numpy(c)).to(dtype)
    k, r = torch.from_numpy(keys.T).to(dtype), torch.from_numpy(changes.T).to(dtype)
    wanted = closed_forms.memit_update(c, keys, changes, weight)
    assert _off(solve.soft_edit(k, r, factor, weight), wanted) < PRECISION[dtype]
    plain = closed_forms.memit_update(np.eye(60), keys, changes, weight)
    assert _off(solve.soft_edit(k, r, None, weight), plain) < PRECISION[dtype]


def test_the_soft_form_becomes_the_exact_one_as_lambda_falls(wide) -> None:
    c, keys, changes = wide
    factor, k, r = torch.linalg.cholesky(torch.from_numpy(c)), torch.from_numpy(keys.T), torch.from_numpy(changes.T)
    exact = solve.equality_edit(solve.whiten(k, factor), k, r)
    assert _off(solve.soft_edit(k, r, factor, 1e-9), _matrix(exact)) < 1e-6


def test_a_key_that_comes_twice_gets_the_mean_of_its_values(wide) -> None:
    c, keys, changes = wide
    factor = torch.linalg.cholesky(torch.from_numpy(c))
    twice = torch.from_numpy(np.stack([keys[:, 0], keys[:, 0], keys[:, 1]]))
    found = _matrix(solve.soft_edit(twice, torch.from_numpy(changes.T[:3].copy()), factor, 1e-8))
    np.testing.assert_allclose(found @ keys[:, 0], changes[:, :2].mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found @ keys[:, 1], changes[:, 2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("complement", [True, False])
@pytest.mark.parametrize("earlier", [0, 4])
@pytest.mark.parametrize("l2", [0.1, 10.0])
def test_the_projected_form_is_alphaedits(wide, dtype: torch.dtype, complement: bool, earlier: int, l2: float) -> None:
    c, keys, changes = wide
    vectors = np.linalg.eigh(c)[1]
    basis = vectors[:, 45:] if complement else vectors[:, :15]
    projector = np.eye(60) - basis @ basis.T if complement else basis @ basis.T
    past = np.random.default_rng(6).normal(size=(60, earlier))
    found = solve.projected_edit(
        torch.from_numpy(keys.T).to(dtype),
        torch.from_numpy(changes.T).to(dtype),
        solve.Projector(torch.from_numpy(basis).to(dtype), complement),
        torch.from_numpy(past.T).to(dtype) if earlier else None,
        l2,
    )
    assert _off(found, closed_forms.alphaedit_update(projector, keys, changes, past, l2)) < PRECISION[dtype]


def test_the_projected_form_moves_neither_kept_directions_nor_earlier_keys(wide) -> None:
    c, keys, changes = wide
    vectors = torch.linalg.eigh(torch.from_numpy(c)).eigenvectors
    projector = solve.Projector(vectors[:, 30:], complement=True)
    assert projector.rank == 30
    past = torch.from_numpy(np.random.default_rng(7).normal(size=(6, 60)))
    arguments = (torch.from_numpy(keys.T), torch.from_numpy(changes.T), projector)
    free, spared = (_matrix(solve.projected_edit(*arguments, earlier, 1e-9)) for earlier in (None, past))
    for update in (free, spared):
        assert np.abs(update @ vectors[:, 30:].numpy()).max() < 1e-9 * np.abs(update).max()
        np.testing.assert_allclose(update @ keys, changes, rtol=1e-3, atol=1e-3)
    assert np.abs(spared @ past.numpy().T).max() < 1e-3 * np.abs(free @ past.numpy().T).max()


def test_many_edits_are_kept_by_the_smaller_side() -> None:
    generator = torch.Generator().manual_seed(0)
    for out, into in ((5, 8), (8, 5)):
        left, right = (torch.randn(size, 20, generator=generator, dtype=torch.float64) for size in (out, into))
        small = solve.thin(solve.LowRank(left, right))
        assert small.left.shape[1] == 5
        torch.testing.assert_close(small.left @ small.right.T, left @ right.T)
    same = solve.LowRank(torch.ones(5, 2), torch.ones(8, 2))
    assert solve.thin(same) is same


def test_systems_that_cannot_be_solved_name_the_knob() -> None:
    keys = torch.full((2, 3), float("nan"))
    with pytest.raises(ActionableError, match="lambda"):
        solve.soft_edit(keys, torch.ones(2, 4), None, 1.0)
    with pytest.raises(ActionableError, match="L2"):
        solve.projected_edit(keys, torch.ones(2, 4), solve.Projector(torch.eye(3)[:, :1], True), None, 1.0)
