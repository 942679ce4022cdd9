"""Pictures: each function takes a prepared table (see tables.py) and returns an Altair chart. Pandas and altair
only.

Sign and identity never share a colour: a diverging scale (orange suppresses, blue promotes, the page's own
background in the middle) is for contributions; teal is the new object and grey the original one. Base is hollow,
edited is filled. The diverging colours come from the theme (`range="diverging"`), so they follow light and dark in
the browser; the other colours are mid-tones that stand out on both backgrounds. Heights are of the whole picture,
axes and legend included: that is how Streamlit fits a chart. Every chart is one resizable view, no facet, and its
title is a heading of the page, which wraps: so it fits a phone.
"""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

NEW, TRUE, OTHER = "#12998a", "#78838f", "#b3bcc6"
ATTENTION, MLP = "#8a6fd8", "#b0821f"
HOLDS, BROKEN = "#2b9160", "#d24d57"
INK = "#727d89"
"""Rules, marks and annotations that must read on both backgrounds."""
SELECTED = "#e0457b"
PADDING = {"left": 2, "top": 6, "right": 6, "bottom": 2}

MODULE_NAMES = {"attn": "Attention", "ffn": "MLP"}
STATE_NAMES = {"before": "Before", "after": "After", "change": "Change"}
ROLE_NAMES = {"new": "new object", "true": "original object", "other": "other"}
CELL = "cell"
"""Name of the selection parameter of `module_map`: its rows carry layer, module and state."""


def _layer_axis(layers: list[int], title: str = "Layer, input to output") -> alt.Axis:
    step = max(1, round(len(layers) / 16))
    return alt.Axis(
        title=title, values=layers[::step], labelAngle=0, ticks=False, domain=False, grid=False, labelPadding=6
    )


def _row(state: str, module: str) -> str:
    return f"{STATE_NAMES[state]} · {MODULE_NAMES.get(module, module)}"


def module_map(
    cells: pd.DataFrame,
    edited: pd.DataFrame,
    *,
    candidate: str,
    limit: float,
    selected: tuple[int, str] | None = None,
) -> alt.LayerChart:
    """Layer x module heat-map of one candidate in three bands: before, after, change. Clicking a cell selects its
    layer and module.

    `limit` is the shared colour limit; a cell beyond it carries a small corner mark. Edited places have a triangle
    on top.
    """
    shown = cells[cells["candidate"] == candidate].copy()
    modules = [m for m in ("attn", "ffn") if m in set(shown["module"])]
    bands = [[_row(state, module) for module in modules] for state in STATE_NAMES if state in set(shown["state"])]
    shown["row"] = [_row(s, m) for s, m in zip(shown["state"], shown["module"], strict=True)]
    shown["state_name"] = shown["state"].map(STATE_NAMES)
    shown["module_name"] = shown["module"].map(MODULE_NAMES)
    shown["clipped"] = shown["value"].abs() > limit * (1 + 1e-9)
    rows = ["Edited"]
    for index, band in enumerate(bands):
        rows += [*band, " " * (index + 1)] if index < len(bands) - 1 else band
    layers = sorted(int(layer) for layer in shown["layer"].unique())
    x = alt.X("layer:O", scale=alt.Scale(domain=layers, paddingInner=0.06, paddingOuter=0.02), axis=_layer_axis(layers))
    y = alt.Y(
        "row:N",
        scale=alt.Scale(domain=rows, paddingInner=0.08, paddingOuter=0.02),
        axis=alt.Axis(title=None, ticks=False, domain=False, grid=False, labelPadding=8, labelLimit=150),
    )
    tooltip = [
        alt.Tooltip("layer:O", title="Layer"),
        alt.Tooltip("module_name:N", title="Module"),
        alt.Tooltip("state_name:N", title="State"),
        alt.Tooltip("value:Q", title="Contribution, nats", format="+.3f"),
        alt.Tooltip("share:Q", title="Share of all", format=".1%"),
        alt.Tooltip("place:Q", title="Rank by size"),
    ]
    picked = alt.selection_point(name=CELL, fields=["layer", "module"], toggle=False, clear="dblclick")
    heat = (
        alt.Chart(shown)
        .mark_rect(cornerRadius=2, stroke=INK, strokeOpacity=0.35, strokeWidth=0.5, cursor="pointer")
        .encode(
            x=x,
            y=y,
            color=alt.Color(
                "value:Q",
                scale=alt.Scale(domain=[-limit, limit], range="diverging", interpolate="rgb", clamp=True),
                legend=alt.Legend(
                    title="suppresses  ←  nats  →  promotes",
                    orient="bottom",
                    direction="horizontal",
                    gradientLength=190,
                    gradientThickness=10,
                    format="+.1f",
                    titleLimit=230,
                    titleFontWeight="normal",
                    titleAnchor="start",
                    values=[-limit, 0, limit],
                    offset=8,
                ),
            ),
            tooltip=tooltip,
        )
        .add_params(picked)
    )
    layered: list[Any] = [heat]
    if shown["clipped"].any():
        corner = alt.Chart(shown[shown["clipped"]]).mark_point(
            shape="triangle-up", size=22, filled=True, color=INK, opacity=1
        )
        layered.append(corner.encode(x=x, y=y))
    if not edited.empty:
        places = edited.assign(row="Edited", module_name=edited["module"].map(MODULE_NAMES))
        layered.append(
            alt.Chart(places)
            .mark_point(shape="triangle-down", size=90, filled=True, color=SELECTED, opacity=1)
            .encode(
                x=x,
                y=y,
                tooltip=[
                    alt.Tooltip("layer:O", title="Edited layer"),
                    alt.Tooltip("module_name:N", title="Module"),
                    alt.Tooltip("relative_norm:Q", title="Relative size of the change", format=".2%"),
                ],
            )
        )
    if selected is not None:
        ring = shown[(shown["layer"] == selected[0]) & (shown["module"] == selected[1])]
        layered.append(
            alt.Chart(ring[["layer", "row"]])
            .mark_rect(fillOpacity=0, stroke=SELECTED, strokeWidth=2.5, cornerRadius=2)
            .encode(x=x, y=y)
        )
    return (
        alt.layer(*layered)
        .properties(height=24 * len(rows) + 108)
        .configure_view(strokeWidth=0)
        .configure(padding=PADDING)
    )


