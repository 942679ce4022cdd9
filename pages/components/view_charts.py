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
TRACE_SITES = {"block_out": "the stream", "attn": "attention", "mlp": "MLP"}
FAINT = -16.0
PROMOTES, SUPPRESSES = "#4c78c9", "#d2772b"
WAYS = ("rises", "falls", "hardly moves")
PICK = "pick"
"""Name of the selection parameter of every picture here that can be clicked."""
_DASHES = alt.Scale(domain=list(STATES.values()), range=[[4, 4], [1, 0]])


def head_map(
    table: pd.DataFrame,
    value: str = "contribution",
    unit: str = "nats",
    *,
    limit: float | None = None,
    selected: tuple[int, int] | None = None,
) -> alt.LayerChart:
    """Layer x head heat-map of a signed number per head: a contribution, its change, or a change of attention mass.

    Clicking a cell selects its layer and head; `limit` is the colour limit that several states share.
    """
    shown = table[table["head"] >= 0].assign(here=lambda t: list(zip(t["layer"], t["head"], strict=True)))
    shown["here"] = shown["here"] == selected
    return _heat(
        shown, "layer:O", "head:O", value, unit, "Layer, input to output", "Head", limit=limit,
        picks=["layer", "head"],
    )  # fmt: skip


def mass_map(table: pd.DataFrame, *, selected: tuple[int, int] | None = None) -> alt.LayerChart:
    """Layer x head heat-map of attention mass, 0 to 1, in one hue. Clicking selects layer and head."""
    shown = table[table["head"] >= 0].assign(here=lambda t: list(zip(t["layer"], t["head"], strict=True)))
    shown["here"] = shown["here"] == selected
    return _heat(
        shown, "layer:O", "head:O", "mass", "share of attention", "Layer, input to output", "Head",
        picks=["layer", "head"], sequential=True,
    )  # fmt: skip


def dumbbells(
    table: pd.DataFrame,
    title: str,
    *,
    picks: list[str] | None = None,
    selected: int | None = None,
    signed: bool = True,
) -> alt.LayerChart:
    """Rows of `label` with a number before (hollow) and after (filled) the edit, in the table's order.

    Columns label, before, after, change; a missing state has no point. Blue rose, orange fell. `picks` are the columns
    a click selects; `selected` is the row with a mark. `signed`: with a zero line.
    """
    shown = table.reset_index(drop=True).assign(line=lambda t: t.index)
    least = 0.02 * float(shown["change"].abs().max() or 0.0)
    shown["way"] = [WAYS[2] if abs(c) <= least else WAYS[0] if c > 0 else WAYS[1] for c in shown["change"]]
    order = list(shown["label"])
    y = alt.Y(
        "label:N", sort=order,
        axis=_names_axis(190),
    )  # fmt: skip
    numbers = shown[["before", "after"]].to_numpy(dtype=float)
    ends = [value for value in numbers.ravel() if value == value] or [0.0]
    low, high = min(*ends, 0.0), max(*ends, 0.0)
    room = 0.05 * max(high - low, 1e-9)
    scale = alt.Scale(domain=[low - room if low < 0 else 0.0, high + room], nice=False)
    axis = alt.Axis(title=title, gridOpacity=0.35, tickCount=5, domain=False, ticks=False)
    colour = alt.Color(
        "way:N", scale=alt.Scale(domain=list(WAYS), range=[PROMOTES, SUPPRESSES, TRUE]),
        legend=alt.Legend(title="hollow: before, filled: after", orient="bottom", titleFontWeight="normal", columns=2),
    )  # fmt: skip
    tooltip = [
        alt.Tooltip("label:N", title="Which"),
        *(alt.Tooltip(f"{name}:Q", title=name.capitalize(), format="+.4f") for name in ("before", "after", "change")),
    ]
    base = alt.Chart(shown).encode(y=y, tooltip=tooltip)
    rule = base.transform_filter("isValid(datum.before) && isValid(datum.after)").mark_rule(
        strokeWidth=2.5, opacity=0.7
    )
    rule = rule.encode(x=alt.X("before:Q", scale=scale, axis=axis), x2="after:Q", color=colour)
    hollow = base.transform_filter("isValid(datum.before)").mark_point(filled=False, size=65, strokeWidth=1.6)
    hollow = hollow.encode(x=alt.X("before:Q", scale=scale, axis=axis), color=colour)
    full = base.transform_filter("isValid(datum.after)").mark_point(filled=True, size=85, opacity=1)
    full = full.encode(x=alt.X("after:Q", scale=scale, axis=axis), color=colour)
    layered: list[Any] = []
    if selected is not None and selected < len(shown):
        mark = alt.Chart(shown.iloc[[selected]]).mark_rect(color=SELECTED, opacity=0.16)
        layered.append(mark.encode(y=y))
    if signed:
        zero = pd.DataFrame({"before": [0.0]})
        layered.append(
            alt.Chart(zero).mark_rule(color=INK, strokeWidth=1).encode(x=alt.X("before:Q", scale=scale, axis=axis))
        )
    if picks:
        click = alt.selection_point(name=PICK, fields=picks, toggle=False, clear="dblclick")
        wide = base.mark_rect(opacity=0.001, cursor="pointer").encode(x=alt.value(0), x2=alt.value("width"))
        layered.append(wide.add_params(click))
    return _finished([*layered, rule, hollow, full], 24 * max(1, len(shown)) + 96)


