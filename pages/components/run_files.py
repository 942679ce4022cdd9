"""A run as files: run.json, its tables, its pictures, a report in one file, and several runs as one archive.

Nothing here is made before somebody presses a button; each function gives the bytes of one file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from mega_core import frames
from mega_core.evaluation.text import verdict
from mega_core.records import Report
from mega_core.summary import outcome
from pages.components import pictures, run_report
from pages.components.run_pictures import pictures_of
from pages.components.text import KINDS, MODULES, STATES, csv_bytes

PARTS = {
    "run.json": "everything, to be imported again",
    "tables": "CSV and Parquet",
    "charts": "PNG and SVG",
    "report.html": "one page for any browser",
}
_STEM = re.compile(r"[^a-z0-9]+")


def stem(report: Report) -> str:
    """The beginning of a run's file names: "run-359f71df92ae"; of an imported run the digest it came with."""
    return f"run-{(report.origin or report.digest)[:12]}"


def run_json(report: Report) -> bytes:
    """The whole run, with what its words and columns mean. Importing it gives the same frames."""
    labels: dict[str, Any] = {
        "verdict": verdict(report),
        "outcome": outcome(report).kind,
        "sentences": [request.sentence for request in report.question.requests],
        "states": {state: STATES[state] for state in ("before", "after")},
        "candidates": {"new": "the new object", "true": "the original object"},
        "prompt_kinds": KINDS,
        "modules": MODULES,
        "columns": {name: frames.CONTRACTS[name].columns for name in report.frames},
    }
    return report.to_file(labels)


def tables_zip(report: Report) -> bytes:
    """Every table as CSV, in which no cell is a formula, and as Parquet."""
    return _zip(_tables(report))


def charts_zip(report: Report) -> bytes:
    """Every picture that the run's tables allow, as PNG and as SVG."""
    return _zip(_charts(report))


def report_html(report: Report) -> bytes:
    """The run as one page that needs no network."""
    return run_report.html(report).encode()


def several_zip(reports: Iterable[Report], parts: Sequence[str], index: bytes) -> bytes:
    """The chosen parts of several runs, a folder for each, and runs.csv, the list of them."""
    return _zip(_several(reports, parts, index))


def _several(reports: Iterable[Report], parts: Sequence[str], index: bytes) -> Iterable[tuple[str, bytes]]:
    yield "runs.csv", index
    for report in reports:
        folder = f"{stem(report)}-{_slug(report)}"
        if "run.json" in parts:
            yield f"{folder}/run.json", run_json(report)
        if "tables" in parts:
            yield from ((f"{folder}/tables/{name}", data) for name, data in _tables(report))
        if "charts" in parts:
            yield from ((f"{folder}/charts/{name}", data) for name, data in _charts(report))
        if "report.html" in parts:
            yield f"{folder}/report.html", report_html(report)


def _tables(report: Report) -> Iterable[tuple[str, bytes]]:
    for name, frame in report.frames.items():
        yield f"{name}.csv", csv_bytes(frame)
        yield f"{name}.parquet", frames.to_parquet(frame)


def _charts(report: Report) -> Iterable[tuple[str, bytes]]:
    for picture in pictures_of(report):
        drawn = pictures.svg(picture.spec, picture.title)
        yield f"{picture.name}.svg", drawn.encode()
        yield f"{picture.name}.png", pictures.png_of(drawn)


def _zip(files: Iterable[tuple[str, bytes]]) -> bytes:
    """An archive with one fixed date: the same files give the same bytes."""
    buffer = BytesIO()
    with ZipFile(buffer, "w") as box:
        for name, data in files:
            entry = ZipInfo(name)
            entry.external_attr = 0o644 << 16
            box.writestr(entry, data, ZIP_DEFLATED)
    return buffer.getvalue()


def _slug(report: Report) -> str:
    """Method and subject in letters that every file system takes."""
    request = report.question.requests[0]
    words = f"{report.question.method.name} {request.subject} {request.target_new}"
    return _STEM.sub("-", words.lower()).strip("-")[:60] or "run"
