"""Pictures of masks and of what the detector found: each function takes a table and returns an Altair chart.

The colours and the rules for height and width are those of charts.py. Pandas and altair only.
"""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from pages.components.charts import INK, NEW, PADDING, SELECTED, TRUE

SETS = {
    "training": "training edits",
    "held-out facts": "unseen facts",
    "held-out relations": "unseen relations",
}
SET_COLORS = (TRUE, NEW, "#8a6fd8")
SET_SHAPES = ("circle", "square", "triangle-up")
MASKS = {
    "trained": "trained mask",
    "random": "random places",
    "within rows": "shuffled in rows",
    "within columns": "shuffled in columns",
    "largest change": "largest change",
    "largest weight": "largest weights",
    "smallest weight": "smallest weights",
    "active inputs": "most active neurons",
    "restore W0": "restore, not cut",
    "K = 0": "whole matrix cut",
    "own largest change, restore W0": "each edit's own",
    "none": "no mask",
}
"""Mask of an evaluation -> its short label."""
SITES = {"mlp_down": "MLP", "attn_out": "Attention"}


def cut_profile(table: pd.DataFrame, share: float) -> alt.LayerChart:
    """Share cut of every neuron and every output, sorted; the dashed rule is what an even mask would cut.

    Columns part, place (0 to 1), cut.
    """
    parts = list(dict.fromkeys(table["part"]))
    lines = (
        alt.Chart(table)
        .mark_line(strokeWidth=2.2)
        .encode(
            x=alt.X("place:Q", title="Place, most cut first", scale=alt.Scale(domain=[0, 1]), axis=_axis(".0%")),
            y=alt.Y("cut:Q", title="Share that is cut", scale=alt.Scale(domain=[0, 1]), axis=_axis(".0%")),
            color=alt.Color(
                "part:N",
                scale=alt.Scale(domain=parts, range=[NEW, "#8a6fd8"][: len(parts)]),
                legend=alt.Legend(title=None, orient="bottom"),
            ),
            strokeDash=alt.StrokeDash(
                "part:N",
                scale=alt.Scale(domain=parts, range=[[1, 0], [6, 3]][: len(parts)]),
                legend=alt.Legend(title=None, orient="bottom"),
            ),
            tooltip=[
                alt.Tooltip("part:N", title="Of"),
                alt.Tooltip("place:Q", title="Place", format=".0%"),
                alt.Tooltip("cut:Q", title="Cut", format=".1%"),
            ],
        )
    )
    even = alt.Chart(pd.DataFrame({"cut": [share]})).mark_rule(color=INK, strokeDash=[3, 3]).encode(y=alt.Y("cut:Q"))
    return _done(alt.layer(even, lines), 290)


def blocks(table: pd.DataFrame) -> alt.LayerChart:
    """The mask seen from afar: share cut by block of outputs (down) and neurons (across). Columns row, column, cut."""
    chart = (
        alt.Chart(table)
        .mark_rect()
        .encode(
            x=alt.X("column:O", title="Neurons, most cut first", axis=alt.Axis(labels=False, ticks=False)),
            y=alt.Y("row:O", title="Outputs, most cut first", axis=alt.Axis(labels=False, ticks=False)),
            color=alt.Color(
                "cut:Q",
                scale=alt.Scale(domain=[0, 1], range="heatmap"),
                legend=alt.Legend(title="Share cut", orient="bottom", format=".0%", gradientLength=190),
            ),
            tooltip=[
                alt.Tooltip("row:O", title="Block of outputs"),
                alt.Tooltip("column:O", title="Block of neurons"),
                alt.Tooltip("cut:Q", title="Cut", format=".1%"),
            ],
        )
    )
    return _done(alt.layer(chart), 330)


