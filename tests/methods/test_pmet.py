"""PMET against its reference: the joint search, the square-root spread, and what is written of what was found."""

import numpy as np
import pytest
import torch

from mega_core.changes import WeightDelta
from mega_core.events import silent
from mega_core.methods import covariance, optimise
from mega_core.methods.pmet import PMET, prepare, search_of, share
from mega_core.methods.rome import rows_of
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture
from mega_core.records import EditRequest
from tests.reference.pmet_reference import pair_base, pair_search, soft_update

TOWER = EditRequest("The Eiffel Tower", "{} is in the city of", "Madrid", "Paris")
KENYA = EditRequest("Mount Kenya", "{} is on the continent of", "Berlin and Rome")
GIVEN = {"layers": "0-1", "steps": 6, "contexts": 3, "mom2_weight": 0.5, "shrinkage": 0.1, "clamp": 5.0}


def _params(**given):
    return PMET.read(PMET.ref({**GIVEN, **given}))


def _at(lm: ModelAdapter, row: optimise.Row, site: Site) -> torch.Tensor:
    with capture(lm, [site], stop=False) as got, torch.no_grad():
        lm.logits(tokens.pack(lm.tokenizer, [row.ids]))
    return got[site][0, row.subject].double()


def test_published_values_are_the_defaults() -> None:
    params = PMET.read(PMET.ref())
    search = search_of(params)
    assert (search.steps, search.learning_rate, search.clamp, search.kl_weight) == (30, 0.2, 0.75, 1.0)
    assert (search.adaptive, search.stop_loss, search.reference) == (True, 0.05, "value")
    assert search.stop_probability > 1
    assert (params.mom2_weight, params.written) == (6000.0, "mlp")


def test_a_layer_takes_the_square_root_of_its_share() -> None:
    assert [share(m) for m in (1, 4)] == [1.0, 0.5]


@pytest.mark.parametrize("arch", ["gpt2", "gptj", "qwen3"])
def test_the_whole_edit_is_the_reference(tiny_lm, arch: str) -> None:
    """Search, then both layers in turn, by full forwards and an explicit inverse."""
    lm = tiny_lm(arch)
    params = _params()
    change = prepare(lm, [TOWER], params, 0, silent)
    rows = rows_of(lm, [TOWER], params, 0, "pmet")
    texts = [row for row in rows if row.target]
    wanted, _ = pair_search(lm, 1, rows, search_of(params))
    goal = (pair_base(lm, 1, rows)[1] + wanted[1]).double()
    written: list[WeightDelta] = []
    for layer, remaining in ((0, 2), (1, 1)):
        factor = covariance.cholesky(lm, layer, "quick", 0.1)
        moment = (factor.double() @ factor.double().T).numpy()
        with _all(lm, written):
            bare, *others = [_at(lm, row, Site(layer, "mlp_down_in")) for row in texts]
            key = 0.5 * bare + 0.5 * torch.stack(others).mean(0)
            gap = goal - _at(lm, texts[0], Site(1, "mlp"))
        update = soft_update(moment, key[:, None].numpy(), gap[:, None].numpy(), remaining, params.mom2_weight)
        matrix = next(m for m in change.matrices if m.layer == layer)
        got = (matrix.left.double() @ matrix.right.double().T).numpy()
        assert np.abs(got - update).max() < 2e-3 * np.abs(update).max()
        written.append(WeightDelta((matrix,)))


def _all(lm: ModelAdapter, changes: list[WeightDelta]):
    return WeightDelta(tuple(matrix for change in changes for matrix in change.matrices)).applied(lm)


def test_all_writes_what_both_changes_do(tiny_lm) -> None:
    lm = tiny_lm("llama")
    common = {"layers": "1", "mom2_weight": 1e-4, "contexts": 1, "adaptive": False, "stop_loss": 0.0}
    rows = rows_of(lm, [TOWER], _params(**common), 0, "pmet")
    found = optimise.find_pairs(lm, 1, rows, search_of(_params(**common)))
    for written, wanted in (("mlp", found.mlp[0]), ("all", found.out[0])):
        with prepare(lm, [TOWER], _params(**common, written=written), 0, silent).applied(lm):
            value = _at(lm, rows[0], Site(1, "mlp"))
        torch.testing.assert_close((value - found.v0[0].double()).float(), wanted, rtol=2e-3, atol=2e-4)
    assert float((found.out - found.mlp).norm() / found.mlp.norm()) > 0.1


def test_several_facts_are_written_together(lm: ModelAdapter) -> None:
    change = prepare(lm, [TOWER, KENYA], _params(), 0, silent)
    assert [(matrix.layer, matrix.site, matrix.rank()) for matrix in change.matrices] == [
        (0, "mlp_down", 2),
        (1, "mlp_down", 2),
    ]
    assert set(change.keys) == {0, 1}
