"""What the pictures of a run need, made once per run: its tables, and the specification of each picture."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from mega_core.records import Report
from mega_core.summary import outcome, verdict
from pages.components import charts, tables


@st.cache_resource(max_entries=32, show_spinner=False)
def tables_of(digest: str, _report: Report) -> dict[str, pd.DataFrame]:
    """Every table the pictures draw, keyed by the run. Shared and not copied: nobody writes into them."""
    return {
        "cells": tables.module_cells(_report),
        "sums": tables.sum_check(_report),
        "edited": tables.edited_places(_report),
        "next": tables.next_tokens(_report),
        "evidence": tables.evidence(_report),
        "generations": tables.generations(_report),
    }


@st.cache_data(max_entries=128, show_spinner=False)
def headline_of(digest: str, _report: Report) -> tuple[str, str]:
    """How a run went (summary.Outcome.kind), and its verdict in words."""
    return outcome(_report).kind, verdict(_report)


@st.cache_data(max_entries=256, show_spinner=False)
def spec_of(
    digest: str, picture: str, candidate: str = "", place: tuple[int, str] | None = None, *, _report: Report
) -> dict[str, Any]:
    """The specification of one picture of a run. Kept, and not checked again: building one takes longer than drawing
    it.
    """
    data = tables_of(digest, _report)
    cells, edited = data["cells"], data["edited"]
    chart: alt.LayerChart
    if picture == "next":
        chart = charts.next_token_bars(data["next"])
    elif picture == "evidence":
        return evidence_spec(data["evidence"])
    elif picture == "profile":
        chart = charts.layer_profile(cells, edited, candidate=candidate)
    else:
        limit = tables.shared_limit(cells)
        chart = charts.module_map(cells, edited, candidate=candidate, limit=limit, selected=place)
    return chart.to_dict(validate=False)


def evidence_spec(evidence: pd.DataFrame) -> dict[str, Any]:
    """The specification of the margins of these prompts."""
    return charts.margin_dumbbell(evidence, axis_title=margin_words(evidence)).to_dict(validate=False)


def margin_words(evidence: pd.DataFrame) -> str:
    """What the margin of this run is, with its unit."""
    return "new − original, nats per token" if "p_true_after" in evidence else "new, nats per token"
