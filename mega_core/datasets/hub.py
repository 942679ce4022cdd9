"""The file of a dataset on the Hugging Face hub: "owner/name", or "owner/name:path/in/it.json".

1. The local cache is read; the network is asked only when the caller says so.
2. Without a path, the dataset's only JSON, JSON Lines, CSV or TSV file.
"""

from __future__ import annotations

import re
from pathlib import Path

from mega_core.errors import BadInput

ENDINGS = (".json", ".jsonl", ".csv", ".tsv")
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")


def find(named: str, *, download: bool = False, cache: Path | None = None) -> Path:
    """The file on this machine. Raises BadInput saying what to do when there is none."""
    name, _, inside = named.partition(":")
    if not _ID.fullmatch(name) or name.endswith(ENDINGS) or ".." in name:
        raise BadInput(
            "dataset",
            f"there is no file {named[:200]!r}.",
            'Give the path of a file, "builtin", or "owner/name" of a hub.',
        )
    folder = _snapshot(name, download, cache)
    if folder is None:
        asked = "could not be downloaded" if download else "is not in the local hub cache, and nothing is downloaded"
        step = f"Run: hf download --repo-type dataset {name}. Or give the path of a file."
        raise BadInput("dataset", f"{name} is no file here, and {asked}.", step)
    if inside:
        file = folder / inside
        if ".." in Path(inside).parts or Path(inside).is_absolute() or not file.is_file():
            raise BadInput("dataset", f"{name} has no file {inside[:100]!r} here.", _choices(folder))
        return file
    files = _files(folder)
    if len(files) != 1:
        raise BadInput("dataset", f"{name} has {len(files)} files that could be read.", _choices(folder))
    return files[0]


def _snapshot(name: str, download: bool, cache: Path | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            name,
            repo_type="dataset",
            cache_dir=cache,
            local_files_only=not download,
            allow_patterns=[f"*{ending}" for ending in ENDINGS],
        )
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError, ValueError):
        return None
    folder = Path(found)
    return folder if folder.is_dir() else None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.name.endswith(ENDINGS) and path.is_file())


def _choices(folder: Path) -> str:
    names = [path.relative_to(folder).as_posix() for path in _files(folder)]
    if not names:
        return f"Only {', '.join(ENDINGS)} are read."
    return f"Write owner/name:FILE; files: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
