"""The key statistics equal a naive computation, are shrunk as said, and are kept under all that they depend on."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mega_core.changes import DenseDelta, MatrixDelta, PromptPrefix, WeightDelta
from mega_core.errors import ActionableError, BadInput
from mega_core.events import Event, Started
from mega_core.methods import covariance
from mega_core.models.adapter import ModelAdapter
from tests.reference import closed_forms
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


def test_several_layers_come_from_one_pass_over_the_texts() -> None:
    lm, memo = tiny("llama", seed=5), Spy()
    lm.memo = memo
    one = covariance.cholesky(lm, 1)
    seen: list[Event] = []
    found = covariance.choleskys(lm, [0, 1, 2, 0], report=seen.append)
    assert [e.stage for e in seen if isinstance(e, Started)] == ["key statistics"]
    assert list(found) == [0, 1, 2]
    assert found[1] is not None
    assert torch.equal(found[1], one)
    fresh = tiny("llama", seed=5)
    assert torch.equal(covariance.cholesky(fresh, 2), found[2])
    assert covariance.choleskys(lm, [0, 1], "identity") == {0: None, 1: None}
    seen.clear()
    covariance.choleskys(lm, [2, 0], report=seen.append)
    assert not seen


def test_statistics_are_the_unedited_models(tiny_lm) -> None:
    """Also where an edit is prepared on top of others; and what was computed so is not kept as the model's own."""
    lm, memo = tiny("qwen3", seed=5), Spy()
    lm.memo = memo
    wanted = covariance.cholesky(tiny("qwen3", seed=5), 2)
    generator = torch.Generator().manual_seed(0)
    out, into = lm.read_weight(0, "mlp_down").shape
    low = MatrixDelta(
        0, "mlp_down", torch.randn(out, 1, generator=generator), torch.randn(into, 1, generator=generator), 1
    )
    dense = DenseDelta(1, "attn_out", torch.randn(lm.read_weight(1, "attn_out").shape, generator=generator), 1.0)
    with WeightDelta((low, dense, low)).applied(lm), PromptPrefix("Rome is in Italy. ").applied(lm):
        digest, changes = lm.live_digest(), list(lm.changes)
        found = covariance.cholesky(lm, 2)
        assert (lm.live_digest(), lm.changes) == (digest, changes)
        assert memo.get_arrays(memo.asked[0]) is None
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    covariance.cholesky(lm, 2)
    with WeightDelta((low,)).applied(lm):
        assert torch.equal(covariance.cholesky(lm, 2), wanted)  # kept from the unedited model: still right


@pytest.mark.parametrize(("kind", "cut"), [("relative", 0.3), ("relative", 0.02), ("absolute", 0.5)])
def test_free_directions_are_the_references(tiny_lm, kind: str, cut: float) -> None:
    lm = tiny_lm("gptj")
    rows = covariance.covariance_texts(lm, covariance.tokens_for("quick", lm.d_mlp))
    c = naive_second_moment(lm, 1, rows)
    reference = closed_forms.null_projector if kind == "relative" else closed_forms.null_projector_absolute
    wanted = reference(c, cut)
    found = covariance.null_spaces(lm, [1], "quick", cut, kind)[1]
    assert 0 < found.rank == round(np.trace(wanted)) < lm.d_mlp
    assert found.basis.shape[1] <= lm.d_mlp / 2
    np.testing.assert_allclose(found(torch.eye(lm.d_mlp)).numpy(), wanted, atol=1e-3)


def test_free_directions_are_kept_under_all_they_depend_on() -> None:
    lm, memo = tiny("gpt2", seed=5), Spy()
    lm.memo = memo
    first = covariance.null_spaces(lm, [0, 1], cut=0.1)
    again = covariance.null_spaces(lm, [1], cut=0.1)[1]
    assert memo.hits == 1
    assert torch.equal(first[1].basis, again.basis)
    assert first[1].complement is again.complement
    before = set(memo.asked)
    covariance.null_spaces(lm, [1], cut=0.2)
    covariance.null_spaces(lm, [1], cut=0.1, kind="absolute")
    covariance.null_spaces(lm, [1], "full", cut=0.1)
    lm.file_digest = "f" * 64
    covariance.null_spaces(lm, [1], cut=0.1)
    assert len([key for key in set(memo.asked) - before if key.startswith("nullspace")]) == 4


def test_a_cut_that_frees_nothing_is_refused(tiny_lm) -> None:
    with pytest.raises(BadInput, match="nullspace_cut"):
        covariance.null_spaces(tiny_lm("gpt2"), [1], cut=1e-9)
    with pytest.raises(BadInput, match="covariance"):
        covariance.null_spaces(tiny_lm("gpt2"), [1], "identity")
