"""Every picture that a run's frames allow, as specifications: for files and for the report in one file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from mega_core.records import Report
from pages.components import readings, tables
from pages.components.anatomy_pictures import Look, picture
from pages.components.anatomy_place import Place
from pages.components.prepared import spec_of, tables_of
from pages.components.text import STATES

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture with what belongs to it."""

    name: str
    """Stem of its files."""
    title: str
    reading: str
    """One sentence made from its numbers, or what it shows."""
    spec: dict[str, Any]
    table: pd.DataFrame
    """The numbers behind it."""


def pictures_of(report: Report) -> Iterator[Picture]:
    """The pictures of the first edit, one at a time. One that can't be drawn is left out and logged: an imported run
    may lack what a picture needs.
    """
    views: list[Callable[[Report], Iterator[Picture]]] = [partial(_view, name) for name in LOOKS]
    for make in (_next, _evidence, _maps, _profiles, *views):
        try:
            yield from make(report)
        except Exception:
            log.warning("A picture of run %s can't be drawn.", report.digest[:12], exc_info=True)


def _next(report: Report) -> Iterator[Picture]:
    table = tables_of(report.digest, report)["next"]
    if not table.empty:
        title, sentence = readings.of_next_tokens(table)
        spec = spec_of(report.digest, "next", _report=report)
        shown = table[["token", "role", "state", "prob"]]
        yield Picture("next-tokens", title, f"{sentence} Hollow: base model, filled: edited model.", spec, shown)


def _evidence(report: Report) -> Iterator[Picture]:
    table = tables_of(report.digest, report)["evidence"]
    if not table.empty:
        title, sentence = readings.of_evidence(table, "p_true_after" in table)
        spec = spec_of(report.digest, "evidence", _report=report)
        kept = [column for column in table.columns if not column.startswith(("says_", "passed_"))]
        yield Picture("evidence", title, f"{sentence} Hollow: base model, filled: edited model.", spec, table[kept])


def _maps(report: Report) -> Iterator[Picture]:
    cells, request = tables_of(report.digest, report)["cells"], report.question.requests[0]
    for candidate in _candidates(cells):
        title, sentence = readings.of_module_map(cells, candidate, request)
        spec = spec_of(report.digest, "map", candidate, _report=report)
        yield Picture(f"map-{candidate}", title, sentence, spec, _wide(cells, candidate))


def _profiles(report: Report) -> Iterator[Picture]:
    cells, request = tables_of(report.digest, report)["cells"], report.question.requests[0]
    for candidate in _candidates(cells):
        title, sentence = readings.of_profile(cells, candidate, request)
        title = f"{title}, toward {readings.explained(candidate, request)}"
        spec = spec_of(report.digest, "profile", candidate, _report=report)
        dashed = "Dashed and hollow: base model, solid and filled: edited model."
        yield Picture(f"profile-{candidate}", title, f"{sentence} {dashed}", spec, _wide(cells, candidate))


def _candidates(cells: pd.DataFrame) -> list[str]:
    return [candidate for candidate in tables.CANDIDATES if candidate in set(cells["candidate"])]


def _wide(cells: pd.DataFrame, candidate: str) -> pd.DataFrame:
    mine = cells[cells["candidate"] == candidate]
    wide = mine.pivot_table(index=["layer", "module"], columns="state", values="value", aggfunc="first", sort=False)
    return wide.reindex(columns=[state for state in STATES if state in wide]).reset_index()


def _strongest_head(report: Report) -> Place | None:
    """The head that pushes most toward the new object after the edit, of those whose sources are known."""
    frame = report.frames.get("head_sources")
    if frame is None:
        return None
    mine = frame[(frame["case"] == 0) & (frame["candidate"] == "new") & (frame["state"] == "after")]
    if mine.empty:
        return None
    layer, head = mine.groupby(["layer", "head"])["contribution"].sum().idxmax()
    return Place(int(layer), "attn", int(head))


LOOKS: dict[str, Callable[[Report], Look]] = {
    "head_scores": lambda report: Look(state="change"),
    "head_sources": lambda report: Look(place=_strongest_head(report)),
    "head_attention": lambda report: Look(place=_strongest_head(report)),
    "neuron_scores": lambda report: Look(),
    "attention_neurons": lambda report: Look(),
    "query_layers": lambda report: Look(),
    "lens": lambda report: Look(),
    "residual": lambda report: Look(),
    "attention": lambda report: Look(state="change", more={"prompts": "edit"}),
    "drift": lambda report: Look(),
    "trace": lambda report: Look(more={"trace": "new.after"}),
    "stress": lambda report: Look(),
    "weight_spectrum": lambda report: Look(),
}
"""Picture of the Anatomy page -> what of it goes into files: toward the new object, after the edit or its change."""


def _view(name: str, report: Report) -> Iterator[Picture]:
    made = picture(report, name, LOOKS[name](report))
    if made is not None:
        yield Picture(name.replace("_", "-"), made.title, made.reading, dict(made.spec), made.table)
