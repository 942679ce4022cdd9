from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from mega_core.attribution import VIEWS, causal_trace, look_at, read_view, recording
from mega_core.attribution.settings import TraceParams
from mega_core.changes import PromptPrefix
from mega_core.events import Advanced, Cancelled, silent
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture, intervene
from mega_core.models.suffix import as_read
from mega_core.records import EditRequest
from tests.reference import trace_reference as plain

FRANCE = EditRequest("France", "The capital of {} is", "Rome", "Paris")
TOWER = EditRequest("Eiffel Tower", "The {} is in the city of", "London", "Paris")
SHORT = EditRequest("Italy", "{}", "Tokyo")
REQUESTS = (TOWER, SHORT)
SAMPLES, WIDTH = 2, 2
embedding_spread = causal_trace.embedding_spread


@cache
def spread_of(name: str, lm: ModelAdapter) -> float:
    return embedding_spread(lm)


@pytest.fixture(autouse=True)
def _spread_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading all subjects takes longer than a tiny model's trace."""
    monkeypatch.setattr(causal_trace, "embedding_spread", lambda lm: spread_of(lm.name, lm))


def recorded(lm: ModelAdapter, *requests: EditRequest) -> recording.Recording:
    return recording.record(lm, requests, causal_trace.SITES)


def noise(seen: recording.Recording, i: int = 0, samples: int = SAMPLES) -> torch.Tensor:
    return causal_trace.noise_for(seen, i, samples, 3 * causal_trace.embedding_spread(seen.lm), 0)


def look(lm: ModelAdapter, requests=REQUESTS, report=silent, **params):
    chosen = TraceParams(**{"samples": SAMPLES, "window": WIDTH, **params})
    with torch.no_grad():
        return causal_trace.look(recorded(lm, *requests), chosen, "before", report)["trace"]


def test_every_cell_is_a_plain_forwards(lm: ModelAdapter) -> None:
    found = look(lm).set_index(["case", "site", "layer", "position", "candidate"])["p_restored"]
    seen = recorded(lm, *REQUESTS)
    compared = 0
    for case, request in enumerate(REQUESTS):
        ids, span = tokens.prompt_ids(lm.tokenizer, request.prompt), seen.spans[case]
        clean, draws = plain.clean_states(lm, ids), noise(seen, case)
        for cell in causal_trace.cells(lm.n_layers, WIDTH):
            for position in range(len(ids)):  # those before the subject too, which are not run
                reference = plain.plain_cell(lm, ids, span, draws, clean, cell.site, cell.layer, position, WIDTH)
                for candidate, token in seen.candidates[case].items():
                    at = case, cell.site, cell.layer, position, candidate
                    assert found[at] == pytest.approx(float(reference[token]), abs=1e-5), at
                    compared += 1
    assert compared == len(found)


def test_all_states_restored_is_clean_and_none_is_corrupt(lm: ModelAdapter) -> None:
    found = look(lm, [TOWER])
    seen = recorded(lm, TOWER)
    ids, span, draws = tokens.prompt_ids(lm.tokenizer, TOWER.prompt), seen.spans[0], noise(seen)
    clean = plain.clean_states(lm, ids)
    everything = {place: dict(enumerate(states)) for place, states in clean.items()}
    whole = torch.stack([plain.probability(lm, ids, span, draw, everything) for draw in draws]).mean(0)
    nothing = torch.stack([plain.probability(lm, ids, span, draw) for draw in draws]).mean(0)
    for candidate, rows in found.groupby("candidate"):
        token = seen.candidates[0][candidate]
        np.testing.assert_allclose(rows["p_clean"], float(whole[token]), atol=1e-5)
        np.testing.assert_allclose(rows["p_corrupt"], float(nothing[token]), atol=1e-5)
        last = rows[(rows["site"] == "block_out") & (rows["layer"] == lm.n_layers - 1)]
        assert last["effect"].iloc[-1] == pytest.approx(float(whole[token] - nothing[token]), abs=1e-5)
        np.testing.assert_allclose(last["effect"].iloc[:-1], 0, atol=1e-7)  # nothing reads the others any more
        np.testing.assert_allclose(rows["effect"], rows["p_restored"] - rows["p_corrupt"], atol=1e-12)


