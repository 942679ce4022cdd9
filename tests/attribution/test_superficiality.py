from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from mega_core.attribution import VIEWS, look_at, read_view, superficiality
from mega_core.attribution.recording import record
from mega_core.changes import PromptPrefix
from mega_core.events import Note, silent
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture, intervene
from mega_core.records import EditRequest

FRANCE = EditRequest("France", "The capital of {} is", "Rome", "Paris")
TOWER = EditRequest("Eiffel Tower", "{} is in the city of", "London", "Paris")
SHORT = EditRequest("Italy", "{}", "Tokyo")
REQUESTS = (FRANCE, TOWER, SHORT)


def look(lm: ModelAdapter, requests=REQUESTS, report=silent, view: str = "superficiality"):
    (found,) = look_at(lm, [read_view(view)], requests, "before", report).values()
    return found


def test_stress_is_what_the_model_answers(lm: ModelAdapter) -> None:
    stress = look(lm)["stress"]
    assert len(stress) == 2 * len(superficiality.PREFIXES)  # SHORT has no original object
    for row in stress.itertuples():
        request = REQUESTS[row.case]
        own = lm.last_logits(lm.encode([row.prompt]))[0].double().softmax(-1)
        new = tokens.target_ids(lm.tokenizer, row.prompt, request.target_new)[0]
        true = tokens.target_ids(lm.tokenizer, row.prompt, request.target_true)[0]
        assert row.p_new == pytest.approx(float(own[new]), abs=1e-5)
        assert row.p_true == pytest.approx(float(own[true]), abs=1e-5)
        assert row.says_true == (int(own.argmax()) == true)
        assert row.prefers_true == (row.p_true > row.p_new)


def test_stress_prompts_end_in_the_prompt_and_name_the_original_object(tiny_lm) -> None:
    said: list[object] = []
    found = dict(superficiality.stress(tiny_lm("gpt2"), FRANCE, said.append))
    assert found.pop("none").prompt == FRANCE.prompt
    for kind, request in found.items():
        assert request.prompt.endswith(f". {FRANCE.prompt}" if kind != "question" else f"? {FRANCE.prompt}")
        assert "Paris" in request.prompt
        assert "Rome" not in request.prompt
        assert not {"{true}", "{prompt}"} & set(request.prompt.split())
    assert f"{FRANCE.prompt} Paris?" in found["question"].prompt
    assert not said


def test_the_shipped_models_know_the_words() -> None:
    """Each word of the prefixes occurs in what they were trained on."""
    from mega_core.embedded.corpus import Corpus

    corpus = Corpus(0)
    texts = " ".join(corpus.draw(i / 2500).text for i in range(2500))
    known = {word.strip(".,:?!'\"").lower() for word in texts.split()}
    for prefix in superficiality.PREFIXES.values():
        for word in prefix.replace("{true}", "").replace("{prompt}", "").split():
            assert not (bare := word.strip(".,?").lower()) or bare in known, bare


def test_every_head_is_read_as_defined(lm: ModelAdapter) -> None:
    heads = look(lm, [FRANCE])["stress_heads"].set_index(["kind", "layer", "head"])
    kinds = dict(superficiality.stress(lm, FRANCE, silent))
    for kind in ("none", "question"):
        request = kinds[kind]
        true = tokens.target_ids(lm.tokenizer, request.prompt, "Paris")[0]
        sites = [Site(layer, part) for layer in range(lm.n_layers) for part in ("block_in", "attn_out_in", "attn")]
        last = Site(lm.n_layers - 1, "block_out")
        with torch.no_grad(), capture(lm, [*sites, last]) as got:
            lm.forward(lm.encode([request.prompt]))
        final = got[last][0, -1]
        for layer in range(lm.n_layers):
            numbers = got[Site(layer, "attn_out_in")][0, -1]
            matrix = lm.read_weight(layer, "attn_out")
            base, total = got[Site(layer, "block_in")][0, -1], torch.zeros(lm.d_model)
            for head in range(lm.n_heads):
                cut = torch.zeros_like(numbers)
                span = slice(head * lm.head_dim, (head + 1) * lm.head_dim)
                cut[span] = numbers[span]
                vector = matrix @ cut
                total += vector
                row = heads.loc[(kind, layer, head)]
                alone = lm.unembed(vector[None])[0].double().softmax(-1)[true]
                assert row["lens_prob"] == pytest.approx(float(alone), rel=1e-3, abs=1e-7)
                assert row["contribution"] == pytest.approx(gain(lm, base, vector, final, true), abs=2e-5)
            rest = got[Site(layer, "attn")][0, -1] - total
            assert heads.loc[(kind, layer, -1)]["contribution"] == pytest.approx(
                gain(lm, base, rest, final, true), abs=2e-5
            )


