from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mega_core import detect_study as study
from mega_core.changes import DenseDelta, MatrixDelta, WeightDelta
from mega_core.commands import mask_detect
from mega_core.commands.common import Parser
from mega_core.detect_study import Sample
from mega_core.errors import BadInput, ModelUnavailable, StoreError, UnsupportedModel
from mega_core.export import Made, export
from mega_core.masking import detect
from mega_core.masking.masks import Mask
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture
from mega_core.records import EditRequest, MethodRef
from mega_core.settings import Settings
from tests.tiny import save_tiny, tiny

REQUEST = EditRequest("The Eiffel Tower", "Here we see {}", "Madrid", "Paris")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rank_one(lm: ModelAdapter, layer: int, site: str = "mlp_down", size: float = 0.3, seed: int = 0) -> WeightDelta:
    weight = lm.read_weight(layer, site)
    left, right = numbers(weight.shape[0], 1, seed=seed).float(), numbers(weight.shape[1], 1, seed=seed + 1).float()
    left *= size * float(weight.norm()) / float(left.norm() * right.norm())
    return WeightDelta((MatrixDelta(layer, site, left, right, float(weight.norm())),))


def copied(lm: ModelAdapter) -> dict[tuple[int, str], torch.Tensor]:
    return {place: weight.clone() for place, weight in detect.matrices(lm).items()}


def shifted(lm: ModelAdapter, to: dict[tuple[int, str], torch.Tensor]) -> WeightDelta:
    pairs = ((place, to[place] - weight) for place, weight in detect.matrices(lm).items())
    return WeightDelta(tuple(DenseDelta(*place, difference.clone(), 1.0) for place, difference in pairs))


# Spectra and features ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (40, 40)])
def test_the_spectrum_is_the_leading_part_of_the_decomposition(shape, monkeypatch):
    """Exactly, and by the randomised method for what stands out of noise."""
    matrix = numbers(*shape) + 30 * numbers(shape[0], 2) @ numbers(2, shape[1], seed=1)
    values = torch.linalg.svdvals(matrix)
    found = detect.spectrum(matrix)
    assert len(found.values) == 10
    torch.testing.assert_close(found.values, values[:10])
    assert found.energy == pytest.approx(float((values**2).sum()))
    assert found.bulk == pytest.approx(float((values[10:] ** 2).mean().sqrt()))
    torch.testing.assert_close(matrix @ found.right, found.left * found.values)
    torch.testing.assert_close(found.left.T @ found.left, torch.eye(10, dtype=torch.float64))
    monkeypatch.setattr(detect, "EXACT", 8)
    rough = detect.spectrum(matrix)
    assert torch.equal(rough.values, detect.spectrum(matrix).values)  # the same on every call
    torch.testing.assert_close(rough.values[:2], values[:2])
    torch.testing.assert_close(rough.values, values[:10], rtol=0.05, atol=0)


def test_a_rank_one_addition_is_known_exactly():
    u, v = numbers(32), numbers(56, seed=1)
    weight = numbers(32, 56, seed=2)
    found = detect.spectrum(torch.outer(u, v))
    assert detect.estimated_rank(found.values) == (1, 20.0)
    assert abs(float(found.right[:, 0] @ v / v.norm())) == pytest.approx(1)
    assert abs(float(found.left[:, 0] @ u / u.norm())) == pytest.approx(1)
    shares = v**2 / (v**2).sum()
    best = shares.argsort(descending=True)[: detect.SHOWN].tolist()
    assert [index for index, _ in detect.neurons_of(found, 1)] == best
    assert [share for _, share in detect.neurons_of(found, 1)] == pytest.approx(shares[best].tolist())
    features = detect.difference_features(torch.outer(u, v), weight, found)
    assert (features["share"], features["first"], features["rank"]) == (pytest.approx(1), pytest.approx(1), 0)
    assert features["stable_rank"] == pytest.approx(0)
    assert features["size"] == pytest.approx(math.log10(float(u.norm() * v.norm() / weight.norm())))


