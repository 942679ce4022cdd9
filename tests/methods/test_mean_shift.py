"""The mean shift: what it adds, where, and that it refuses places that are not there."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from mega_core.embedded.examples import candidates
from mega_core.errors import BadInput
from mega_core.events import silent
from mega_core.methods import METHODS, fitting
from mega_core.methods.gate import known_fact
from mega_core.methods.mean_shift import MEAN_SHIFT, prepare
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import FINAL, Site, capture
from mega_core.records import EditRequest

EMBEDDED = Path(__file__).resolve().parents[2] / "mega_core" / "embedded" / "weights"
TOWER = EditRequest("The Eiffel Tower", "Look at {}", "Madrid", "Paris")
PARTS = ("attn", "resid_mid", "mlp", "block_out")


def _params(**given):
    return MEAN_SHIFT.read(MEAN_SHIFT.ref({"target": "contexts", "prompts": 5, **given}))


def test_it_is_registered() -> None:
    assert METHODS["mean_shift"] is MEAN_SHIFT
    assert MEAN_SHIFT.family == "steering"


@pytest.mark.parametrize("part", PARTS)
def test_the_shift_is_the_difference_of_the_means_times_alpha(lm: ModelAdapter, part: str) -> None:
    site = Site(1, part)
    fit = fitting.target_sets(lm, TOWER, "contexts", 5, "pool", 0)
    means = []
    for texts in (fit.source(), fit.contexts):
        states = []
        for text in texts:
            with torch.no_grad(), capture(lm, [site]) as got:
                lm.forward(lm.encode([text]))
            states.append(got[site][0, -1])
        means.append(torch.stack(states).mean(0))
    with torch.no_grad(), capture(lm, [site]) as got:
        lm.forward(lm.encode([TOWER.prompt]))
    plain = got[site][0]
    change = prepare(lm, [TOWER], _params(layers="1", part=part, alpha=1.5, gate="always"), 0, silent)
    with change.applied(lm), torch.no_grad(), capture(lm, [site]) as got:
        lm.forward(lm.encode([TOWER.prompt]))
    torch.testing.assert_close(got[site][0, -1], plain[-1] + 1.5 * (means[1] - means[0]), atol=1e-3, rtol=1e-3)
    assert torch.equal(got[site][0, :-1], plain[:-1])


def test_layers_by_default_and_by_name(tiny_lm) -> None:
    lm = tiny_lm("gpt2")

    def sites(**given) -> tuple[Site, ...]:
        (edit,) = prepare(lm, [TOWER], _params(**given), 0, silent).edits
        return edit.sites

    assert sites() == (Site(1, "attn"), Site(2, "attn"))  # the upper half of three
    assert sites(layers="0,2", part="mlp") == (Site(0, "mlp"), Site(2, "mlp"))
    assert [(site.layer, site.part) for site in sites(part="final")] == [(2, FINAL)]
    with pytest.raises(BadInput, match="last layer only"):
        sites(part="final", layers="1")
    with pytest.raises(BadInput, match="no layer 9"):
        sites(layers="1-9")


def test_bare_sources_are_the_prompts_alone(tiny_lm, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("gpt2")
    seen: list[int] = []
    real = fitting.activations

    def count(lm, rows, *args):
        seen.append(len(rows))
        return real(lm, rows, *args)

    monkeypatch.setattr(fitting, "activations", count)
    for source in ("both", "bare"):
        prepare(lm, [TOWER], _params(source=source), 0, silent)
    assert seen == [10, 5, 5, 5]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["atlas-gpt2", "atlas-qwen3"])
@pytest.mark.parametrize("target", ["contexts", "donors"])
def test_it_edits_a_model_that_knows_things(name: str, target: str) -> None:
    from mega_core.embedded.evaluate import open_folder

    lm = open_folder(EMBEDDED / name)
    took = named = kept = 0
    edits = list(islice(candidates(11, min_neighbours=1), 6))
    for request in edits:
        fact = known_fact(request)
        assert fact is not None
        change = prepare(lm, [request], MEAN_SHIFT.read(MEAN_SHIFT.ref({"target": target})), 0, silent)
        before = lm.generate(request.neighbours[:2], 6)
        with change.applied(lm):
            said = lm.generate([request.prompt, *(fact.prompt(t) for t in fact.templates_held_out)], 6)
            kept += lm.generate(request.neighbours[:2], 6) == before
        took += said[0].startswith(f" {request.target_new}")
        named += sum(text.startswith(f" {request.target_new}") for text in said[1:]) >= 1
    assert kept == len(edits)
    assert min(took, named) >= len(edits) - 1