def test_before_the_subject_a_state_is_the_same_in_both_runs(lm: ModelAdapter) -> None:
    seen = recorded(lm, TOWER)
    begin = seen.spans[0][0]
    assert begin > 0
    cells = causal_trace.cells(lm.n_layers, WIDTH)
    ids = causal_trace._candidate_ids(seen, 0)
    rows = [causal_trace._Row(0, position, cell) for position in range(begin) for cell in cells]
    with torch.no_grad():
        run = causal_trace._run_rows(seen, 0, [causal_trace._Row(0, 0, None), *rows], noise(seen), ids)
    torch.testing.assert_close(run, run[:1].expand_as(run), atol=1e-7, rtol=0)
    found = look(lm, [TOWER])
    assert (found[found["position"] < begin]["effect"] == 0).all()


def test_without_noise_nothing_happens(lm: ModelAdapter) -> None:
    found = look(lm, noise=0.0, samples=1)
    np.testing.assert_allclose(found["effect"], 0, atol=1e-6)
    np.testing.assert_allclose(found["p_corrupt"], found["p_clean"], atol=1e-6)


def test_whole_rows_give_the_same_as_suffixes(lm: ModelAdapter) -> None:
    seen = recorded(lm, *REQUESTS)
    cells = causal_trace.cells(lm.n_layers, WIDTH)
    for i in range(len(REQUESTS)):
        with torch.no_grad():
            one, other = (
                run(seen, i, cells, noise(seen, i), lambda: None)
                for run in (causal_trace._by_suffixes, causal_trace._by_rows)
            )
        torch.testing.assert_close(one.restored, other.restored, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.corrupt, other.corrupt, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.clean, other.clean, atol=1e-5, rtol=0)


@pytest.mark.parametrize("run", ["_by_suffixes", "_by_rows"])
def test_behind_a_text_the_prompts_own_positions_count(lm: ModelAdapter, run: str) -> None:
    with PromptPrefix("Madrid is the capital of Spain. ").applied(lm):
        seen = recorded(lm, TOWER)
        full, places = as_read(lm, seen.batch)
        cells = causal_trace.cells(lm.n_layers, WIDTH)
        with torch.no_grad():
            found = getattr(causal_trace, run)(seen, 0, cells, noise(seen), lambda: None)
    ids, at = full.rows()[0], places[0].tolist()
    assert len(ids) > seen.length(0)
    span = at[seen.spans[0][0]], at[seen.spans[0][1] - 1] + 1
    clean = plain.clean_states(lm, ids)
    for k, cell in list(enumerate(cells))[::4]:
        for position in (seen.spans[0][0], seen.length(0) - 1):
            reference = plain.plain_cell(lm, ids, span, noise(seen), clean, cell.site, cell.layer, at[position], WIDTH)
            expected = reference[list(seen.candidates[0].values())]
            torch.testing.assert_close(found.restored[k, position], expected, atol=1e-5, rtol=0)


def test_a_steered_model_is_traced_with_its_steering(tiny_lm) -> None:
    lm = tiny_lm("llama")
    shift = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(1))

    def steer(value: torch.Tensor) -> torch.Tensor:
        new = value.clone()
        new[:, -1] += shift  # counts positions of whole rows: TOWER is alone
        return new

    with intervene(lm, {Site(1, "attn"): steer}):
        steered = look(lm, [TOWER])
        own = lm.last_logits(lm.encode([TOWER.prompt])).double().softmax(-1)[0]
    seen = recorded(lm, TOWER)
    for candidate, token in seen.candidates[0].items():
        rows = steered[steered["candidate"] == candidate]
        np.testing.assert_allclose(rows["p_clean"], float(own[token]), atol=1e-6)
        last = rows[(rows["site"] == "block_out") & (rows["layer"] == lm.n_layers - 1)].iloc[-1]
        assert last["p_restored"] == pytest.approx(float(own[token]), abs=1e-6)
    assert not np.allclose(steered["p_restored"], look(lm, [TOWER])["p_restored"], atol=1e-4)


