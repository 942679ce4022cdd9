"""Charts of the edit page that no other page draws: frame -> Altair chart. See charts.py for what all charts share."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from pages.components.charts import ATTENTION, INK, MLP, NEW, PADDING, SELECTED, TRUE

SERIES = {
    "p_new": ("P(new object)", NEW, "circle", [1, 0]),
    "p_true": ("P(original object)", TRUE, "square", [1, 0]),
    "paraphrases": ("Paraphrases say it", ATTENTION, "triangle-up", [6, 3]),
    "neighbours": ("Neighbours kept", MLP, "diamond", [6, 3]),
}
"""Column of the curve -> name, colour, shape of its points, dashes of its line: none is told by colour alone."""


def strength_curve(curve: pd.DataFrame, *, own: float, now: float) -> alt.LayerChart:
    """Probabilities after the edit prompt and shares of the other prompts that hold, by strength.

    The dashed rule is the run's own strength, the full one the strength that is looked at.
    """
    long = curve.melt("alpha", value_vars=[name for name in SERIES if name in curve], var_name="what").dropna()
    long["series"] = [SERIES[name][0] for name in long["what"]]
    present = [name for name in SERIES if name in set(long["what"])]
    names = [SERIES[name][0] for name in present]
    highest = float(curve["alpha"].max())
    x = alt.X(
        "alpha:Q",
        scale=alt.Scale(domain=[0, highest], nice=False),
        axis=alt.Axis(title="Strength α", tickCount=7, domain=False, ticks=False, gridOpacity=0.35),
    )
    y = alt.Y(
        "value:Q",
        scale=alt.Scale(domain=[0, 1.02], nice=False),
        axis=alt.Axis(
            title="Probability, or share of prompts", format=".0%", tickCount=5, domain=False, ticks=False,
            gridOpacity=0.35,
        ),
    )  # fmt: skip
    legend = alt.Legend(title=None, orient="bottom", columns=2, symbolSize=70)
    color = alt.Color(
        "series:N", scale=alt.Scale(domain=names, range=[SERIES[name][1] for name in present]), legend=legend
    )
    tooltip = [
        alt.Tooltip("series:N", title="What"),
        alt.Tooltip("alpha:Q", title="Strength", format=".2f"),
        alt.Tooltip("value:Q", title="Value", format=".1%"),
    ]
    base = alt.Chart(long).encode(x=x, y=y, color=color)
    lines = base.mark_line(strokeWidth=2).encode(
        strokeDash=alt.StrokeDash(
            "series:N", scale=alt.Scale(domain=names, range=[SERIES[name][3] for name in present]), legend=legend
        )
    )
    points = base.mark_point(filled=True, size=55, opacity=1).encode(
        shape=alt.Shape(
            "series:N", scale=alt.Scale(domain=names, range=[SERIES[name][2] for name in present]), legend=legend
        ),
        tooltip=tooltip,
    )
    layered: list[Any] = [_rule(own, INK, [4, 4], "The run's own strength"), lines, points]
    layered.insert(1, _rule(now, SELECTED, [1, 0], "Looked at"))
    return alt.layer(*layered).properties(height=320).configure_view(strokeWidth=0).configure(padding=PADDING)


def _rule(alpha: float, color: str, dash: list[int], what: str) -> alt.Chart:
    return (
        alt.Chart(pd.DataFrame({"alpha": [alpha], "what": [what]}))
        .mark_rule(color=color, strokeDash=dash, strokeWidth=2)
        .encode(
            x="alpha:Q",
            tooltip=[alt.Tooltip("what:N", title="Rule"), alt.Tooltip("alpha:Q", title="Strength", format=".2f")],
        )
    )
