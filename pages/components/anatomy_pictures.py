"""The pictures of the Anatomy page: each takes a run and what is looked at, and gives a chart with everything that
belongs to it. Made once per run and look, and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from mega_core.records import Report
from pages.components import anatomy_tables as rearranged
from pages.components import readings, view_charts
from pages.components.anatomy_place import Place
from pages.components.text import MODULES, signed, token_label

STATE_WORDS = {"before": "before the edit", "after": "after the edit", "change": "by the edit"}
SEGMENTS = {
    "subject": "the subject",
    "first": "the first token",
    "between": "what lies between",
    "last": "the last token itself",
    "context": "a text in front",
}


@dataclass(frozen=True, slots=True)
class Look:
    """What is looked at. `more` are the choices of single pictures."""

    candidate: str = "new"
    state: str = "after"
    place: Place | None = None
    more: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, ...]:
        """For caches."""
        return (self.candidate, self.state, str(self.place), *(f"{k}={v}" for k, v in sorted(self.more.items())))


@dataclass(frozen=True, slots=True)
class Picture:
    """Everything that figure() needs."""

    title: str
    reading: str
    spec: Mapping[str, Any]
    table: pd.DataFrame


Made = tuple[str, str, alt.LayerChart, pd.DataFrame]
"""Title, reading, chart, and the numbers behind it."""
Maker = Callable[[Report, Look], Made | None]


def _who(report: Report, look: Look) -> str:
    return readings.explained(look.candidate, report.question.requests[0])


def _standing_out(state: str) -> str:
    return "The edit moved most:" if state == "change" else f"Largest {STATE_WORDS[state]}:"


def _largest(table: pd.DataFrame, value: str) -> Any:
    return table.loc[table[value].abs().idxmax()]


# Heads ---------------------------------------------------------------------------------------------------------------


def _head_scores(report: Report, look: Look) -> Made | None:
    table = rearranged.heads(report)
    mine = table[(table["candidate"] == look.candidate) & (table["state"] == look.state)] if len(table) else table
    if mine.empty:
        return None
    best = _largest(mine, "value")
    place = look.place
    at = (place.layer, place.part) if place and place.module == "attn" and place.part is not None else None
    chart = view_charts.head_map(mine, "value", limit=rearranged.limit_of(table), selected=at)
    reading = (
        f"{_standing_out(look.state)} layer {int(best['layer'])} · head {int(best['head'])}, {signed(best['value'])} "
        f"nats toward {_who(report, look)}."
    )
    wide = table[table["candidate"] == look.candidate].pivot_table(
        index=["layer", "head"], columns="state", values="value", aggfunc="first"
    )
    order = [state for state in STATE_WORDS if state in wide]
    return f"Heads: what pushes toward {_who(report, look)}", reading, chart, wide[order].reset_index()


def _head_bars(report: Report, look: Look) -> Made | None:
    if look.place is None:
        return None
    table = rearranged.heads_of(report, look.place.layer, look.candidate)
    if table.empty:
        return None
    first = table.iloc[0]
    hit = table.index[table["head"] == look.place.part].tolist()
    chart = view_charts.dumbbells(
        table, "Contribution, nats", picks=["head"], selected=hit[0] if hit and look.place.part is not None else None
    )
    reading = (
        f"Head {int(first['head'])} moved most: from {signed(first['before'])} to {signed(first['after'])} nats toward "
        f"{_who(report, look)}."
    )
    return f"Heads of layer {look.place.layer}", reading, chart, table[["head", "before", "after", "change"]]


def _sources(report: Report, look: Look) -> pd.DataFrame:
    place = look.place
    if place is None or place.module != "attn" or place.part is None:
        return pd.DataFrame()
    return rearranged.sources(report, place.layer, place.part, look.candidate)


def _head_sources(report: Report, look: Look) -> Made | None:
    table = _sources(report, look)
    if table.empty or look.place is None:
        return None
    best = _largest(table, "change" if table[["before", "after"]].notna().all(axis=None) else "after")
    reading = (
        f"From “{best['label']}” it reads {_was(best['before'])} nats toward {_who(report, look)} before the edit and "
        f"{_was(best['after'])} after: the largest part of what moved."
    )
    chart = view_charts.dumbbells(table, "Contribution, nats")
    return "What it reads from each token", reading, chart, table[["label", "before", "after", "change"]]


def _head_attention(report: Report, look: Look) -> Made | None:
    table = _sources(report, look)
    if table.empty or look.place is None:
        return None
    shown = table[["label"]].assign(before=table["attention_before"], after=table["attention_after"])
    shown["change"] = shown["after"].fillna(0.0) - shown["before"].fillna(0.0)
    known = shown["after"] if shown["after"].notna().any() else shown["before"]
    best = shown.loc[known.idxmax()]
    reading = (
        f"It looks most at “{best['label']}”: {_share(best['before'])} before the edit, {_share(best['after'])} after."
    )
    chart = view_charts.dumbbells(shown, "Share of the last token's attention", signed=False)
    return "Where it looks", reading, chart, shown


def _was(value: float) -> str:
    return signed(value) if value == value else "(not split)"


def _points(value: float, digits: int = 1) -> str:
    """A signed share with a true minus: "+3.1%"."""
    return f"{value:+.{digits}%}".replace("-", "−")


def _share(value: float) -> str:
    return f"{value:.0%}" if value == value else "not split"


# Neurons -------------------------------------------------------------------------------------------------------------


def _neurons(name: str, what: str) -> Maker:
    def make(report: Report, look: Look) -> Made | None:
        layer = look.place.layer if look.place is not None and look.more.get("within") == "layer" else None
        table = rearranged.neurons(report, name, look.candidate, look.state, layer)
        if table.empty:
            return None
        best = _largest(table, look.state).to_dict()
        place = look.place
        hit = (
            table.index[(table["layer"] == place.layer) & (table["neuron"] == place.part)].tolist()
            if name == "neuron_scores" and place is not None and place.module == "ffn"
            else []
        )
        chart = view_charts.dumbbells(
            table, "Contribution, nats", picks=["layer", "neuron"] if name == "neuron_scores" else None,
            selected=hit[0] if hit else None,
        )  # fmt: skip
        missing = int(table[["before", "after"]].isna().any(axis=1).sum())
        says = f" What it raises most is “{best['promotes']}”." if best["promotes"] else ""
        alone = f" {missing} of {len(table)} are on one state's list only and have one point." if missing else ""
        reading = (
            f"{_standing_out(look.state)} {rearranged.neuron_name(name, best)}, {signed(best[look.state])} nats toward "
            f"{_who(report, look)}.{says}{alone}"
        )
        where = "" if layer is None else f" of layer {layer}"
        keep = [*rearranged.NEURON_TABLES[name], "promotes", "before", "after", "change"]
        return f"{what}{where} that push toward {_who(report, look)}", reading, chart, table[keep]

    return make


def _neuron_tokens(report: Report, look: Look) -> Made | None:
    place = look.place
    if place is None or place.module != "ffn" or place.part is None:
        return None
    state = "before" if look.state == "before" else "after"
    table = rearranged.words_of(report, place.layer, str(place.part), state)
    if table.empty:
        return None
    up = [token_label(str(t)) for t in table[table["direction"] == "promoted"].head(3)["token"]]
    reading = f"With the sign it has here, it raises {', '.join(f'“{t}”' for t in up) or 'nothing'} most."
    keep = table[["direction", "rank", "token", "logit"]]
    return f"What neuron {place.part} of layer {place.layer} says", reading, view_charts.token_bars(table), keep


def _query(report: Report, look: Look) -> Made | None:
    values = look.more.get("values", "ffn")
    table = rearranged.queries(report, values, look.candidate, look.state)
    if table.empty or not (table["score"].abs() > 1e-4).any():
        return None
    best = _largest(table, "score")
    kind = "MLP" if values == "ffn" else "attention"
    where = "the embedding" if best["layer"] < 0 else f"{MODULES[best['module']]} of layer {int(best['layer'])}"
    reading = f"{_standing_out(look.state)} {where}, {signed(best['score'])} nats of the neurons' scores."
    chart = view_charts.query_bars(table)
    return f"What switches the {kind} neurons on", reading, chart, table[["layer", "module", "score"]]


# Lens and writes -----------------------------------------------------------------------------------------------------


def _lens(report: Report, look: Look) -> Made | None:
    positions = rearranged.lens_positions(report)
    if not positions:
        return None
    position = int(look.more.get("token", next(iter(positions))))
    table = rearranged.lens(report, position)
    last = position == next(iter(positions))
    frame = rearranged.rows(report, "lens_crossing")
    crossing = frame if last and len(frame) else None
    request = report.question.requests[0]
    measure = look.more.get("measure", "logprob")
    if measure == "margin":
        margin = rearranged.margins(table)
        if margin.empty:
            return None
        chart = view_charts.lens_margin(margin, crossing)
        twin = margin.pivot_table(index="depth", columns="state", values="margin").reset_index()
    else:
        chart = view_charts.lens_lines(table, crossing, measure=measure)
        twin = table[["layer", "site", "state", "candidate", "token", "logprob", "prob", "rank"]]
    return f"Through the layers, at “{positions[position]}”", _crossed(crossing, request.target_new), chart, twin


def _crossed(crossing: pd.DataFrame | None, new: str) -> str:
    if crossing is None:
        return "Read at the subject: what the model holds there before the prompt's end."
    said = {row.state: row for row in crossing.itertuples()}
    if "after" not in said:
        return ""
    after, before = said["after"], said.get("before")
    if after.lasting_layer < 0:  # type: ignore[operator]
        return f"{new} never takes the lead for good, not even after the edit."
    site = "after its MLP" if after.lasting_site == "block_out" else "after attention"
    where = f"in layer {after.lasting_layer} ({site})"
    never = before is not None and before.lasting_layer < 0  # type: ignore[operator]
    return f"After the edit {new} takes the lead for good {where}.{' Before it never did.' if never else ''}"


def _residual(report: Report, look: Look) -> Made | None:
    table = rearranged.signed(report, "residual", ["layer", "module"], "dot")
    if table.empty:
        return None
    mine = table[(table["candidate"] == look.candidate) & (table["layer"] >= 0)]
    moved = mine[mine["state"] == "change"]
    lines = mine[mine["state"] != "change"].rename(columns={"value": "dot"})
    if moved.empty or lines.empty:
        return None
    best = _largest(moved, "value")
    reading = (
        f"{MODULES[best['module']]} of layer {int(best['layer'])} changed what it writes most: {signed(best['value'])} "
        f"along {_who(report, look)}."
    )
    twin = mine.pivot_table(index=["layer", "module"], columns="state", values="value", aggfunc="first").reset_index()
    return f"What is written along {_who(report, look)}", reading, view_charts.residual_lines(lines), twin


# Attention -----------------------------------------------------------------------------------------------------------


def _attention(report: Report, look: Look) -> Made | None:
    kind, segment = look.more.get("prompts", "neighbourhood"), look.more.get("segment", "subject")
    table = rearranged.attention(report, kind, segment)
    mine = table[table["state"] == look.state].dropna() if len(table) else table
    if mine.empty:
        return None
    place = look.place
    at = (place.layer, place.part) if place and place.module == "attn" and place.part is not None else None
    whose = "the edit prompt" if kind == "edit" else "neighbour prompts"
    best = _largest(mine, "value")
    if look.state == "change":
        limit = float(table[table["state"] == "change"]["value"].abs().max()) or 1.0
        chart = view_charts.head_map(mine, "value", "share of attention", limit=limit, selected=at)
        title = f"Attention to {SEGMENTS[segment]}: what the edit changed"
        verb = "gained" if best["value"] > 0 else "lost"
        reading = (
            f"In {whose} head {int(best['head'])} of layer {int(best['layer'])} {verb} most, "
            f"{abs(best['value']):.1%} of its attention; the mean over all heads is {_points(mine['value'].mean())}."
        )
    else:
        chart = view_charts.mass_map(mine.rename(columns={"value": "mass"}), selected=at)
        title = f"Attention to {SEGMENTS[segment]}, {STATE_WORDS[look.state]}"
        reading = (
            f"In {whose} head {int(best['head'])} of layer {int(best['layer'])} gives it most: {best['value']:.0%} of "
            f"its attention; the mean over all heads is {mine['value'].mean():.0%}."
        )
    wide = table.pivot_table(index=["layer", "head"], columns="state", values="value", aggfunc="first")
    return title, reading, chart, wide.reset_index()


def _drift(report: Report, look: Look) -> Made | None:
    table = rearranged.drift(report)
    if table.empty:
        return None
    near = table[table["prompt_kind"] == "neighbourhood"]
    if near.empty:
        reading = "No neighbour prompt with a known subject was looked at."
    else:
        reading = (
            f"{len(near)} neighbour{'s' if len(near) > 1 else ''}: attention to their own subject changes by "
            f"{_points(near['drift'].mean())} and their margin by {signed(near['margin_change'].mean())} nats on "
            "average. Crosses broke. So few prompts can't show a correlation."
        )
    twin = table[["prompt_kind", "prompt", "drift", "margin_change", "holds"]]
    return "Does attention go with what breaks?", reading, view_charts.drift_points(table), twin


# Trace, change, stress -----------------------------------------------------------------------------------------------


def _traced(report: Report, look: Look) -> tuple[str, str, str]:
    candidate, _, state = look.more.get("trace", "true.before").partition(".")
    word = readings.explained(candidate, report.question.requests[0])
    return candidate, state, f"{word}, {STATE_WORDS[state]}"


def _trace(report: Report, look: Look) -> Made | None:
    if rearranged.rows(report, "trace").empty:
        return None
    candidate, state, what = _traced(report, look)
    site = look.more.get("site", "block_out")
    table = rearranged.trace(report, candidate, state, site)
    if table.empty:
        return None
    both = rearranged.rows(report, "trace")
    limit = float(both[(both["site"] == site) & (both["candidate"] == candidate)]["effect"].abs().max()) or 1.0
    inner = table[table["position"] < table["position"].max()]  # the last token late in the stream always does
    best = _largest(inner if len(inner) else table, "effect")
    word = readings.explained(candidate, report.question.requests[0])
    reading = (
        f"{STATE_WORDS[state].capitalize()}, noise on the subject takes {word} from {best['p_clean']:.0%} to "
        f"{best['p_corrupt']:.0%}. Restoring {view_charts.TRACE_SITES[site]} of layer {int(best['layer'])} at "
        f"“{view_charts.place_label(int(best['position']), str(best['token']))}” alone moves it by "
        f"{_points(best['effect'], 0)}, the most before the last token."
    )
    chart = view_charts.trace_map(table, limit=limit)
    keep = table[["layer", "position", "token", "p_clean", "p_corrupt", "p_restored", "effect"]]
    return f"Causal trace of {what}", reading, chart, keep


def _trace_profile(report: Report, look: Look) -> Made | None:
    if rearranged.rows(report, "trace").empty:
        return None
    candidate, state, what = _traced(report, look)
    table = rearranged.trace_by_layer(report, candidate, state)
    if table.empty:
        return None
    best = {row.site: row for row in table.sort_values("effect").itertuples()}
    parts = [
        f"{view_charts.TRACE_SITES[site]} at layer {best[site].layer}"
        for site in ("mlp", "attn") if site in best
    ]  # fmt: skip
    reading = f"Largest over the tokens: {', '.join(parts)}." if parts else ""
    return f"Traced by layer: {what}", reading, view_charts.trace_profile(table), table


def _spectrum(report: Report, look: Look) -> Made | None:
    known = rearranged.matrices(report)
    if not known:
        return None
    chosen = look.more.get("matrix", next(iter(known)))
    layer, _, site = chosen.partition(".")
    frame = rearranged.rows(report, "weight_spectrum")
    mine = frame[(frame["layer"] == int(layer)) & (frame["site"] == site)].drop(columns=["layer", "site"])
    energy = mine["singular"] ** 2
    share = float(energy.iloc[0] / energy.sum()) if energy.sum() > 0 else 0.0
    beside = float(mine["singular"].iloc[0] / mine["base_singular"].iloc[0])
    reading = f"One direction holds {share:.0%} of the change; it is {beside:.2g} times the matrix's own largest."
    return f"Singular values of the change, {known[chosen]}", reading, view_charts.spectrum_points(mine), mine


def _stress(report: Report, look: Look) -> Made | None:
    frame = rearranged.rows(report, "stress")
    state = "before" if look.state == "before" else "after"
    mine = frame[frame["state"] == state] if len(frame) else frame
    if mine.empty:
        return None
    request = report.question.requests[0]
    back = int(mine[mine["kind"] != "none"]["prefers_true"].sum())
    others = int((mine["kind"] != "none").sum())
    reading = (
        f"{STATE_WORDS[state].capitalize()}, {back} of {others} prefixes that suggest "
        f"{request.target_true or 'the original object'} make it likelier than {request.target_new}."
    )
    return "Both objects behind prefixes", reading, view_charts.stress_bars(mine), mine


def _stress_heads(report: Report, look: Look) -> Made | None:
    kind = look.more.get("prefix", "wiki")
    table = rearranged.returned(report, kind)
    if table.empty:
        return None
    best = _largest(table, "lens_prob")
    reading = (
        f"Head {int(best['head'])} of layer {int(best['layer'])} differs most from what it says without the prefix: "
        f"{_points(best['lens_prob'], 2)} for the original object."
    )
    chart = view_charts.head_map(table, "lens_prob", "p of the original object")
    return "Which heads bring the old fact back", reading, chart, table


# All of them ---------------------------------------------------------------------------------------------------------

MAKERS: dict[str, Maker] = {
    "head_scores": _head_scores,
    "head_bars": _head_bars,
    "head_sources": _head_sources,
    "head_attention": _head_attention,
    "neuron_scores": _neurons("neuron_scores", "MLP neurons"),
    "attention_neurons": _neurons("attention_neurons", "Attention neurons"),
    "neuron_tokens": _neuron_tokens,
    "query_layers": _query,
    "lens": _lens,
    "residual": _residual,
    "attention": _attention,
    "drift": _drift,
    "trace": _trace,
    "trace_profile": _trace_profile,
    "weight_spectrum": _spectrum,
    "stress": _stress,
    "stress_heads": _stress_heads,
}


def picture(report: Report, name: str, look: Look) -> Picture | None:
    """The picture of this name; None when the run has nothing for it."""
    return _kept(report.digest, name, look.key, _report=report, _look=look)


@st.cache_data(max_entries=256, show_spinner=False)
def _kept(digest: str, name: str, key: tuple[str, ...], *, _report: Report, _look: Look) -> Picture | None:
    made = MAKERS[name](_report, _look)
    if made is None:
        return None
    title, reading, chart, table = made
    return Picture(title, reading, chart.to_dict(validate=False), table)