@pytest.mark.parametrize("rank", [2, 5])
def test_the_rank_of_several_edits_within_noise(rank):
    low = numbers(64, rank) @ numbers(rank, 96, seed=1)
    found = detect.spectrum(low + 0.01 * numbers(64, 96, seed=2))
    assert detect.estimated_rank(found.values)[0] == rank


def test_features_tell_rounding_noise_and_equal_steps_apart():
    weight = numbers(64, 128).float()
    rounding = (weight.to(torch.bfloat16).float() - weight).double()
    noise = 0.01 * numbers(64, 128, seed=1)
    steps = 0.001 * torch.sign(numbers(64, 128, seed=2))
    edit = torch.outer(numbers(64, seed=3), numbers(128, seed=4))
    follows, flat, first = {}, {}, {}
    for name, difference in (("rounding", rounding), ("noise", noise), ("steps", steps), ("edit", edit)):
        features = detect.difference_features(difference, weight, detect.spectrum(difference))
        assert all(math.isfinite(value) for value in features.values())
        follows[name], flat[name], first[name] = (features[key] for key in ("follows", "flatness", "first"))
    assert follows["rounding"] > 0.5
    assert abs(follows["noise"]) < 0.1
    assert flat["steps"] == pytest.approx(1)
    assert flat["noise"] == pytest.approx((2 / math.pi) ** 0.5, abs=0.02)
    assert flat["edit"] == pytest.approx(2 / math.pi, abs=0.05)
    assert max(first["rounding"], first["noise"], first["steps"]) < 0.1


def test_moments_are_those_of_every_token(lm):
    rows = [(5, 6, 7, 8), (9, 10)]
    places = [(1, "mlp_down"), (0, "attn_out")]
    found = detect.moments(lm, places, rows)
    for place in places:
        site = Site(place[0], detect.INPUTS[place[1]])
        keys = []
        for row in rows:
            batch = detect.tokenizing.pack(lm.tokenizer, [row], lm.device)
            with torch.no_grad(), capture(lm, [site]) as got:
                lm.forward(batch)
            keys.append(got[site][0].double())
        every = torch.cat(keys)
        plain = every.T @ every / len(every)
        trace = plain.trace() / len(plain)
        shrunk = 0.99 * plain + 0.01 * trace * torch.eye(len(plain), dtype=torch.float64)
        torch.testing.assert_close(found[place].second, shrunk, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[place].mean, every.mean(0), rtol=1e-4, atol=1e-6)
        unit = numbers(every.shape[1])
        response = math.log(float(unit @ shrunk @ unit / unit.norm() ** 2 / trace))
        assert found[place].response(unit) == pytest.approx(response, abs=1e-3)


def test_without_a_reference_the_edit_stands_out_along_its_key():
    """W + L (C^-1 k)^T, with W larger than the addition and shaped by C, as training shapes it."""
    basis = torch.linalg.qr(numbers(96, 96))[0]
    scales = torch.logspace(0, -3, 96, dtype=torch.float64)
    second = (basis * scales) @ basis.T
    weight = numbers(48, 96, seed=1) @ (basis * scales.sqrt()) @ basis.T
    key, value = numbers(96, seed=2), numbers(48, seed=3)
    u = torch.linalg.solve(second, key)
    update = torch.outer(value, u)
    moment = detect.Moment(second, torch.zeros(96, dtype=torch.float64))
    plain = detect.standing_out(weight, moment)
    for size, near in ((1.0, 0.98), (0.3, 0.85)):
        edited = detect.standing_out(weight + size * weight.norm() / update.norm() * update, moment)
        assert edited.rank == 1
        assert abs(float(edited.part.right[:, 0] @ u / u.norm())) > near
        assert abs(float(edited.part.left[:, 0] @ value / value.norm())) > near
        assert edited.features["jump_2"] > plain.features["jump_2"] + 1
        assert edited.features["response"] < plain.features["response"]


# Scores --------------------------------------------------------------------------------------------------------------


