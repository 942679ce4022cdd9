"""Pictures of a review: pandas and altair only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import altair as alt
import pandas as pd

from pages.components.charts import INK, NEW, PADDING, SELECTED


def pair_table(counts: Mapping[tuple[str, str], int], order: Sequence[str]) -> pd.DataFrame:
    """Every pair of answers that either gave, with its cases: columns first, second, n, same. `order` sorts them."""
    given = {answer for pair in counts for answer in pair}
    answers = [answer for answer in order if answer in given]
    return pd.DataFrame(
        [(a, b, counts.get((a, b), 0), a == b) for a in answers for b in answers],
        columns=["first", "second", "n", "same"],
    )


def pairs(table: pd.DataFrame, first: str, second: str) -> alt.LayerChart:
    """Answers of two reviewers against each other: a square per pair, its number in it; equal answers are framed."""
    order = list(dict.fromkeys(table["first"]))
    x = alt.X(
        "second:N", sort=order, scale=alt.Scale(domain=order, paddingInner=0.06),
        axis=alt.Axis(title=f"{second} says", labelAngle=-35 if len(order) > 4 else 0, ticks=False, domain=False,
                      grid=False, labelLimit=110, titleLimit=260, labelPadding=6),
    )  # fmt: skip
    y = alt.Y(
        "first:N", sort=order, scale=alt.Scale(domain=order, paddingInner=0.06),
        axis=alt.Axis(title=f"{first} says", ticks=False, domain=False, grid=False, labelLimit=110, titleLimit=200,
                      labelPadding=6),
    )  # fmt: skip
    tooltip = [
        alt.Tooltip("first:N", title="First says"),
        alt.Tooltip("second:N", title="Second says"),
        alt.Tooltip("n:Q", title="Cases"),
    ]
    base = alt.Chart(table).encode(x=x, y=y, tooltip=tooltip)
    most = max(1, int(table["n"].max()))
    squares = base.mark_rect(color=NEW, cornerRadius=3).encode(
        opacity=alt.Opacity("n:Q", scale=alt.Scale(domain=[0, most], range=[0.03, 0.24]), legend=None)
    )
    frames = base.transform_filter(alt.datum.same).mark_rect(
        fillOpacity=0, stroke=SELECTED, strokeWidth=1.5, cornerRadius=3
    )
    numbers = base.mark_text(fontSize=14, fontWeight="bold", color=INK).encode(text="n:Q")
    return (
        alt.layer(squares, frames, numbers)
        .properties(height=44 * len(order) + (110 if len(order) > 4 else 64))
        .configure_view(strokeWidth=0)
        .configure(padding=PADDING)
    )
