"""The closed forms against NumPy, and what they refuse."""

import numpy as np
import pytest
import torch

from mega_core.errors import ActionableError, BadInput
from mega_core.methods import solve
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
