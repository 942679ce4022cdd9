"""Pictures of a benchmark: one metric of one protocol at a time. The colours and rules are those of charts.py.

Teal is a method that edits, hollow grey the unedited model, the ring the method whose answers are open.
"""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from pages.components.charts import INK, NEW, PADDING, SELECTED, TRUE

PICK = "pick"
"""Name of the selection parameter of `dots`: its rows carry `method`."""
UNEDITED = "unedited"
LABELLED = 8
_WITHIN = "datum.value > 1.0001 || datum.value < -0.0001 ? '' : datum.label"
"""Shares have room beside them, but no such values."""


def _format(unit: str) -> str:
    return ".0%" if unit == "share" else ".3~g"


def _axis(title: str, form: str, count: int = 5, **more: Any) -> alt.Axis:
    if form == ".0%":
        more |= {"values": [0, 0.2, 0.4, 0.6, 0.8, 1], "labelOverlap": False}
    return alt.Axis(
        title=title, format=form, tickCount=count, domain=False, ticks=False, gridOpacity=0.35, titleLimit=320, **more
    )


def _scale(unit: str) -> alt.Scale:
    return alt.Scale(domain=[-0.02, 1.03], nice=False) if unit == "share" else alt.Scale(zero=False)


def _tooltip(unit: str, *first: alt.Tooltip) -> list[alt.Tooltip]:
    form = ".1%" if unit == "share" else ".4~g"
    return [
        *first,
        alt.Tooltip("value:Q", title="Value", format=form),
        alt.Tooltip("ci_low:Q", title="95 % interval from", format=form),
        alt.Tooltip("ci_high:Q", title="to", format=form),
        alt.Tooltip("n:Q", title="Cases", format="d"),
    ]


def ordered(scores: pd.DataFrame, better: str) -> pd.DataFrame:
    """Rows of one metric, the best first, the unedited model last."""
    rows = scores.assign(base=scores["method"] == UNEDITED)
    return rows.sort_values(["base", "value"], ascending=[True, better == "lower"], kind="stable")


def dots(scores: pd.DataFrame, *, unit: str, better: str, title: str, chosen: str = "") -> alt.LayerChart:
    """A dot with its 95 % interval per method, the best on top. Clicking a dot selects its method.

    `scores`: method, value, n, ci_low, ci_high of one metric.
    """
    rows = ordered(scores, better)
    names = [str(name) for name in rows["method"]]
    y = alt.Y(
        "method:N", sort=names, axis=alt.Axis(title=None, domain=False, ticks=False, labelLimit=150, labelPadding=6)
    )
    tooltip = _tooltip(unit, alt.Tooltip("method:N", title="Method"))
    arrow = "more is better" if better == "higher" else "less is better"
    scale, axis = _scale(unit), _axis(f"{title} ({arrow})", _format(unit))
    x = alt.X("value:Q", scale=scale, axis=axis)
    base = alt.Chart(rows).encode(y=y, tooltip=tooltip)
    picked = alt.selection_point(name=PICK, fields=["method"], toggle=False, clear="dblclick")
    line = base.mark_rule(strokeWidth=2.5, opacity=0.65).encode(
        x=alt.X("ci_low:Q", scale=scale, axis=axis),
        x2="ci_high:Q",
        color=alt.condition("datum.base", alt.value(TRUE), alt.value(NEW)),
    )
    full = (
        base.transform_filter("!datum.base")
        .mark_point(filled=True, size=110, opacity=1, color=NEW, cursor="pointer")
        .encode(x=x)
        .add_params(picked)
    )
    hollow = (
        base.transform_filter("datum.base").mark_point(filled=False, size=95, strokeWidth=2, color=TRUE).encode(x=x)
    )
    layers: list[alt.Chart] = [line, hollow, full]
    if chosen in names:
        ring = alt.Chart(rows[rows["method"] == chosen][["method", "value"]])
        layers.append(ring.mark_point(filled=False, size=330, strokeWidth=2.5, color=SELECTED).encode(x=x, y=y))
    return (
        alt.layer(*layers)
        .properties(height=26 * len(names) + 74)
        .configure_view(strokeWidth=0)
        .configure(padding=PADDING)
    )