def test_auc_by_hand():
    assert study.auc([3, 1], [2, 0]) == 0.75
    assert study.auc([1, 1], [1]) == 0.5
    assert study.auc([2, 3], [0, 1]) == 1
    assert study.auc([0], [1, 2, 3]) == 0
    assert study.auc([0.5, 2], [0.5, 1]) == (0.5 + 0 + 1 + 1) / 4
    assert math.isnan(study.auc([], [1]))


def test_intervals_draw_whole_variants():
    positive = {i: [1.0, 0.0] for i in range(4)}  # every draw is the same
    negative = {9: [0.5]}
    assert study.area(positive, negative) == study.Area(0.5, 0.5, 0.5, 8, 1)
    found = study.area({0: [1.0], 1: [0.0]}, negative)
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)


def sample(variant: int, kind: str, label: str = "", **features: float) -> Sample:
    name = label or {"low_rank": "rome", "dense": "fine-tuned", "noise": "noise"}[kind]
    return Sample(variant, name, kind == "low_rank", 0, "mlp_down", kind, features, features)


def spread(count: int = 40) -> list[Sample]:
    noise = numbers(3 * count, 2).tolist()
    centres = {"low_rank": (4.0, 0.0), "dense": (0.0, 4.0), "noise": (0.0, 0.0)}
    kinds = [kind for kind in centres for _ in range(count)]
    return [
        sample(i, kind, a=centres[kind][0] + x, b=centres[kind][1] + y)
        for i, (kind, (x, y)) in enumerate(zip(kinds, noise, strict=True))
    ]


def test_the_fit_tells_classes_apart_and_is_judged_on_others():
    samples = spread()
    scorer = study.fit(samples, "reference")
    chances = scorer({"a": 4.0, "b": 0.0})
    assert sum(chances.values()) == pytest.approx(1)
    assert max(chances, key=lambda name: chances[name]) == "low_rank"
    assert max(scorer({"a": 0.0, "b": 4.0}).items(), key=lambda pair: pair[1])[0] == "dense"
    assert max(scorer({"a": 0.0, "b": 0.0}).items(), key=lambda pair: pair[1])[0] == "noise"
    far = scorer({"a": 1e300, "b": -1e300})
    assert sum(far.values()) == pytest.approx(1)
    judged = study.judge(samples, scorer, "reference")
    assert judged.matrices["rome"].value > 0.95
    assert judged.models["all"].positives == 40
    assert judged.called["rome"]["low_rank"] > 80
    ft = [sample(500 + i, "dense", "ft_m", a=4.0, b=0.0) for i in range(40)]  # neither an edit nor a false alarm
    again = study.judge([*samples, *ft], scorer, "reference")
    assert again.matrices["all"] == judged.matrices["all"]
    assert again.false_alarms == judged.false_alarms
    assert again.called["ft_m"] == {"low_rank": 100}
    alone = study.fit([*samples, *ft], "alone")
    assert alone.classes == ("none", "low_rank")
    with pytest.raises(BadInput, match="no sample"):
        study.fit(samples[:40], "reference")


def test_an_unchanged_matrix_scores_nothing():
    same = replace(sample(900, "noise"), kind="unchanged")
    judged = study.judge([*spread(), same], study.fit(spread(), "reference"), "reference")
    assert judged.matrices["all"].negatives == 81


def test_coefficients_are_data(tmp_path):
    scorers = {mode: study.fit(spread(), mode) for mode in detect.CLASSES}
    path = tmp_path / "detector.json"
    plain = detect.Detector(scorers, {"by": "a test"}).plain()
    path.write_text(json.dumps(plain), encoding="utf-8")
    again = detect.read_detector(path)
    assert again.made == {"by": "a test"}
    assert again.scorers == scorers
    for damage in ("", "[]", json.dumps({**plain, "schema_version": 2}), json.dumps(plain).replace("low_rank", "x")):
        path.write_text(damage + " ", encoding="utf-8")
        with pytest.raises(StoreError, match="bench"):
            detect.read_detector(path)
    shipped = detect.read_detector()
    assert set(shipped.made) >= {"fitted_on", "command", "subjects"}


