"""Frames of a run rearranged for the pictures of the Anatomy page: report -> frame of its first case, no widgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from mega_core.records import Report
from pages.components import tables
from pages.components.text import KINDS, token_label
from pages.components.view_charts import SITE_STEPS, place_label

STATES = ("before", "after")
SHOWN_NEURONS = 20
NEURON_TABLES = {"neuron_scores": ["layer", "neuron"], "attention_neurons": ["layer", "head", "dim", "position"]}


def rows(report: Report, name: str) -> pd.DataFrame:
    """The rows of the first case; no rows when the run hasn't got the frame."""
    frame = report.frames.get(name)
    if frame is None:
        return pd.DataFrame()
    return frame[frame["case"] == 0].drop(columns="case") if "case" in frame else frame


def signed(report: Report, name: str, keys: list[str], value: str) -> pd.DataFrame:
    """Every candidate and state with their differences (see tables.with_difference); the number is `value`."""
    frame = rows(report, name)
    if frame.empty:
        return frame
    return tables.with_difference(frame.rename(columns={value: "value"}), keys, "value")


def limit_of(table: pd.DataFrame) -> float:
    """One symmetric colour limit for all states and candidates of a table: its largest absolute value."""
    return float(table["value"].abs().max()) or 1.0


def paired(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """One row per key with before, after and change (a missing state counts as nothing in the change)."""
    wide = table[table["state"].isin(STATES)].pivot_table(index=keys, columns="state", values="value", aggfunc="first")
    wide = wide.reindex(columns=list(STATES)).astype(float)
    wide["change"] = wide["after"].fillna(0.0) - wide["before"].fillna(0.0)
    return wide.reset_index().rename_axis(columns=None)


def heads(report: Report) -> pd.DataFrame:
    """Contribution of each head: layer, head, candidate, state, value."""
    table = signed(report, "head_scores", ["layer", "head"], "contribution")
    return table if table.empty else table[table["head"] >= 0].reset_index(drop=True)


def heads_of(report: Report, layer: int, candidate: str) -> pd.DataFrame:
    """The heads of a layer before and after: label, head, before, after, change; the largest change first."""
    table = heads(report)
    if table.empty:
        return table
    mine = paired(table[(table["layer"] == layer) & (table["candidate"] == candidate)], ["head"])
    mine = mine.reindex(mine["change"].abs().sort_values(ascending=False).index).reset_index(drop=True)
    return mine.assign(label=[f"Head {head}" for head in mine["head"]])


def sources(report: Report, layer: int, head: int, candidate: str) -> pd.DataFrame:
    """What one head reads, by source token: label, position, before, after, change of the contribution, and
    attention_before, attention_after. No rows when the run didn't split this head.
    """
    frame = rows(report, "head_sources")
    if frame.empty:
        return frame
    mine = frame[(frame["layer"] == layer) & (frame["head"] == head)]
    if mine.empty:
        return mine
    names = mine.drop_duplicates("position").set_index("position")["token"]
    values = tables.with_difference(mine.rename(columns={"contribution": "value"}), ["position"], "value")
    table = paired(values[values["candidate"] == candidate], ["position"])
    mass = mine.drop_duplicates(["position", "state"]).pivot_table(
        index="position", columns="state", values="attention"
    )
    for state in STATES:
        table[f"attention_{state}"] = table["position"].map(mass.get(state, {})).astype(float)
    table["label"] = [place_label(int(position), str(names[position])) for position in table["position"]]
    shown = (table["position"] >= 0) | (table[["before", "after"]].abs().max(axis=1) > 1e-3)
    return table[shown].reset_index(drop=True)


def neurons(report: Report, name: str, candidate: str, state: str, layer: int | None = None) -> pd.DataFrame:
    """The neurons with the largest contribution in a state, or change: label, layer, keys, before, after, change and
    the token that each promotes most. A state in which a neuron was not listed is missing.

    `name`: neuron_scores or attention_neurons. "difference" has the neurons that both objects' lists name.
    """
    keys = NEURON_TABLES[name]
    frame = rows(report, name)
    if frame.empty:
        return frame
    values = frame.rename(columns={"contribution": "value"})
    if candidate == "difference":
        both = values.pivot_table(index=[*keys, "state"], columns="candidate", values="value", aggfunc="first")
        if not {"new", "true"} <= set(both.columns):
            return pd.DataFrame()
        values = (both["new"] - both["true"]).dropna().rename("value").reset_index()
    else:
        values = values[values["candidate"] == candidate]
    if layer is not None:
        values = values[values["layer"] == layer]
    if values.empty:
        return pd.DataFrame()
    table = paired(values, keys)
    table = table[table[state].notna()]
    table = table.reindex(table[state].abs().sort_values(ascending=False).index).head(SHOWN_NEURONS)
    table = table.sort_values(state, ascending=False).reset_index(drop=True)
    said = promoted(report, "ffn" if name == "neuron_scores" else "attn", "after" if state == "change" else state)
    every = table.to_dict("records")
    names = [neuron_name(name, row) for row in every]
    first = [said.get((int(row["layer"]), _neuron_key(name, row)), "") for row in every]
    return table.assign(promotes=first, label=[f"{a}  {b}".rstrip() for a, b in zip(names, first, strict=True)])


def neuron_name(name: str, row: Mapping[Any, Any]) -> str:
    """ "L3·N321", or "L7·H5·n28 from 2"."""
    if name == "neuron_scores":
        return f"L{row['layer']}·N{row['neuron']}"
    return f"L{row['layer']}·H{row['head']}·n{row['dim']} from {row['position']}"


def _neuron_key(name: str, row: Mapping[Any, Any]) -> str:
    """As the column `neuron` of neuron_tokens."""
    return str(row["neuron"]) if name == "neuron_scores" else f"{row['head']}.{row['dim']}.{row['position']}"


def promoted(report: Report, kind: str, state: str) -> dict[tuple[int, str], str]:
    """(layer, neuron) -> the token it promotes most."""
    words = rows(report, "neuron_tokens")
    if words.empty:
        return {}
    first = words[
        (words["kind"] == kind) & (words["state"] == state) & (words["direction"] == "promoted") & (words["rank"] == 1)
    ]
    return {(int(row.layer), str(row.neuron)): token_label(str(row.token)) for row in first.itertuples()}  # type: ignore[arg-type]


def words_of(report: Report, layer: int, neuron: str, state: str, kind: str = "ffn") -> pd.DataFrame:
    """The tokens one neuron promotes and suppresses: label, direction, rank, logit; of `state`, else of the other."""
    words = rows(report, "neuron_tokens")
    if words.empty:
        return words
    mine = words[(words["kind"] == kind) & (words["layer"] == layer) & (words["neuron"] == neuron)]
    if mine.empty:
        return mine
    mine = mine[mine["state"] == (state if state in set(mine["state"]) else mine["state"].iloc[0])]
    labels = [
        f"{'+' if row.direction == 'promoted' else '−'} {token_label(str(row.token))}" for row in mine.itertuples()
    ]
    return mine.assign(label=labels).drop_duplicates("label").sort_values("logit", ascending=False)


def queries(report: Report, values: str, candidate: str, state: str) -> pd.DataFrame:
    """What switches the value neurons on: layer, module, score of one state, or its change."""
    table = signed(report, "query_layers", ["values", "layer", "module"], "score")
    if table.empty:
        return table
    mine = table[(table["values"] == values) & (table["candidate"] == candidate) & (table["state"] == state)]
    return mine.rename(columns={"value": "score"}).reset_index(drop=True)


def lens(report: Report, position: int) -> pd.DataFrame:
    """The lens at one token, with `depth`: how many layers the stream has passed."""
    frame = rows(report, "lens")
    mine = frame[frame["position"] == position]
    return mine.assign(depth=mine["layer"] + mine["site"].map(SITE_STEPS)).sort_values("depth", kind="stable")


def lens_positions(report: Report) -> dict[int, str]:
    """Token position -> its label, of those the lens was read at; the last token first."""
    frame = rows(report, "lens")
    if frame.empty:
        return {}
    names = {int(row.position): str(row.token) for row in rows(report, "tokens").itertuples()}  # type: ignore[arg-type]
    return {p: place_label(p, names.get(p, "")) for p in sorted(map(int, frame["position"].unique()), reverse=True)}


def margins(table: pd.DataFrame) -> pd.DataFrame:
    """log p(new) - log p(true) at each depth and state; no rows without an original object."""
    wide = table.pivot_table(index=["depth", "state"], columns="candidate", values="logprob", aggfunc="first")
    if not {"new", "true"} <= set(wide.columns):
        return pd.DataFrame()
    return (wide["new"] - wide["true"]).dropna().rename("margin").reset_index()


def attention(report: Report, kind: str, segment: str) -> pd.DataFrame:
    """Mean mass on a segment over the prompts of a kind: layer, head, state (with change), value."""
    frame = rows(report, "attention")
    if frame.empty:
        return frame
    mine = frame[(frame["prompt_kind"] == kind) & (frame["segment"] == segment)]
    if mine.empty:
        return mine
    mean = mine.groupby(["layer", "head", "state"], as_index=False)["mass"].mean()
    table = paired(mean.rename(columns={"mass": "value"}), ["layer", "head"])
    return table.melt(["layer", "head"], ["before", "after", "change"], "state", "value")


def drift(report: Report) -> pd.DataFrame:
    """For each prompt the mean change of attention to its subject over the heads of the later half of the layers,
    beside the change of its margin: prompt, prompt_kind, kind_name, drift, margin_change, holds.
    """
    frame = rows(report, "attention")
    evidence = tables.evidence(report)
    if frame.empty or evidence.empty:
        return pd.DataFrame()
    late = frame[(frame["segment"] == "subject") & (frame["layer"] > frame["layer"].max() / 2)]
    mass = late.pivot_table(index=["prompt_kind", "prompt"], columns="state", values="mass", aggfunc="mean")
    if not set(STATES) <= set(mass.columns):
        return pd.DataFrame()
    moved = (mass["after"] - mass["before"]).dropna().rename("drift").reset_index()
    told = evidence.assign(margin_change=evidence["margin_after"] - evidence["margin_before"], holds=evidence["passed"])
    table = moved.merge(told[["prompt_kind", "prompt", "margin_change", "holds"]], on=["prompt_kind", "prompt"])
    return table.assign(kind_name=table["prompt_kind"].map(KINDS))


def trace(report: Report, candidate: str, state: str, site: str) -> pd.DataFrame:
    """Effects of one kind of restored state: layer, position, token, effect."""
    frame = rows(report, "trace")
    mine = frame[(frame["candidate"] == candidate) & (frame["state"] == state) & (frame["site"] == site)]
    return mine.reset_index(drop=True)


def trace_by_layer(report: Report, candidate: str, state: str) -> pd.DataFrame:
    """The largest effect over the tokens: layer, site, effect."""
    frame = rows(report, "trace")
    mine = frame[(frame["candidate"] == candidate) & (frame["state"] == state)]
    return mine.groupby(["layer", "site"], as_index=False)["effect"].max()


def returned(report: Report, kind: str) -> pd.DataFrame:
    """How much more a head says the original object behind a prefix than without it, after the edit: layer, head,
    lens_prob.
    """
    frame = rows(report, "stress_heads")
    if frame.empty:
        return frame
    after = frame[frame["state"] == "after"]
    wide = after.pivot_table(index=["layer", "head"], columns="kind", values="lens_prob", aggfunc="first")
    if not {"none", kind} <= set(wide.columns):
        return pd.DataFrame()
    return (wide[kind] - wide["none"]).dropna().rename("lens_prob").reset_index()


def matrices(report: Report) -> dict[str, str]:
    """ "2.mlp_down" -> its name, for each matrix with a spectrum."""
    frame = rows(report, "weight_spectrum")
    if frame.empty:
        return {}
    pairs = frame[["layer", "site"]].drop_duplicates().sort_values(["layer", "site"])
    return {f"{row.layer}.{row.site}": f"Layer {row.layer} · {row.site}" for row in pairs.itertuples()}


def restorable(report: Report) -> frozenset[str]:
    """Cells of the matrices that this edit changed."""
    frame = rows(report, "weight_change")
    if frame.empty:
        return frozenset()
    edited = frame[(frame["kind"] == "weights") & (frame["layer"] >= 0)]
    return frozenset(f"matrix:{row.layer}.{row.site}" for row in edited.itertuples())
