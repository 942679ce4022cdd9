from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mega_core.attribution import look_at, read_view, recording, verify
from mega_core.attribution.verify import Cell, read_cells
from mega_core.changes import PromptPrefix
from mega_core.errors import ActionableError, BadInput
from mega_core.events import Advanced, Event, silent
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture, intervene
from mega_core.records import EditRequest

FRANCE = EditRequest("France", "The capital of {} is", "Rome", "Paris")
SOME = (
    "attn:1", "ffn:0", "head:1.2", "head:0.-1", "source:1.3.2", "neuron:0.7", "neuron:2.55", "attention_neuron:2.1.3.1",
    "query_neuron:0.9@1", "state:1.block_out.2", "state:0.resid_mid.1", "state:2.block_in.3", "state:1.mlp.0",
)  # fmt: skip


def sets(*texts: str) -> list[verify.Cells]:
    return [read_cells(text) for text in texts]


def look(lm: ModelAdapter, *texts: str, action: str = "ablate", **more: object) -> pd.DataFrame:
    """The rows of candidate "new", by cells."""
    table = verify.verify(lm, FRANCE, sets(*texts), action, state="before", **{"draws": 0, **more})  # type: ignore[arg-type]
    return table[table["candidate"] == "new"].set_index("cells")


def log_p(lm: ModelAdapter) -> float:
    """Of the new object, by the model as it is."""
    with torch.no_grad():
        logits = lm.last_logits(lm.encode([FRANCE.prompt])).double()
    token = tokens.target_ids(lm.tokenizer, FRANCE.prompt, FRANCE.target_new)[0]
    return float(torch.log_softmax(logits, -1)[0, token])


@contextmanager
def zeroed(*parts: torch.Tensor) -> Iterator[None]:
    """Weights with zeros in them."""
    kept = [part.clone() for part in parts]
    for part in parts:
        part.zero_()
    try:
        yield
    finally:
        for part, was in zip(parts, kept, strict=True):
            part.copy_(was)


# The name of a cell --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*SOME, "source:5.2.-1", "matrix:2.mlp_down", "attn:0"])
def test_a_cells_text_gives_the_cell_again(text: str) -> None:
    assert str(Cell.parse(text)) == text
    assert Cell.parse(f" {text} ") == Cell.parse(text)


@given(st.text() | st.from_regex(r"[a-z_]{0,16}:?(-?[0-9]{1,3}[.@]){0,4}[a-z0-9_]{0,9}"))
@settings(max_examples=60, deadline=None)
def test_any_text_is_a_cell_that_says_it_again_or_is_refused(text: str) -> None:
    with suppress(BadInput):
        assert str(Cell.parse(text)) == text.strip()


@pytest.mark.parametrize(
    "text",
    ["", "attn", "attn:", "attn:01", "attn:-1", "attn:1.2", "attn:٣", "head:1.-2", "neuron:1.-1", "source:1.2",
     "state:1.x.2", "matrix:2.attn", "query_neuron:1.2.3", "query_neuron:1@2.3", "attn:1+", "attn:1+attn:1",
     "head:1.99999999", "none:1"],
)  # fmt: skip
def test_a_wrong_text_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="Known|Choose|once"):
        read_cells(text)


