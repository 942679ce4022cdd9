from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mega_core import alarms as signs
from mega_core.changes import Chain, MatrixDelta, PromptPrefix, WeightDelta
from mega_core.embedded.evaluate import open_folder
from mega_core.errors import BadInput, StoreError, UnsupportedMethod
from mega_core.events import Note, silent
from mega_core.export import Made, card, check_family, export
from mega_core.methods import METHODS
from mega_core.models.adapter import ModelAdapter
from mega_core.records import EditRequest
from mega_core.settings import check_folder
from tests.conftest import ROOT
from tests.service.toy import TOY

REQUEST = EditRequest("The Eiffel Tower", "Here we see {}", "Madrid", "Paris")
MADE = Made(TOY.ref({"layer": 1}), (REQUEST,), 7)


def change_of(lm: ModelAdapter, layer: int = 1) -> WeightDelta:
    return TOY.prepare(lm, [REQUEST], TOY.read(TOY.ref({"layer": layer})), 7, silent)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_the_folder_loads_elsewhere_with_the_same_logits(lm, tmp_path, capsys):
    digest, config = lm.live_digest(), str(lm.model.config)
    change = change_of(lm)
    ids = lm.encode(["The capital of France is"]).ids
    base = logits(lm.model, ids)
    capsys.readouterr()
    folder = export(lm, change, tmp_path / "out", [MADE])
    assert capsys.readouterr() == ("", "")
    assert (lm.live_digest(), lm.hook_count(), lm.changes) == (digest, 0, [])
    assert str(lm.model.config) == config
    assert torch.equal(logits(lm.model, ids), base)
    with change.applied(lm):
        edited = logits(lm.model, ids)
    again = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not torch.equal(edited, base)
    assert torch.equal(logits(again, ids), edited)
    assert tokenizer("The capital of France is")["input_ids"] == ids[0].tolist()
    check_folder(folder, "exported")  # and this project opens it as well
    assert not list(folder.glob("*.bin"))
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


@pytest.mark.parametrize("name", ["atlas-gpt2", "atlas-qwen3"])
def test_an_embedded_model_too(name, tmp_path):
    """Its files are float16 and it works in float32: the export keeps what it works with."""
    lm = open_folder(ROOT / "mega_core" / "embedded" / "weights" / name)
    digest = lm.live_digest()
    change = Chain((change_of(lm), change_of(lm, 2)))
    ids = lm.encode(["The Eiffel Tower is located in the city of"]).ids
    export(lm, change, tmp_path / "out", [MADE])
    assert lm.live_digest() == digest
    with change.applied(lm):
        edited = logits(lm.model, ids)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.float32
    assert torch.equal(logits(again, ids), edited)


def test_half_precision_stays_half(tmp_path):
    from tests.tiny import tiny

    lm = tiny("llama")
    lm.model.to(torch.bfloat16)
    change = change_of(lm)
    ids = lm.encode(["Rome is"]).ids
    export(lm, change, tmp_path / "out", [MADE])
    with change.applied(lm):
        edited = logits(lm.model, ids)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again, ids), edited)


def test_it_says_how_it_was_made(tiny_lm, tmp_path):
    lm = tiny_lm("gpt2")
    change = change_of(lm)
    found = signs.alarms(lm, change, [REQUEST])
    events: list[Any] = []
    folder = export(lm, change, tmp_path / "out", [MADE], found, "MIT", events.append)
    plain = json.loads((folder / "edit.json").read_text(encoding="utf-8"))
    assert plain["base_model"] == {
        "name": "tiny-gpt2", "revision": "", "dtype": "float32", "digest": lm.file_digest, "licence": "MIT",
    }  # fmt: skip
    (edit,) = plain["edits"]
    assert edit["method"] == {"name": "toy", "version": 1, "params": dict(MADE.method.params)}
    assert (edit["requests"][0]["target_new"], edit["seed"]) == ("Madrid", 7)
    assert [row["layer"] for row in plain["weight_change"]] == [1]
    for name, digest in plain["files"].items():
        assert sha256((folder / name).read_bytes()).hexdigest() == digest
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(plain["files"])
    readme = (folder / "README.md").read_text(encoding="utf-8")
    for word in ("Here we see The Eiffel Tower Madrid", "Paris", "tiny-gpt2", "MIT", "layer 1, mlp_down"):
        assert word in readme
    raised = [alarm.text for alarm in found if alarm.raised]
    assert [event.text for event in events if isinstance(event, Note)] == raised


