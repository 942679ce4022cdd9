"""Run the measurements and print a table: python -m bench [--only NAME ...] [--json FILE] [--markdown FILE].

`--markdown FILE` writes each measurement's table into that file, between the lines `<!-- begin NAME -->` and
`<!-- end NAME -->`, with the command and the machine above it.
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import import_module
from inspect import signature
from pathlib import Path
from time import perf_counter

from bench.common import Row, Unmeasured, machine

# Name -> what it measures; each is a module of this folder with measure(quick) -> rows.
MEASUREMENTS = {
    "optimiser": "one step of the value optimisation against a plain full forward pass",
    "edit": "one edit with metrics and module scores, after warm-up",
    "seconds": "one edit by every method, after warm-up; written to the table of the method cards",
    "quality": "100 random counterfactual edits per method and embedded model",
    "regions": "MEGA in the measured region, the default one and others",
    "mask": "one mask that undoes unseen edits, beside its controls",
    "detect": "finding edits in a model's weights, with and without a reference",
    "trace": "causal trace against one forward per cell",
    "drift": "where the new object overtakes, and attention to the subject, after edits",
    "faithful": "scores of the views against the effects of taking cells out",
    "solve": "closed forms against the plain ones",
    "attribution": "certified neurons against a full enumeration",
    "steering": "fitting a steered edit, and its hooks' share of generation",
    "memory": "peak memory of one edit",
    "gpu": "one edit of each method in the shape of large models",
    "sweep": "a benchmark run against one process per edit, and killed five times",
    "reopen": "opening a stored result",
    "storm": "200 jobs with cancellations and failures at every stage",
    "pages": "what a person waits for in a browser",
    "crowd": "eight people at once, every result against the serial one",
}


def main() -> int:
    """Exit status 1 when a measurement failed; one that can't be made here is only told."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", action="append", choices=MEASUREMENTS, help="measure this only; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples, to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables into this file")
    parser.add_argument("--methods", type=_names, default=(), metavar="A,B", help="only these methods")
    parser.add_argument("--model", dest="models", action="append", default=[], help="only this model; may be repeated")
    parser.add_argument("--count", type=int, help="how many edits, or samples of each wait")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep each method's results here and go on from them")
    parser.add_argument("--controls", "--forced-gate", action="store_true", help="also without gates, and controls")
    parser.add_argument("--batch", action="store_true", help="also all edits at once")
    parser.add_argument("--shape", help="the shape of the model (gpu)")
    arguments = parser.parse_args()
    options = {name: value for name, value in vars(arguments).items() if value}

    rows: list[Row] = []
    missing: dict[str, str] = {}
    failed = False
    for name in arguments.only or MEASUREMENTS:
        print(f"{name}: {MEASUREMENTS[name]} ...", file=sys.stderr, flush=True)
        start = perf_counter()
        try:
            module = import_module(f"bench.{name}")
            accepted = set(signature(module.measure).parameters) - {"quick"}
            found = module.measure(arguments.quick, **{key: options[key] for key in accepted & options.keys()})
            rows += found
            if arguments.markdown:
                text = module.markdown(found) if hasattr(module, "markdown") else markdown(found)
                put_between(arguments.markdown, name, text)
        except Unmeasured as why:
            missing[name] = str(why)
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


def markdown(rows: Sequence[Row]) -> str:
    """The rows as one Markdown table."""
    lines = ["| measurement | value | unit | note |", "|---|---:|---|---|"]
    lines += [f"| {row.name} | {row.value:,.4g} | {row.unit} | {row.note} |" for row in rows]
    return "\n".join(lines) + "\n"


def put_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between a measurement's two marks; both are put at the end of a file without them."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    whole = path.read_text(encoding="utf-8") if path.exists() else ""
    if begin not in whole or end not in whole:
        whole = f"{whole.rstrip()}\n\n{begin}\n{end}\n".lstrip()
    before, rest = whole.split(begin, 1)
    after = rest.split(end, 1)[1]
    command = f"python -m bench {shlex.join(sys.argv[1:])}"
    when = datetime.now(UTC).date().isoformat()
    head = f"`{command}`, {when}; {machine()}"
    path.write_text(f"{before}{begin}\n{head}\n\n{text.strip()}\n{end}{after}", encoding="utf-8")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


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
