"""A contrast of edits as pages show it, whether it ships with a model or was made here, and the folder that keeps it.

A folder holds `study.json` (region, verdict, claims, what was asked) and a Parquet file per frame. It is there whole or
not at all; its name is the digest of what was asked, so the same study is made once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mega_core import frames
from mega_core.embedded.measured import Measured
from mega_core.errors import BadInput, FrameError, StoreError
from mega_core.folders import new_folder
from mega_core.regions import Claim, Region

if TYPE_CHECKING:
    from mega_core.contrast_study import Study

SCHEMA_VERSION = 1
MAX_BYTES = 8 * 2**20
"""Of one file."""
SHIPPED, DRAWN, MINE = "shipped", "drawn", "mine"
FRAMES = ("contrast", "contrast_sums", "contrast_runs", "leverage")
ALL = "all"
"""The editor of rows that average over editors."""
ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Contrasted:
    """What one study found."""

    id: str
    """32 hex digits; empty for the one that ships."""
    source: str
    """shipped | drawn (random facts) | mine (runs that were there)."""
    region: Region
    verdict: str
    """Whether the published pattern holds, in a sentence."""
    claims: Mapping[str, tuple[Claim, ...]]
    """Editor -> the parts of the pattern."""
    curves: pd.DataFrame
    """The frame `contrast`."""
    leverage: pd.DataFrame
    """The frame `leverage`; of the one that ships only the editors' mean for attention."""
    runs: pd.DataFrame
    """The frame `contrast_runs`; empty for the one that ships."""
    left_out: Mapping[str, Mapping[str, int]]
    """Editor -> reason -> how many edits don't count."""
    made: str = ""
    """When, ISO 8601."""

    @property
    def map(self) -> pd.DataFrame:
        """Leverage of every editor's modules in nats: editor, module, layer, leverage, in_region."""
        return raw_leverage(self.curves, self.region)


def of_measured(found: Measured) -> Contrasted:
    """The study that ships, in the same form as the others."""
    region = found.region
    rows: list[dict[str, object]] = [
        {
            "editor": ALL, "basis": region.basis, "module": "attn", "layer": lever.layer, "leverage": lever.leverage,
            "low": lever.low, "high": lever.high, "smoothed": lever.smoothed,
            "in_region": lever.layer in region.layers, "chosen": lever.chosen,
        }
        for lever in region.leverage
    ]  # fmt: skip
    return Contrasted(
        "", SHIPPED, region, found.verdict, found.claims, found.curves, frames.from_rows(rows, "leverage"),
        frames.empty("contrast_runs"), {},
    )  # fmt: skip


def raw_leverage(curves: pd.DataFrame, region: Region) -> pd.DataFrame:
    """max(0, X(new)) + beta max(0, -X(true)) of each editor, module and layer, X the statistic that the region was read
    from; nats. Natural failures before induced ones.
    """
    beta = float(region.rules.get("beta", 1.0))
    mine = curves[curves["statistic"] == region.basis]
    mine = mine.drop_duplicates(["editor", "module", "layer", "candidate"])
    wide = mine.pivot(index=["editor", "module", "layer"], columns="candidate", values="mean").reset_index()
    wide["leverage"] = wide["new"].clip(lower=0) + beta * (-wide["true"]).clip(lower=0)
    wide["in_region"] = wide["layer"].isin(region.layers)
    order = {name: i for i, name in enumerate(dict.fromkeys(mine["editor"]))}
    wide = wide.sort_values(["editor", "module", "layer"], key=lambda c: c.map(order) if c.name == "editor" else c)
    return wide[["editor", "module", "layer", "leverage", "in_region"]].reset_index(drop=True)


def keep(study: Study, name: str, source: str, asked: Mapping[str, Any], root: Path) -> None:
    """Write a study to the folder `root`/`name`; one of that name stays. Raises StoreError when the disk refuses."""
    plain = {
        "schema_version": SCHEMA_VERSION,
        "kind": "contrast",
        "source": source,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "asked": dict(asked),
        "region": study.region.as_plain(),
        "verdict": study.in_words,
        "claims": {editor: [asdict(claim) for claim in claims] for editor, claims in study.verdicts.items()},
        "left_out": {editor: dict(reasons) for editor, reasons in study.left_out.items()},
    }
    root.mkdir(parents=True, exist_ok=True)
    if (root / name).exists():
        return
    with new_folder(root / name, "study") as folder:
        (folder / "study.json").write_text(
            json.dumps(plain, ensure_ascii=False, allow_nan=False, indent=1) + "\n", encoding="utf-8"
        )
        for frame in FRAMES:
            (folder / f"{frame}.parquet").write_bytes(frames.to_parquet(study.frames[frame]))


def load(name: str, root: Path) -> Contrasted | None:
    """The study of this name; None when there is none, or the text is no name. Raises StoreError on damage."""
    folder = root / name if ID.fullmatch(name) else None
    if folder is None or not folder.is_dir():
        return None
    try:
        plain = _headline(folder)
        found = {frame: frames.from_parquet(_bytes(folder / f"{frame}.parquet"), frame) for frame in FRAMES}
        return Contrasted(
            id=name,
            source=str(plain["source"]),
            region=Region.of_plain(plain["region"]),
            verdict=str(plain["verdict"]),
            claims={
                str(editor): tuple(
                    Claim(str(c["text"]), str(c["holds"]), float(c["value"]), float(c["low"]), float(c["high"]))
                    for c in claims
                )
                for editor, claims in plain["claims"].items()
            },
            curves=found["contrast"],
            leverage=found["leverage"],
            runs=found["contrast_runs"],
            left_out={
                str(editor): {str(why): int(n) for why, n in reasons.items()}
                for editor, reasons in plain["left_out"].items()
            },
            made=str(plain["made"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, FrameError, BadInput) as error:
        raise StoreError(
            f"The stored study {name[:8]} is damaged ({str(error)[:80]}).", "Run it again with the same settings."
        ) from error


def listed(root: Path, model: str) -> list[dict[str, Any]]:
    """What there is of a model, newest first: id, source, made, methods, edits, layers, owner. Damaged ones are passed
    over.
    """
    rows: list[dict[str, Any]] = []
    for folder in root.iterdir() if root.is_dir() else ():
        if not ID.fullmatch(folder.name):
            continue
        try:
            plain = _headline(folder)
            region = Region.of_plain(plain["region"])
            if region.model == model:
                rows.append(
                    {
                        "id": folder.name, "source": str(plain["source"]), "made": str(plain["made"]),
                        "methods": tuple(region.counts), "edits": region.edits, "layers": region.layers,
                        "owner": str(plain["asked"].get("owner", "")),
                    }
                )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, BadInput):
            continue
    return sorted(rows, key=lambda row: (row["made"], row["id"]), reverse=True)


def _headline(folder: Path) -> Mapping[str, Any]:
    plain = json.loads(_bytes(folder / "study.json"))
    if not isinstance(plain, dict) or plain.get("schema_version") != SCHEMA_VERSION or plain.get("kind") != "contrast":
        raise ValueError("not a study of this version")
    return plain


def _bytes(path: Path) -> bytes:
    with path.open("rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path.name} is too large")
    return data