def test_a_look_aside_gets_neither_noise_nor_restored_states(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    aside: list[torch.Tensor] = []

    class Gate:
        def begin(self, batch) -> None:
            with lm.aside(), capture(lm, [Site(1, "mlp")]) as got:
                lm.forward(lm.encode([TOWER.prompt]))
            aside.append(got[Site(1, "mlp")])

        def advance(self, ids) -> None: ...

    with lm.reading(Gate()):
        look(lm, [TOWER])
    assert len(aside) > 2
    assert all(torch.equal(one, aside[0]) for one in aside)


def test_the_same_seed_gives_the_same_noise_whatever_is_traced_beside(tiny_lm) -> None:
    lm = tiny_lm("qwen3")
    both, alone = look(lm, [FRANCE, TOWER]), look(lm, [TOWER])
    again = both[both["case"] == 1].reset_index(drop=True)
    np.testing.assert_allclose(again["p_restored"], alone["p_restored"], atol=1e-6)
    assert look(lm, [TOWER]).equals(alone)
    assert not np.allclose(look(lm, [TOWER], seed=1)["p_corrupt"], alone["p_corrupt"], atol=1e-6)


def test_groups_change_nothing(tiny_lm, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = look(tiny_lm("gpt_neox"), samples=3)
    monkeypatch.setattr(causal_trace, "NUMBERS_AT_ONCE", 1)
    monkeypatch.setattr(causal_trace, "LOGITS_AT_ONCE", 1)
    np.testing.assert_allclose(look(tiny_lm("gpt_neox"), samples=3)["p_restored"], whole["p_restored"], atol=1e-6)


def test_windows_and_noise_are_the_papers() -> None:
    assert causal_trace.window_of(48) == 10
    assert causal_trace.window_of(8) == 2
    assert causal_trace.window_of(2) == 1
    for width in (1, 2, 5, 10):
        for cell in causal_trace.cells(12, width, ("mlp",)):
            assert list(cell.window) == plain.window(cell.layer, width, 12)
            assert cell.first == cell.window[0]
    assert [cell.first for cell in causal_trace.cells(3, 1)] == sorted([1, 2, 3, 0, 1, 2, 0, 1, 2])


def test_the_spread_is_that_of_the_subjects_embeddings(tiny_lm) -> None:
    from mega_core.embedded import facts

    lm = tiny_lm("llama")  # its tokenizer puts a BOS in front, which is no part of a subject
    ids = [token for name in facts.load().by_subject for token in lm.tokenizer(name)["input_ids"][1:]]
    numbers = lm.model.get_input_embeddings().weight[torch.tensor(ids)].double()
    assert embedding_spread(lm) == pytest.approx(float(numbers.std(correction=0)), rel=1e-9)
    draws = causal_trace.noise_for(recorded(lm, TOWER), 0, 500, 0.7, 0)
    assert float(draws.std()) == pytest.approx(0.7, rel=0.02)


def test_the_view_reports_progress_and_can_be_cancelled(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    events: list[object] = []
    look(lm, [TOWER], events.append, sites="mlp")
    seen = recorded(lm, TOWER)
    steps = [event for event in events if isinstance(event, Advanced)]
    assert len(steps) == seen.length(0) - seen.spans[0][0]

    def stop(event: object) -> None:
        if isinstance(event, Advanced):
            raise Cancelled

    with pytest.raises(Cancelled):
        look(lm, [TOWER], stop)
    assert lm.hook_count() == 0


def test_the_registered_view_fills_its_frame(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    asked = read_view("trace?samples=1&sites=block_out")
    found = look_at(lm, [asked], [FRANCE, SHORT], "after", silent)[asked.text]
    assert set(found) == set(VIEWS["trace"].frames)
    trace = found["trace"]
    assert set(trace["site"]) == {"block_out"}
    assert set(trace["state"]) == {"after"}
    assert set(trace[trace["case"] == 1]["candidate"]) == {"new"}
    assert "".join(trace[(trace["case"] == 0) & (trace["layer"] == 0) & (trace["candidate"] == "new")]["token"]) == (
        FRANCE.prompt
    )
