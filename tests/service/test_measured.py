"""The contrast that ships with each embedded model: read back as it was written, refused when damaged or foreign."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mega_core.embedded import measured
from mega_core.errors import BadInput, StoreError
from mega_core.regions import Claim
from mega_core.service import Service
from mega_core.settings import Settings

STUDY: dict[str, Any] = {
    "region": {
        "schema_version": 1, "kind": "region", "model": {"name": "little", "weights": "a" * 64}, "n_layers": 4,
        "methods": ["rome"], "edits": 3, "seed": 0, "basis": "D",
        "counts": {"rome": {"success": 3, "failure": 0, "left_out": 0, "failures": "too few"}},
        "layers": [2, 3], "value_layers": [2], "query_layers": [1], "leverage": [], "rules": {}, "versions": {},
    },
    "verdict": "It holds.",
    "claims": {"rome": [{"text": "late", "holds": "yes", "value": 1.5, "low": 1.0, "high": 2.0}]},
    "frames": {
        "contrast": [
            {"editor": "rome", "statistic": "D", "failures": "none", "module": "attn", "layer": 2, "candidate": "new",
             "mean": 1.23456789, "low": 1.0, "high": 2.0, "n_success": 3, "n_failure": 0}
        ]
    },
}  # fmt: skip


def test_a_file_is_read_once_until_it_changes(tmp_path: Path) -> None:
    measured.write(STUDY, tmp_path)
    first = measured.load("little", "a" * 64, tmp_path)
    assert measured.load("little", "a" * 64, tmp_path) is first
    measured.write({**STUDY, "verdict": "It does not hold."}, tmp_path)
    changed = measured.load("little", "a" * 64, tmp_path)
    assert changed is not None
    assert changed.verdict == "It does not hold."


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = measured.write(STUDY, tmp_path)
    assert path == tmp_path / "little.json"
    found = measured.load("little", "a" * 64, tmp_path)
    assert found is not None
    assert found.region.as_plain() == STUDY["region"]
    assert found.verdict == "It holds."
    assert found.claims["rome"] == (Claim("late", "yes", 1.5, 1.0, 2.0),)
    assert found.curves["mean"].tolist() == [1.23457]


def test_nothing_for_another_model_or_other_weights(tmp_path: Path) -> None:
    measured.write(STUDY, tmp_path)
    assert measured.load("little", "b" * 64, tmp_path) is None
    assert measured.load("big", "a" * 64, tmp_path) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda plain: plain.pop("region"),
        lambda plain: plain["region"].update(kind="other"),
        lambda plain: plain["region"].update(layers=[9]),
        lambda plain: plain["claims"]["rome"][0].pop("low"),
        lambda plain: plain.update(claims=[]),
        lambda plain: plain["curves"][0].update(mean="x"),
        lambda plain: plain["curves"].append(plain["curves"][0]),
    ],
)
def test_damage_is_told(tmp_path: Path, damage: Any) -> None:
    path = measured.write(STUDY, tmp_path)
    plain = json.loads(path.read_text())
    damage(plain)
    path.write_text(json.dumps(plain))
    with pytest.raises(StoreError, match="damaged"):
        measured.load("little", "a" * 64, tmp_path)
    path.write_bytes(b"\xff{")
    with pytest.raises(StoreError, match="damaged"):
        measured.load("little", "a" * 64, tmp_path)


@pytest.mark.parametrize("model", ["atlas-gpt2", "atlas-qwen3"])
def test_each_embedded_model_ships_one_that_fits_its_weights(model: str) -> None:
    with Service.open(Settings.read()) as service:
        found = service.studies.measured(model)
        assert found is not None
        assert service.studies.regions(model)[model] == found.region
        assert not service.status().notices
    assert found.claims.keys() == set(found.region.methods)
    assert set(found.curves["layer"]) == set(range(found.region.n_layers))


def test_only_embedded_models_ship_one() -> None:
    with Service.open(Settings.read()) as service, pytest.raises(BadInput, match="does not ship"):
        service.studies.ship_contrast(
            {**STUDY, "region": {**STUDY["region"], "model": {"name": "gpt2", "weights": "a" * 64}}}
        )