def against_time(rows: pd.DataFrame, *, unit: str, better: str, title: str, chosen: str = "") -> alt.LayerChart:
    """The metric over the seconds that an edit takes (logarithmic); those that nothing is both better and quicker than
    carry their names.

    `rows`: method, value, n, ci_low, ci_high, seconds.
    """
    sign = 1 if better == "higher" else -1
    best, front = float("-inf"), set()
    for row in rows.sort_values(["seconds", "value"], ascending=[True, better == "lower"]).itertuples():
        if sign * float(row.value) > best:
            best = sign * float(row.value)
            front.add(str(row.method))
    shown = rows.assign(
        label=[str(name) if len(rows) <= LABELLED or name in front or name == chosen else "" for name in rows["method"]]
    )
    x = alt.X(
        "seconds:Q",
        scale=alt.Scale(type="log", nice=True),
        axis=_axis("Seconds an edit takes, median (log)", "~g", 4),
    )
    low, high = float(rows["value"].min()), float(rows["value"].max())
    room = max(0.12 * (high - low), 0.02 * max(abs(low), abs(high), 0.5))
    y = alt.Y(
        "value:Q",
        scale=alt.Scale(domain=[low - room, high + room], nice=False, zero=False),
        axis=_axis(title, ".1~%", labelExpr=_WITHIN) if unit == "share" else _axis(title, _format(unit)),
    )
    tooltip = _tooltip(
        unit, alt.Tooltip("method:N", title="Method"), alt.Tooltip("seconds:Q", title="Seconds an edit", format=".3~g")
    )
    base = alt.Chart(shown).encode(x=x, y=y, tooltip=tooltip)
    points = base.mark_point(filled=True, size=80, opacity=0.9, color=NEW)
    layers: list[alt.Chart] = [points, base.mark_text(dy=-11, fontSize=11, color=INK).encode(text="label:N")]
    if chosen in set(rows["method"]):
        ring = alt.Chart(shown[shown["method"] == chosen]).encode(x=x, y=y)
        layers.append(ring.mark_point(filled=False, size=260, strokeWidth=2.5, color=SELECTED))
    return alt.layer(*layers).properties(height=300).configure_view(strokeWidth=0).configure(padding=PADDING)


def retention(rows: pd.DataFrame, *, unit: str, title: str, chosen: str) -> alt.LayerChart:
    """The metric at each checkpoint of a sequence: the chosen method with its 95 % band, the others in grey;
    it, the highest and the lowest carry their names at the end.

    `rows`: method, step, value, n, ci_low, ci_high of one metric.
    """
    x = alt.X(
        "step:Q",
        scale=alt.Scale(nice=False, zero=False),
        axis=_axis("Edits made so far", "d", tickMinStep=1),
    )
    y = alt.Y("value:Q", scale=_scale(unit), axis=_axis(title, _format(unit)))
    tooltip = _tooltip(unit, alt.Tooltip("method:N", title="Method"), alt.Tooltip("step:Q", title="Edits so far"))
    others, own = rows[rows["method"] != chosen], rows[rows["method"] == chosen]
    grey = alt.Chart(others).encode(x=x, y=y, detail="method:N", tooltip=tooltip)
    teal = alt.Chart(own).encode(x=x, y=y, tooltip=tooltip)
    last = rows[rows["step"] == rows.groupby("method")["step"].transform("max")]
    ends = {chosen, *last.sort_values("value")["method"].iloc[[0, -1]]}
    few = last[last["method"].isin(ends)]
    names = alt.Chart(few).encode(x=x, y=y, text="method:N")
    return (
        alt.layer(
            grey.mark_line(strokeWidth=1.5, color=TRUE, opacity=0.45),
            grey.mark_point(filled=True, size=30, color=TRUE, opacity=0.45),
            teal.mark_area(opacity=0.16, color=NEW).encode(y=alt.Y("ci_low:Q", scale=_scale(unit)), y2="ci_high:Q"),
            teal.mark_line(strokeWidth=2.5, color=NEW),
            teal.mark_point(filled=True, size=60, color=NEW, opacity=1),
            names.mark_text(align="right", dy=-9, dx=2, fontSize=11, color=INK),
        )
        .properties(height=320)
        .configure_view(strokeWidth=0)
        .configure(padding=PADDING)
    )