def reversal(table: pd.DataFrame) -> alt.LayerChart:
    """Share of edits undone by mask, one mark per set of edits. Columns label, set_name, rsr, cases, in order."""
    order = list(dict.fromkeys(table["label"]))
    sets = [name for name in SETS.values() if name in set(table["set_name"])]
    y = alt.Y("label:N", sort=order, axis=alt.Axis(title=None, labelLimit=140, ticks=False, domain=False, grid=True))
    chart = (
        alt.Chart(table)
        .mark_point(filled=True, size=85, opacity=0.9)
        .encode(
            x=alt.X(
                "rsr:Q", title="Edits undone", scale=alt.Scale(domain=[-0.02, 1.02], nice=False), axis=_share_axis()
            ),
            y=y,
            yOffset=alt.YOffset("set_name:N", sort=sets, scale=alt.Scale(domain=sets)),
            color=alt.Color(
                "set_name:N",
                scale=alt.Scale(domain=sets, range=list(SET_COLORS[: len(sets)])),
                legend=alt.Legend(title=None, orient="bottom", columns=2),
            ),
            shape=alt.Shape(
                "set_name:N",
                scale=alt.Scale(domain=sets, range=list(SET_SHAPES[: len(sets)])),
                legend=alt.Legend(title=None, orient="bottom", columns=2),
            ),
            tooltip=[
                alt.Tooltip("label:N", title="Mask"),
                alt.Tooltip("set_name:N", title="Edits"),
                alt.Tooltip("rsr:Q", title="Undone", format=".0%"),
                alt.Tooltip("top1:Q", title="Same first token as unedited", format=".0%"),
                alt.Tooltip("cases:Q", title="Edits that took (n)"),
            ],
        )
    )
    return _done(alt.layer(chart), 30 * len(order) + 110)


def shares(table: pd.DataFrame, title: str, *, marked: str = "", lowest: float = 0.0) -> alt.LayerChart:
    """Bars of a share in the table's order; `marked` is the label that stands out. Columns label, value, told."""
    order = list(table["label"])
    y = alt.Y("label:N", sort=order, axis=alt.Axis(title=None, labelLimit=150, ticks=False, domain=False))
    base = alt.Chart(table).encode(
        y=y,
        x=alt.X("value:Q", title=title, scale=alt.Scale(domain=[lowest, 1.12], nice=False), axis=_share_axis()),
        tooltip=[alt.Tooltip("label:N", title="Under"), alt.Tooltip("told:N", title=title)],
    )
    bars = base.mark_bar(color=TRUE, cornerRadiusEnd=2, height={"band": 0.62})
    layers = [bars]
    if marked in order:
        layers.append(base.transform_filter(alt.datum.label == marked).mark_bar(
            color=NEW, cornerRadiusEnd=2, height={"band": 0.62}))  # fmt: skip
    text = base.mark_text(align="left", dx=5, fontSize=11, color=INK).encode(text="told:N")
    return _done(alt.layer(*layers, text), 26 * len(order) + 70)


def margins(table: pd.DataFrame) -> alt.LayerChart:
    """Margin of each edit, hollow under the edit, filled under edit and mask; right of zero it is undone.

    Columns label, margin_edited, margin_masked, result.
    """
    order = list(table["label"])
    y = alt.Y("label:N", sort=order, axis=alt.Axis(title=None, labelLimit=150, ticks=False, domain=False, grid=True))
    axis = alt.Axis(title="log P(old) − log P(new), nats", format="+.0f", tickCount=5, domain=False, ticks=False,
                    gridOpacity=0.35, titleLimit=300)  # fmt: skip
    color = alt.Color(
        "result:N",
        scale=alt.Scale(domain=["✓ undone", "✗ still edited"], range=["#2b9160", "#d24d57"]),
        legend=alt.Legend(title=None, orient="bottom"),
    )
    shape = alt.Shape(
        "result:N",
        scale=alt.Scale(domain=["✓ undone", "✗ still edited"], range=["circle", "cross"]),
        legend=alt.Legend(title=None, orient="bottom"),
    )
    base = alt.Chart(table).encode(
        y=y,
        tooltip=[
            alt.Tooltip("prompt:N", title="Prompt"),
            alt.Tooltip("margin_edited:Q", title="Edited, nats", format="+.2f"),
            alt.Tooltip("margin_masked:Q", title="Under the mask, nats", format="+.2f"),
            alt.Tooltip("result:N", title="Result"),
        ],
    )
    low = alt.X("margin_edited:Q", axis=axis)
    line = base.mark_rule(strokeWidth=1.6, opacity=0.6).encode(x=low, x2="margin_masked:Q", color=color)
    hollow = base.mark_point(filled=False, size=50, strokeWidth=1.5).encode(x=low, color=color)
    full = base.mark_point(filled=True, size=70, opacity=1).encode(x="margin_masked:Q", color=color, shape=shape)
    zero = alt.Chart(pd.DataFrame({"margin_edited": [0.0]})).mark_rule(color=INK, strokeDash=[3, 3]).encode(x=low)
    return _done(alt.layer(zero, line, hollow, full), 22 * len(order) + 100)