def change_strip(cells: pd.DataFrame, *, candidate: str, limit: float) -> alt.Chart:
    """The change of every module's contribution, small: two rows, no legend, nothing to click."""
    shown = cells[(cells["candidate"] == candidate) & (cells["state"] == "change")]
    shown = shown.assign(row=shown["module"].map(MODULE_NAMES))
    layers = sorted(int(layer) for layer in shown["layer"].unique())
    chart = (
        alt.Chart(shown[["layer", "row", "value"]])
        .mark_rect(cornerRadius=2, stroke=INK, strokeOpacity=0.35, strokeWidth=0.5, aria=False)
        .encode(
            x=alt.X("layer:O", scale=alt.Scale(domain=layers, paddingInner=0.06), axis=_layer_axis(layers, "Layer")),
            y=alt.Y(
                "row:N",
                scale=alt.Scale(paddingInner=0.08),
                axis=alt.Axis(title=None, ticks=False, domain=False, grid=False, labelPadding=6),
            ),
            color=alt.Color(
                "value:Q",
                scale=alt.Scale(domain=[-limit, limit], range="diverging", interpolate="rgb", clamp=True),
                legend=None,
            ),
            tooltip=[
                alt.Tooltip("layer:O", title="Layer"),
                alt.Tooltip("row:N", title="Module"),
                alt.Tooltip("value:Q", title="Change, nats", format="+.2f"),
            ],
        )
    )
    return chart.properties(height=104).configure_view(strokeWidth=0).configure(padding=PADDING)


