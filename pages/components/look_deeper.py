"""Beneath layers and modules: heads, neurons, lens, trace and the other views of a finished run, each a picture with
its table; and the form that asks for those it hasn't got yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import altair as alt
import pandas as pd
import streamlit as st

from mega_core.errors import ActionableError
from mega_core.records import Report
from pages.components import view_charts
from pages.components.session import service, start, tell, told
from pages.components.text import MODULES, csv_bytes, md, signed, token_label

CANDIDATE = "new"


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture of a view."""

    frame: str
    title: str
    caption: str
    draw: Callable[[pd.DataFrame, Report], alt.LayerChart]


def _changed(frame: pd.DataFrame, keys: list[str], value: str) -> pd.DataFrame:
    mine = frame[frame["candidate"] == CANDIDATE] if "candidate" in frame else frame
    return view_charts.change(mine, keys, value)


def _after(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[(frame["state"] == "after") & (frame["candidate"] == CANDIDATE)]


def _heads(frame: pd.DataFrame, report: Report) -> alt.LayerChart:
    return view_charts.head_map(_changed(frame, ["layer", "head"], "contribution"))


def _sources(frame: pd.DataFrame, report: Report) -> alt.LayerChart:
    mine = _after(frame)
    total = mine.groupby(["layer", "head"])["contribution"].sum()
    layer, head = total.idxmax()
    return view_charts.source_bars(mine[(mine["layer"] == layer) & (mine["head"] == head)])


def _neurons(frame: pd.DataFrame, report: Report) -> alt.LayerChart:
    words = report.frames.get("neuron_tokens")
    if words is not None:
        words = words[(words["state"] == "after") & (words["kind"] == "ffn") & (words["case"] == 0)]
    return view_charts.neuron_bars(_after(frame), words)


def _attention_neurons(frame: pd.DataFrame, report: Report) -> alt.LayerChart:
    mine = _after(frame)
    labels = [f"{row.head}.{row.dim} from {token_label(str(row.token))}" for row in mine.itertuples()]
    return view_charts.neuron_bars(mine.assign(neuron=labels), letter="H")


def _queries(frame: pd.DataFrame, report: Report) -> alt.LayerChart:
    mine = _after(frame)
    return view_charts.query_bars(mine[mine["values"] == "ffn"])


def _lens(frame: pd.DataFrame, report: Report) -> alt.LayerChart:
    last = frame[frame["position"] == frame["position"].max()]
    crossing = report.frames.get("lens_crossing")
    return view_charts.lens_lines(last, None if crossing is None else crossing[crossing["case"] == 0])


def _residual(frame: pd.DataFrame, report: Report) -> alt.LayerChart:
    return view_charts.residual_lines(frame[frame["candidate"] == CANDIDATE])


def _attention(frame: pd.DataFrame, report: Report) -> alt.LayerChart:
    mine = frame[(frame["prompt_kind"] == "edit") & (frame["segment"] == "subject")]
    return view_charts.head_map(_changed(mine, ["layer", "head"], "mass"), "mass", "attention")


def _trace(frame: pd.DataFrame, report: Report) -> alt.LayerChart:
    mine = _after(frame)
    return view_charts.trace_map(mine[mine["site"] == "block_out"])


def _stress(frame: pd.DataFrame, report: Report) -> alt.LayerChart:
    return view_charts.stress_bars(frame[frame["state"] == "after"])


def _spectrum(frame: pd.DataFrame, report: Report) -> alt.LayerChart:
    first = frame.sort_values(["layer", "site"]).iloc[0]
    return view_charts.spectrum_points(frame[(frame["layer"] == first["layer"]) & (frame["site"] == first["site"])])


PANELS = (
    Panel(
        "head_scores", "Heads that changed", "Change of each head's contribution to the new object, in nats.", _heads
    ),
    Panel(
        "head_sources",
        "What the strongest head reads",
        "Contribution to the new object after the edit, by the token that the head with the largest one reads from.",
        _sources,
    ),
    Panel(
        "neuron_scores",
        "MLP neurons",
        "The neurons that promote or suppress the new object most after the edit, exact scores in nats. They overlap, "
        "so they don't add up to the layer's contribution.",
        _neurons,
    ),
    Panel(
        "attention_neurons",
        "Attention neurons",
        "Single numbers of a head at one source token (head.number from token), as above.",
        _attention_neurons,
    ),
    Panel(
        "query_layers",
        "What switches the neurons on",
        "How much of the promoting MLP neurons' input each module wrote, weighted by their scores, after the edit.",
        _queries,
    ),
    Panel(
        "lens",
        "Through the layers",
        "Log-probability of both objects if the stream at the last token ended at that layer. Reading middle layers so "
        "is approximate. The vertical line: where the new object overtakes the original one.",
        _lens,
    ),
    Panel("residual", "Direct writes", "Dot product of each module's output with the new object's row.", _residual),
    Panel(
        "attention",
        "Attention to the subject",
        "Change of the attention that the last token gives to the subject, per head.",
        _attention,
    ),
    Panel(
        "trace",
        "Causal trace",
        "How much of the new object's probability comes back when one state of the corrupted run is restored.",
        _trace,
    ),
    Panel(
        "stress",
        "Under pressure",
        "Probabilities after prefixes that suggest the original object: an edit that gives way is superficial.",
        _stress,
    ),
    Panel("weight_spectrum", "The change itself", "Singular values of the first edited matrix's change.", _spectrum),
)


def draw(report: Report) -> None:
    """The views of this run, and a form for the others."""
    present = [panel for panel in PANELS if not _table(report, panel).empty]
    st.header("Look deeper", anchor=False)
    _ask(report)
    for panel in present:
        _panel(panel, report)
    _contrast(report.question.model.name)


@st.fragment
@told
def _panel(panel: Panel, report: Report) -> None:
    table = _table(report, panel)
    with st.expander(panel.title, icon=":material/insights:"):
        spec = panel.draw(table, report).to_dict(validate=False)
        st.vega_lite_chart(
            spec=spec,
            width="stretch",
            key=f"deep_{panel.frame}_{report.digest[:8]}",
            alt=f"{panel.title}. {panel.caption}",
        )
        st.caption(panel.caption)
        st.dataframe(table.head(200), hide_index=True, key=f"deep_table_{panel.frame}", alt=f"{panel.title} as a table")
        st.download_button(
            "All rows as CSV",
            data=lambda: csv_bytes(table),
            file_name=f"{panel.frame}-{report.digest[:12]}.csv",
            mime="text/csv",
            icon=":material/table:",
            on_click="ignore",
            key=f"deep_csv_{panel.frame}",
        )


HOLDS = {"yes": ":material/check_circle: holds", "no": ":material/cancel: does not hold", "unclear": "unclear"}


@st.fragment
@told
def _contrast(model: str) -> None:
    """What many edits of this model have in common: curves by editor, and whether the published pattern holds."""
    found = service().studies.measured(model)
    if found is None:
        return
    region = found.region
    with st.expander("Success against failure: many edits of this model", icon=":material/insights:"):
        st.markdown(f"**{md(found.verdict)}**")
        st.caption(
            f"{region.edits} edits, each by {md(', '.join(region.methods))}. The pattern is that of MEGA's paper: late "
            "attention promotes the new object, attention and MLPs suppress the original one. Curves: change of the "
            "contribution over edits that worked, with 95 % intervals. This is a small teaching model; nothing here is "
            "evidence about pretrained ones."
        )
        module = st.segmented_control(
            "Module",
            ["attn", "ffn"],
            default="attn",
            format_func=lambda m: MODULES[m],
            key="contrast_module",
            required=True,
        )
        candidate = st.segmented_control(
            "Object",
            ["new", "true"],
            default="new",
            format_func=lambda c: view_charts.CANDIDATES[c],
            key="contrast_candidate",
            required=True,
        )
        table = found.curves
        shown = table[
            (table["statistic"] == "D") & (table["module"] == module) & (table["candidate"] == candidate)
        ].reset_index(drop=True)
        st.vega_lite_chart(
            spec=view_charts.contrast_bands(shown).to_dict(validate=False),
            width="stretch",
            key=f"contrast_chart_{module}_{candidate}",
            alt="Change of the contribution by layer, a line and interval for each editor. A table has the numbers.",
        )
        layers = ", ".join(map(str, region.layers))
        st.markdown(f"Layers with most leverage, where MEGA can steer: **{md(layers)}**")
        for editor, claims in found.claims.items():
            for claim in claims:
                st.caption(
                    f"{md(editor)}: {md(claim.text)}: {HOLDS.get(claim.holds, md(claim.holds))} "
                    f"({signed(claim.value)} nats, {signed(claim.low)} to {signed(claim.high)})"
                )
        st.dataframe(table, hide_index=True, key="contrast_table", alt="All curves as a table")


def _ask(report: Report) -> None:
    """Choose views that the run hasn't got and ask the same question with them."""
    views = {view.name: view for view in service().views()}
    has = {text.partition("?")[0] for text in report.question.views}
    left = [name for name in views if name not in has]
    if not left:
        return
    chosen = st.pills(
        "Also measure",
        left,
        selection_mode="multi",
        format_func=lambda name: views[name].title,
        key=f"deep_views_{report.digest[:8]}",
        help="The same edit is made again and looked at in these ways too.",
    )
    for name in chosen:
        st.caption(f"**{md(views[name].title)}**: {md(views[name].summary)}")
    if st.button("Look", icon=":material/troubleshoot:", disabled=not chosen, key="deep_look"):
        try:
            start(replace(report.question, views=(*report.question.views, *chosen)))
        except ActionableError as error:
            tell(error)
            return
        st.rerun()


def _table(report: Report, panel: Panel) -> pd.DataFrame:
    frame = report.frames.get(panel.frame)
    if frame is None:
        return pd.DataFrame()
    return frame[frame["case"] == 0].drop(columns="case") if "case" in frame else frame
