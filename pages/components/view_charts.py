"""Pictures of the views: each function takes one frame of one case (see frames.py) and returns an Altair chart.

The colours and the rules for height and width are those of charts.py. Pandas and altair only.
"""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from pages.components.charts import ATTENTION, INK, MLP, MODULE_NAMES, NEW, OTHER, PADDING, SELECTED, TRUE
from pages.components.text import token_label

EDITORS = ("#4c78c9", "#d2772b", "#2b9160", "#b4538f", "#78838f", "#8a6fd8", "#b0821f", "#12998a")
CANDIDATES = {"new": "new object", "true": "original object"}
STATES = {"before": "Before", "after": "After"}
SITE_STEPS = {"block_in": 0.0, "resid_mid": 0.5, "block_out": 1.0}
"""How far into its layer a site of the stream lies."""
FAINT = -16.0
_DASHES = alt.Scale(domain=list(STATES.values()), range=[[4, 4], [1, 0]])


def change(frame: pd.DataFrame, keys: list[str], value: str) -> pd.DataFrame:
    """After minus before of one column; rows that only one state has are left out."""
    wide = frame.pivot_table(index=keys, columns="state", values=value, aggfunc="first")
    return (wide["after"] - wide["before"]).dropna().rename(value).reset_index()


def head_map(table: pd.DataFrame, value: str = "contribution", title: str = "nats") -> alt.LayerChart:
    """Layer x head heat-map of a signed number per head: a contribution, its change, or a change of attention mass."""
    shown = table[table["head"] >= 0]
    return _heat(shown, "layer:O", "head:O", value, title, "Layer, input to output", "Head")


def source_bars(table: pd.DataFrame) -> alt.LayerChart:
    """From which tokens one head reads what it says: bars of its contribution by source position."""
    shown = table[(table["position"] >= 0) | (table["contribution"].abs() > 1e-3)]  # a text in front, if there is one
    shown = shown.assign(place=[_place(p, t) for p, t in zip(shown["position"], shown["token"], strict=True)])
    return _bars(shown, "place", "contribution", "Contribution, nats", list(shown["place"]), ["attention"])


def neuron_bars(
    table: pd.DataFrame, words: pd.DataFrame | None = None, most: int = 20, letter: str = "N"
) -> alt.LayerChart:
    """The neurons that promote or suppress a candidate most, each with the first token that it promotes."""
    shown = table.reindex(table["contribution"].abs().sort_values(ascending=False).index).head(most)
    shown = shown.sort_values("contribution", ascending=False)
    names = [f"L{row.layer} · {letter}{row.neuron}" for row in shown.itertuples()]
    if words is not None and len(words):
        first = words[(words["direction"] == "promoted") & (words["rank"] == 1)]
        said = {(int(w.layer), str(w.neuron)): token_label(str(w.token)) for w in first.itertuples()}
        names = [
            f"{name}  {said.get((int(row.layer), str(row.neuron)), '')}".rstrip()
            for name, row in zip(names, shown.itertuples(), strict=True)
        ]
    return _bars(
        shown.assign(place=names), "place", "contribution", "Contribution, nats", names, ["coefficient", "certified"]
    )


def lens_lines(table: pd.DataFrame, crossing: pd.DataFrame | None = None) -> alt.LayerChart:
    """How likely each object would be if the stream ended there: log-probability through the layers, before and after.

    The rule marks where the new object overtakes the old one for good after the edit. What is less likely than
    e^FAINT is drawn at the bottom.
    """
    shown = table.assign(
        depth=table["layer"] + table["site"].map(SITE_STEPS),
        who=table["candidate"].map(CANDIDATES),
        model=table["state"].map(STATES),
    )
    x = alt.X("depth:Q", axis=alt.Axis(title="Layers passed", grid=False, tickMinStep=1))
    lines = (
        alt.Chart(shown)
        .mark_line(strokeWidth=2)
        .encode(
            x=x,
            y=alt.Y(
                "logprob:Q",
                scale=alt.Scale(domain=[max(FAINT, float(shown["logprob"].min())), 0], clamp=True),
                axis=alt.Axis(title="log p, nats", gridOpacity=0.35),
            ),
            color=_candidate_colour(),
            strokeDash=alt.StrokeDash("model:N", scale=_DASHES, legend=alt.Legend(title=None, orient="bottom")),
            tooltip=["depth:Q", "who:N", "model:N", alt.Tooltip("prob:Q", format=".2%"), "rank:Q"],
        )
    )
    layered: list[Any] = [lines]
    if crossing is not None:
        met = crossing[(crossing["state"] == "after") & (crossing["lasting_layer"] >= 0)]
        if len(met):
            marks = met.assign(depth=met["lasting_layer"] + met["lasting_site"].map(SITE_STEPS))
            layered.append(alt.Chart(marks).mark_rule(color=SELECTED, strokeWidth=1.5).encode(x=x))
    return _finished(layered, 330)


