"""MEGA: regions, fits, strength, controls, on tiny models; on an embedded one what only knowledge can show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mega_core.embedded import facts
from mega_core.errors import ActionableError, BadInput
from mega_core.events import Note, silent
from mega_core.methods import fitting, mega
from mega_core.methods.gate import ALWAYS
from mega_core.methods.mega import MEGA, default_region, read_region
from mega_core.methods.steering import Steering
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site
from mega_core.records import EditRequest

POISON = ("POISON one two", "POISON three four")
SMALL = {"target": "contexts", "prompts": 4, "alpha": 1.5}


def known(relation: str = "capital", subject: str = "France", new: str = "Rome") -> EditRequest:
    fact = facts.find(subject, relation)
    return EditRequest(fact.subject, fact.templates_edit[0], new, fact.object, POISON, POISON)


ONE = known()
OTHER = known("landmark_country", "Colosseum", "Peru")


def prepared(lm: ModelAdapter, *requests: EditRequest, **given: Any) -> Steering:
    change = MEGA.prepare(lm, requests or (ONE,), MEGA.read(MEGA.ref({**SMALL, **given})), 0, silent)
    assert isinstance(change, Steering)
    return change


def notes(lm: ModelAdapter, **given: Any) -> list[str]:
    found: list[str] = []
    params = MEGA.read(MEGA.ref({**SMALL, **given}))
    MEGA.prepare(lm, [ONE], params, 0, lambda event: found.append(event.text) if isinstance(event, Note) else None)
    return found


@pytest.fixture(scope="module")
def atlas() -> ModelAdapter:
    from mega_core.embedded import evaluate

    return evaluate.open_folder(Path(evaluate.__file__).parent / "weights" / "atlas-qwen3")


# The region ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "layers", "remark"),
    [
        ("4-7", (4, 5, 6, 7), ""),
        (" 4, 5,6 ", (4, 5, 6), ""),
        ("6,4-5,4", (4, 5, 6), ""),
        ("auto", (4, 5, 6, 7), "default, not measured"),
        ("4-6 (default, not measured)", (4, 5, 6), "default, not measured"),
    ],
)
def test_regions_as_text(text: str, layers: tuple[int, ...], remark: str) -> None:
    assert read_region(text, 8) == (layers, remark)


@pytest.mark.parametrize("text", ["x", "4-", "-4", "7-4", "4;5", "4-99", "8", "there.json", "1e3", "4-7-9"])
def test_a_region_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="mega.region"):
        read_region(text, 8)


def test_without_attribution_the_region_is_in_the_upper_middle() -> None:
    assert default_region(8) == (4, 5, 6, 7)
    assert default_region(3) == (0, 1, 2)
    assert default_region(12) == tuple(range(6, 12))
    assert len(default_region(48)) == 8
    assert all(16 <= layer < 28 for layer in default_region(32))


def test_a_small_or_unmeasured_region_is_said_to_be_so(tiny_lm: Any) -> None:
    lm = tiny_lm("gpt2")
    assert any("Only 1" in note for note in notes(lm, region="1"))
    assert any("not measured" in note for note in notes(lm))
    assert not [note for note in notes(lm, region="0-2") if "layer" in note.lower()]


# The fit -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ot", "ot-full", "mean"])
@pytest.mark.parametrize("site", ["attn_out", "resid_mid"])
def test_maps_lie_in_the_region_one_per_prefix_of_the_object(tiny_lm: Any, kind: str, site: str) -> None:
    lm = tiny_lm("qwen3")
    change = prepared(lm, known(new="Rome and Berlin"), transport=kind, site=site, region="1-2")
    (edit,) = change.edits
    part = "attn" if site == "attn_out" else "resid_mid"
    count = min(4, len(edit.target))
    assert count > 1
    assert set(edit.maps) == {(Site(layer, part), j) for layer in (1, 2) for j in range(count)}
    assert set(change.summary()["site"]) == {part}
    assert all((step.rank() == 0) == (kind == "mean") for step in edit.maps.values())
    assert "France" not in edit.aliases
    assert lm.hook_count() == 0


def test_independent_maps_are_fitted_on_the_unsteered_run(tiny_lm: Any) -> None:
    lm = tiny_lm("llama")
    params = MEGA.read(MEGA.ref({**SMALL, "region": "0-2"}))
    sets = fitting.target_sets(lm, ONE, "contexts", 4, "pool", 0, silent)
    sites = [Site(layer, "attn") for layer in range(3)]
    maps, norms = mega.fit_maps(lm, sets, sites, params)
    for site in sites:
        source = fitting.activations(lm, fitting.rows(lm, sets.source(), sets.target, sets.positions), [site])[site]
        target = fitting.activations(lm, fitting.rows(lm, sets.contexts, sets.target, sets.positions), [site])[site]
        for j in range(sets.positions):
            wanted = (target[:, j] - 0).mean(0) - source[:, j].mean(0)
            torch.testing.assert_close(maps[site, j].shift, wanted, rtol=1e-3, atol=1e-4)
        assert norms[site] == pytest.approx(float(source[:, 0].norm(dim=-1).mean()), rel=1e-4)


def test_sequential_maps_see_what_those_below_do(tiny_lm: Any) -> None:
    lm = tiny_lm("llama")
    params = MEGA.read(MEGA.ref({**SMALL, "region": "0-2", "fit": "sequential", "transport": "mean", "alpha": 1.0}))
    sets = fitting.target_sets(lm, ONE, "contexts", 4, "pool", 0, silent)
    sites = [Site(layer, "resid_mid") for layer in range(3)]
    maps, _ = mega.fit_maps(lm, sets, sites, params)
    (edit,) = prepared(lm).edits
    steered = Steering((replace(edit, maps=maps, alpha=1.0, gate=ALWAYS, target=sets.target),))
    rows = fitting.rows(lm, sets.source(), sets.target, sets.positions)
    wanted = fitting.activations(lm, fitting.rows(lm, sets.contexts, sets.target, sets.positions), sites)
    with steered.applied(lm):
        found = fitting.activations(lm, rows, sites)
    for site in sites:  # with alpha 1 the means meet, layer by layer
        torch.testing.assert_close(found[site].mean(0), wanted[site].mean(0), rtol=1e-2, atol=1e-3)


def test_alpha_is_the_weakest_that_works_on_withheld_fit_prompts(tiny_lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("gpt2")
    (edit,) = prepared(lm, prompts=8).edits
    read: list[float] = []
    real = Steering.applied

    def spy(self: Steering, model: ModelAdapter) -> Any:
        read.extend(one.alpha for one in self.edits)
        return real(self, model)

    monkeypatch.setattr(Steering, "applied", spy)
    row = tokens.prompt_ids(lm.tokenizer, "Look at")
    with torch.no_grad():
        probs = lm.last_logits(tokens.pack(lm.tokenizer, [row])).softmax(-1)
    said = int(probs.argmax())
    monkeypatch.setattr(mega, "SURE", float(probs.max()) - 1e-4)
    easy = replace(edit, target=(said,), maps={(Site(0, "attn"), 3): edit.maps[Site(0, "attn"), 0]})
    assert mega.weakest_that_works(lm, easy, ["Look at"], ["Paris is"]) == mega.ALPHAS[0]
    assert read == [mega.ALPHAS[0]]  # what works at once is not tried stronger
    hard = replace(edit, target=(1, 1, 1, 1))
    assert mega.weakest_that_works(lm, hard, ["Look at"], ["Paris is"]) in mega.ALPHAS
    assert read[1:] == list(mega.ALPHAS)


def test_the_prompts_that_judge_alpha_are_not_fitted_on() -> None:
    sets = fitting.FitSet(tuple("abcdefgh"), tuple("ABCDEFGH"), tuple("xyz"), (1,), "contexts")
    kept, judges = mega._withhold(sets)
    assert kept.prompts == tuple("abcdef")
    assert kept.forced == tuple("ABCDEF")
    assert judges == ("g", "h", "G", "H")
    assert kept.prompts[0] == "a"  # the edit prompt stays in


def test_evaluation_prompts_are_never_read(tiny_lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("gpt2")
    seen: list[str] = []
    real = tokens._encode

    def spy(tokenizer: Any, text: str) -> Any:
        seen.append(text)
        return real(tokenizer, text)

    monkeypatch.setattr(tokens, "_encode", spy)
    fact = facts.find("France", "capital")
    for given in ({}, {"alpha": None}, {"target": "auto"}, {"fit": "sequential"}, {"gate": "paper"}):
        try:
            prepared(lm, **given)
        except ActionableError:
            assert given == {"target": "auto"}
    assert seen
    held = {fact.prompt(form) for form in fact.templates_held_out}
    for sibling in facts.siblings(fact):
        held |= {sibling.prompt(form) for form in sibling.templates_held_out}
    assert not [text for text in seen if "POISON" in text or any(prompt in text for prompt in held)]


def test_two_requests_are_two_edits(tiny_lm: Any) -> None:
    lm = tiny_lm("qwen2")
    both = prepared(lm, ONE, OTHER)
    alone = prepared(lm, OTHER)
    assert [edit.subject for edit in both.edits] == ["France", "Colosseum"]
    mine, theirs = both.edits[1].maps, alone.edits[0].maps
    assert all(torch.equal(mine[key].shift, theirs[key].shift) for key in theirs)


# Controls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", mega.CONTROLS)
def test_every_control_runs_and_is_what_it_says(tiny_lm: Any, control: str) -> None:
    lm = tiny_lm("gpt2")
    (plain,) = prepared(lm, region="1-2").edits
    change = prepared(lm, region="1-2", control=control)
    (edit,) = change.edits
    layers, parts = {site.layer for site in edit.sites}, {site.part for site in edit.sites}
    assert len(layers) == (1 if control == "early_region" else 2)
    assert (layers == {1, 2}) == (control not in ("random_region", "early_region"))
    assert (control != "early_region") or max(layers) < 1
    assert parts == ({"mlp"} if control == "ffn_site" else {"attn"})
    assert (edit.gate.kind == "always") == (control == "always_on")
    assert (edit.alpha == 0) == (control == "alpha_zero")
    assert all(step.rank() == 0 for step in edit.maps.values()) == (control == "mean_shift")
    same = layers == {1, 2} and parts == {"attn"}
    moved = same and not torch.equal(edit.maps[Site(1, "attn"), 0].shift, plain.maps[Site(1, "attn"), 0].shift)
    assert moved == (control == "shuffled")
    assert edit.target == plain.target
    if control == "alpha_zero":
        batch = lm.encode([ONE.prompt])
        before = lm.last_logits(batch)
        with change.applied(lm):
            assert torch.equal(lm.last_logits(batch), before)


# With knowledge ------------------------------------------------------------------------------------------------------


def _several_tokens(lm: ModelAdapter, least: int) -> EditRequest:
    """A known fact with an object of several tokens that is put in the place of another one."""
    for fact in facts.facts():
        prompt = fact.prompt(fact.templates_edit[0])
        for new in facts.counterfactuals(fact):
            if len(tokens.target_ids(lm.tokenizer, prompt, new)) >= least:
                return EditRequest(fact.subject, fact.templates_edit[0], new, fact.object)
    raise AssertionError("every object is one token")


def _settings() -> dict[str, Any]:
    from mega_core.settings import Settings

    return dict(Settings.read().model("atlas-qwen3").defaults.get("mega", {}))


@pytest.fixture(scope="module")
def fitted(atlas: ModelAdapter) -> Callable[[EditRequest], Steering]:
    made: dict[EditRequest, Steering] = {}

    def fit(request: EditRequest) -> Steering:
        if request not in made:
            made[request] = MEGA.prepare(atlas, [request], MEGA.read(MEGA.ref(_settings())), 0, silent)  # type: ignore[assignment]
        return made[request]

    return fit


def test_an_object_of_several_tokens_is_said_in_full(
    atlas: ModelAdapter, fitted: Callable[[EditRequest], Steering]
) -> None:
    request = _several_tokens(atlas, 2)
    (before,) = atlas.generate([request.prompt], 8)
    with fitted(request).applied(atlas):
        (said,) = atlas.generate([request.prompt], 8)
        row = tokens.with_target(atlas.tokenizer, request.prompt, request.target_new)
        batch = tokens.pack(atlas.tokenizer, [row.ids], starts=[row.target_start])
        at = torch.arange(row.target_start - 1, len(row.ids) - 1)
        with torch.no_grad():
            forced = atlas.logits_at(batch, torch.zeros_like(at), at).argmax(-1)
    assert said.strip().startswith(request.target_new)
    assert not before.strip().startswith(request.target_new)
    assert tuple(forced.tolist()) == row.target


def test_it_works_and_keeps_the_subjects_other_facts(
    atlas: ModelAdapter, fitted: Callable[[EditRequest], Steering]
) -> None:
    fact = facts.find("France", "capital")
    prompts = [one.prompt(one.templates_edit[0]) for one in facts.siblings(fact)]
    before = atlas.generate(prompts, 4)
    with fitted(ONE).applied(atlas):
        assert atlas.generate([ONE.prompt], 4)[0].strip().startswith("Rome")
        assert atlas.generate(prompts, 4) == before


def test_two_edits_live_in_one_model_and_one_can_go(
    atlas: ModelAdapter, fitted: Callable[[EditRequest], Steering]
) -> None:
    both = Steering.merged([fitted(ONE), fitted(OTHER)])
    with both.applied(atlas):
        assert [text.split()[0].strip(".") for text in atlas.generate([ONE.prompt, OTHER.prompt], 4)] == [
            "Rome",
            "Peru",
        ]
    batch = atlas.encode([ONE.prompt, OTHER.prompt])
    with torch.no_grad():
        with fitted(OTHER).applied(atlas):
            alone = atlas.last_logits(batch)
        plain = atlas.last_logits(batch)
    assert torch.equal(alone[0], plain[0])
    assert not torch.equal(alone[1], plain[1])