def lens_lines(
    table: pd.DataFrame, crossing: pd.DataFrame | None = None, *, measure: str = "logprob"
) -> alt.LayerChart:
    """How likely each object would be if the stream ended there, through the layers, before and after.

    `measure`: logprob (what is less likely than e^FAINT is drawn at the bottom), or rank (1 on top, logarithmic). The
    rule marks where the new object overtakes the old one for good after the edit.
    """
    shown = table.assign(
        depth=table["layer"] + table["site"].map(SITE_STEPS),
        who=table["candidate"].map(CANDIDATES),
        model=table["state"].map(STATES),
    )
    x = _depth()
    if measure == "rank":
        y = alt.Y(
            "rank:Q", scale=alt.Scale(type="log", reverse=True, domain=[1, max(10, int(shown["rank"].max()))]),
            axis=alt.Axis(title="Rank of all tokens, 1 = first", gridOpacity=0.35, format=",d", tickCount=4),
        )  # fmt: skip
    else:
        y = alt.Y(
            "logprob:Q", scale=alt.Scale(domain=[max(FAINT, float(shown["logprob"].min())), 0], clamp=True),
            axis=alt.Axis(title="log p, nats", gridOpacity=0.35),
        )  # fmt: skip
    lines = (
        alt.Chart(shown)
        .mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=18))
        .encode(
            x=x,
            y=y,
            color=_candidate_colour(),
            strokeDash=_state_dash(),
            tooltip=[
                alt.Tooltip("depth:Q", title="Layers passed"), alt.Tooltip("who:N", title="Object"),
                alt.Tooltip("model:N", title="Edit"), alt.Tooltip("logprob:Q", title="log p, nats", format=".2f"),
                alt.Tooltip("prob:Q", title="Probability", format=".2%"),
                alt.Tooltip("rank:Q", title="Rank", format=","),
            ],
        )
    )  # fmt: skip
    return _finished([lines, *_crossing(crossing, x)], 340)


def lens_margin(table: pd.DataFrame, crossing: pd.DataFrame | None = None) -> alt.LayerChart:
    """log p(new) - log p(original) through the layers, before and after; above zero the new object leads.

    Columns depth, state, margin; what lies beyond -FAINT is drawn at the edge.
    """
    shown = table.assign(model=table["state"].map(STATES))
    x = _depth()
    edge = min(-FAINT, float(shown["margin"].abs().max()) * 1.05 + 1e-9)
    lines = (
        alt.Chart(shown)
        .mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=18), color=NEW)
        .encode(
            x=x,
            y=alt.Y(
                "margin:Q", scale=alt.Scale(domain=[-edge, edge], clamp=True),
                axis=alt.Axis(title="new − original, nats", gridOpacity=0.35),
            ),
            strokeDash=_state_dash(),
            tooltip=[
                alt.Tooltip("depth:Q", title="Layers passed"), alt.Tooltip("model:N", title="Edit"),
                alt.Tooltip("margin:Q", title="new − original, nats", format="+.2f"),
            ],
        )
    )  # fmt: skip
    return _finished([_zero(), lines, *_crossing(crossing, x)], 340)


