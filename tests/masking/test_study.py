"""The study around a mask: who is kept apart from whom, what is kept, and one run through all of it."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest
import torch

from mega_core import mask_study
from mega_core.__main__ import build_parser
from mega_core.commands import mask as command
from mega_core.embedded import examples
from mega_core.errors import BadInput, UnknownName
from mega_core.mask_study import FACTS, RELATIONS, SETS, TRAIN, Plan
from mega_core.masking import controls
from mega_core.masking.masks import Mask
from mega_core.masking.train import TOP
from mega_core.methods import METHODS
from mega_core.methods.covariance import Memory
from tests.tiny import tiny

QUICK = {"steps": 3, "contexts": 1, "covariance": "identity", "layer": 1, "kl_weight": 0.0}


def test_what_judges_was_never_seen() -> None:
    found = mask_study.split(60, 30)
    assert (len(found.train), len(found.facts), len(found.relations)) == (60, 30, 30)
    seen = {request.subject for request in found.train}
    unseen = {request.subject for request in (*found.facts, *found.relations)}
    assert len(seen) == 60
    assert not seen & unseen
    assert {mask_study.relation_of(request) for request in found.relations} <= set(found.held)
    assert not {mask_study.relation_of(request) for request in (*found.train, *found.facts)} & set(found.held)
    assert set(found.facts) <= set(examples.reported(200))
    assert mask_study.split(40, 30).train == found.train[:40]


def test_nothing_that_judges_is_trained_on() -> None:
    for request in mask_study.split(60, 30).train:
        prompts = mask_study.fit_prompts(request)
        assert prompts[0] == request.prompt
        assert not set(prompts) & set(request.paraphrases)
        assert 1 < len(prompts) <= mask_study.PROMPTS


def test_too_many_edits_are_refused() -> None:
    with pytest.raises(BadInput, match="can't be drawn"):
        mask_study.split(100_000)


def test_an_edit_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny("gpt2")
    lm.memo = Memory()
    request = mask_study.split(1, 1).train[0]
    ref = METHODS["rome"].ref(QUICK)
    first = mask_study.one_edit(lm, ref, [request])
    monkeypatch.setitem(METHODS._entries, "rome", replace(METHODS["rome"], prepare=_never))
    again = mask_study.one_edit(lm, ref, [request])
    for one, other in zip(first.matrices, again.matrices, strict=True):
        assert torch.equal(one.left, other.left)
        assert torch.equal(one.right, other.right)
        assert one.base_norm == other.base_norm


def _never(*_: object) -> None:
    raise AssertionError("the edit was kept, so nothing is to be made")


@pytest.fixture(scope="module")
def judged() -> mask_study.Evaluation:
    lm = tiny("gpt2")
    lm.memo = Memory()
    before = lm.live_digest()
    plan = Plan("rome", 6, 3, given=tuple(QUICK.items()))
    mask = mask_study.train_mask(lm, plan, {}, None, replace(TOP, epochs=2))
    found = mask_study.evaluate_mask(lm, mask, {"rome": QUICK}, 3, train_cases=6, editable=2)
    assert lm.live_digest() == before
    assert lm.hook_count() == 0
    return found


def test_a_study_judges_the_mask_beside_its_controls(judged: mask_study.Evaluation) -> None:
    assert judged.mask.layer == 1
    assert judged.mask.pruned == pytest.approx(0.1, abs=1e-3)
    masks = {row.mask for row in judged.rows}
    assert masks == {"trained", *controls.NAMES, "restore W0", "K = 0", "own largest change, restore W0"}
    assert {row.set for row in judged.rows} == set(SETS) == {TRAIN, FACTS, RELATIONS}
    assert {row.kind for row in judged.rows} == {"edit", "paraphrase"}
    assert [row.mask for row in judged.collateral][:2] == ["none", "trained"]
    assert len(judged.editability) == 5
    assert json.loads(json.dumps(judged.to_json(), allow_nan=False))["layer"] == 1
    said = command.judged(judged)
    assert "held-out" in said
    assert "10.0 % pruned" in said
    assert "10.0 %" in command.trained(judged.mask)


def test_a_mask_of_unknown_training_is_not_judged(judged: mask_study.Evaluation) -> None:
    lm = tiny("gpt2")
    bare = Mask(judged.mask.keep, 1, lm.name, lm.file_digest)
    with pytest.raises(BadInput, match="trained on"):
        mask_study.evaluate_mask(lm, bare, {})
    with pytest.raises(BadInput, match="not for this"):
        mask_study.evaluate_mask(tiny("gpt2", seed=1), judged.mask, {})


def test_a_method_without_factors_and_a_layer_without_edit_are_refused() -> None:
    lm = tiny("gpt2")
    with pytest.raises(BadInput, match="rome or memit"):
        mask_study.edit_all(lm, "ft", {}, [])
    edits = mask_study.edit_all(lm, "rome", {}, mask_study.split(1, 1).train, given=QUICK)
    with pytest.raises(BadInput, match="layer 2"):
        mask_study.layer_of(lm, edits, 2)
    with pytest.raises(UnknownName):
        mask_study.settings_of("best", 0.1, None)


def test_the_commands_are_understood() -> None:
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers(parser_class=type(build_parser())))
    train = parser.parse_args(["mask", "train", "--model", "atlas-gpt2", "--n", "20", "--out", "x.mask"])
    assert (train.method, train.n, train.layer, train.pruned) == ("rome", 20, "auto", 0.1)
    judge = parser.parse_args(["mask", "evaluate", "--mask", "x.mask"])
    assert judge.n == 100