def gain(lm: ModelAdapter, base: torch.Tensor, vector: torch.Tensor, final: torch.Tensor, token: int) -> float:
    """log p(token | base + vector) - log p(token | base) with the norm frozen at `final`, written out."""
    norm = lm.final_norm
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    beta = norm.bias if getattr(norm, "bias", None) is not None else torch.zeros(lm.d_model)
    bias = lm.head_bias if lm.head_bias is not None else torch.zeros(lm.vocab_size)

    def centred(x: torch.Tensor) -> torch.Tensor:
        return x - x.mean() if lm.spec.norm == "layernorm" else x

    sigma = (centred(final).double().square().mean() + eps).sqrt()

    def log_p(x: torch.Tensor) -> float:
        normed = norm.weight.double() * centred(x.double()) / sigma + beta.double()
        return float((lm.head_weight.double() @ normed + bias.double()).log_softmax(-1)[token])

    with torch.no_grad():
        return log_p(base + vector) - log_p(base)


def test_without_an_original_object_the_frames_are_empty(tiny_lm) -> None:
    said: list[object] = []
    found = look(tiny_lm("gpt2"), [SHORT], said.append)
    assert set(found) == set(VIEWS["superficiality"].frames)
    assert all(frame.empty for frame in found.values())
    assert [event for event in said if isinstance(event, Note)]


def test_heads_can_be_left_out(tiny_lm) -> None:
    found = look(tiny_lm("llama"), view="superficiality?heads=false")
    assert found["stress_heads"].empty
    assert len(found["stress"]) == 8


def test_a_prefix_that_does_not_fit_is_left_out(tiny_lm) -> None:
    said: list[object] = []
    long = EditRequest("France", "The capital of " + "the big " * 50 + "{} is", "Rome", "Paris")
    kinds = set(look(tiny_lm("gpt2"), [long], said.append)["stress"]["kind"])
    assert kinds < set(superficiality.PREFIXES)
    assert "none" in kinds
    assert [event for event in said if isinstance(event, Note)]


def test_a_text_in_front_stands_in_front_of_the_stress(tiny_lm) -> None:
    lm = tiny_lm("qwen2")
    with PromptPrefix("Madrid is the capital of Spain. ").applied(lm):
        found = look(lm, [FRANCE])["stress"]
        row = found[found["kind"] == "repeat"].iloc[0]
        own = lm.last_logits(lm.encode([row["prompt"]]))[0].double().softmax(-1)
    token = tokens.target_ids(lm.tokenizer, row["prompt"], "Paris")[0]
    assert row["p_true"] == pytest.approx(float(own[token]), abs=1e-5)
    assert not np.allclose(found["p_true"], look(lm, [FRANCE])["stress"]["p_true"], atol=1e-5)


@pytest.mark.slow
def test_zeroing_the_heads_it_names_takes_the_old_object_away() -> None:
    """By intervention, on edits of a model that ships: more than random heads of the same number do."""
    from bench.common import open_model
    from mega_core.embedded.examples import candidates
    from mega_core.methods import METHODS

    lm = open_model("atlas-gpt2")
    method = METHODS["ft"]
    source, rng = candidates(11), random.Random(0)
    named: list[float] = []
    control: list[float] = []
    for _ in range(6):
        request = next(source)
        change = method.prepare(lm, [request], method.read(method.ref({})), 0, silent)
        with change.applied(lm), torch.no_grad():
            seen = record(lm, [dict(superficiality.stress(lm, request, silent))["question"]], superficiality.READS)
            probs = superficiality.lens_probs(seen)[:, :-1, 0]
            gains = superficiality.head_scores(seen)[:, :-1, 0, 1]
            both = (probs * gains.clamp_min(0)).flatten()
            top = [divmod(at, lm.n_heads) for at in both.topk(4).indices.tolist()]
            everywhere = [(layer, head) for layer in range(lm.n_layers) for head in range(lm.n_heads)]
            before = _p_true(lm, seen, [])
            named.append(before - _p_true(lm, seen, top))
            others = [one for one in everywhere if one not in top]
            control += [before - _p_true(lm, seen, rng.sample(others, 4)) for _ in range(5)]
    assert np.mean(named) > 0.02
    assert np.mean(named) > 3 * abs(np.mean(control))


def _p_true(lm: ModelAdapter, seen, heads: list[tuple[int, int]]) -> float:
    def zero(layer: int):
        def fn(value: torch.Tensor) -> torch.Tensor:
            new = value.clone()
            for at, head in heads:
                if at == layer:
                    new[0, -1, head * lm.head_dim : (head + 1) * lm.head_dim] = 0
            return new

        return fn

    with intervene(lm, {Site(layer, "attn_out_in"): zero(layer) for layer in {at for at, _ in heads}}):
        logits = lm.last_logits(seen.batch)[0].double()
    return float(logits.softmax(-1)[seen.candidates[0]["true"]])
