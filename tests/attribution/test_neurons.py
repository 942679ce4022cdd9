from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from mega_core import frames
from mega_core.attribution import VIEWS, attention_neurons, look_at, neurons, read_view, topk
from mega_core.attribution.frozen import FrozenLens
from mega_core.attribution.recording import Recording, record
from mega_core.changes import MatrixDelta, PromptPrefix, WeightDelta
from mega_core.events import Cancelled, Note, silent
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture, intervene
from mega_core.records import EditRequest
from tests.reference.neuron_reference import contributions

FRANCE = EditRequest("France", "The capital of {} is", "Rome", "Paris")
TOWER = EditRequest("Eiffel Tower", "{} is in the city of", "London", "Paris")
SHORT = EditRequest("Italy", "{}", "Tokyo")  # without a true object
REQUESTS = (FRANCE, TOWER, SHORT)
KINDS = {"ffn": ("neurons", "neuron_scores", ["layer", "neuron"], neurons)}
KINDS["attn"] = (
    "attention_neurons",
    "attention_neurons",
    ["layer", "head", "dim", "position"],
    attention_neurons,
)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def look(lm: ModelAdapter, view: str, requests, state: str = "before", report=silent) -> dict[str, pd.DataFrame]:
    (found,) = look_at(lm, [read_view(view)], requests, state, report).values()
    return found


def vectors_by_hand(lm: ModelAdapter, request: EditRequest, kind: str) -> list[dict[tuple[int, ...], np.ndarray]]:
    """Per layer: name of a neuron -> what it writes, in float64, and under () what the module writes in all."""
    parts = ("mlp_down_in", "mlp", "pattern", "value", "attn")
    with capture(lm, [Site(layer, part) for layer in range(lm.n_layers) for part in parts], stop=False) as got:
        lm.forward(lm.encode([request.prompt]))  # alone, so this is a test of padding too
    layers = []
    for layer in range(lm.n_layers):
        seen = {part: got[Site(layer, part)][0].double().numpy() for part in parts}
        found: dict[tuple[int, ...], np.ndarray] = {}
        if kind == "ffn":
            weight = lm.read_weight(layer, "mlp_down").double().numpy()
            for k in range(lm.d_mlp):
                found[layer, k] = seen["mlp_down_in"][-1, k] * weight[:, k]
            found[()] = seen["mlp"][-1]
        else:
            weight = lm.read_weight(layer, "attn_out").double().numpy()
            for h in range(lm.n_heads):
                shared = h // (lm.n_heads // lm.n_kv_heads)
                for j in range(lm.head_dim):
                    for p in range(len(seen["value"])):
                        number = seen["pattern"][h, -1, p] * seen["value"][p, shared * lm.head_dim + j]
                        found[layer, h, j, p] = number * weight[:, h * lm.head_dim + j]
            found[()] = seen["attn"][-1]
        layers.append(found)
    return layers