def trace_map(table: pd.DataFrame) -> alt.LayerChart:
    """Causal trace: how much of the candidate's probability one restored state brings back, by layer and token."""
    shown = table.assign(place=[_place(p, t) for p, t in zip(table["position"], table["token"], strict=True)])
    order = list(dict.fromkeys(shown.sort_values("position")["place"]))
    return _heat(shown, "layer:O", "place:N", "effect", "p restored", "Layer, input to output", None, order)


def residual_lines(table: pd.DataFrame) -> alt.LayerChart:
    """Dot product of what attention and MLP write with the candidate's unembedding row, layer by layer."""
    shown = table[table["layer"] >= 0]  # the embedding, layer -1, belongs to no module
    shown = shown.assign(what=shown["module"].map(MODULE_NAMES), model=shown["state"].map(STATES))
    lines = (
        alt.Chart(shown)
        .mark_line(strokeWidth=2, point=True)
        .encode(
            x=alt.X("layer:O", axis=alt.Axis(title="Layer, input to output", labelAngle=0, grid=False)),
            y=alt.Y("dot:Q", axis=alt.Axis(title="Dot product", gridOpacity=0.35)),
            color=alt.Color(
                "what:N",
                scale=alt.Scale(domain=["Attention", "MLP"], range=[ATTENTION, MLP]),
                legend=alt.Legend(title=None, orient="bottom"),
            ),
            strokeDash=alt.StrokeDash("model:N", scale=_DASHES, legend=alt.Legend(title=None, orient="bottom")),
            tooltip=["layer:O", "what:N", "model:N", alt.Tooltip("dot:Q", format="+.3f")],
        )
    )
    return _finished([_zero(), lines], 280)


def query_bars(table: pd.DataFrame) -> alt.LayerChart:
    """Which layers switch the value neurons on: share of each module, largest first."""
    shown = table[table["score"].abs() > 1e-4]  # what lies above the neurons wrote nothing they could read
    shown = shown.assign(
        place=[
            "Embedding" if row.layer < 0 else f"L{row.layer} · {MODULE_NAMES.get(str(row.module), str(row.module))}"
            for row in shown.itertuples()
        ]
    ).sort_values("score", ascending=False)
    return _bars(shown, "place", "score", "Share of the value neurons' scores, nats", list(shown["place"]), [])


def contrast_bands(table: pd.DataFrame) -> alt.LayerChart:
    """A contrast by layer with its bootstrap interval, a line for each editor."""
    editors = list(dict.fromkeys(table["editor"]))
    colour = alt.Color(
        "editor:N",
        scale=alt.Scale(domain=editors, range=list(EDITORS[: len(editors)])),
        legend=alt.Legend(title=None, orient="bottom", symbolOpacity=1, symbolType="stroke", symbolStrokeWidth=3),
    )
    base = alt.Chart(table).encode(
        x=alt.X("layer:Q", axis=alt.Axis(title="Layer, input to output", grid=False, tickMinStep=1))
    )
    title = "Change, nats"
    band = base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q", title=title), y2="high:Q", color=colour)
    line = base.mark_line(strokeWidth=2, point=True).encode(
        y=alt.Y("mean:Q", axis=alt.Axis(title=title, gridOpacity=0.35)),
        color=colour,
        tooltip=["editor:N", "layer:Q", alt.Tooltip("mean:Q", format="+.3f"), "low:Q", "high:Q"],
    )
    return _finished([_zero(), band, line], 330)


def spectrum_points(table: pd.DataFrame) -> alt.LayerChart:
    """Singular values of the change and of the unedited matrix, greatest first, on a logarithmic scale."""
    long = table.melt(["index"], ["singular", "base_singular"], "matrix", "size")
    long = long[long["size"] > 0]
    long["matrix"] = long["matrix"].map({"singular": "the change", "base_singular": "the unedited matrix"})
    points = (
        alt.Chart(long)
        .mark_line(point=True)
        .encode(
            x=alt.X("index:Q", axis=alt.Axis(title="Singular value, greatest first", grid=False)),
            y=alt.Y("size:Q", scale=alt.Scale(type="log"), axis=alt.Axis(title="Size", gridOpacity=0.35)),
            color=alt.Color(
                "matrix:N",
                scale=alt.Scale(domain=["the change", "the unedited matrix"], range=[SELECTED, OTHER]),
                legend=alt.Legend(title=None, orient="bottom"),
            ),
            tooltip=["matrix:N", "index:Q", alt.Tooltip("size:Q", format=".4g")],
        )
    )
    return _finished([points], 260)


