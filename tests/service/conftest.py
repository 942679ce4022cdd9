from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mega_core.methods.base import METHODS
from mega_core.service import Service
from mega_core.settings import Settings
from tests.service.toy import TOY, write_catalogue


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models on disk; the second has the shape of one that a method refuses."""
    return write_catalogue(tmp_path_factory.mktemp("models"), little="gpt2", refused="gptj")


@pytest.fixture
def settings(catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setitem(METHODS._entries, "toy", TOY)
    env = {"MEGA_CACHE_DIR": str(tmp_path / "cache"), "MEGA_MODELS": str(catalogue), "MEGA_DEVICE": "cpu"}
    return replace(Settings.read(env), job_seconds=120.0)


@pytest.fixture
def service(settings: Settings) -> Iterator[Service]:
    with Service.open(settings) as opened:
        yield opened
