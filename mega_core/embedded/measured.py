"""What a contrast of edits found on each embedded model, as it ships: curves, region, and whether the published pattern
holds. Made by `python -m mega_core contrast --model MODEL --ship`; the pages show it, and MEGA and ACE take its region.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from mega_core import frames
from mega_core.errors import BadInput, FrameError, StoreError
from mega_core.folders import write_file
from mega_core.regions import Claim, Region

FOLDER = Path(__file__).parent / "contrast"
MAX_BYTES = 2**21


@dataclass(frozen=True)
class Measured:
    """One model's contrast."""

    region: Region
    verdict: str
    """Whether the pattern holds, in a sentence."""
    claims: Mapping[str, tuple[Claim, ...]]
    """Editor -> the parts of the pattern."""
    curves: pd.DataFrame
    """The frame `contrast`."""


def load(model: str, weights: str, folder: Path = FOLDER) -> Measured | None:
    """What ships for this model; None when there is nothing, or it was made on other weights.

    Raises StoreError on a damaged file.
    """
    path = folder / f"{model}.json"
    if not path.is_file():
        return None
    stamp = path.stat()
    found = _read(path, stamp.st_mtime_ns, stamp.st_size)
    return found if (found.region.model, found.region.weights) == (model, weights) else None


@lru_cache(maxsize=4)
def _read(path: Path, changed: int, size: int) -> Measured:
    """The file as it is at this time and size: pages ask for it at every redraw."""
    try:
        if size > MAX_BYTES:
            raise ValueError("too large")
        plain = json.loads(path.read_bytes())
        return Measured(
            Region.of_plain(plain["region"]),
            str(plain["verdict"]),
            {
                str(name): tuple(
                    Claim(str(c["text"]), str(c["holds"]), float(c["value"]), float(c["low"]), float(c["high"]))
                    for c in claims
                )
                for name, claims in plain["claims"].items()
            },
            frames.from_rows(plain["curves"], "contrast"),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, FrameError, BadInput) as error:
        raise StoreError(
            f"{path.name} is damaged ({str(error)[:80]}).", "Make it again: mega_core contrast."
        ) from error


def write(study: Mapping[str, Any], folder: Path = FOLDER) -> Path:
    """Keep of a study, as plain JSON, what the pages show."""
    kept = {
        "region": study["region"],
        "verdict": study["verdict"],
        "claims": study["claims"],
        "curves": [_rounded(row) for row in study["frames"]["contrast"]],
    }
    path = folder / f"{study['region']['model']['name']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(kept, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n").encode())
    return path


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in row.items()}