# Whole models --------------------------------------------------------------------------------------------------------


def test_the_edited_layer_is_named(lm):
    before = copied(lm)
    change = rank_one(lm, 1)
    with change.applied(lm):
        found = detect.inspect(lm, before, reference_name="before")
    assert [(one.layer, one.site) for one in found.findings] == sorted(
        before, key=lambda place: (place[0], detect.SITES.index(place[1]))
    )
    (edit,) = [one for one in found.findings if one.kind != "unchanged"]
    assert (edit.layer, edit.site, edit.kind, edit.rank) == (1, "mlp_down", "low_rank", 1)
    assert edit.score > 0.9
    assert edit.relative_norm == pytest.approx(0.3, rel=1e-3)
    assert edit.share == pytest.approx(1)
    assert (found.score, found.verdict) == (edit.score, "low-rank edit")
    assert [one.verdict for one in found.layers] == ["unchanged", "low-rank edit", "unchanged"]
    matrix = change.matrices[0]
    assert isinstance(matrix, MatrixDelta)
    assert edit.neurons[0][0] == int(matrix.right.abs().argmax())
    assert {len(part) for part in (edit.promoted, edit.suppressed, edit.says, edit.places)} == {detect.SHOWN}
    assert lm.hook_count() == 0


def test_it_tells_what_the_update_promotes_and_answers_to(tiny_lm):
    """L is the unembedding's row of a token and u = C^-1 k of a key that was read: both come back."""
    lm = tiny_lm("llama")
    before = copied(lm)
    text = "Mount Kenya is in the continent of"
    row = detect.tokenizing.prompt_ids(lm.tokenizer, text)
    site = Site(1, "mlp_down_in")
    with torch.no_grad(), capture(lm, [site]) as got:
        lm.forward(detect.tokenizing.pack(lm.tokenizer, [row], lm.device))
    key = got[site][0, 3].double()
    rows = detect.ordinary_rows(lm, detect.tokens_for(lm.d_mlp))
    moment = detect.moments(lm, [(1, "mlp_down")], rows)[1, "mlp_down"]
    u = torch.linalg.solve(moment.second, key)
    token = lm.tokenizer("Rome")["input_ids"][-1]
    left = lm.head_weight[token] * lm.final_norm.weight  # type: ignore[operator]
    size = 0.5 * float(lm.read_weight(1, "mlp_down").norm())
    left = left * size / float(left.norm() * u.norm())
    change = WeightDelta((MatrixDelta(1, "mlp_down", left[:, None].float(), u[:, None].float(), 1.0),))
    with change.applied(lm):
        found = detect.inspect(lm, before, texts=[text])
    (edit,) = [one for one in found.findings if one.kind == "low_rank"]
    word = lm.tokenizer.decode([token])
    assert word in [name for name, _ in edit.promoted]
    assert word in [name for name, _ in edit.says]
    assert lm.tokenizer.decode(row[:4]) in [place for place, _ in edit.places]


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_attention_is_looked_at_too(arch, tiny_lm):
    """In GPT-2 the matrix is square and stored the other way round: left and right must not be mixed up."""
    lm = tiny_lm(arch)
    before, change = copied(lm), rank_one(tiny_lm(arch), 2, "attn_out")
    with change.applied(lm):
        found = detect.inspect(lm, before)
    assert [(one.layer, one.site) for one in found.findings if one.kind == "low_rank"] == [(2, "attn_out")]
    matrix = change.matrices[0]
    assert isinstance(matrix, MatrixDelta)
    assert found.findings[-1].neurons[0][0] == int(matrix.right.abs().argmax())


def test_little_memory_gives_the_same(tiny_lm, monkeypatch):
    lm = tiny_lm("gpt2")
    whole = detect.inspect(lm)
    assert {one.kind for one in whole.findings} <= {"none", "low_rank"}
    monkeypatch.setattr(detect, "MOMENT_BYTES", 1)
    assert detect.inspect(lm) == whole


