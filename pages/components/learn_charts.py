"""Pictures that only the teaching steps draw. Colours and rules as in charts.py."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from pages.components.charts import INK, NEW, OTHER, PADDING, ROLE_NAMES, TRUE

LEAST = 1e-6


def base_bars(table: pd.DataFrame) -> alt.LayerChart:
    """Probability of the likeliest next tokens in the unedited model; columns token, role, prob, percent."""
    shown = table.assign(
        label=[token.strip() or "(blank)" for token in table["token"]], role_name=table["role"].map(ROLE_NAMES)
    )
    roles = [name for role, name in ROLE_NAMES.items() if role in set(shown["role"])]
    base = alt.Chart(shown).encode(
        y=alt.Y("label:N", sort=list(shown["label"]), axis=alt.Axis(title=None, ticks=False, domain=False)),
        x=alt.X(
            "prob:Q",
            scale=alt.Scale(domain=[0, max(1.16 * float(shown["prob"].max()), 0.01)], nice=False),
            axis=alt.Axis(
                title="Probability of coming next", format=".0%", tickCount=5, domain=False, gridOpacity=0.35
            ),
        ),
        tooltip=[
            alt.Tooltip("label:N", title="Token"),
            alt.Tooltip("prob:Q", title="Probability", format=".4%"),
            alt.Tooltip("role_name:N", title="Is"),
        ],
    )
    bars = base.mark_bar(cornerRadiusEnd=2).encode(
        color=alt.Color(
            "role_name:N",
            scale=alt.Scale(domain=list(ROLE_NAMES.values()), range=[NEW, TRUE, OTHER]),
            legend=alt.Legend(title=None, orient="bottom", values=roles, symbolType="square"),
        )
    )
    text = base.mark_text(align="left", dx=5, fontSize=12, color=INK).encode(text="percent:N")
    return _finished([bars, text], 32 * max(1, len(shown)) + 100)


def odds_points(table: pd.DataFrame) -> alt.LayerChart:
    """Probability of both objects on a scale of powers of ten; columns object, role, prob, percent."""
    shown = table.assign(at=table["prob"].clip(lower=LEAST), role_name=table["role"].map(ROLE_NAMES))
    base = alt.Chart(shown).encode(
        y=alt.Y("object:N", sort=list(shown["object"]), axis=alt.Axis(title=None, ticks=False, domain=False)),
        x=alt.X(
            "at:Q",
            scale=alt.Scale(type="log", domain=[LEAST, 1]),
            axis=alt.Axis(
                title="Probability, each line ten times the one before", format=".0e", gridOpacity=0.35,
                values=[10.0**-power for power in range(6, -1, -1)],
                labelExpr="datum.value >= 0.01 ? format(datum.value, '.0%') : format(datum.value * 100, '~g') + '%'",
            ),
        ),
        tooltip=[
            alt.Tooltip("object:N", title="Object"),
            alt.Tooltip("role_name:N", title="Is"),
            alt.Tooltip("prob:Q", title="Probability", format=".5%"),
        ],
    )  # fmt: skip
    points = base.mark_point(filled=True, size=190, opacity=1).encode(
        color=alt.Color(
            "role_name:N",
            scale=alt.Scale(domain=list(ROLE_NAMES.values())[:2], range=[NEW, TRUE]),
            legend=alt.Legend(title=None, orient="bottom"),
        )
    )
    text = base.mark_text(dy=-15, fontSize=12, color=INK).encode(text="percent:N")
    return _finished([points, text], 60 * max(1, len(shown)) + 90)


def _finished(layered: list[Any], height: int) -> alt.LayerChart:
    return alt.layer(*layered).properties(height=height).configure_view(strokeWidth=0).configure(padding=PADDING)
