from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from mega_core import __main__ as cli
from mega_core import frames
from mega_core.changes import MatrixDelta, WeightDelta, prompt_summary, standing
from mega_core.errors import ActionableError, BadInput
from mega_core.events import Advanced, Cancelled, Event, Note, Reporter
from mega_core.methods.base import METHODS, Method, knob
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, intervene
from mega_core.records import EditRequest, Inspection, MethodRef
from mega_core.verify_study import Verification, verify
from tests.service.toy import TOY, write_catalogue

FRANCE = EditRequest("France", "The capital of {} is", "Rome", "Paris")
SPAIN = EditRequest("Spain", "The language of {} is", "Rome")


@dataclass(frozen=True)
class Params:
    """What the tests' methods can be told."""

    layer: int = knob(1, "the layer", low=0, high=2)
    fail: bool = knob(False, "whether to fail")


def nudge(lm: ModelAdapter, requests: Sequence[EditRequest], params: Params, seed: int, report: Reporter) -> Any:
    if params.fail:
        raise ActionableError("It can't.", "Don't.")
    report(Note("nudged"))
    noise = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, 1, generator=noise) for size in (lm.d_model, lm.d_mlp))
    return WeightDelta((MatrixDelta(params.layer, "mlp_down", left, right, 1.0),))


class Steer:
    """Moves what attention writes."""

    @contextmanager
    def applied(self, lm: ModelAdapter) -> Iterator[None]:
        with intervene(lm, {Site(1, "attn"): lambda value: value + 1}), standing(lm, self):  # type: ignore[arg-type]
            yield

    def summary(self) -> pd.DataFrame:
        return prompt_summary()


STEER = Method("steer", "Steer", "Moves.", "steering", "", Params, lambda *_: Steer(), lambda spec: None)  # type: ignore[arg-type,return-value]
NUDGE = Method("nudge", "Nudge", "Changes a matrix.", "weights", "", Params, nudge, lambda spec: None)