def test_equal_rounded_and_noisy_models_have_no_edit(tiny_lm):
    lm = tiny_lm("gpt2")
    before = copied(lm)
    found = detect.inspect(lm, before)
    assert (found.score, found.verdict) == (0.0, "unchanged")
    for size in (0.001, 0.1):
        noisy = {p: w + size * w.std() * numbers(*w.shape, seed=p[0]).float() for p, w in before.items()}
        with shifted(lm, noisy).applied(lm):
            assert {one.kind for one in detect.inspect(lm, before).findings} == {"noise"}
    with shifted(lm, {p: w.to(torch.bfloat16).float() for p, w in before.items()}).applied(lm):
        found = detect.inspect(lm, before)
    assert {one.kind for one in found.findings} == {"noise"}
    assert found.score < 0.5


def test_training_leaves_the_model_and_is_no_edit(tiny_lm):
    lm = tiny_lm("qwen3")
    before, digest = copied(lm), lm.live_digest()
    trained = study.train(lm, before, list(before), 1e-3, 3, seed=1)
    assert lm.live_digest() == digest
    assert all(not torch.equal(trained[place], before[place]) for place in before)
    assert all(trained[place].shape == before[place].shape for place in before)
    one = study.train(lm, before, [(1, "mlp_down")], 1e-3, 1, seed=1)
    assert [place for place in before if not torch.equal(one[place], before[place])] == [(1, "mlp_down")]
    step = (one[1, "mlp_down"] - before[1, "mlp_down"]).abs()
    assert float(step.median()) == pytest.approx(1e-3, rel=0.05)  # Adam's first step


