"""Pictures of a comparison. Colours and rules as in charts.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from pages.components.charts import INK, MLP, MODULE_NAMES, NEW, PADDING, SELECTED, TRUE


def method_maps(cells: pd.DataFrame, methods: Sequence[str], *, locked: bool) -> alt.LayerChart:
    """Layer x module maps of the change, a band of two rows for each method (columns of compare_tables.changes).

    Locked: one colour scale for all. Otherwise each method's colours are shares of its own largest change, and that
    stands in its label. A ring marks where a method acts.
    """
    limits = dict(zip(cells["method"], cells["limit"], strict=True))
    limit = max(limits.values()) if locked else 1.0
    head = {name: name if locked else f"{name} ±{limits[name]:.2g}" for name in methods if name in limits}
    shown = cells.assign(
        row=[f"{head[m]} · {MODULE_NAMES.get(k, k)}" for m, k in zip(cells["method"], cells["module"], strict=True)],
        module_name=cells["module"].map(MODULE_NAMES),
        colour=cells["value"] if locked else cells["value"] / cells["limit"],
    )
    rows: list[str] = []
    for place, name in enumerate(head.values()):
        rows += [" " * place] if place else []
        rows += [f"{name} · {title}" for module, title in MODULE_NAMES.items() if module in set(shown["module"])]
    layers = sorted(int(layer) for layer in shown["layer"].unique())
    step = max(1, round(len(layers) / 16))
    x = alt.X(
        "layer:O",
        scale=alt.Scale(domain=layers, paddingInner=0.06),
        axis=alt.Axis(title="Layer, input to output", values=layers[::step], labelAngle=0, ticks=False, domain=False),
    )
    y = alt.Y(
        "row:N",
        scale=alt.Scale(domain=rows, paddingInner=0.08),
        axis=alt.Axis(title=None, ticks=False, domain=False, grid=False, labelPadding=8, labelLimit=170),
    )
    unit = "nats" if locked else "share of the method's largest change"
    heat = (
        alt.Chart(shown)
        .mark_rect(cornerRadius=2, stroke=INK, strokeOpacity=0.35, strokeWidth=0.5)
        .encode(
            x=x,
            y=y,
            color=alt.Color(
                "colour:Q",
                scale=alt.Scale(domain=[-limit, limit], range="diverging", interpolate="rgb", clamp=True),
                legend=alt.Legend(
                    title=f"away  ←  {unit}  →  toward", orient="bottom", direction="horizontal", gradientLength=190,
                    gradientThickness=10, format="+.1f", titleLimit=300, titleFontWeight="normal",
                    values=[-limit, 0, limit], offset=8,
                ),
            ),
            tooltip=[
                alt.Tooltip("method:N", title="Method"),
                alt.Tooltip("layer:O", title="Layer"),
                alt.Tooltip("module_name:N", title="Module"),
                alt.Tooltip("value:Q", title="Change, nats", format="+.3f"),
                alt.Tooltip("share:Q", title="Share of its changes", format=".1%"),
                alt.Tooltip("edited:N", title="The method acts here"),
            ],
        )
    )  # fmt: skip
    ring = alt.Chart(shown[shown["edited"]]).mark_rect(fillOpacity=0, stroke=SELECTED, strokeWidth=2.5, cornerRadius=2)
    return _finished([heat, ring.encode(x=x, y=y)], 24 * len(rows) + 140)


def object_bars(table: pd.DataFrame) -> alt.LayerChart:
    """Probability of the first token of both objects, a pair of bars for each method."""
    order = list(dict.fromkeys(table["method"]))
    highest = float(table["prob"].max()) if len(table) else 1.0
    base = alt.Chart(table).encode(
        y=alt.Y(
            "method:N", sort=order, scale=alt.Scale(paddingInner=0.3),
            axis=alt.Axis(title=None, ticks=False, domain=False, labelLimit=150, labelPadding=8),
        ),
        yOffset=alt.YOffset("who:N", sort=["new object", "original object"], scale=alt.Scale(paddingInner=0.1)),
        x=alt.X(
            "prob:Q",
            scale=alt.Scale(domain=[0, max(1.16 * highest, 0.01)], nice=False),
            axis=alt.Axis(title="Probability of the next token", format=".0%", tickCount=5, domain=False,
                          ticks=False, gridOpacity=0.35),
        ),
        tooltip=[
            alt.Tooltip("method:N", title="Method"),
            alt.Tooltip("who:N", title="Object"),
            alt.Tooltip("token:N", title="First token"),
            alt.Tooltip("prob:Q", title="Probability", format=".4%"),
        ],
    )  # fmt: skip
    colour = alt.Color(
        "who:N",
        scale=alt.Scale(domain=["new object", "original object"], range=[NEW, TRUE]),
        legend=alt.Legend(title=None, orient="bottom", symbolType="square"),
    )
    bars = base.mark_bar(cornerRadiusEnd=2).encode(color=colour)
    text = base.mark_text(align="left", dx=5, fontSize=11, color=INK).encode(text="percent:N")
    return _finished([bars, text], 44 * max(1, len(order)) + 110)


def second_bars(table: pd.DataFrame) -> alt.LayerChart:
    """Seconds of each run, longest first."""
    order = list(table.sort_values("seconds", ascending=False)["method"])
    shown = table.assign(words=[f"{value:.1f} s" for value in table["seconds"]])
    base = alt.Chart(shown).encode(
        y=alt.Y("method:N", sort=order, axis=alt.Axis(title=None, ticks=False, domain=False, labelLimit=150)),
        x=alt.X(
            "seconds:Q", scale=alt.Scale(domain=[0, 1.2 * max(float(table["seconds"].max()), 0.1)], nice=False),
            axis=alt.Axis(title="Seconds", tickCount=5, domain=False, ticks=False, gridOpacity=0.35),
        ),
        tooltip=[
            alt.Tooltip("method:N", title="Method"),
            alt.Tooltip("seconds:Q", title="Seconds in all", format=".2f"),
            alt.Tooltip("changed:N", title="Changes"),
        ],
    )  # fmt: skip
    text = base.mark_text(align="left", dx=5, fontSize=11, color=INK).encode(text="words:N")
    return _finished([base.mark_bar(cornerRadiusEnd=2, color=MLP), text], 30 * max(1, len(order)) + 80)


def _finished(layered: list[Any], height: int) -> alt.LayerChart:
    return alt.layer(*layered).properties(height=height).configure_view(strokeWidth=0).configure(padding=PADDING)