def by_definition(
    lm: ModelAdapter, recording: Recording, i: int, kind: str, token: int
) -> dict[tuple[int, ...], float]:
    """Every neuron's contribution, from the plain implementation."""
    norm = lm.final_norm
    beta = getattr(norm, "bias", None)
    found: dict[tuple[int, ...], float] = {}
    for layer, vectors in enumerate(vectors_by_hand(lm, recording.requests[i], kind)):
        names = [name for name in vectors if name]
        gains = contributions(
            recording.base(layer, kind)[i].double().numpy(),
            np.stack([vectors[name] for name in names]),
            recording.states[-1, i].double().numpy(),
            norm.weight.double().numpy(),
            np.zeros(lm.d_model) if beta is None else beta.double().numpy(),
            norm.eps if hasattr(norm, "eps") else norm.variance_epsilon,
            lm.spec.norm == "layernorm",
            lm.head_weight.double().numpy(),
            np.zeros(lm.vocab_size) if lm.head_bias is None else lm.head_bias.double().numpy(),
            token,
        )
        found.update(zip(names, gains.tolist(), strict=True))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_neurons_and_bias_are_what_the_module_writes(lm: ModelAdapter, kind: str) -> None:
    recording = record(lm, [FRANCE], ("mlp_down_in", "pattern", "value"))
    vectors = KINDS[kind][3].of_prompt(recording, 0)
    sites = {"ffn": "mlp_down", "attn": "attn_out"}
    _, copies, units = vectors.coefficients.shape
    for layer, by_hand in enumerate(vectors_by_hand(lm, FRANCE, kind)):
        mine = vectors.take(layer * copies * units + torch.arange(copies * units)).sum(0)
        bias = lm.bias(layer, sites[kind])
        both = mine if bias is None else mine + bias
        np.testing.assert_allclose(both.numpy(), by_hand[()], atol=1e-5)
        np.testing.assert_allclose(both.numpy(), recording.written(layer, kind)[0].numpy(), atol=1e-5)
    assert max(neurons.rests(recording)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_listed_are_the_greatest_and_least_of_all_and_their_values_the_definitions(
    lm: ModelAdapter, kind: str
) -> None:
    view, frame, place, _ = KINDS[kind]
    recording = record(lm, REQUESTS)
    scores = look(lm, f"{view}?top=40&tail=10", REQUESTS)[frame]
    assert scores["certified"].all()
    for i, ids in enumerate(recording.candidates):
        for candidate, token in ids.items():
            exact = by_definition(lm, recording, i, kind, token)
            rows = scores[(scores["case"] == i) & (scores["candidate"] == candidate)].set_index("rank")
            for ranks, order in ((range(1, 41), 1), (range(-1, -11, -1), -1)):
                mine = rows.loc[list(ranks)]
                names = list(mine[place].itertuples(index=False, name=None))
                np.testing.assert_allclose(mine["contribution"], [exact[name] for name in names], atol=2e-5)
                best = sorted(exact.values(), reverse=order == 1)[: len(mine)]
                np.testing.assert_allclose(mine["contribution"], best, atol=2e-5)
            assert (rows["bound"] >= rows["contribution"]).all()
    assert len(scores) == 5 * 50  # two prompts with two candidates, one with one


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_lies_between_its_two_bounds(lm: ModelAdapter, kind: str, monkeypatch) -> None:
    recording = record(lm, [TOWER], ("mlp_down_in", "pattern", "value"))
    vectors = KINDS[kind][3].of_prompt(recording, 0)
    # Larger vectors too: the gap between bound and value grows with their square.
    for scale in (0.1, 1.0, 10.0, 100.0):
        louder = topk.Vectors(scale * vectors.coefficients, vectors.directions)
        states = torch.stack([recording.base(layer, kind)[0] for layer in range(lm.n_layers)])
        bases = topk.Bases.of(recording.lens, states, list(recording.candidates[0].values()))
        bound = topk.bounds(bases, louder)
        monkeypatch.setattr(topk, "BLOCK", 12 if scale == 1 else 32)  # 32 numbers are no multiple of 12
        monkeypatch.setattr(topk, "MOMENT_AT_ONCE", 1000)
        gap = topk.gaps(bases, louder)
        index = torch.arange(len(louder))
        value = bases.values(louder.place(index)[0], louder.take(index))
        rounding = topk.SLACK * max(1.0, scale / 10)
        assert (bound >= value - rounding).all()
        assert (bound - gap <= value + rounding).all()
        assert float((bound - value).max()) > 10 * rounding or scale < 1, "bounds that always touch test nothing"


def test_the_lower_bound_knows_that_numbers_of_a_vector_go_together(monkeypatch) -> None:
    """Every row of this head is a multiple of one vector, so that parts of b that lie in different blocks add up."""
    monkeypatch.setattr(topk, "BLOCK", 4)
    head = torch.linspace(-1, 1, 50)[:, None] * torch.ones(16)
    norm = SimpleNamespace(weight=torch.ones(16))
    one = SimpleNamespace(head_weight=head, head_bias=None, vocab_size=50, final_norm=norm)
    one.spec = SimpleNamespace(norm="rmsnorm")
    bases = topk.Bases.of(FrozenLens(one, torch.ones(1)), torch.zeros(1, 16), [3])
    vectors = topk.Vectors(torch.tensor([[[0.01, -0.03, 0.05]]]), lambda layer: torch.ones(3, 16))
    index = torch.arange(3)
    value = bases.values(torch.zeros(3, dtype=torch.long), vectors.take(index))
    actual = topk.bounds(bases, vectors) - value
    gap = topk.gaps(bases, vectors)
    assert (gap >= actual).all()
    assert (gap <= 2 * actual).all()


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_what_is_certified_is_true_and_the_search_skips_most(tiny_lm, scale: float, monkeypatch) -> None:
    lm = tiny_lm("llama")
    recording = record(lm, [FRANCE], ("pattern", "value"))
    vectors = attention_neurons.of_prompt(recording, 0)
    vectors = topk.Vectors(scale * vectors.coefficients, vectors.directions)
    states = torch.stack([recording.base(layer, "attn")[0] for layer in range(lm.n_layers)])
    bases = topk.Bases.of(recording.lens, states, list(recording.candidates[0].values()))
    index = torch.arange(len(vectors))
    value = bases.values(vectors.place(index)[0], vectors.take(index))
    # A small budget, so that the search must give up on some of the least.
    monkeypatch.setattr(topk, "MOST_FOR_TAIL", 1)
    monkeypatch.setattr(topk, "SMALLEST_CHUNK", 4)
    found = topk.search(bases, vectors, 10, 5, lambda: None)
    assert found.evaluated < (0.2 if scale == 1 else 1.0) * len(vectors)
    for row, top, tail, sure_top, sure_tail in zip(
        value, found.top, found.tail, found.sure_top, found.sure_tail, strict=True
    ):
        torch.testing.assert_close(row[top], row.topk(10).values, atol=1e-5, rtol=1e-5)
        assert sure_top.all()
        least = row.topk(5, largest=False).values
        torch.testing.assert_close(row[tail][sure_tail], least[sure_tail], atol=1e-5, rtol=1e-5)
    if scale == 30:
        assert not torch.stack(found.sure_tail).all(), "nothing here is out of reach: the test shows nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_several_prompts_slices_and_groups_change_nothing(lm: ModelAdapter, kind: str, monkeypatch) -> None:
    view, frame, place, _ = KINDS[kind]
    whole = look(lm, f"{view}?top=20&tail=5&read=2", REQUESTS)
    monkeypatch.setattr("mega_core.attribution.recording.CAPTURE_BYTES", 1)
    monkeypatch.setattr(topk, "LOGITS_AT_ONCE", 3000)
    monkeypatch.setattr(topk, "SMALLEST_CHUNK", 4)
    alone = look(lm, f"{view}?top=20&tail=5&read=2", REQUESTS)
    keys = ["case", "candidate", "rank"]
    both = whole[frame].merge(alone[frame], on=keys, suffixes=("", "_alone"), validate="1:1")
    assert len(both) == len(whole[frame])
    np.testing.assert_allclose(both["contribution"], both["contribution_alone"], atol=1e-5)
    same = (both[place].to_numpy() == both[[f"{name}_alone" for name in place]].to_numpy()).all(1)
    assert same.mean() > 0.9  # neighbours that are equal to the last digits may change places
    assert set(whole["neuron_tokens"]["token_id"]) == set(alone["neuron_tokens"]["token_id"])


def test_a_neuron_is_read_at_the_sign_of_its_coefficient(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    recording = record(lm, [FRANCE], ("mlp_down_in",))
    direction = torch.linalg.pinv(recording.lens.vector(torch.eye(lm.d_model)[:, None])[:, 0].T) @ lm.head_weight[77]
    for coefficient in (2.0, -2.0):
        hand_made = topk.Vectors(torch.tensor([[[coefficient]]]), lambda layer: direction[None])
        bases = topk.Bases.of(recording.lens, recording.states[:1, 0], [77])
        value = bases.values(torch.tensor([0]), hand_made.take(torch.tensor([0])))
        assert float(value) * coefficient > 0
        rows = neurons.spelled(bases, hand_made, torch.tensor([0]), torch.tensor([0]), ["0"], lambda: None)
        logit = float(lm.head_weight[77] @ recording.lens.vector(coefficient * direction[None])[0])
        where = rows[rows["token_id"] == 77]
        assert list(where["direction"]) == ["promoted" if coefficient > 0 else "suppressed"]
        np.testing.assert_allclose(where["logit"], logit, rtol=1e-5)


def test_tokens_are_those_with_the_greatest_and_least_logits(lm: ModelAdapter) -> None:
    found = look(lm, "neurons?top=5&tail=2&read=2", REQUESTS)
    scores, read = found["neuron_scores"], found["neuron_tokens"]
    recording = record(lm, REQUESTS)
    chosen = scores[scores["rank"].between(-2, 2)][["case", "layer", "neuron", "coefficient"]].drop_duplicates()
    assert len(read) == 20 * len(chosen)
    for row in chosen.itertuples():
        vector = row.coefficient * lm.read_weight(row.layer, "mlp_down")[:, row.neuron]
        logits = (lm.head_weight @ recording.lens.row(row.case).vector(vector[None])[0]).double().numpy()
        mine = read[(read["case"] == row.case) & (read["layer"] == row.layer) & (read["neuron"] == str(row.neuron))]
        order = np.sort(logits)
        for direction, expected in (("promoted", order[::-1][:10]), ("suppressed", order[:10])):
            rows = mine[mine["direction"] == direction].sort_values("rank")
            np.testing.assert_allclose(rows["logit"], expected, atol=1e-5)
            np.testing.assert_allclose(rows["logit"], logits[rows["token_id"]], atol=1e-5)
            assert list(rows["rank"]) == list(range(1, 11))


def test_attention_neurons_are_read_by_name(tiny_lm) -> None:
    found = look(tiny_lm("qwen3"), "attention_neurons?top=3&tail=0&read=1", [FRANCE])
    scores, read = found["attention_neurons"], found["neuron_tokens"]
    assert set(read["kind"]) == {"attn"}
    best = scores[scores["rank"] == 1]
    expected = {f"{row.head}.{row.dim}.{row.position}" for row in best.itertuples()}
    assert set(read["neuron"]) == expected
    assert set(scores["rank"]) == {1, 2, 3}


def test_more_rows_than_neurons(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    rows = look(lm, "neurons?top=150&tail=500&read=0", [FRANCE])
    scores = rows["neuron_scores"]
    assert len(scores) == 2 * lm.n_layers * lm.d_mlp
    assert rows["neuron_tokens"].empty
    assert scores["certified"].all()
    frames.check(scores, "neuron_scores")
    frames.check(rows["neuron_tokens"], "neuron_tokens")


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_edited_steered_and_prefixed_models(tiny_lm, arch: str) -> None:
    lm = tiny_lm(arch)
    edit = WeightDelta(
        (MatrixDelta(1, "mlp_down", torch.arange(lm.d_model)[:, None] / 9, torch.ones(lm.d_mlp, 1), 1.0),)
    )
    before = look(lm, "neurons?top=5", [FRANCE])["neuron_scores"]
    said: list[object] = []
    with edit.applied(lm):
        after = look(lm, "neurons?top=5", [FRANCE], "after", said.append)["neuron_scores"]
        recording = record(lm, [FRANCE])
        exact = by_definition(lm, recording, 0, "ffn", recording.candidates[0]["new"])
    best = after[(after["candidate"] == "new") & (after["rank"] > 0)]
    np.testing.assert_allclose(best["contribution"], sorted(exact.values(), reverse=True)[:5], atol=1e-4)
    assert not np.allclose(before["contribution"], after["contribution"])
    assert set(after["state"]) == {"after"}
    assert not [event for event in said if isinstance(event, Note)]
    with PromptPrefix("Rome is in Italy. ").applied(lm):
        for view, frame, *_ in KINDS.values():
            frames.check(look(lm, view, REQUESTS)[frame], frame)
    with intervene(lm, {Site(1, "mlp"): lambda mlp: mlp + 1.0, Site(2, "attn"): lambda attn: 0 * attn}):
        for view, frame, *_ in KINDS.values():
            frames.check(look(lm, view, REQUESTS, "after", said.append)[frame], frame)
    told = [event.text for event in said if isinstance(event, Note)]
    assert told == ["What the MLP of layer 1 writes after the edit is not the sum of its neurons."]


def test_a_job_can_be_stopped_in_the_middle(tiny_lm) -> None:
    def stop(event: object) -> None:
        if getattr(event, "stage", "") == "neurons":
            raise Cancelled

    with pytest.raises(Cancelled):
        look(tiny_lm("gpt_neox"), "neurons", [FRANCE], "before", stop)


def test_a_head_that_is_not_float32_is_cast_in_slices(tiny_lm, monkeypatch) -> None:
    lm = tiny_lm("gpt2")
    recording = record(lm, [FRANCE], ("mlp_down_in",))
    states = torch.stack([recording.base(layer, "ffn")[0] for layer in range(lm.n_layers)])
    half = SimpleNamespace(head_weight=lm.head_weight.double(), head_bias=None, vocab_size=lm.vocab_size)
    half.spec, half.final_norm = lm.spec, lm.final_norm
    monkeypatch.setattr(topk, "CAST_AT_ONCE", 50 * lm.d_model)
    vectors = neurons.of_prompt(recording, 0)
    found = []
    for model in (lm, half):
        lens = type(recording.lens)(model, recording.lens.scale)
        found.append(topk.search(topk.Bases.of(lens, states, [5]), vectors, 20, 5, lambda: None))
    torch.testing.assert_close(
        found[0].value[0][found[0].top[0]], found[1].value[0][found[1].top[0]], atol=1e-5, rtol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["atlas-gpt2", "atlas-qwen3"])
def test_on_a_trained_and_edited_model(name: str) -> None:
    from bench.common import open_model
    from mega_core.embedded import examples

    lm = open_model(name)
    (request,) = islice(examples.candidates(seed=11), 1)
    recording = record(lm, [request], ("mlp_down_in",))
    # An edit that writes the new object's row whenever the MLP of layer 2 reads what it reads here.
    key = recording.part(2, "mlp_down_in")[0, recording.spans[0][1] - 1]
    value = 5 * lm.head_weight[recording.candidates[0]["new"]]
    change = WeightDelta((MatrixDelta(2, "mlp_down", value[:, None], (key / key.square().sum())[:, None], 1.0),))
    with change.applied(lm):
        recording = record(lm, [request], ("mlp_down_in", "pattern", "value"))
        for kind, (view, frame, _, module) in KINDS.items():
            scores = look(lm, view, [request], "after")[frame]
            assert scores["certified"].all()
            vectors = module.of_prompt(recording, 0)
            states = torch.stack([recording.base(layer, kind)[0] for layer in range(lm.n_layers)])
            bases = topk.Bases.of(recording.lens, states, list(recording.candidates[0].values()))
            every = torch.arange(len(vectors)).split(512)
            value = torch.cat([bases.values(vectors.place(at)[0], vectors.take(at)) for at in every], dim=1)
            for candidate, row in zip(recording.candidates[0], value, strict=True):
                mine = scores[scores["candidate"] == candidate]
                top, tail = mine[mine["rank"] > 0], mine[mine["rank"] < 0]
                np.testing.assert_allclose(top["contribution"], row.topk(100).values, atol=1e-5)
                np.testing.assert_allclose(tail["contribution"], row.topk(20, largest=False).values, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_views_fill_the_frames_they_name(tiny_lm, kind: str) -> None:
    view = KINDS[kind][0]
    assert set(look(tiny_lm("qwen3"), view, [FRANCE])) == set(VIEWS[view].frames)