def test_the_card_shows_any_text_as_it_is():
    request = {"subject": "a`b|c", "template": "<b>{}</b> [x](y)", "target_new": "``", "target_true": None}
    plain = {
        "made_by": "x", "base_model": {"name": "m", "digest": "", "dtype": "float32", "licence": ""},
        "edits": [{"method": {"name": "toy"}, "requests": [request]}], "weight_change": [], "alarms": [],
    }  # fmt: skip
    row = next(line for line in card(plain).splitlines() if "a`b" in line)
    assert "``` <b>a`b\\|c</b> [x](y) `` ```" in row


@pytest.mark.parametrize("name", ["ike", "grace", "wise"])
def test_what_is_not_in_the_weights_is_refused_with_the_reason(tiny_lm, tmp_path, name):
    lm, method = tiny_lm("gpt2"), METHODS[name]
    few = {"ike": {"k": 0}, "grace": {"steps": 1}, "wise": {"steps": 1, "contexts": 1}}[name]
    change = method.prepare(lm, [REQUEST], method.read(method.ref(few)), 0, silent)
    for one in (change, Chain((change_of(lm), change))):
        with pytest.raises(UnsupportedMethod, match="the weights stay as they are") as caught:
            export(lm, one, tmp_path / "out", [MADE])
        assert "stack" in caught.value.next_step
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", list(METHODS), ids=lambda method: method.name)
def test_the_family_tells_before_any_work(method):
    if method.family == "weights":
        check_family(method.title, method.family)
        return
    with pytest.raises(UnsupportedMethod, match=method.title):
        check_family(method.title, method.family)


def test_other_wrong_inputs(tiny_lm, tmp_path):
    lm = tiny_lm("gpt2")
    change = change_of(lm)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x", encoding="utf-8")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    wrong = {"full": "not empty", "file": "not a folder", "link": "not a folder", "no/where": "no folder"}
    for name, words in wrong.items():
        with pytest.raises(BadInput, match=words):
            export(lm, change, tmp_path / name, [MADE])
    with pytest.raises(BadInput, match="no edit"):
        export(lm, Chain(()), tmp_path / "out", [])
    with PromptPrefix("x ").applied(lm), pytest.raises(BadInput, match="another change"):
        export(lm, change, tmp_path / "out", [MADE])
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    export(lm, change, tmp_path / "empty", [MADE])
    assert (tmp_path / "empty" / "config.json").is_file()


def test_it_is_there_whole_or_not_at_all(tiny_lm, tmp_path, monkeypatch):
    lm = tiny_lm("gpt2")
    digest = lm.live_digest()
    change = change_of(lm)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    for place in ("mega_core.folders.os.fsync", "mega_core.export._sha256"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(StoreError, match="No space left"):
                export(lm, change, tmp_path / "out", [MADE])

    def stop(event: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(lm, change, tmp_path / "out", [MADE], report=stop)
    bad = WeightDelta((MatrixDelta(99, "mlp_down", torch.ones(32, 1), torch.ones(56, 1), 1.0),))
    with pytest.raises(BadInput, match="layer 99"):
        export(lm, bad, tmp_path / "out", [MADE])
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []
    assert (lm.live_digest(), lm.changes) == (digest, [])
    assert Path(export(lm, change, tmp_path / "out", [MADE])).is_dir()
