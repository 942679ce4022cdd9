"""Every picture that a run's frames allow, as specifications: for files and for the report in one file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd

from mega_core.records import Report
from pages.components import readings, tables, view_charts
from pages.components.prepared import spec_of, tables_of
from pages.components.text import STATES, token_label

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


@dataclass(frozen=True, slots=True)
class _View:
    """How one table of a view is drawn. `pick` chooses the rows of the picture, `chart` draws them."""

    frame: str
    title: str
    shows: str
    pick: Callable[[pd.DataFrame, Report], pd.DataFrame]
    chart: Callable[[pd.DataFrame, Report], alt.LayerChart]


def pictures_of(report: Report) -> Iterator[Picture]:
    """The pictures of the first edit, one at a time. One that can't be drawn is left out and logged: an imported run
    may lack what a picture needs.
    """
    for make in (_next, _evidence, _maps, _profiles, *(_of_view(view) for view in VIEWS)):
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


def _of_view(view: _View) -> Callable[[Report], Iterator[Picture]]:
    def make(report: Report) -> Iterator[Picture]:
        frame = report.frames.get(view.frame)
        if frame is None or frame.empty:
            return
        if "case" in frame:
            frame = frame[frame["case"] == 0].drop(columns="case")
        table = view.pick(frame, report).reset_index(drop=True)
        if not table.empty:
            spec = view.chart(table, report).to_dict(validate=False)
            yield Picture(view.frame.replace("_", "-"), view.title, view.shows, spec, table)

    return make


# How each view is drawn ----------------------------------------------------------------------------------------------


def _of_new(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["candidate"] == "new"]


def _after(frame: pd.DataFrame, _: Report | None = None) -> pd.DataFrame:
    return _of_new(frame[frame["state"] == "after"])


def _strongest_head(frame: pd.DataFrame, _: Report) -> pd.DataFrame:
    mine = _after(frame)
    if mine.empty:
        return mine
    layer, head = mine.groupby(["layer", "head"])["contribution"].sum().idxmax()
    return mine[(mine["layer"] == layer) & (mine["head"] == head)]


def _said_by_neurons(report: Report) -> pd.DataFrame | None:
    words = report.frames.get("neuron_tokens")
    if words is None:
        return None
    return words[(words["state"] == "after") & (words["kind"] == "ffn") & (words["case"] == 0)]


def _named(frame: pd.DataFrame, _: Report) -> pd.DataFrame:
    mine = _after(frame)
    names = [f"{row.head}.{row.dim} from {token_label(str(row.token))}" for row in mine.itertuples()]
    return mine.assign(neuron=names)


def _crossing(report: Report) -> pd.DataFrame | None:
    frame = report.frames.get("lens_crossing")
    return None if frame is None else frame[frame["case"] == 0]


def _to_subject(frame: pd.DataFrame, _: Report) -> pd.DataFrame:
    mine = frame[(frame["prompt_kind"] == "edit") & (frame["segment"] == "subject")]
    return view_charts.change(mine, ["layer", "head"], "mass")


def _first_matrix(frame: pd.DataFrame, _: Report) -> pd.DataFrame:
    first = frame.sort_values(["layer", "site"]).iloc[0]
    return frame[(frame["layer"] == first["layer"]) & (frame["site"] == first["site"])]


VIEWS = (
    _View(
        "head_scores", "Heads that changed", "Change of each head's contribution to the new object, nats.",
        lambda frame, _: view_charts.change(_of_new(frame), ["layer", "head"], "contribution"),
        lambda table, _: view_charts.head_map(table),
    ),
    _View(
        "head_sources", "What the strongest head reads",
        "Contribution to the new object after the edit, by the token that the head reads from.",
        _strongest_head, lambda table, _: view_charts.source_bars(table),
    ),
    _View(
        "neuron_scores", "MLP neurons",
        "The neurons that promote or suppress the new object most after the edit, nats; they overlap.",
        _after, lambda table, report: view_charts.neuron_bars(table, _said_by_neurons(report)),
    ),
    _View(
        "attention_neurons", "Attention neurons", "Single numbers of a head at one source token, after the edit.",
        _named, lambda table, _: view_charts.neuron_bars(table, letter="H"),
    ),
    _View(
        "query_layers", "What switches the neurons on",
        "How much of the promoting MLP neurons' input each module wrote, weighted by their scores, after the edit.",
        lambda frame, _: _after(frame[frame["values"] == "ffn"]), lambda table, _: view_charts.query_bars(table),
    ),
    _View(
        "lens", "Through the layers",
        "Log-probability of both objects if the stream at the last token ended at that layer.",
        lambda frame, _: frame[frame["position"] == frame["position"].max()],
        lambda table, report: view_charts.lens_lines(table, _crossing(report)),
    ),
    _View(
        "residual", "Direct writes", "Dot product of each module's output with the new object's row.",
        lambda frame, _: _of_new(frame), lambda table, _: view_charts.residual_lines(table),
    ),
    _View(
        "attention", "Attention to the subject",
        "Change of the attention that the last token gives to the subject, per head.",
        _to_subject, lambda table, _: view_charts.head_map(table, "mass", "attention"),
    ),
    _View(
        "trace", "Causal trace",
        "How much of the new object's probability comes back when one state of the corrupted run is restored.",
        lambda frame, _: _after(frame[frame["site"] == "block_out"]), lambda table, _: view_charts.trace_map(table),
    ),
    _View(
        "stress", "Under pressure", "Probabilities after prefixes that suggest the original object.",
        lambda frame, _: frame[frame["state"] == "after"], lambda table, _: view_charts.stress_bars(table),
    ),
    _View(
        "weight_spectrum", "The change itself", "Singular values of the first edited matrix's change.",
        _first_matrix, lambda table, _: view_charts.spectrum_points(table),
    ),
)  # fmt: skip
