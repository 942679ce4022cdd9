"""The operator's choices: read from the environment and a TOML file, wrong ones named by entry and key."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from mega_core.errors import BadInput, ModelUnavailable, UnknownName
from mega_core.executors import NAMES
from mega_core.settings import (
    CATALOGUE,
    EXECUTOR_NAMES,
    ModelEntry,
    Settings,
    check_folder,
    read_catalogue,
    weights_digest,
)
from tests.conftest import ROOT


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def model_folder(path: Path, config: dict | None = None) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config or {"model_type": "gpt2"}))
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def test_the_catalogue():
    settings = Settings.read({})
    assert {"atlas-gpt2", "atlas-qwen3", "gpt2", "gpt2-xl", "llama-2-7b", "gpt-j-6b", "qwen3-8b"} <= set(
        settings.models
    )
    assert {e.architecture for e in settings.models.values()} == {"gpt2", "gptj", "llama", "qwen3"}
    for entry in settings.models.values():
        assert entry.licence
        assert entry.memory_gb > 0
        assert entry.title
        assert entry.embedded == (entry.path is not None)
        assert entry.embedded or (entry.hub and entry.revision and entry.defaults["rome"]["layer"] >= 0)
        assert settings.model(entry.name) is entry
    assert settings.model("Qwen/Qwen3-8B").name == "qwen3-8b"
    assert settings.models["gpt2-xl"].defaults["rome"]["layer"] == 17
    assert settings.models["atlas-gpt2"].path == CATALOGUE.parent / "embedded" / "weights" / "atlas-gpt2"


def test_defaults_and_environment(tmp_path: Path):
    plain = Settings.read({})
    assert (plain.cache_dir, plain.device, plain.memory_gb, plain.max_models) == (Path("cache"), "auto", None, 1)
    given = Settings.read(
        {
            "MEGA_CACHE_DIR": str(tmp_path),
            "MEGA_DEVICE": "cuda:1",
            "MEGA_DEVICE_MAP": "auto",
            "MEGA_MEMORY_GB": "24.5",
            "MEGA_MAX_MODELS": "3",
            "MEGA_DATABASE_URL": "postgresql://db/notebook",
            "MEGA_JOB_SECONDS": "60",
            "MEGA_STORE_GB": "0.5",
            "MEGA_EXECUTOR": " ray ",
            "HF_HOME": str(tmp_path / "hf"),
        }
    )
    assert (given.cache_dir, given.device, given.device_map) == (tmp_path, "cuda:1", "auto")
    assert (given.memory_gb, given.max_models, given.job_seconds, given.store_gb) == (24.5, 3, 60.0, 0.5)
    assert (plain.executor, given.executor) == ("local", "ray")
    assert given.database_url == "postgresql://db/notebook"
    assert given.hub_cache == tmp_path / "hf" / "hub"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MEGA_DEVICE", "tpu"),
        ("MEGA_EXECUTOR", "slurm"),
        ("MEGA_DEVICE_MAP", "everywhere"),
        ("MEGA_MEMORY_GB", "lots"),
        ("MEGA_MEMORY_GB", "-1"),
        ("MEGA_MEMORY_GB", "nan"),
        ("MEGA_MAX_MODELS", "0"),
        ("MEGA_MAX_MODELS", "1.5"),
        ("MEGA_JOB_SECONDS", "inf"),
        ("MEGA_MODELS", "/nowhere/models.toml"),
    ],
)
def test_a_wrong_variable_is_named(key: str, value: str):
    with pytest.raises(BadInput) as error:
        Settings.read({key: value})
    assert key in str(error.value)


def test_the_executors_of_the_settings_are_those_there_are():
    assert EXECUTOR_NAMES == NAMES


def test_settings_are_frozen():
    settings = Settings.read({})
    with pytest.raises(FrozenInstanceError):
        settings.device = "cpu"  # type: ignore[misc]
    with pytest.raises(TypeError):
        settings.models["x"] = settings.models["gpt2"]  # type: ignore[index]
    with pytest.raises(TypeError):
        settings.models["gpt2"].defaults["rome"]["layer"] = 1  # type: ignore[index]


def test_an_operators_file_adds_and_overrides(tmp_path: Path):
    folder = model_folder(tmp_path / "mine")
    file = write(
        tmp_path / "models.toml",
        """
        [[model]]
        name = "mine"
        path = "mine"
        memory_gb = 2

        [[model]]
        name = "gpt2-xl"
        dtype = "float16"
        [model.defaults.rome]
        steps = 30
        """,
    )
    settings = Settings.read({"MEGA_MODELS": str(file)})
    assert settings.models["mine"].path == folder
    assert settings.models["mine"].locate() == folder
    assert settings.models["mine"].title == "mine"
    xl, base = settings.models["gpt2-xl"], Settings.read({}).models["gpt2-xl"]
    assert (xl.dtype, xl.hub, xl.revision) == ("float16", base.hub, base.revision)
    assert dict(xl.defaults["rome"]) == {**base.defaults["rome"], "steps": 30}
    assert list(settings.models)[: len(Settings.read({}).models)] == list(Settings.read({}).models)
    assert settings.models["mine"] in settings.available()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('[[model]]\nname = "m"\nhub = "a/b"\nmemory_gb = "lots"', ["'m'", "'memory_gb'", "int or float"]),
        ('[[model]]\nname = "m"\nhub = "a/b"\nlayers = 3', ["'m'", "'layers'", "memory_gb"]),
        ('[[model]]\nname = "m"\nhub = "a/b"\ndtype = "int8"', ["'m'", "'dtype'", "bfloat16"]),
        ('[[model]]\nname = "m"\nhub = "a/b"\nattention = "fast"', ["'m'", "'attention'", "eager"]),
        ('[[model]]\nname = "m"\nhub = "../../etc"', ["'m'", "'hub'"]),
        ('[[model]]\nname = "m"\nhub = "a/b"\nrevision = "../x"', ["'m'", "'revision'"]),
        ('[[model]]\nname = "m"', ["'m'", "'path'", "'hub'"]),
        ('[[model]]\nhub = "a/b"', ["model 1", "'name'"]),
        ('[[model]]\nname = "../m"\nhub = "a/b"', ["model 1", "'name'"]),
        ('[[model]]\nname = "m"\nhub = "a/b"\nembedded = 1', ["'m'", "'embedded'"]),
        ('[[model]]\nname = "m"\nhub = "a/b"\nparams = true', ["'m'", "'params'"]),
        ('[[model]]\nname = "m"\nhub = "a/b"\n[model.defaults]\nrome = 3', ["'m'", "defaults.rome"]),
        ('[[model]]\nname = "m"\nhub = "a/b"\n[model.defaults.rome]\nlayer = [1]', ["'m'", "defaults.rome.layer"]),
        ('[[model]]\nname = "m"\nhub = "a/b"\n[[model]]\nname = "m"\nhub = "a/b"', ["'m'", "twice"]),
        ('[model]\nname = "m"', ["[[model]]"]),
        ("[[models]]\n", ["'models'", "[[model]]"]),
        ("model = 3", ["[[model]]"]),
        ("model = [3]", ["model 1"]),
        ("[[model]\n", ["TOML"]),
    ],
)
def test_a_malformed_file_names_entry_and_key(tmp_path: Path, text: str, named: list[str]):
    file = write(tmp_path / "models.toml", text)
    with pytest.raises(BadInput) as error:
        Settings.read({"MEGA_MODELS": str(file)})
    for part in ("models.toml", *named):
        assert part in str(error.value)


def test_a_new_hub_id_replaces_an_embedded_folder(tmp_path: Path):
    file = write(tmp_path / "models.toml", '[[model]]\nname = "atlas-gpt2"\nhub = "a/b"')
    assert read_catalogue(file, read_catalogue(CATALOGUE))["atlas-gpt2"].path is None


def test_a_model_that_is_not_here_says_how_to_get_it(tmp_path: Path):
    settings = Settings.read({"HF_HUB_CACHE": str(tmp_path)})
    for name in ("gpt2", "llama-2-7b", "qwen3-8b"):
        error = settings.models[name].missing(settings.hub_cache)
        assert isinstance(error, ModelUnavailable)
        assert "isn't on this machine" in error.what
        assert f"hf download {settings.models[name].hub}" in error.next_step
        assert settings.models[name].revision in error.next_step
        assert "://" not in str(error)
        assert ".co" not in str(error)
        assert str(tmp_path) not in str(error)
    with pytest.raises(ModelUnavailable):
        settings.locate(settings.models["gpt2"])


def test_a_downloaded_model_is_found_offline(tmp_path: Path):
    entry = Settings.read({}).models["gpt2"]
    store = tmp_path / "models--openai-community--gpt2"
    folder = model_folder(store / "snapshots" / entry.revision)
    assert entry.locate(tmp_path) == folder
    assert entry.missing(tmp_path) is None


def test_unknown_names_suggest_a_known_one():
    settings = Settings.read({})
    with pytest.raises(UnknownName, match="gpt2-xl"):
        settings.model("gpt2-xll")
    for name in ("../../etc/passwd", "/tmp", "evil/model", ""):
        with pytest.raises(UnknownName):
            settings.model(name)


def test_unfit_folders(tmp_path: Path):
    good = model_folder(tmp_path / "good")
    check_folder(good, "m")
    with pytest.raises(ModelUnavailable, match=r"config\.json"):
        check_folder(tmp_path, "m")
    for text in ("{", "[]", "\udcff"):
        broken = model_folder(tmp_path / f"broken{len(text)}{text[0] == '{'}{text == '[]'}")
        (broken / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ModelUnavailable, match=r"config\.json"):
            check_folder(broken, "m")
    empty = model_folder(tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match="safetensors"):
        check_folder(empty, "m")
    assert "isn't on this machine" in str(ModelEntry("m", path=tmp_path / "gone").missing())


def test_the_digest_follows_the_content_and_is_remembered(tmp_path: Path):
    folder, cache = model_folder(tmp_path / "m"), tmp_path / "cache"
    first = weights_digest(folder, cache)
    assert first == weights_digest(folder) == weights_digest(folder, cache)
    assert len(list((cache / "digests").iterdir())) == 1
    memo = next((cache / "digests").iterdir())
    memo.write_text("not a digest")
    assert weights_digest(folder, cache) == first
    (folder / "model.safetensors").write_bytes(b"weighty")
    assert weights_digest(folder, cache) != first
    (folder / "tokenizer.json").write_text("{}")
    with_tokenizer = weights_digest(folder, cache)
    assert with_tokenizer != first
    (folder / "README.md").write_text("not part of the model")
    assert weights_digest(folder, cache) == with_tokenizer


def test_a_digest_that_cannot_be_remembered_is_still_given(tmp_path: Path):
    folder = model_folder(tmp_path / "m")
    blocked = write(tmp_path / "file", "in the way")
    assert weights_digest(folder, blocked) == weights_digest(folder)


def test_reading_settings_needs_no_torch():
    code = (
        "import sys; from mega_core.settings import Settings; s = Settings.read({'HF_HUB_CACHE': '/nonexistent'}); "
        "s.available(); import mega_core.models.arch; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