def trace_map(table: pd.DataFrame, *, limit: float | None = None) -> alt.LayerChart:
    """Causal trace: how much of the candidate's probability one restored state brings back, by layer and token."""
    shown = table.assign(place=[place_label(p, t) for p, t in zip(table["position"], table["token"], strict=True)])
    order = list(dict.fromkeys(shown.sort_values("position")["place"]))
    return _heat(
        shown, "layer:O", "place:N", "effect", "p restored", "Layer, input to output", None, order, limit=limit
    )


def trace_profile(table: pd.DataFrame) -> alt.LayerChart:
    """The largest restored probability of each layer, a line for each kind of state. Columns layer, site, effect."""
    shown = table.assign(what=table["site"].map(TRACE_SITES))
    lines = (
        alt.Chart(shown)
        .mark_line(strokeWidth=2, point=True)
        .encode(
            x=alt.X("layer:O", axis=alt.Axis(title="Layer, input to output", labelAngle=0, grid=False)),
            y=alt.Y("effect:Q", axis=alt.Axis(title="p restored", gridOpacity=0.35)),
            color=alt.Color(
                "what:N",
                scale=alt.Scale(domain=list(TRACE_SITES.values()), range=[OTHER, ATTENTION, MLP]),
                legend=alt.Legend(title=None, orient="bottom"),
            ),
            tooltip=[
                alt.Tooltip("layer:O", title="Layer"), alt.Tooltip("what:N", title="Restored"),
                alt.Tooltip("effect:Q", title="p restored", format="+.3f"),
            ],
        )
    )  # fmt: skip
    return _finished([_zero(), lines], 300)


def drift_points(table: pd.DataFrame) -> alt.LayerChart:
    """A point for each prompt: change of the attention to its subject against the change of its margin.

    Columns prompt, kind_name, drift, margin_change, holds.
    """
    shown = table.assign(result=["✓ holds" if holds else "✗ broken" for holds in table["holds"]])
    kinds = ["Edit prompt", "Neighbour"]
    points = (
        alt.Chart(shown)
        .mark_point(size=110, filled=True, opacity=0.95)
        .encode(
            x=alt.X("drift:Q", axis=alt.Axis(title="Change of attention to the subject", format="+.1%", tickCount=4)),
            y=alt.Y(
                "margin_change:Q",
                axis=alt.Axis(title="Change of margin, nats", gridOpacity=0.35),
            ),
            color=alt.Color(
                "kind_name:N", scale=alt.Scale(domain=kinds, range=[SELECTED, "#4c78c9"]),
                legend=alt.Legend(title=None, orient="bottom"),
            ),
            shape=alt.Shape(
                "result:N", scale=alt.Scale(domain=["✓ holds", "✗ broken"], range=["circle", "cross"]),
                legend=None,
            ),
            tooltip=[
                alt.Tooltip("prompt:N", title="Prompt"), alt.Tooltip("kind_name:N", title="Kind"),
                alt.Tooltip("drift:Q", title="Attention to the subject", format="+.1%"),
                alt.Tooltip("margin_change:Q", title="Change of margin, nats", format="+.2f"),
                alt.Tooltip("result:N", title="Rule"),
            ],
        )
    )  # fmt: skip
    across = alt.Chart(pd.DataFrame({"drift": [0.0]})).mark_rule(color=INK, strokeDash=[3, 3]).encode(x="drift:Q")
    return _finished([_zero(), across, points], 320)


