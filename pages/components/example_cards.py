"""The finished examples of the first page: what was changed, how it went, and a small picture of where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from mega_core.errors import ActionableError
from mega_core.records import EditRequest
from mega_core.service import Example
from pages.components import charts, readings, tables
from pages.components.report_view import outcome_badge
from pages.components.text import md


def draw(examples: Sequence[Example]) -> None:
    """One card for each example, side by side; their pictures share one colour scale."""
    for column, example in zip(st.columns(len(examples), gap="medium"), examples, strict=True):
        with column.container(border=True, height="stretch", key=f"card_{example.name}"):
            _card(example, tuple(examples))


def _card(example: Example, examples: tuple[Example, ...]) -> None:
    try:
        request, cells = _read(example.digest, example)
        limit = max(tables.shared_limit(_read(other.digest, other)[1]) for other in examples)
    except ActionableError:
        st.caption("This example can't be read; rebuild it with `python -m mega_core examples`.")
        return
    outcome_badge(example.outcome)
    st.subheader(md(example.title), anchor=False)
    original = f":gray[~~{md(request.target_true)}~~] → " if request.target_true else "→ "
    st.markdown(f"{md(request.prompt)} {original}**{md(request.target_new)}**")
    st.caption(md(example.sentence))
    st.space("stretch")
    if not cells.empty:
        candidate = "difference" if "difference" in set(cells["candidate"]) else "new"
        what = readings.explained(candidate, request)
        st.vega_lite_chart(
            spec=_strip(example.digest, candidate, limit, cells),
            width="stretch",
            key=f"strip_{example.name}",
            alt=f"Change of every module's push toward {what}. {readings.of_module_map(cells, candidate, request)[1]}",
        )
        st.caption(f"Blue modules push more toward {md(what)} than before the edit, orange ones less.")
    with st.container(key=f"open_{example.name}"):
        st.page_link(
            "pages/edit.py", label="Open", icon=":material/open_in_new:", query_params={"run": example.digest},
            width="stretch",
        )  # fmt: skip


@st.cache_data(max_entries=8, show_spinner=False)
def _read(digest: str, _example: Example) -> tuple[EditRequest, Any]:
    """The request of an example and its contributions (tables.module_cells)."""
    report = _example.report()
    return report.question.requests[0], tables.module_cells(report)


@st.cache_data(max_entries=8, show_spinner=False)
def _strip(digest: str, candidate: str, limit: float, _cells: Any) -> dict[str, Any]:
    return charts.change_strip(_cells, candidate=candidate, limit=limit).to_dict(validate=False)