@pytest.fixture(autouse=True)
def _methods(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in (NUDGE, STEER, TOY):
        monkeypatch.setitem(METHODS._entries, method.name, method)


def ask(lm: ModelAdapter, *cells: str, method: str = "nudge", fail: bool = False, **more: Any) -> Verification:
    ref = METHODS[method].ref({"fail": fail})
    return verify(Inspection(lm.ref, ref, (FRANCE, SPAIN), ()), lm, cells, **{"draws": 3, **more})


def new(found: Verification) -> pd.DataFrame:
    return found.table[found.table["candidate"] == "new"].set_index("cells")


def test_restoring_the_only_edited_matrix_gives_the_unedited_probability(lm: ModelAdapter) -> None:
    digest = lm.live_digest()
    unedited = new(ask(lm, "attn:0", state="before")).loc["attn:0"]
    edited = new(ask(lm, "attn:0")).loc["attn:0"]
    found = ask(lm, "matrix:1.mlp_down", action="restore")
    row = new(found).loc["matrix:1.mlp_down"]
    assert row["prob_before"] == pytest.approx(edited["prob_before"], rel=1e-4)
    assert row["prob_after"] == pytest.approx(unedited["prob_before"], rel=1e-4)
    assert row["rank_after"] == unedited["rank_before"]
    assert abs(row["actual"]) > 1e-3
    assert not row["has_prediction"]
    assert row["controls"] == 3
    assert row["control"] != pytest.approx(row["actual"], abs=1e-4)
    assert found.receipt.restored
    assert found.receipt.weights_digest_before == found.receipt.weights_digest_after == digest == lm.live_digest()
    assert lm.hook_count() == 0


def test_patching_goes_both_ways(tiny_lm) -> None:
    lm = tiny_lm("qwen3")
    length = len(lm.encode([FRANCE.prompt]).rows()[0])
    last = f"state:{lm.n_layers - 1}.block_out.{length - 1}"
    into_edited = new(ask(lm, last, "ffn:0", "head:2.1", action="patch"))
    into_unedited = new(ask(lm, last, "ffn:0", action="patch", state="before"))
    assert set(into_unedited["state"]) == {"before"}
    for ours, others in ((into_edited, into_unedited), (into_unedited, into_edited)):
        assert ours.loc[last, "prob_after"] == pytest.approx(others.loc[last, "prob_before"], rel=1e-3)
        assert abs(ours.loc["ffn:0", "actual"]) < 1e-5  # below the edited layer both states are the same
    assert abs(into_edited.loc["head:2.1", "actual"]) > 1e-5


def test_in_a_steered_model_the_rest_of_attention_is_the_steering(tiny_lm) -> None:
    lm = tiny_lm("llama")
    found = new(ask(lm, "head:1.-1", "ffn:1", method="steer", action="patch"))
    before, after = (new(ask(lm, "ffn:1", method="steer", state=state)).loc["ffn:1"] for state in ("before", "after"))
    assert before["prob_before"] != pytest.approx(after["prob_before"], rel=1e-3)
    # Only the last position loses its steering: the effect is there, but the model isn't quite the unedited one.
    assert abs(found.loc["head:1.-1", "actual"]) > 1e-3


def test_the_unedited_model_needs_no_edit_unless_it_is_patched_from_one(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    assert new(ask(lm, "attn:0", state="before", fail=True)).loc["attn:0", "controls"] == 2
    with pytest.raises(ActionableError, match="can't"):
        ask(lm, "attn:0", state="before", action="patch", fail=True)
    with pytest.raises(ActionableError, match="can't"):
        ask(lm, "attn:0", fail=True)


def test_a_fact_of_several_is_asked_about(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    found = ask(lm, "attn:0", case=1)
    assert set(found.table["case"]) == {1}
    assert set(found.table["candidate"]) == {"new"}  # its old object isn't known
    assert "".join(found.tokens) == SPAIN.prompt
    assert found.notes == ("nudged",)
    assert frames.from_parquet(frames.to_parquet(found.table), "verified").equals(found.table)


@pytest.mark.parametrize(
    ("cells", "more", "said"),
    [
        (["head:5.2"], {}, "no layer 5"),
        (["head 5"], {}, "Known"),
        ([], {}, "there is none"),
        (["attn:0", "attn:0"], {}, "twice"),
        (["attn:0"], {"state": "during"}, "during"),
        (["attn:0"], {"action": "erase"}, "erase"),
        (["attn:0"], {"case": 2}, "no fact 2"),
        (["attn:0"], {"draws": -1}, "out of range"),
        (["attn:0"], {"action": "scale", "factor": float("inf")}, "factor"),
        (["matrix:1.mlp_down"], {"action": "restore", "state": "before"}, "nothing to restore"),
    ],
)
def test_what_cant_be_is_refused_before_the_edit(tiny_lm, cells: list[str], more: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        ask(tiny_lm("gpt2"), *cells, fail=True, **more)


def test_a_matrix_that_the_edit_leaves_alone_is_told_with_those_it_changes(tiny_lm) -> None:
    lm = tiny_lm("gpt2")
    with pytest.raises(BadInput, match=r"Changed: matrix:1\.mlp_down"):
        ask(lm, "matrix:0.mlp_down", action="restore")
    with pytest.raises(BadInput, match="no matrix"):
        ask(lm, "matrix:0.mlp_down", action="restore", method="steer")


def test_another_model_or_version_is_refused(tiny_lm) -> None:
    plan = Inspection(tiny_lm("gpt2").ref, MethodRef("nudge", version=9), (FRANCE,), ())
    with pytest.raises(BadInput, match="version"):
        verify(plan, tiny_lm("gpt2"), ["attn:0"])


@pytest.mark.parametrize(("cell", "action"), [("neuron:0.7", "ablate"), ("matrix:1.mlp_down", "restore")])
def test_a_person_who_stops_it_finds_the_model_clean(tiny_lm, cell: str, action: str) -> None:
    lm = tiny_lm("mistral")
    digest = lm.live_digest()

    def stop(event: Event) -> None:
        if isinstance(event, Advanced) and event.stage == "verify":
            raise Cancelled

    with pytest.raises(Cancelled):
        ask(lm, cell, action=action, report=stop)
    assert lm.live_digest() == digest
    assert lm.hook_count() == 0
    assert not lm.changes


# The command line ----------------------------------------------------------------------------------------------------

FACT = ["--subject", "France", "--template", "The capital of {} is", "--target-new", "Rome", "--target-true", "Paris"]
ASK = ["verify", "--model", "little", "--method", "toy", *FACT]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_catalogue(tmp_path_factory.mktemp("models"), little="gpt2")


@pytest.fixture
def run(catalogue: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MEGA_MODELS", str(catalogue))
    monkeypatch.setenv("MEGA_DEVICE", "cpu")

    def main(*words: str) -> int:
        try:
            return cli.main([*ASK, *words])
        except SystemExit as left:
            return int(left.code or 0)

    return main


def test_the_command_shows_each_cell_and_the_receipt(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--cell", "head:1.2", "--cell", "neuron:0.7+neuron:2.9", "--cell", "state:1.block_out.1") == 0
    said = capsys.readouterr().out
    for text in ("head:1.2", "neuron:0.7+neuron:2.9", "predicted", "actual", "control", "restored bit for bit"):
        assert text in said
    assert "nan" not in said


def test_the_command_writes_json(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--cell", "attn:1", "--action", "scale", "--factor", "0.5", "--state", "before"]
    assert run(*words, "--json", str(tmp_path / "out.json")) == 0
    capsys.readouterr()
    assert run(*words, "--json", "-") == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain == json.loads((tmp_path / "out.json").read_text())
    assert plain["verified"][0]["action"] == "scale 0.5"
    assert plain["receipt"]["restored"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--cell"),
        (["--cell", "head:9.0"], "no layer 9"),
        (["--cell", "head"], "Known: attn:5"),
        (["--cell", "attn:1", "--factor", "2"], "--factor"),
        (["--cell", "attn:1", "--action", "scale"], "--factor"),
        (["--cell", "attn:1", "--fact", "2"], "--fact"),
        (["--cell", "attn:1", "--action", "erase"], "erase"),
        (["--cell", "matrix:0.mlp_down", "--action", "restore"], "Changed: matrix:2.mlp_down"),
    ],
)
def test_the_command_refuses_in_one_line(
    run: Any, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert run(*words) == 2
    complaint = capsys.readouterr().err
    assert said in complaint
    assert len(complaint.splitlines()) == 1