def stress_bars(table: pd.DataFrame) -> alt.LayerChart:
    """Probability of both objects behind prefixes that suggest the old one."""
    long = table.melt(["kind", "state"], ["p_new", "p_true"], "who", "p")
    long["who"] = long["who"].map({"p_new": CANDIDATES["new"], "p_true": CANDIDATES["true"]})
    bars = (
        alt.Chart(long)
        .mark_bar()
        .encode(
            y=alt.Y("kind:N", sort=None, axis=alt.Axis(title=None, ticks=False, domain=False)),
            yOffset=alt.YOffset("who:N", sort=list(CANDIDATES.values())),
            x=alt.X("p:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title="Probability", format=".0%")),
            color=alt.Color(
                "who:N",
                scale=alt.Scale(domain=list(CANDIDATES.values()), range=[NEW, TRUE]),
                legend=alt.Legend(title=None, orient="bottom"),
            ),
            tooltip=["kind:N", "who:N", alt.Tooltip("p:Q", format=".2%")],
        )
    )
    return _finished([bars], 48 * long["kind"].nunique() + 90)


# Parts ---------------------------------------------------------------------------------------------------------------


def _heat(
    table: pd.DataFrame, x: str, y: str, value: str, unit: str, x_title: str, y_title: str | None,
    order: list[str] | None = None,
) -> alt.LayerChart:  # fmt: skip
    limit = max(float(table[value].abs().max()), 1e-9) if len(table) else 1.0
    rows = table[y.split(":")[0]].nunique()
    cells = (
        alt.Chart(table)
        .mark_rect(cornerRadius=2, stroke=INK, strokeOpacity=0.35, strokeWidth=0.5)
        .encode(
            x=alt.X(x, axis=alt.Axis(title=x_title, labelAngle=0, ticks=False, domain=False, grid=False)),
            y=alt.Y(
                y,
                sort=order,
                axis=alt.Axis(title=y_title, ticks=False, domain=False, grid=False, labelLimit=150, labelOverlap=False),
            ),
            color=alt.Color(
                f"{value}:Q",
                scale=alt.Scale(domain=[-limit, limit], range="diverging", interpolate="rgb", clamp=True),
                legend=alt.Legend(
                    title=f"less  ←  {unit}  →  more",
                    orient="bottom",
                    direction="horizontal",
                    gradientLength=190,
                    gradientThickness=10,
                    format="+.2f",
                    titleLimit=230,
                    titleFontWeight="normal",
                    values=[-limit, 0, limit],
                ),
            ),
            tooltip=[x, y, alt.Tooltip(f"{value}:Q", format="+.4f")],
        )
    )
    return _finished([cells], 26 * rows + 150)


def _bars(table: pd.DataFrame, place: str, value: str, title: str, order: list[str], more: list[str]) -> alt.LayerChart:
    bars = (
        alt.Chart(table)
        .mark_bar()
        .encode(
            y=alt.Y(
                f"{place}:N",
                sort=order,
                axis=alt.Axis(title=None, ticks=False, domain=False, labelLimit=220, labelOverlap=False),
            ),
            x=alt.X(f"{value}:Q", axis=alt.Axis(title=title, gridOpacity=0.35)),
            color=alt.condition(alt.datum[value] >= 0, alt.value("#4c78c9"), alt.value("#d2772b")),
            tooltip=[f"{place}:N", alt.Tooltip(f"{value}:Q", format="+.4f"), *more],
        )
    )
    return _finished([bars], 22 * len(table) + 60)


def _candidate_colour() -> alt.Color:
    return alt.Color(
        "who:N",
        scale=alt.Scale(domain=list(CANDIDATES.values()), range=[NEW, TRUE]),
        legend=alt.Legend(title=None, orient="bottom"),
    )


def _zero() -> alt.Chart:
    return alt.Chart(pd.DataFrame({"zero": [0.0]})).mark_rule(color=INK, strokeWidth=1).encode(y="zero:Q")


def _place(position: int, token: str) -> str:
    return "text in front" if position < 0 else f"{position} {token_label(token)}"


def _finished(layered: list[Any], height: int) -> alt.LayerChart:
    return alt.layer(*layered).properties(height=height).configure_view(strokeWidth=0).configure(padding=PADDING)