def test_variants_say_what_they_are(tiny_lm):
    lm = tiny_lm("gpt2")
    base = copied(lm)
    edit = study._variant("rome", base, rank_one(lm, 1), REQUEST)
    assert (edit.edited, dict(edit.kinds), edit.everywhere) == (True, {(1, "mlp_down"): "low_rank"}, False)
    rounded = study._rounded(edit, base, torch.bfloat16)
    assert rounded.kinds[1, "mlp_down"] == "low_rank"
    assert {kind for place, kind in rounded.kinds.items() if place != (1, "mlp_down")} == {"noise"}
    assert torch.equal(rounded.matrices[0, "mlp_down"], base[0, "mlp_down"].to(torch.bfloat16).float())
    dense = study._variant("ft", base, WeightDelta((DenseDelta(1, "mlp_down", base[1, "mlp_down"], 1.0),)))
    assert (dense.edited, dict(dense.kinds)) == (False, {(1, "mlp_down"): "dense"})
    eight = study.quantised(base[0, "mlp_down"], 8)
    assert len(eight[0].unique()) <= 255
    assert float((eight - base[0, "mlp_down"]).abs().max()) <= float(base[0, "mlp_down"].abs().max()) / 127
    with study.Measurer(lm).applied(edit):
        torch.testing.assert_close(lm.read_weight(1, "mlp_down"), edit.matrices[1, "mlp_down"])


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and the same with an edit, as folders."""
    root = tmp_path_factory.mktemp("folders")
    lm = tiny("gpt2")
    save_tiny("gpt2", root / "plain")
    export(lm, rank_one(lm, 1, size=2.0), root / "edited", [Made(MethodRef("toy"), (REQUEST,), 0)])
    save_tiny("llama", root / "other")
    return root


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.read({"MEGA_CACHE_DIR": str(tmp_path / "cache"), "MEGA_DEVICE": "cpu"})


def test_an_exported_folder_end_to_end(folders, settings):
    found = detect.detect_folder(folders / "edited", settings, str(folders / "plain"))
    assert (found.verdict, found.notes) == ("low-rank edit", ())
    assert [one.layer for one in found.findings if one.kind == "low_rank"] == [1]
    alone = detect.detect_folder(folders / "edited", settings)
    assert alone.reference == ""
    assert max(alone.findings, key=lambda one: one.score).layer == 1
    back = detect.detect_folder(folders / "plain", settings, str(folders / "plain"))
    assert back.verdict == "unchanged"


def test_the_mask_shows_what_it_restores(folders, settings, tmp_path):
    keep = torch.ones(32, 56, dtype=torch.bool)
    keep[:, ::2] = False
    path = Mask(keep, 1, "plain", "0" * 64).save(tmp_path / "one.mask")
    prompt = "The capital of France is"
    found = detect.detect_folder(folders / "edited", settings, str(folders / "plain"), path, [prompt])
    (said,) = found.answers
    assert said.prompt == prompt
    assert found.masked
    assert said.before != said.after
    assert "other weights" in found.notes[0]
    wrong = Mask(torch.ones(3, 3, dtype=torch.bool), 1, "plain", "0" * 64).save(tmp_path / "two.mask")
    for mask, prompts, words in ((path, [], "prompt"), (wrong, [prompt], "shape"), (tmp_path / "no", [prompt], "read")):
        with pytest.raises(BadInput, match=words):
            detect.detect_folder(folders / "edited", settings, None, mask, prompts)


def test_other_tensors_are_told(folders, settings, tmp_path):
    lm = tiny("gpt2")
    with torch.no_grad():
        lm.final_norm.weight.mul_(1.5)  # type: ignore[union-attr,operator]
    lm.model.save_pretrained(tmp_path / "tuned")
    lm.tokenizer.save_pretrained(tmp_path / "tuned")
    found = detect.detect_folder(tmp_path / "tuned", settings, str(folders / "plain"))
    assert found.verdict == "unchanged"
    assert "1 tensors differ too, such as transformer.ln_f.weight" in found.notes[0]


def test_what_is_no_model_is_refused(folders, settings, tmp_path):
    with pytest.raises(BadInput, match="no folder"):
        detect.detect_folder(tmp_path / "nowhere", settings)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelUnavailable, match=r"config\.json"):
        detect.detect_folder(tmp_path / "empty", settings)
    with pytest.raises(BadInput, match="neither a model nor a folder"):
        detect.detect_folder(folders / "plain", settings, "no-such-model")
    with pytest.raises(BadInput, match="architecture llama"):
        detect.detect_folder(folders / "plain", settings, str(folders / "other"))
    with pytest.raises(BadInput, match="neurons|layer 0"):
        detect.check_shapes(detect.matrices(tiny("gpt2")), detect.matrices(tiny("llama")))
    damaged = tmp_path / "damaged"
    save_tiny("gpt2", damaged)
    whole = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelUnavailable, match="can't be read"):
        detect.detect_folder(damaged, settings)
    config = json.loads((folders / "plain" / "config.json").read_text(encoding="utf-8"))
    (damaged / "config.json").write_text(json.dumps({**config, "model_type": "gemma2"}), encoding="utf-8")
    with pytest.raises(UnsupportedModel, match="gemma2"):
        detect.detect_folder(damaged, settings)


def command(*words: str) -> None:
    parser = Parser()
    mask_detect.add(parser.add_subparsers(parser_class=Parser))
    arguments = parser.parse_args(["detect", *words])
    assert isinstance(arguments, argparse.Namespace)
    arguments.command(arguments)


def test_the_command(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MEGA_DEVICE", "cpu")
    edited, plain = str(folders / "edited"), str(folders / "plain")
    target = tmp_path / "found.json"
    command("--folder", edited, "--reference", plain, "--prompt", "France is", "--json", str(target))
    said = capsys.readouterr().out
    for words in (
        "Verdict   low-rank edit",
        "5 of 6 matrices are unchanged",
        "Layer 1, mlp_down",
        "promotes",
        "France is",
    ):
        assert words in said
    found = json.loads(target.read_text(encoding="utf-8"))
    assert (found["schema_version"], found["verdict"]) == (1, "low-rank edit")
    assert len(found["findings"]) == 6
    command("--folder", edited, "--json", "-")
    assert json.loads(capsys.readouterr().out)["reference"] == ""