def token_bars(table: pd.DataFrame) -> alt.LayerChart:
    """The tokens that a neuron raises and lowers most: a bar of the logit for each. Columns label, logit."""
    return _bars(table, "label", "logit", "Change of the token's logit", list(table["label"]), [])


def effects(table: pd.DataFrame) -> alt.LayerChart:
    """Verified cells: predicted (diamond) against actual effect (filled circle), and the random controls (tick with
    one standard deviation). Columns label, predicted, actual, control, control_sd, has_prediction, controls, order.
    """
    shown = table.assign(low=table["control"] - table["control_sd"], high=table["control"] + table["control_sd"])
    parts = {"predicted": "predicted", "actual": "actual", "control": "mean of random cells"}
    long = shown.melt(["label", "has_prediction", "controls", "low", "high"], list(parts), "which", "effect")
    long = long[
        ((long["which"] != "predicted") | long["has_prediction"])
        & ((long["which"] != "control") | (long["controls"] > 0))
    ]
    long["which"] = long["which"].map(parts)
    y = alt.Y(
        "label:N", sort=list(shown["label"]),
        axis=_names_axis(230),
    )  # fmt: skip
    axis = alt.Axis(title="Effect on log p, nats", gridOpacity=0.35, tickCount=5)
    names = list(parts.values())
    points = (
        alt.Chart(long)
        .mark_point(size=95, filled=True, opacity=0.95)
        .encode(
            y=y,
            x=alt.X("effect:Q", axis=axis),
            color=alt.Color(
                "which:N", scale=alt.Scale(domain=names, range=["#4c78c9", SELECTED, OTHER]),
                legend=alt.Legend(title=None, orient="bottom", columns=2),
            ),
            shape=alt.Shape(
                "which:N", scale=alt.Scale(domain=names, range=["diamond", "circle", "triangle-up"]),
                legend=alt.Legend(title=None, orient="bottom", columns=2),
            ),
            tooltip=[
                alt.Tooltip("label:N", title="Changed"), alt.Tooltip("which:N", title="Which"),
                alt.Tooltip("effect:Q", title="Effect, nats", format="+.3f"),
                alt.Tooltip("controls:Q", title="Random cells"),
            ],
        )
    )  # fmt: skip
    bar = alt.Chart(shown[shown["controls"] > 1]).mark_rule(color=OTHER, strokeWidth=3, opacity=0.6)
    zero = alt.Chart(pd.DataFrame({"effect": [0.0]})).mark_rule(color=INK, strokeWidth=1)
    return _finished(
        [zero.encode(x=alt.X("effect:Q", axis=axis)), bar.encode(y=y, x="low:Q", x2="high:Q"), points],
        36 * max(1, len(shown)) + 140,
    )


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
            strokeDash=_state_dash(),
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


def _names_axis(limit: int) -> alt.Axis:
    return alt.Axis(
        title=None, ticks=False, domain=False, labelLimit=limit, labelOverlap=False, labelFlush=False, labelPadding=8
    )


def _depth() -> alt.X:
    return alt.X("depth:Q", axis=alt.Axis(title="Layers passed", grid=False, tickMinStep=1))


def _state_dash() -> alt.StrokeDash:
    legend = alt.Legend(
        title=None, orient="bottom", symbolType="stroke", symbolStrokeWidth=2, symbolSize=300, symbolStrokeColor=INK
    )
    return alt.StrokeDash("model:N", scale=_DASHES, legend=legend)


def _crossing(crossing: pd.DataFrame | None, x: alt.X) -> list[alt.Chart]:
    """The rule at which the new object has overtaken the old one for good after the edit, with a word beside it."""
    if crossing is None:
        return []
    met = crossing[(crossing["state"] == "after") & (crossing["lasting_layer"] >= 0)]
    if met.empty:
        return []
    marks = met.assign(depth=met["lasting_layer"] + met["lasting_site"].map(SITE_STEPS), word="overtakes")
    word = alt.Chart(marks).mark_text(align="right", dx=-5, dy=-6, baseline="bottom", color=SELECTED, fontSize=11)
    foot = alt.value("height")
    return [
        alt.Chart(marks).mark_rule(color=SELECTED, strokeWidth=1.5).encode(x=x),
        word.encode(x=x, y=foot, text="word:N"),
    ]


