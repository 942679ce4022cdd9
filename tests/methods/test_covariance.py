"""The key statistics equal a naive computation, are shrunk as said, and are kept under all that they depend on."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mega_core.errors import ActionableError
from mega_core.methods import covariance
from mega_core.models.adapter import ModelAdapter
from tests.reference.rome_reference import naive_second_moment
from tests.tiny import tiny


class Spy(covariance.Memory):
    """Remembers what was asked and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.hits = 0

    def get_arrays(self, key):
        self.asked.append(key)
        found = super().get_arrays(key)
        self.hits += found is not None
        return found


def test_second_moments_equal_a_naive_computation(lm: ModelAdapter) -> None:
    rows = covariance.covariance_texts(lm, 600)
    found = covariance.second_moments(lm, [2, 0], rows)
    for layer in (0, 2):
        np.testing.assert_allclose(found[layer].numpy(), naive_second_moment(lm, layer, rows), rtol=1e-4, atol=1e-5)
    assert found[0].dtype == torch.float64


def test_texts_are_long_enough_and_always_the_same(tiny_lm) -> None:
    lm = tiny_lm("llama")
    rows = covariance.covariance_texts(lm, 700)
    assert 700 <= sum(map(len, rows)) < 700 + covariance.ROW_TOKENS
    assert rows == covariance.covariance_texts(lm, 700)


def test_shrinking_keeps_the_trace_and_bounds_the_condition() -> None:
    moment = torch.diag(torch.tensor([4.0, 0.0, 2.0], dtype=torch.float64))
    shrunk = covariance.shrink(moment, 0.25)
    assert shrunk.trace() == pytest.approx(6.0)
    assert torch.linalg.eigvalsh(shrunk).min() == pytest.approx(0.25 * 2.0)
    assert (moment.diagonal() == torch.tensor([4.0, 0.0, 2.0])).all()


def test_more_tokens_shrink_less() -> None:
    rhos = [covariance.default_shrinkage(n * 100, 100) for n in (1, 4, 40)]
    assert rhos == sorted(rhos, reverse=True)
    assert rhos[0] == 0.05
    assert rhos[-1] == 0.01


def test_the_factor_is_the_cholesky_factor_of_the_shrunk_moment(tiny_lm) -> None:
    lm = tiny_lm("gptj")
    factor = covariance.cholesky(lm, 1, "quick", 0.1)
    rows = covariance.covariance_texts(lm, covariance.tokens_for("quick", lm.d_mlp))
    wanted = covariance.shrink(torch.from_numpy(naive_second_moment(lm, 1, rows)), 0.1)
    torch.testing.assert_close((factor @ factor.T).double(), wanted, rtol=1e-3, atol=1e-4)
    assert covariance.cholesky(lm, 1, "identity") is None


def test_singular_statistics_name_the_way_out() -> None:
    with pytest.raises(ActionableError, match="shrinkage"):
        covariance.factorise(torch.zeros(3, 3, dtype=torch.float64))


def test_it_is_computed_once_per_model_layer_and_setting() -> None:
    lm, memo = tiny("gpt2", seed=5), Spy()
    lm.memo = memo
    first = covariance.cholesky(lm, 1)
    again = covariance.cholesky(lm, 1)
    assert memo.hits == 1
    assert torch.equal(first, again)
    covariance.cholesky(lm, 0)
    covariance.cholesky(lm, 1, shrinkage=0.2)
    covariance.cholesky(lm, 1, "full")
    lm.file_digest = "f" * 64
    covariance.cholesky(lm, 1)
    lm.ref = replace(lm.ref, dtype="bfloat16")
    covariance.cholesky(lm, 1)
    assert memo.hits == 1
    assert len(set(memo.asked)) == 6


def test_a_damaged_memo_is_computed_anew() -> None:
    lm, memo = tiny("gpt2", seed=5), Spy()
    lm.memo = memo
    good = covariance.cholesky(lm, 1)
    memo.put_arrays(memo.asked[0], {"cholesky": np.zeros((2, 2), dtype=np.float32)})
    assert torch.equal(covariance.cholesky(lm, 1), good)


def test_a_model_without_a_digest_is_never_kept() -> None:
    lm, memo = tiny("gpt2", seed=5), Spy()
    lm.memo, lm.file_digest = memo, ""
    covariance.cholesky(lm, 1)
    assert not memo.asked
