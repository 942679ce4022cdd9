"""From a folder to a checked model; unfit folders are refused with a reason and without running anything from them."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mega_core.errors import ModelUnavailable, UnsupportedModel
from mega_core.events import Event, Finished, Started
from mega_core.models import loading
from mega_core.models.loading import load, pick_device
from mega_core.settings import ModelEntry, Settings
from tests.conftest import ARCH_NAMES
from tests.tiny import save_tiny, tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def folder(arch: str) -> Path:
        path = root / arch
        return path if path.exists() else save_tiny(arch, path)

    return folder


@pytest.fixture
def folder(folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder of a tiny llama that a test may spoil."""
    return Path(shutil.copytree(folders("llama"), tmp_path / "model"))


def entry(path: Path, **more) -> ModelEntry:
    return ModelEntry("local", path=path, **more)


def settings_of(tmp_path: Path, **more) -> Settings:
    return Settings(cache_dir=tmp_path / "cache", device="cpu", **more)


@pytest.mark.parametrize("arch", ARCH_NAMES)
def test_every_architecture_comes_back_as_saved(folders: Callable[[str], Path], tmp_path: Path, arch: str):
    events: list[Event] = []
    lm = load(entry(folders(arch)), settings_of(tmp_path), events.append)
    saved = tiny(arch)
    batch = saved.encode(["The capital of France is"])
    with torch.no_grad():
        torch.testing.assert_close(lm.logits(lm.encode(["The capital of France is"])), saved.logits(batch))
    assert lm.name == "local"
    assert len(lm.file_digest) == 64
    assert lm.hook_count() == 0
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)


def test_models_are_read_one_at_a_time(folders: Callable[[str], Path], tmp_path: Path, monkeypatch):
    """Of two that were read at once, one came back without some of its weights."""
    read, inside, together = loading._model, [], []

    def slowly(path: Path, *more):
        inside.append(path)
        together.append(len(inside))
        time.sleep(0.1)
        model = read(path, *more)
        inside.remove(path)
        return model

    monkeypatch.setattr(loading, "_model", slowly)
    entries = [ModelEntry(name, path=folders(name)) for name in ("gpt2", "llama", "qwen3")]
    with ThreadPoolExecutor() as pool:
        loaded = list(pool.map(lambda entry: load(entry, Settings(cache_dir=tmp_path)), entries))
    assert [lm.ref.name for lm in loaded] == ["gpt2", "llama", "qwen3"]
    assert together == [1, 1, 1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision(folders: Callable[[str], Path], tmp_path: Path, dtype: str):
    for arch in ("gpt2", "qwen3"):
        lm = load(entry(folders(arch), dtype=dtype), settings_of(tmp_path))
        assert lm.dtype == getattr(torch, dtype)
        assert lm.ref.dtype == dtype
        assert len(lm.generate(["Rome is", "The"], 3)) == 2
        assert lm.live_digest() == lm.live_digest()


def test_eager_attention_when_asked(folders: Callable[[str], Path], tmp_path: Path):
    assert load(entry(folders("llama")), settings_of(tmp_path)).model.config._attn_implementation == "sdpa"
    eager = load(entry(folders("llama"), attention="eager"), settings_of(tmp_path))
    assert eager.model.config._attn_implementation == "eager"


def test_a_device_map(folders: Callable[[str], Path], tmp_path: Path):
    lm = load(entry(folders("llama")), settings_of(tmp_path, device_map="auto"))
    plain = load(entry(folders("llama")), settings_of(tmp_path))
    assert lm.generate(["Rome"], 4) == plain.generate(["Rome"], 4)


def test_pickled_weights_are_refused_and_never_read(folder: Path, tmp_path: Path):
    canary = tmp_path / "canary"
    (folder / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (canary,))

    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(ModelUnavailable, match="pickle") as error:
            load(entry(folder), settings_of(tmp_path))
        assert "safetensors" in error.value.next_step
    assert not canary.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_the_folder_is_refused_and_never_run(folder: Path, tmp_path: Path, file: str):
    canary = tmp_path / "canary"
    content = json.loads((folder / file).read_text())
    content["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Model", None]}
    (folder / file).write_text(json.dumps(content))
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Model: pass\n")
    with pytest.raises(ModelUnavailable, match="auto_map"):
        load(entry(folder), settings_of(tmp_path))
    assert not canary.exists()


def change_config(folder: Path, **values) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **values}))


@pytest.mark.parametrize(
    ("model_type", "reason"), [("gemma2", "normalises"), ("olmo2", "normalises"), ("mamba", "table")]
)
def test_other_architectures_are_refused(folder: Path, tmp_path: Path, model_type: str, reason: str):
    change_config(folder, model_type=model_type)
    with pytest.raises(UnsupportedModel, match=reason):
        load(entry(folder), settings_of(tmp_path))


def test_quantised_weights_are_refused(folder: Path, tmp_path: Path):
    change_config(folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelUnavailable, match="quantised"):
        load(entry(folder), settings_of(tmp_path))


def test_missing_weights_are_refused_instead_of_made_up(folder: Path, tmp_path: Path):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnavailable, match=r"layers\.1\.mlp\.down_proj"):
        load(entry(folder), settings_of(tmp_path))


def test_a_missing_shard_is_named(folder: Path, tmp_path: Path):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelUnavailable, match="model-00002-of-00002"):
        load(entry(folder), settings_of(tmp_path))


def test_damaged_weights_are_refused(folder: Path, tmp_path: Path):
    data = (folder / "model.safetensors").read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"\xff" * 64):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ModelUnavailable, match="local"):
            load(entry(folder), settings_of(tmp_path))


def test_a_folder_without_tokenizer_is_refused(folder: Path, tmp_path: Path):
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises((ModelUnavailable, UnsupportedModel), match="tokenizer"):
        load(entry(folder), settings_of(tmp_path))


def test_the_memory_budget_is_kept(folder: Path, tmp_path: Path):
    with pytest.raises(ModelUnavailable, match="needs about 20 GB, the budget is 8 GB"):
        load(entry(folder, memory_gb=20.0), settings_of(tmp_path, memory_gb=8.0))


def test_loading_touches_no_network(folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    load(entry(folders("gpt2")), settings_of(tmp_path))


def test_devices():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(ModelUnavailable, match="cuda"):
            pick_device("cuda:1")


def test_the_file_digest_is_that_of_the_files(folders: Callable[[str], Path], tmp_path: Path):
    one = load(replace(entry(folders("gpt2")), name="one"), settings_of(tmp_path))
    two = load(replace(entry(folders("gpt2")), name="two"), settings_of(tmp_path))
    other = load(entry(folders("llama")), settings_of(tmp_path))
    assert one.file_digest == two.file_digest != other.file_digest


@pytest.mark.slow
def test_a_real_trained_model(shared_data: Callable[[str], Path], tmp_path: Path):
    lm = load(entry(shared_data("stories260k")), settings_of(tmp_path))
    prompts = ["Once upon a time, there was a little girl", "Lily", "The dog wanted to"]
    texts = lm.generate(prompts, 20)
    assert texts == [lm.generate([prompt], 20)[0] for prompt in prompts]
    assert all(len(text.split()) > 3 for text in texts)
