from __future__ import annotations

from pathlib import Path

import pytest

from mega_core import datasets
from mega_core.errors import BadInput
from tests.datasets.samples import as_file, records
from tests.test_layering import reach


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A hub cache with one dataset of two files, and one of a single file."""
    for name, listed in (("bray--two", ("a.json", "sub/b.jsonl")), ("finch--one", ("data/only.json",))):
        folder = tmp_path / f"datasets--{name}"
        commit = "0123456789abcdef0123456789abcdef01234567"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        for i, path in enumerate(listed):
            file = folder / "snapshots" / commit / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(as_file(records(("zsre", "table")[i]), lines=path.endswith("l")))
    (tmp_path / "secret.json").write_bytes(as_file(records("table")))
    return tmp_path


def test_a_cached_dataset_is_read_without_a_request(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", _no_network)
    found = datasets.load("finch/one", hub_cache=cache)
    assert (found.name, found.source, found.format, len(found.cases)) == ("only", "finch/one", "zsre", 8)
    assert datasets.load("bray/two:sub/b.jsonl", hub_cache=cache, limit=2).format == "table"
    with pytest.raises(BadInput, match="2 files") as caught:
        datasets.load("bray/two", hub_cache=cache)
    assert "a.json, sub/b.jsonl" in caught.value.next_step
    for inside in ("nothing.json", "../../../../secret.json", "/etc/hosts"):
        with pytest.raises(BadInput, match="has no file"):
            datasets.load(f"bray/two:{inside}", hub_cache=cache)


def test_what_is_not_here_is_not_downloaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", _no_network)
    with pytest.raises(BadInput) as caught:
        datasets.load("nobody/nothing", hub_cache=cache)
    assert caught.value.what == (
        "dataset: nobody/nothing is no file here, and is not in the local hub cache, and nothing is downloaded."
    )
    assert "hf download --repo-type dataset nobody/nothing" in caught.value.next_step


@pytest.mark.parametrize(
    "name", ["nope.json", "a/nope.json", "../x", "counterfact", "", "a\0b", "x" * 5000, "a/b/c", "https://a.b/c"]
)
def test_a_name_that_is_nothing_is_refused(name: str, cache: Path) -> None:
    with pytest.raises(BadInput) as caught:
        datasets.load(name, hub_cache=cache)
    assert "there is no file" in caught.value.what or "is a folder" in caught.value.what
    assert caught.value.next_step
    assert len(str(caught.value)) < 400


def test_a_format_for_a_file_is_told_apart_from_a_file(cache: Path) -> None:
    with pytest.raises(BadInput, match="is a format: give the file as well"):
        datasets.load("counterfact", hub_cache=cache)
    with pytest.raises(BadInput, match="is a folder"):
        datasets.load(cache)


def test_datasets_need_no_torch() -> None:
    assert not {"torch", "transformers"} & set(reach("mega_core.datasets"))


def _no_network(*_: object) -> None:
    raise AssertionError("asked the network")