def layer_profile(cells: pd.DataFrame, edited: pd.DataFrame, *, candidate: str) -> alt.LayerChart:
    """Contribution by layer: colour is the module, dashes and hollow points are the base model, solid and filled the
    edited one.
    """
    shown = cells[(cells["candidate"] == candidate) & (cells["state"] != "change")].copy()
    shown["module_name"] = shown["module"].map(MODULE_NAMES)
    shown["state_name"] = shown["state"].map({"before": "Base", "after": "Edited"})
    layers = sorted(int(layer) for layer in shown["layer"].unique())
    x = alt.X("layer:O", scale=alt.Scale(domain=layers, paddingOuter=0.3), axis=_layer_axis(layers))
    y = alt.Y(
        "value:Q",
        axis=alt.Axis(
            title="Contribution, nats", format="+.1f", tickCount=5, domain=False, ticks=False, gridOpacity=0.35
        ),
    )
    color = alt.Color(
        "module_name:N",
        scale=alt.Scale(domain=["Attention", "MLP"], range=[ATTENTION, MLP]),
        legend=alt.Legend(title=None, orient="bottom"),
    )
    tooltip = [
        alt.Tooltip("layer:O", title="Layer"),
        alt.Tooltip("module_name:N", title="Module"),
        alt.Tooltip("state_name:N", title="Model"),
        alt.Tooltip("value:Q", title="Contribution, nats", format="+.3f"),
    ]
    base = alt.Chart(shown).encode(x=x, y=y, color=color)
    lines = base.mark_line(strokeWidth=2).encode(
        strokeDash=alt.StrokeDash(
            "state_name:N",
            scale=alt.Scale(domain=["Base", "Edited"], range=[[4, 4], [1, 0]]),
            legend=alt.Legend(title=None, orient="bottom"),
        ),
    )
    hollow = (
        base.transform_filter(alt.datum.state_name == "Base")
        .mark_point(filled=False, size=45, strokeWidth=1.5)
        .encode(tooltip=tooltip)
    )
    full = (
        base.transform_filter(alt.datum.state_name == "Edited")
        .mark_point(filled=True, size=55, opacity=1)
        .encode(tooltip=tooltip)
    )
    zero = alt.Chart(pd.DataFrame({"value": [0.0]})).mark_rule(color=INK, strokeWidth=1).encode(y="value:Q")
    layered: list[Any] = []
    if not edited.empty:
        layered.append(
            alt.Chart(edited[["layer"]].drop_duplicates()).mark_rect(color=SELECTED, opacity=0.12).encode(x=x)
        )
    return (
        alt.layer(*layered, zero, lines, hollow, full)
        .properties(height=300)
        .configure_view(strokeWidth=0)
        .configure(padding=PADDING)
    )


def next_token_bars(table: pd.DataFrame) -> alt.LayerChart:
    """First-token probabilities: hollow bar for the base model, filled bar for the edited one; teal new object, grey
    original.
    """
    shown = table.assign(
        label=[token.replace(" ", "·").replace("\n", "⏎") or "∅" for token in table["token"]],
        role_name=table["role"].map(ROLE_NAMES),
        state_name=table["state"].map({"before": "Base", "after": "Edited"}),
    )
    order = list(dict.fromkeys(shown["label"]))
    highest = float(shown["prob"].max()) if len(shown) else 1.0
    x = alt.X(
        "prob:Q",
        scale=alt.Scale(domain=[0, max(highest * 1.16, 0.01)], nice=False),
        axis=alt.Axis(
            title="Probability of the next token",
            format=".0%",
            tickCount=5,
            domain=False,
            ticks=False,
            gridOpacity=0.35,
        ),
    )
    y = alt.Y(
        "label:N",
        sort=order,
        scale=alt.Scale(paddingInner=0.3),
        axis=alt.Axis(title=None, ticks=False, domain=False, labelLimit=130, labelPadding=8),
    )
    offset = alt.YOffset(
        "state_name:N", sort=["Base", "Edited"], scale=alt.Scale(domain=["Base", "Edited"], paddingInner=0.12)
    )
    scale = alt.Scale(domain=list(ROLE_NAMES.values()), range=[NEW, TRUE, OTHER])
    tooltip = [
        alt.Tooltip("label:N", title="Token"),
        alt.Tooltip("state_name:N", title="Model"),
        alt.Tooltip("prob:Q", title="Probability", format=".4%"),
        alt.Tooltip("role_name:N", title="Is"),
    ]
    base = alt.Chart(shown).encode(x=x, y=y, yOffset=offset, tooltip=tooltip)
    hollow = base.transform_filter(alt.datum.state_name == "Base").mark_bar(
        filled=False, strokeWidth=1.5, cornerRadiusEnd=2
    )
    full = base.transform_filter(alt.datum.state_name == "Edited").mark_bar(cornerRadiusEnd=2)
    roles = [ROLE_NAMES[role] for role in ROLE_NAMES if role in set(shown["role"])]
    color = alt.Color(
        "role_name:N", scale=scale, legend=alt.Legend(title=None, orient="bottom", values=roles, symbolType="square")
    )
    text = base.mark_text(align="left", dx=5, fontSize=11, color=INK).encode(text="percent:N")
    return (
        alt.layer(
            hollow.encode(color=color),
            full.encode(color=color),
            text,
        )
        .properties(height=42 * max(1, len(order)) + 84)
        .configure_view(strokeWidth=0)
        .configure(padding=PADDING)
    )