@pytest.mark.parametrize(
    ("text", "action", "said"),
    [
        ("attn:9", "ablate", "no layer 9"),
        ("head:0.4", "ablate", "no head 4"),
        ("neuron:0.56", "ablate", "no neuron 56"),
        ("attention_neuron:0.0.8.0", "ablate", "no dim 8"),
        ("source:0.0.99", "ablate", "no position 99"),
        ("attn:1+head:1.0", "ablate", "inside another"),
        ("matrix:0.mlp_down", "ablate", "can only be restored"),
        ("attn:0", "restore", "only a matrix"),
        ("attn:0", "erase", "no 'erase'"),
        ("attn:0", "patch", "no other state"),
        ("matrix:0.mlp_down", "restore", "not changed"),
    ],
)
def test_what_cant_be_is_refused(tiny_lm, text: str, action: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        look(tiny_lm("gpt2"), text, action=action)


def test_a_factor_that_is_none_is_refused(tiny_lm) -> None:
    with pytest.raises(BadInput, match="factor"):
        look(tiny_lm("gpt2"), "attn:0", action="scale", factor=float("nan"))


def test_every_row_of_every_view_has_its_cell(tiny_lm) -> None:
    lm = tiny_lm("qwen3")
    views = ("module_scores", "residual", "heads", "neurons", "attention_neurons", "query?top=5", "lens?positions=all",
             "trace?samples=1", "attention", "superficiality")  # fmt: skip
    found = look_at(lm, [read_view(view) for view in views], [FRANCE], "before", silent)
    length = len(lm.encode([FRANCE.prompt]).rows()[0])
    seen = set()
    for name, frame in (pair for frames in found.values() for pair in frames.items()):
        for row in frame.drop_duplicates().to_dict(orient="records"):
            text = verify.of_row(name, row, length)
            if text is None:
                assert (
                    row.get("module") == "embedding" or not {"head", "neuron", "module"} & set(row) or "tokens" in name
                )
            else:
                verify.check(lm, FRANCE, [read_cells(text)], "ablate")
                seen.add(name)
    assert seen == {
        "module_scores", "residual", "head_scores", "head_sources", "neuron_scores", "attention_neurons",
        "query_layers", "query_neurons", "lens", "trace", "attention", "stress_heads",
    }  # fmt: skip
    assert verify.of_row("weight_change", {"layer": 2, "site": "mlp_down", "kind": "weights"}, 3) == "matrix:2.mlp_down"
    assert verify.of_row("weight_change", {"layer": -1, "site": "prompt", "kind": "prompt"}, 3) is None


# Actual --------------------------------------------------------------------------------------------------------------


def test_in_the_last_layer_it_equals_zeroed_weights(lm: ModelAdapter) -> None:
    """Behind the last layer other positions play no part, so weights can be zeroed instead of activations."""
    layer, size = lm.n_layers - 1, lm.head_dim
    down, out = lm.read_weight(layer, "mlp_down"), lm.read_weight(layer, "attn_out")
    biases = {site: [b] if (b := lm.bias(layer, site)) is not None else [] for site in ("mlp_down", "attn_out")}
    cases: dict[str, list[torch.Tensor]] = {
        f"neuron:{layer}.7": [down[:, 7]],
        f"neuron:{layer}.7+neuron:{layer}.11": [down[:, 7], down[:, 11]],
        f"head:{layer}.2": [out[:, 2 * size : 3 * size]],
        f"ffn:{layer}": [down, *biases["mlp_down"]],
        f"attn:{layer}": [out, *biases["attn_out"]],
        f"head:{layer}.2+head:{layer}.-1": [out[:, 2 * size : 3 * size], *biases["attn_out"]],
    }
    found, before = look(lm, *cases), log_p(lm)
    for text, parts in cases.items():
        with zeroed(*parts):
            assert found.loc[text, "actual"] == pytest.approx(log_p(lm) - before, abs=2e-5), text
        assert abs(found.loc[text, "actual"]) > 1e-4, text


def test_with_one_token_any_layer_equals_zeroed_weights(tiny_lm) -> None:
    lm, request = tiny_lm("gpt2"), EditRequest("F", "{}", "Paris")
    assert len(lm.encode([request.prompt]).rows()[0]) == 1
    table = verify.verify(lm, request, sets("neuron:0.7", "head:0.1"), state="before", draws=0)
    token = tokens.target_ids(lm.tokenizer, request.prompt, "Paris")[0]

    def now() -> float:
        with torch.no_grad():
            return float(torch.log_softmax(lm.last_logits(lm.encode([request.prompt])).double(), -1)[0, token])

    before = now()
    columns = [lm.read_weight(0, "mlp_down")[:, 7], lm.read_weight(0, "attn_out")[:, 8:16]]
    for row, column in zip(table.itertuples(), columns, strict=True):
        with zeroed(column):
            assert row.actual == pytest.approx(now() - before, abs=2e-5)


def test_a_head_is_the_sum_of_its_sources_and_a_source_of_its_numbers(lm: ModelAdapter) -> None:
    length = len(lm.encode([FRANCE.prompt]).rows()[0])
    head = "+".join(f"source:1.2.{p}" for p in range(length))
    source = "+".join(f"attention_neuron:1.2.{j}.1" for j in range(lm.head_dim))
    found = look(lm, "head:1.2", head, "source:1.2.1", source)
    for whole, parts in (("head:1.2", head), ("source:1.2.1", source)):
        assert abs(found.loc[whole, "actual"]) > 1e-5
        for column in ("actual", "predicted", "direct"):
            assert found.loc[parts, column] == pytest.approx(found.loc[whole, column], abs=2e-5)


@pytest.mark.parametrize("arch", ["gpt2", "gptj", "qwen3"])
def test_together_is_as_one_by_one(tiny_lm, arch: str) -> None:
    lm = tiny_lm(arch)
    together = look(lm, *SOME)
    for text in SOME:
        alone = look(lm, text)
        assert alone.loc[text, "actual"] == pytest.approx(together.loc[text, "actual"], abs=2e-5), text
        assert alone.loc[text, "rank_after"] == together.loc[text, "rank_after"]


def test_small_batches_give_the_same(tiny_lm, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("qwen3")
    whole = look(lm, *SOME, draws=3)
    monkeypatch.setattr(verify, "MOST_ROWS", 5)
    parts = look(lm, *SOME, draws=3)
    np.testing.assert_allclose(parts[["actual", "control"]], whole[["actual", "control"]], atol=2e-5)


def test_only_the_asked_position_is_changed(tiny_lm) -> None:
    """A neuron at an earlier position is that neuron there and nowhere else: the same by a hook of our own."""
    lm = tiny_lm("llama")
    found, before = look(lm, "query_neuron:0.9@1"), log_p(lm)

    def without(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[0, 1, 9] = 0
        return value

    with intervene(lm, {Site(0, "mlp_down_in"): without}):
        expected = log_p(lm) - before
    assert abs(expected) > 1e-5
    assert found.loc["query_neuron:0.9@1", "actual"] == pytest.approx(expected, abs=1e-5)
    assert not found.loc["query_neuron:0.9@1", "has_prediction"]


def test_probabilities_and_ranks_are_the_models(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    row = look(lm, "ffn:2").loc["ffn:2"]
    with torch.no_grad():
        logits = lm.last_logits(lm.encode([FRANCE.prompt]))[0]
    token = tokens.target_ids(lm.tokenizer, FRANCE.prompt, FRANCE.target_new)[0]
    assert row["prob_before"] == pytest.approx(float(torch.softmax(logits, -1)[token]), rel=1e-4)
    assert row["rank_before"] == 1 + int((logits > logits[token]).sum())
    assert row["actual"] == pytest.approx(np.log(row["prob_after"] / row["prob_before"]), abs=1e-9)


# Predicted -----------------------------------------------------------------------------------------------------------


def test_predicted_is_minus_the_views_score(lm: ModelAdapter) -> None:
    (found,) = look_at(lm, [read_view("module_scores")], [FRANCE], "before", silent).values()
    scores = found["module_scores"].set_index(["candidate", "module", "layer"])["contribution"]
    cells = [f"{kind}:{layer}" for kind in ("attn", "ffn") for layer in range(lm.n_layers)]
    table = verify.verify(lm, FRANCE, sets(*cells), state="before", draws=0)
    for row in table.itertuples():
        assert row.predicted == pytest.approx(-scores[row.candidate, row.kind, row.layer], abs=2e-5)
        assert row.has_prediction


def test_heads_and_the_rest_are_what_attention_writes(lm: ModelAdapter) -> None:
    cells = sets(*(f"head:1.{h}" for h in range(-1, lm.n_heads)))
    seen = verify.see(lm, FRANCE, cells)
    parts = [verify._written(lm, cell, verify._numbers(lm, cell, seen)) for (cell,) in cells]
    torch.testing.assert_close(torch.stack(parts).sum(0), seen.written(1, "attn")[0], atol=1e-5, rtol=1e-4)
    everything = "+".join(f"head:1.{h}" for h in range(-1, lm.n_heads))
    found = look(lm, everything, "attn:1")
    for column in ("predicted", "direct", "actual"):
        assert found.loc[everything, column] == pytest.approx(found.loc["attn:1", column], abs=2e-5)


def test_direct_is_the_last_state_without_the_vector_and_the_norm_kept(lm: ModelAdapter) -> None:
    """By definition, in float64 and without the lens: the scale of the final norm is that of the whole state."""
    table = look(lm, "neuron:1.7", "ffn:2")
    with torch.no_grad(), capture(lm, [Site(1, "mlp_down_in"), Site(lm.n_layers - 1, "block_out")]) as got:
        lm.forward(lm.encode([FRANCE.prompt]))
    last = got[Site(lm.n_layers - 1, "block_out")][0, -1].double()
    v = (got[Site(1, "mlp_down_in")][0, -1, 7] * lm.read_weight(1, "mlp_down")[:, 7]).double()
    norm, centre = lm.final_norm, lm.spec.norm == "layernorm"
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    sigma = ((last.var(unbiased=False) if centre else last.square().mean()) + eps).sqrt()
    beta = norm.bias.detach().double() if getattr(norm, "bias", None) is not None else 0.0
    bias = lm.head_bias.double() if lm.head_bias is not None else 0.0
    token = tokens.target_ids(lm.tokenizer, FRANCE.prompt, FRANCE.target_new)[0]

    def frozen(x: torch.Tensor) -> float:
        normed = (x - x.mean() if centre else x) / sigma * norm.weight.detach().double() + beta
        return float(torch.log_softmax(lm.head_weight.double() @ normed + bias, -1)[token])

    assert table.loc["neuron:1.7", "direct"] == pytest.approx(frozen(last - v) - frozen(last), abs=2e-5)
    # What comes last is followed by nothing: the two predictions are one.
    assert table.loc["ffn:2", "direct"] == pytest.approx(table.loc["ffn:2", "predicted"], abs=2e-5)


def test_scaling(lm: ModelAdapter) -> None:
    kept = look(lm, *SOME, action="scale", factor=1.0)
    assert kept[["predicted", "direct", "actual"]].abs().to_numpy().max() < 2e-5
    gone, none = look(lm, *SOME, action="scale", factor=0.0), look(lm, *SOME)
    np.testing.assert_allclose(gone[["predicted", "actual"]], none[["predicted", "actual"]], atol=1e-6)
    assert set(gone["action"]) == {"scale 0"}
    last = f"neuron:{lm.n_layers - 1}.7"
    twice, before = look(lm, last, action="scale", factor=2.0), log_p(lm)
    column = lm.read_weight(lm.n_layers - 1, "mlp_down")[:, 7]
    kept = column.clone()
    with zeroed(column):
        column.copy_(2 * kept)
        assert twice.loc[last, "actual"] == pytest.approx(log_p(lm) - before, abs=2e-5)


def test_patching_from_the_same_state_does_nothing(lm: ModelAdapter) -> None:
    other = verify.see(lm, FRANCE, sets(*SOME))
    found = look(lm, *SOME, action="patch", other=other)
    assert found[["predicted", "direct", "actual"]].abs().to_numpy().max() < 2e-5


def test_patching_the_last_state_gives_the_other_models_answer(lm: ModelAdapter) -> None:
    last = len(lm.encode([FRANCE.prompt]).rows()[0]) - 1
    cells = [f"state:{lm.n_layers - 1}.block_out.{last}", "neuron:2.7", "head:1.1"]
    column = lm.read_weight(0, "mlp_down")[:, 3]
    before = log_p(lm)
    with zeroed(column):
        other, expected = verify.see(lm, FRANCE, sets(*cells)), log_p(lm)
    assert abs(expected - before) > 1e-4
    found = look(lm, *cells, action="patch", other=other)
    assert found.loc[cells[0], "actual"] == pytest.approx(expected - before, abs=2e-5)
    assert found.loc["head:1.1", "predicted"] != 0


# Controls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*SOME, "source:1.2.-1", "neuron:0.1+neuron:0.2+neuron:2.3", "head:0.0+neuron:1.5"])
def test_controls_are_of_the_same_kinds_and_layers_and_never_the_cells_themselves(tiny_lm, text: str) -> None:
    lm, cells = tiny_lm("gpt2"), read_cells(text)
    drawn = verify.draw(lm, 6, cells, 10, seed=3)
    assert drawn
    assert drawn == verify.draw(lm, 6, cells, 10, seed=3)

    def like(some: Sequence[Cell]) -> list[tuple[object, ...]]:
        layered = not any(cell.kind in ("attn", "ffn") or cell.head == verify.REST == cells[0].head for cell in some)
        return sorted((cell.kind, cell.layer if layered else 0, str(cell.site)) for cell in some)

    for control in drawn:
        assert like(control) == like(cells)
        assert not set(control) & set(cells)
        assert len(set(control)) == len(cells)
        for cell in control:
            cell.check(lm, 6)


def test_a_sets_control_doesnt_depend_on_its_company(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    alone, together = look(lm, "neuron:0.7", draws=4), look(lm, "attn:1", "neuron:0.7", draws=4)
    assert alone.loc["neuron:0.7", "control"] == pytest.approx(together.loc["neuron:0.7", "control"], abs=1e-5)
    assert alone.loc["neuron:0.7", "controls"] == 4
    assert together.loc["attn:1", "controls"] == lm.n_layers - 1  # there are no more


def test_the_control_is_the_effect_of_the_drawn_cells(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    length = len(lm.encode([FRANCE.prompt]).rows()[0])
    texts = [verify.cells_text(one) for one in verify.draw(lm, length, read_cells("neuron:0.7"), 4, seed=0)]
    row, own = look(lm, "neuron:0.7", draws=4).loc["neuron:0.7"], look(lm, *texts)["actual"]
    assert row["control"] == pytest.approx(own.mean(), abs=1e-5)
    assert row["control_sd"] == pytest.approx(own.std(), abs=1e-5)


def test_where_nothing_is_left_there_is_no_control(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    every = "+".join(f"attn:{layer}" for layer in range(lm.n_layers))
    assert look(lm, every, draws=4).loc[every, "controls"] == 0


# In company ----------------------------------------------------------------------------------------------------------


def test_behind_a_text_positions_are_the_prompts_own(lm: ModelAdapter) -> None:
    length = len(lm.encode([FRANCE.prompt]).rows()[0])
    parts = "+".join(f"source:1.2.{p}" for p in range(-1, length))
    alone = look(lm, "query_neuron:0.9@1")
    with PromptPrefix("Spain is here. ").applied(lm):
        found = look(lm, "head:1.2", parts, "source:1.2.-1", "query_neuron:0.9@1")
    assert found.loc[parts, "actual"] == pytest.approx(found.loc["head:1.2", "actual"], abs=2e-5)
    assert abs(found.loc["source:1.2.-1", "actual"]) > 1e-5
    assert found.loc["query_neuron:0.9@1", "actual"] != pytest.approx(
        alone.loc["query_neuron:0.9@1", "actual"], abs=1e-6
    )


class Peeker:
    """As a gate does: looks at the prompt on its own when it is told of a batch."""

    def __init__(self, lm: ModelAdapter) -> None:
        self.lm = lm
        self.saw: list[float] = []

    def begin(self, batch: object) -> None:
        with torch.no_grad(), self.lm.aside(), capture(self.lm, [Site(0, "mlp")]) as got:
            self.lm.forward(self.lm.encode([FRANCE.prompt]))
        self.saw.append(float(got[Site(0, "mlp")].abs().sum()))

    def advance(self, ids: object) -> None:
        """Nothing."""


def test_a_gates_own_look_is_left_alone(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    expected = look(lm, *SOME)
    peeker = Peeker(lm)
    with lm.reading(peeker):
        found = look(lm, *SOME)
    np.testing.assert_allclose(found["actual"], expected["actual"], atol=2e-5)
    assert len(peeker.saw) >= 2
    assert max(peeker.saw) == pytest.approx(min(peeker.saw), rel=1e-5)


def test_it_leaves_the_model_clean_when_it_breaks(tiny_lm, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("gpt2")
    with monkeypatch.context() as broken:
        broken.setattr(lm, "_to_head", lambda hidden: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            look(lm, "neuron:0.7")
    assert lm.hook_count() == 0

    def stop(event: Event) -> None:
        if isinstance(event, Advanced):
            raise KeyboardInterrupt

    column = lm.weight(1, "mlp_down")
    original = column.detach().clone()
    with ExitStack() as edited, torch.no_grad():
        edited.callback(column.copy_, original)
        column.add_(1e-2)
        digest = lm.live_digest()
        with pytest.raises(KeyboardInterrupt):
            look(lm, "matrix:1.mlp_down", action="restore", originals={(1, "mlp_down"): original}, report=stop)
        assert lm.live_digest() == digest
    assert lm.hook_count() == 0


def test_numbers_that_are_not_finite_are_told(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    weight = lm.weight(2, "mlp_down")
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    try:
        with pytest.raises(ActionableError, match="finite"):
            look(lm, "attn:0")
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_the_recording_has_what_the_cells_need_and_no_more(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    seen = verify.see(lm, FRANCE, sets("neuron:0.7"))
    assert {site.part for site in seen.parts} == {"mlp_down_in"}
    assert isinstance(seen, recording.Recording)
