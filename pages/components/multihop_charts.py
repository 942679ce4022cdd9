"""Pictures of a chain: which step holds by method, value neurons and what switches them on. Rules as in charts.py."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from pages.components.charts import ATTENTION, BROKEN, HOLDS, INK, MLP, NEW, OTHER, PADDING

STATES = {"before": "Before", "after": "After"}


def steps(table: pd.DataFrame) -> alt.LayerChart:
    """Method x step: ✓ or ✗, what was said in the tooltip. Columns: method, step, prompt, expected, said, right."""
    shown = table.assign(
        mark=table["right"].map({True: "✓", False: "✗"}), word=table["right"].map({True: "right", False: "wrong"})
    )
    x = alt.X(
        "step:N",
        sort=list(dict.fromkeys(table["step"])),
        axis=alt.Axis(
            title=None,
            labelAngle=0,
            ticks=False,
            domain=False,
            labelOverlap=False,
            labelExpr="split(datum.label, ' ')",
        ),
    )
    y = alt.Y(
        "method:N",
        sort=list(dict.fromkeys(table["method"])),
        axis=alt.Axis(title=None, ticks=False, domain=False, labelLimit=110),
    )
    tooltip = [
        alt.Tooltip("method:N", title="Method"),
        alt.Tooltip("step:N", title="Step"),
        alt.Tooltip("prompt:N", title="Prompt"),
        alt.Tooltip("said:N", title="It says"),
        alt.Tooltip("expected:N", title="Right would be"),
        alt.Tooltip("word:N", title="Judged"),
    ]
    colour = alt.Color(
        "word:N",
        scale=alt.Scale(domain=["right", "wrong"], range=[HOLDS, BROKEN]),
        legend=alt.Legend(title=None, orient="bottom", symbolOpacity=1),
    )
    cells = (
        alt.Chart(shown)
        .mark_rect(cornerRadius=3, opacity=0.22, stroke=INK, strokeOpacity=0.4, strokeWidth=0.5)
        .encode(x=x, y=y, color=colour, tooltip=tooltip)
    )
    marks = (
        alt.Chart(shown)
        .mark_text(fontSize=15, fontWeight="bold")
        .encode(x=x, y=y, text="mark:N", color=colour, tooltip=tooltip)
    )
    return _finished([cells, marks], 34 * shown["method"].nunique() + 130)


def value_bars(table: pd.DataFrame) -> alt.LayerChart:
    """Value neurons by layer, before and after. Columns: layer, state, contribution (sum, nats), neurons."""
    shown = table.assign(model=table["state"].map(STATES))
    layers = sorted(int(layer) for layer in set(table["layer"]))
    bars = (
        alt.Chart(shown)
        .mark_bar(strokeWidth=1.5)
        .encode(
            x=alt.X(
                "layer:O",
                scale=alt.Scale(domain=list(range(min(layers), max(layers) + 1))),
                axis=alt.Axis(title="Layer, input to output", labelAngle=0, ticks=False, grid=False),
            ),
            xOffset=alt.XOffset("model:N", sort=list(STATES.values())),
            y=alt.Y("contribution:Q", axis=alt.Axis(title="Value neurons, nats", gridOpacity=0.35)),
            color=_state_colour(),
            tooltip=[
                alt.Tooltip("layer:O", title="Layer"),
                alt.Tooltip("model:N", title="State"),
                alt.Tooltip("contribution:Q", format="+.3f", title="Sum, nats"),
                alt.Tooltip("neurons:Q", title="Neurons listed"),
            ],
        )
    )
    return _finished([_zero(), bars], 280)


def query_lines(table: pd.DataFrame) -> alt.LayerChart:
    """What switches the value neurons on, by layer: colour is the module, dashes the unedited model. Columns: layer,
    module (attn, ffn), state, score (nats).
    """
    names = {"attn": "Attention", "ffn": "MLP"}
    shown = table.assign(what=table["module"].map(names), model=table["state"].map(STATES))
    last = int(table["layer"].max())
    lines = (
        alt.Chart(shown)
        .mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=40))
        .encode(
            x=alt.X(
                "layer:Q",
                axis=alt.Axis(
                    title="Layer, input to output", grid=False, format="d",
                    values=list(range(0, last + 1, max(1, round((last + 1) / 16)))),
                ),
            ),
            y=alt.Y("score:Q", axis=alt.Axis(title="Share of the values, nats", gridOpacity=0.35)),
            color=alt.Color(
                "what:N",
                scale=alt.Scale(domain=list(names.values()), range=[ATTENTION, MLP]),
                legend=alt.Legend(title=None, orient="bottom", symbolType="stroke", symbolStrokeWidth=3),
            ),
            strokeDash=alt.StrokeDash(
                "model:N",
                scale=alt.Scale(domain=list(STATES.values()), range=[[4, 4], [1, 0]]),
                legend=alt.Legend(
                    title=None, orient="bottom", symbolType="stroke", symbolSize=300, symbolStrokeColor=INK
                ),
            ),
            tooltip=[
                alt.Tooltip("what:N", title="Module"),
                alt.Tooltip("layer:Q", title="Layer"),
                alt.Tooltip("model:N", title="State"),
                alt.Tooltip("score:Q", format="+.3f", title="Share, nats"),
            ],
        )
    )  # fmt: skip
    return _finished([_zero(), lines], 320)


def _state_colour() -> alt.Color:
    return alt.Color(
        "model:N",
        scale=alt.Scale(domain=list(STATES.values()), range=[OTHER, NEW]),
        legend=alt.Legend(title=None, orient="bottom"),
    )


def _zero() -> alt.Chart:
    return alt.Chart(pd.DataFrame({"zero": [0.0]})).mark_rule(color=INK, strokeWidth=1).encode(y="zero:Q")


def _finished(layered: list[Any], height: int) -> alt.LayerChart:
    return alt.layer(*layered).properties(height=height).configure_view(strokeWidth=0).configure(padding=PADDING)
