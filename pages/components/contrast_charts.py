"""Pictures of a contrast of edits: curves with intervals, leverage by layer and by module. Rules as in charts.py."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from pages.components.charts import ATTENTION, INK, OTHER, PADDING, SELECTED
from pages.components.text import MODULES
from pages.components.view_charts import EDITORS

LAYER = "Layer, input to output"


def bands(table: pd.DataFrame, region: tuple[int, ...], title: str) -> alt.LayerChart:
    """One statistic by layer, a line and its interval for each editor. Columns: label, layer, mean, low, high,
    n_success, n_failure. The region's layers are shaded.
    """
    labels = list(dict.fromkeys(table["label"]))
    colour = alt.Color(
        "label:N",
        scale=alt.Scale(domain=labels, range=[EDITORS[i % len(EDITORS)] for i in range(len(labels))]),
        legend=alt.Legend(
            title=None, orient="bottom", columns=2, labelLimit=170, symbolOpacity=1, symbolType="stroke",
            symbolStrokeWidth=3,
        ),
    )  # fmt: skip
    x = _layers(table["layer"])
    base = alt.Chart(table).encode(x=x)
    axis = alt.Axis(title=title, gridOpacity=0.35)
    band = base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q", axis=axis), y2="high:Q", color=colour)
    line = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=45)).encode(
        y=alt.Y("mean:Q", axis=axis),
        color=colour,
        shape=alt.Shape("label:N", scale=alt.Scale(domain=labels), legend=None),
        tooltip=[
            alt.Tooltip("label:N", title="Editor"),
            alt.Tooltip("layer:Q", title="Layer"),
            alt.Tooltip("mean:Q", format="+.3f", title="Mean, nats"),
            alt.Tooltip("low:Q", format="+.3f", title="95 % from"),
            alt.Tooltip("high:Q", format="+.3f", title="95 % to"),
            alt.Tooltip("n_success:Q", title="Successes"),
            alt.Tooltip("n_failure:Q", title="Failures"),
        ],
    )
    return _finished([*_shaded(region, x), _zero(), band, line], 350)


def leverage_profile(
    table: pd.DataFrame, region: tuple[int, ...], other: pd.DataFrame | None = None, other_name: str = "shipped study"
) -> alt.LayerChart:
    """The editors' mean leverage of attention by layer with its interval; the region is shaded, its points are filled
    and say how often the layer was chosen. `other` is drawn dashed beside it. Columns: layer, leverage, low, high,
    chosen.
    """
    shown = table.assign(inside=table["layer"].isin(region), often=[f"{100 * c:.0f} %" for c in table["chosen"]])
    x = _layers(table["layer"])
    axis = alt.Axis(title="Leverage, standard deviations", gridOpacity=0.35)
    base = alt.Chart(shown).encode(x=x)
    y = alt.Y("leverage:Q", axis=axis)
    tooltip = [
        alt.Tooltip("layer:Q", title="Layer"),
        alt.Tooltip("leverage:Q", format=".3f", title="Leverage, deviations"),
        alt.Tooltip("low:Q", format=".3f", title="95 % from"),
        alt.Tooltip("high:Q", format=".3f", title="95 % to"),
        alt.Tooltip("often:N", title="Chosen in draws"),
        alt.Tooltip("inside:N", title="In the region"),
    ]
    layered: list[Any] = [*_shaded(region, x)]
    layered.append(base.mark_rule(color=ATTENTION, strokeWidth=4, opacity=0.35).encode(y=alt.Y("low:Q", axis=axis),
                                                                                      y2="high:Q"))  # fmt: skip
    layered.append(base.mark_line(color=ATTENTION, strokeWidth=2).encode(y=y))
    layered.append(
        base.mark_point(size=70, color=ATTENTION, strokeWidth=2, opacity=1).encode(
            y=y,
            fill=alt.condition("datum.inside", alt.value(ATTENTION), alt.value("transparent")),
            tooltip=tooltip,
        )
    )
    layered.append(
        base.transform_filter("datum.chosen > 0.005")
        .mark_text(dy=-16, color=INK, fontSize=11)
        .encode(y=y, text="often:N")
    )
    if other is not None and len(other):
        layered.append(
            alt.Chart(other.assign(study=other_name))
            .mark_line(color=OTHER, strokeDash=[5, 4], strokeWidth=2, point=alt.OverlayMarkDef(color=OTHER, size=30))
            .encode(
                x=x,
                y=y,
                tooltip=[
                    alt.Tooltip("study:N", title="Study"),
                    alt.Tooltip("layer:Q", title="Layer"),
                    alt.Tooltip("leverage:Q", format=".3f", title="Leverage, deviations"),
                ],
            )
        )
    return _finished(layered, 300)


def leverage_map(table: pd.DataFrame) -> alt.LayerChart:
    """Layer x (editor, module): leverage in nats; cells of the region are framed. Columns: editor, module, layer,
    leverage, in_region.
    """
    shown = table.assign(
        row=[f"{e} · {MODULES.get(m, m)}" for e, m in zip(table["editor"], table["module"], strict=True)]
    )
    order = list(dict.fromkeys(shown["row"]))
    x = alt.X("layer:O", axis=alt.Axis(title=LAYER, labelAngle=0, ticks=False, domain=False, grid=False))
    y = alt.Y(
        "row:N",
        sort=order,
        axis=alt.Axis(title=None, ticks=False, domain=False, grid=False, labelLimit=130, labelOverlap=False),
    )
    limit = max(float(shown["leverage"].max()), 1e-9)
    cells = (
        alt.Chart(shown)
        .mark_rect(cornerRadius=2, stroke=INK, strokeOpacity=0.35, strokeWidth=0.5)
        .encode(
            x=x,
            y=y,
            color=alt.Color(
                "leverage:Q",
                scale=alt.Scale(domain=[0, limit], range="heatmap", interpolate="rgb"),
                legend=alt.Legend(
                    title="leverage, nats", orient="bottom", direction="horizontal", gradientLength=190,
                    gradientThickness=10, format=".1f", titleFontWeight="normal", values=[0, limit / 2, limit],
                ),
            ),
            tooltip=[
                alt.Tooltip("row:N", title="Editor and module"),
                alt.Tooltip("layer:O", title="Layer"),
                alt.Tooltip("leverage:Q", format=".3f", title="Leverage, nats"),
                alt.Tooltip("in_region:N", title="Layer in the region"),
            ],
        )
    )  # fmt: skip
    framed = (
        alt.Chart(shown[shown["in_region"] & (shown["module"] == "attn")])
        .mark_rect(filled=False, stroke=SELECTED, strokeWidth=2, cornerRadius=2)
        .encode(x=x, y=y)
    )
    return _finished([cells, framed], 26 * len(order) + 165)


def _layers(layers: pd.Series) -> alt.X:
    """A number line with a tick per layer, at most sixteen."""
    last = int(layers.max())
    step = max(1, round((last + 1) / 16))
    return alt.X(
        "layer:Q",
        scale=alt.Scale(domain=[-0.5, last + 0.5], nice=False),
        axis=alt.Axis(title=LAYER, grid=False, values=list(range(0, last + 1, step)), format="d", labelAngle=0),
    )


def _shaded(region: tuple[int, ...], x: alt.X) -> list[alt.Chart]:
    """Bars of the page's height behind the region's layers."""
    if not region:
        return []
    table = pd.DataFrame({"layer": [layer - 0.5 for layer in region], "end": [layer + 0.5 for layer in region]})
    return [alt.Chart(table).mark_rect(color=SELECTED, opacity=0.09).encode(x=x, x2="end:Q")]


def _zero() -> alt.Chart:
    return alt.Chart(pd.DataFrame({"zero": [0.0]})).mark_rule(color=INK, strokeWidth=1).encode(y="zero:Q")


def _finished(layered: list[Any], height: int) -> alt.LayerChart:
    return alt.layer(*layered).properties(height=height).configure_view(strokeWidth=0).configure(padding=PADDING)
