"""One picture as every page shows it: heading, explanation, chart, reading, and its numbers and files.

The chart itself is Streamlit's: full screen and a quick PNG are in its toolbar. Under it stands one sentence made from
the numbers. "Table and files" opens the same numbers as a table, for keyboards and screen readers, and offers CSV, PNG
and SVG; nothing of it is computed before it is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from pages.components import pictures
from pages.components.session import told
from pages.components.text import csv_bytes, md

ROWS_SHOWN = 500


@dataclass(frozen=True, slots=True)
class About:
    """What the (i) beside a heading says."""

    what: str
    """What is shown, with its unit."""
    how: str
    """The formula or protocol, with its source."""
    limits: str
    """What it does not show."""


def heading(title: str, about: About | None = None, *, level: int = 2) -> None:
    """A heading with its explanation behind an (i). Plain text: it is escaped here."""
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
        (st.header if level == 2 else st.subheader)(md(title), anchor=False, width="content")
        if about is not None:
            with st.popover("", icon=":material/info:", type="tertiary", help=f"About: {md(title)}"):
                st.markdown(
                    f"**What it shows.** {md(about.what)}\n\n**How it is computed.** {md(about.how)}\n\n"
                    f"**Limits.** {md(about.limits)}"
                )


def figure(
    key: str,
    chart: alt.TopLevelMixin | Mapping[str, Any],
    *,
    title: str,
    reading: str,
    table: pd.DataFrame,
    file: str,
    about: About | None = None,
    columns: Mapping[str, Any] | None = None,
    level: int = 2,
    on_select: Callable[[], None] | None = None,
    selection: str | None = None,
) -> None:
    """Draw one picture with everything that belongs to it.

    `reading` is one plain sentence made from the numbers; it stands under the chart and is what a screen reader says.
    `table` holds the numbers behind it, `file` the stem of its downloads. With `on_select` a click on a mark calls back
    (read the event from st.session_state[key]); `selection` names the chart's selection parameter.
    """
    heading(title, about, level=level)
    spec = dict(chart) if isinstance(chart, Mapping) else chart.to_dict(validate=False)
    if on_select is None:
        st.vega_lite_chart(spec=spec, width="stretch", key=key, alt=f"{title}. {reading}")
    else:
        st.vega_lite_chart(
            spec=spec, width="stretch", key=key, alt=f"{title}. {reading}", on_select=on_select,
            selection_mode=selection,
        )  # fmt: skip
    if reading:
        st.caption(md(reading))
    _files(key, spec, title, table, file, dict(columns or {}))


@st.fragment
@told
def _files(
    key: str, spec: Mapping[str, Any], title: str, table: pd.DataFrame, file: str, columns: Mapping[str, Any]
) -> None:
    opened = st.expander("Table and files", icon=":material/table_rows:", key=f"{key}_files", on_change="rerun")
    if not opened.open:
        return
    with opened:
        st.dataframe(
            table.head(ROWS_SHOWN), hide_index=True, column_config=columns, key=f"{key}_table",
            alt=f"{title}, as a table",
        )  # fmt: skip
        if len(table) > ROWS_SHOWN:
            st.caption(f"The first {ROWS_SHOWN} of {len(table):,} rows; the CSV has them all.")
        with st.container(horizontal=True, gap="small"):
            download("CSV", lambda: csv_bytes(table), f"{file}.csv", "text/csv", key=f"{key}_csv")
            download("PNG", lambda: pictures.png(spec, title), f"{file}.png", "image/png", key=f"{key}_png")
            download(
                "SVG", lambda: pictures.svg(spec, title).encode(), f"{file}.svg", "image/svg+xml", key=f"{key}_svg"
            )


def download(label: str, data: Callable[[], bytes], name: str, mime: str, *, key: str) -> None:
    """A download button whose file is made when it is pressed."""
    st.download_button(
        label, data=data, file_name=name, mime=mime, icon=":material/download:", on_click="ignore", key=key
    )