def margin_dumbbell(table: pd.DataFrame, *, axis_title: str) -> alt.LayerChart:
    """Margin by prompt, hollow (base) to filled (edited); the zero rule is where the answer flips. The prompt stands
    above its line.
    """
    kinds = {"edit": "Edit", "paraphrase": "Paraphrase", "neighbourhood": "Neighbour"}
    shown = table.reset_index(drop=True).assign(line=lambda t: t.index.astype(int))
    shown["kind_name"] = shown["prompt_kind"].map(kinds)
    shown["label"] = [f"{kind}: {prompt}" for kind, prompt in zip(shown["kind_name"], shown["prompt"], strict=True)]
    shown["result"] = shown["passed"].map({True: "✓ holds", False: "✗ does not hold"})
    lowest = float(min(shown["margin_before"].min(), shown["margin_after"].min(), 0.0))
    highest = float(max(shown["margin_before"].max(), shown["margin_after"].max(), 0.0))
    room = 0.06 * max(highest - lowest, 1e-6)
    scale = alt.Scale(domain=[lowest - room, highest + room], nice=False, zero=False)
    y = alt.Y("line:O", axis=None, scale=alt.Scale(paddingInner=0.1))
    axis = alt.Axis(
        title=axis_title, format="+.0f", tickCount=6, domain=False, ticks=False, gridOpacity=0.35, titleLimit=420
    )
    tooltip = [
        alt.Tooltip("prompt:N", title="Prompt"),
        alt.Tooltip("kind_name:N", title="Kind"),
        alt.Tooltip("margin_before:Q", title="Margin before", format="+.2f"),
        alt.Tooltip("margin_after:Q", title="Margin after", format="+.2f"),
        alt.Tooltip("result:N", title="Rule"),
    ]
    color = alt.Color(
        "result:N",
        scale=alt.Scale(domain=["✓ holds", "✗ does not hold"], range=[HOLDS, BROKEN]),
        legend=alt.Legend(title=None, orient="bottom"),
    )
    base = alt.Chart(shown).encode(y=y, tooltip=tooltip)
    low = alt.X("margin_before:Q", scale=scale, axis=axis)
    line = base.mark_rule(strokeWidth=2, opacity=0.7, yOffset=9).encode(x=low, x2="margin_after:Q", color=color)
    hollow = base.mark_point(filled=False, size=60, strokeWidth=1.6, yOffset=9).encode(x=low, color=color)
    full = base.mark_point(filled=True, size=85, opacity=1, yOffset=9).encode(
        x=alt.X("margin_after:Q", scale=scale),
        color=color,
        shape=alt.Shape(
            "result:N",
            scale=alt.Scale(domain=["✓ holds", "✗ does not hold"], range=["circle", "cross"]),
            legend=alt.Legend(title=None, orient="bottom"),
        ),
    )
    zero = alt.Chart(pd.DataFrame({"margin_before": [0.0]})).mark_rule(color=INK, strokeDash=[3, 3]).encode(x=low)
    label = base.mark_text(align="left", baseline="middle", dy=-9, fontSize=12, limit=560, color=INK).encode(
        x=alt.value(2), text="label:N"
    )
    return (
        alt.layer(zero, line, hollow, full, label)
        .properties(height=44 * max(1, len(shown)) + 84)
        .configure_view(strokeWidth=0)
        .configure(padding=PADDING)
    )
