"""Run the measurements and print a table: python -m bench [--only NAME ...] [--json FILE]."""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from time import perf_counter

from bench.common import Row, Unmeasured, machine

# Name -> what it measures; each is a module of this folder with measure(quick) -> rows.
MEASUREMENTS = {
    "optimiser": "one step of the value optimisation against a plain full forward pass",
    "edit": "one edit with metrics and module scores, after warm-up",
    "quality": "100 random counterfactual edits per embedded model",
    "reopen": "opening a stored result",
    "storm": "200 jobs with cancellations and failures at every stage",
    "pages": "first paint and chart click in a browser",
}


def main() -> int:
    """Exit status 1 when a measurement failed; one that can't be made here is only told."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", action="append", choices=MEASUREMENTS, help="measure this only; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples, to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    arguments = parser.parse_args()

    rows: list[Row] = []
    missing: dict[str, str] = {}
    failed = False
    for name in arguments.only or MEASUREMENTS:
        print(f"{name}: {MEASUREMENTS[name]} ...", file=sys.stderr, flush=True)
        start = perf_counter()
        try:
            rows += import_module(f"bench.{name}").measure(arguments.quick)
        except Unmeasured as reason:
            missing[name] = str(reason)
        except Exception as error:  # noqa: BLE001 - the other measurements still count
            missing[name] = f"{type(error).__name__}: {error}"
            failed = True
        print(f"{name}: {perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

    print(table(rows))
    for name, reason in missing.items():
        print(f"Not measured: {name} ({reason})")
    print(machine())
    if arguments.json:
        content = {
            "schema_version": 1,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "rows": [asdict(row) for row in rows],
            "not_measured": missing,
        }
        arguments.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(failed)


def table(rows: list[Row]) -> str:
    """Aligned columns."""
    cells = [("group", "measurement", "value", "unit", "note")]
    cells += [(row.group, row.name, f"{row.value:,.4g}", row.unit, row.note) for row in rows]
    widths = [max(len(cell[i]) for cell in cells) for i in range(5)]
    lines = [
        "  ".join(
            f"{text:>{w}}" if i == 2 else f"{text:<{w}}" for i, (text, w) in enumerate(zip(cell, widths, strict=True))
        )
        for cell in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