def over_attention(table: pd.DataFrame) -> alt.LayerChart:
    """What attention says for the new object by layer, in three states. Columns layer, state_name, mean, error."""
    states = list(dict.fromkeys(table["state_name"]))
    layers = sorted(int(layer) for layer in table["layer"].unique())
    step = max(1, round(len(layers) / 16))
    colors, dashes = [TRUE, "#d2772b", NEW][: len(states)], [[4, 4], [1, 0], [8, 3]][: len(states)]
    base = alt.Chart(table).encode(
        x=alt.X("layer:O", title="Layer, input to output", axis=alt.Axis(values=layers[::step], labelAngle=0)),
        y=alt.Y("mean:Q", title="Logits for the new object", axis=_axis("+.0f")),
        color=alt.Color(
            "state_name:N",
            scale=alt.Scale(domain=states, range=colors),
            legend=alt.Legend(title=None, orient="bottom", symbolType="stroke"),
        ),
        tooltip=[
            alt.Tooltip("layer:O", title="Layer"),
            alt.Tooltip("state_name:N", title="Model"),
            alt.Tooltip("mean:Q", title="Logits", format="+.2f"),
            alt.Tooltip("error:Q", title="Standard error", format=".2f"),
        ],
    )
    lines = base.mark_line(strokeWidth=2).encode(
        strokeDash=alt.StrokeDash(
            "state_name:N", scale=alt.Scale(domain=states, range=dashes),
            legend=alt.Legend(title=None, orient="bottom", symbolType="stroke"),
        )
    )  # fmt: skip
    points = base.mark_point(filled=True, size=50, opacity=1)
    return _done(alt.layer(lines, points), 300)


def suspicion(table: pd.DataFrame) -> alt.LayerChart:
    """Score of every matrix, layer across and kind of matrix down; a ring where the verdict is an edit.

    Columns layer, site_name, score, verdict, kind.
    """
    layers = sorted(int(layer) for layer in table["layer"].unique())
    step = max(1, round(len(layers) / 16))
    x = alt.X("layer:O", title="Layer, input to output",
              axis=alt.Axis(values=layers[::step], labelAngle=0, ticks=False, domain=False))  # fmt: skip
    y = alt.Y("site_name:N", sort=list(SITES.values()), axis=alt.Axis(title=None, ticks=False, domain=False))
    heat = (
        alt.Chart(table)
        .mark_rect(cornerRadius=2, stroke=INK, strokeOpacity=0.35, strokeWidth=0.5)
        .encode(
            x=x,
            y=y,
            color=alt.Color(
                "score:Q",
                scale=alt.Scale(domain=[0, 1], range="heatmap"),
                legend=alt.Legend(title="Score", orient="bottom", format=".1f", gradientLength=190),
            ),
            tooltip=[
                alt.Tooltip("layer:O", title="Layer"),
                alt.Tooltip("site_name:N", title="Matrix"),
                alt.Tooltip("score:Q", title="Score", format=".2f"),
                alt.Tooltip("verdict:N", title="Verdict"),
            ],
        )
    )
    ring = (
        alt.Chart(table[table["kind"] == "low_rank"])
        .mark_rect(fillOpacity=0, stroke=SELECTED, strokeWidth=2.5, cornerRadius=2)
        .encode(x=x, y=y)
    )
    return _done(alt.layer(heat, ring), 250)


def _axis(text: str) -> alt.Axis:
    return alt.Axis(format=text, tickCount=5, domain=False, ticks=False, gridOpacity=0.35)


def _share_axis() -> alt.Axis:
    return alt.Axis(format=".0%", values=[0, 0.25, 0.5, 0.75, 1], domain=False, ticks=False, gridOpacity=0.35)


def _done(chart: Any, height: int) -> alt.LayerChart:
    whole: alt.LayerChart = chart.properties(height=height).configure_view(strokeWidth=0).configure(padding=PADDING)
    return whole