def _heat(
    table: pd.DataFrame, x: str, y: str, value: str, unit: str, x_title: str, y_title: str | None,
    order: list[str] | None = None, *, limit: float | None = None, picks: list[str] | None = None,
    sequential: bool = False,
) -> alt.LayerChart:  # fmt: skip
    """`limit` is the colour limit, else the largest value; rows whose column `here` is true get a ring."""
    if limit is None:
        limit = max(float(table[value].abs().max()), 1e-9) if len(table) else 1.0
    rows = table[y.split(":")[0]].nunique()
    legend = alt.Legend(
        title=unit if sequential else f"less  ←  {unit}  →  more",
        orient="bottom",
        direction="horizontal",
        gradientLength=190,
        gradientThickness=10,
        format=".0%" if sequential else "+.2f",
        titleLimit=230,
        titleFontWeight="normal",
        values=[0, 0.5, 1] if sequential else [-limit, 0, limit],
    )
    scale = (
        alt.Scale(domain=[0, 1], range="heatmap", interpolate="rgb", clamp=True)
        if sequential
        else alt.Scale(domain=[-limit, limit], range="diverging", interpolate="rgb", clamp=True)
    )
    across = alt.X(x, axis=alt.Axis(title=x_title, labelAngle=0, ticks=False, domain=False, grid=False))
    down = alt.Y(
        y,
        sort=order,
        axis=alt.Axis(
            title=y_title, ticks=False, domain=False, grid=False, labelLimit=150, labelOverlap=False, labelFlush=False
        ),
    )
    names = {"layer": "Layer", "head": "Head", "place": "Token", "token": "Token"}
    cells = (
        alt.Chart(table)
        .mark_rect(
            cornerRadius=2, stroke=INK, strokeOpacity=0.35, strokeWidth=0.5, cursor="pointer" if picks else "default"
        )
        .encode(
            x=across,
            y=down,
            color=alt.Color(f"{value}:Q", scale=scale, legend=legend),
            tooltip=[
                *(alt.Tooltip(name, title=names.get(name.split(":")[0], name)) for name in (x, y)),
                alt.Tooltip(f"{value}:Q", title=unit.capitalize(), format=".1%" if sequential else "+.4f"),
            ],
        )
    )
    layered: list[Any] = [cells]
    if picks:
        layered = [cells.add_params(alt.selection_point(name=PICK, fields=picks, toggle=False, clear="dblclick"))]
    if "here" in table and table["here"].any():
        ring = alt.Chart(table[table["here"]]).mark_rect(
            fillOpacity=0, stroke=SELECTED, strokeWidth=2.5, cornerRadius=2
        )
        layered.append(ring.encode(x=across, y=down))
    return _finished(layered, 26 * rows + 150)


def _bars(table: pd.DataFrame, place: str, value: str, title: str, order: list[str], more: list[str]) -> alt.LayerChart:
    bars = (
        alt.Chart(table)
        .mark_bar()
        .encode(
            y=alt.Y(
                f"{place}:N",
                sort=order,
                axis=alt.Axis(
                    title=None, ticks=False, domain=False, labelLimit=220, labelOverlap=False, labelFlush=False
                ),
            ),
            x=alt.X(f"{value}:Q", axis=alt.Axis(title=title, gridOpacity=0.35)),
            color=alt.condition(alt.datum[value] >= 0, alt.value(PROMOTES), alt.value(SUPPRESSES)),
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


def place_label(position: int, token: str) -> str:
    """A source token with its position: "3 ·Tower"."""
    return "text in front" if position < 0 else f"{position} {token_label(token)}"


def _finished(layered: list[Any], height: int) -> alt.LayerChart:
    return alt.layer(*layered).properties(height=height).configure_view(strokeWidth=0).configure(padding=PADDING)
