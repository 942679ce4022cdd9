"""Tables of benchmark runs for docs/results.md: python -m bench.tables docs/results.md NAME=FOLDER [NAME=FOLDER ...].

Each run's tables, made from the `summary.csv` and `plan.json` in its folder, go between the lines `<!-- begin NAME -->`
and `<!-- end NAME -->`, with the command that made them. One table per protocol: numbers of different protocols don't
share one.
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import csv
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mega_core.evaluation.protocols import PROTOCOLS

Row = Mapping[str, str]
LEFT_OUT = {"ours": ("paraphrase_contains", "efficacy_contains", "neighbourhood_contains")}
"""Metrics that the tables leave out because another of theirs says nearly the same; summary.csv has them."""


def main() -> int:
    """Write the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("into", type=Path)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    arguments = parser.parse_args()
    for run in arguments.runs:
        name, _, folder = run.partition("=")
        put_between(arguments.into, name, markdown(Path(folder)))
        print(f"{name}: {folder}")
    return 0


def put_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between a run's two marks. Raises ValueError where they are missing."""
    whole = path.read_text(encoding="utf-8")
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if begin not in whole or end not in whole:
        raise ValueError(f"{path} has no marks for {name!r}")
    before, rest = whole.split(begin, 1)
    path.write_text(f"{before}{begin}\n{text.strip()}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def markdown(folder: Path) -> str:
    """A run's command and its tables."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    with (folder / "summary.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    text = [f"`{_command(plan)}`", ""]
    for name in dict.fromkeys(row["protocol"] for row in rows):
        text += _table(name, [row for row in rows if row["protocol"] == name])
    retention = folder / "retention.csv"
    if retention.exists():
        with retention.open(encoding="utf-8", newline="") as stream:
            text += _retention(list(csv.DictReader(stream)))
    return "\n".join(text)


def _command(plan: Mapping[str, Any]) -> str:
    return shlex.join(plan["command"])


def _table(protocol: str, rows: Sequence[Row]) -> list[str]:
    """Methods by metrics; shares in percent with half the width of their 95 % interval."""
    entry = PROTOCOLS[protocol]
    known = {metric.name: metric for metric in entry.metrics}
    columns = [name for name in dict.fromkeys(row["metric"] for row in rows) if name not in LEFT_OUT.get(protocol, ())]
    cells = {(row["method"], row["metric"]): row for row in rows}
    lines = [f"**{entry.title}** (`{protocol}`)", ""]
    lines += ["| method | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        shown = []
        for column in columns:
            unit = known[column].unit if column in known else "share"
            shown.append(_cell(cells.get((method, column)), unit))
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    return [*lines, ""]


def _cell(row: Row | None, unit: str) -> str:
    if row is None or not row["value"]:
        return ""
    value, low, high = (float(row[name]) for name in ("value", "ci_low", "ci_high"))
    scale = 100 if unit in ("share", "difference") else 1
    digits = 1 if scale == 100 else 3
    return f"{scale * value:.{digits}f} ±{scale * (high - low) / 2:.{digits}f}"


def _retention(rows: Sequence[Row]) -> list[str]:
    """Methods by checkpoint: how many of all edits so far hold, and what happened to the model's language."""
    chosen = (
        ("ours", "efficacy_forced", 100, 0, "the new object is the whole greedy answer to the edit prompt, %"),
        ("rome", "NS", 100, 0, "neighbourhood score, %"),
        ("ours", "perplexity_ratio", 1, 3, "perplexity of the fixed text, times the unedited model's"),
        ("ours", "collapse", 100, 0, "collapse alarm, %"),
    )
    lines: list[str] = []
    for protocol, metric, scale, digits, title in chosen:
        own = [row for row in rows if (row["protocol"], row["metric"]) == (protocol, metric)]
        if not own:
            continue
        steps = sorted({int(row["step"]) for row in own})
        cells = {(row["method"], int(row["step"])): row for row in own}
        lines += [f"After so many edits: {title}.", ""]
        lines += ["| method | " + " | ".join(map(str, steps)) + " |", "|---" + "|---:" * len(steps) + "|"]
        for method in dict.fromkeys(row["method"] for row in own):
            values = (cells.get((method, step)) for step in steps)
            shown = ("" if row is None else f"{scale * float(row['value']):.{digits}f}" for row in values)
            lines.append(f"| {method} | " + " | ".join(shown) + " |")
        lines.append("")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
