"""Edits under a mask as a table, and a person's own edits tried under it."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from mega_core.jobs import JobView
from mega_core.service.masks import OWN, KeptMask
from pages.components import progress
from pages.components.mask_form import start
from pages.components.session import owner, service, told
from pages.components.text import md, token_label


def table(rows: pd.DataFrame, key: str, alt: str) -> None:
    """Edits, one a line: whether each is undone, and what the model says before and under the mask."""
    shown = rows.assign(
        result=[
            "– did not take" if not took else "✓ undone" if back else "✗ still edited"
            for took, back in zip(rows["took"], rows["reversed"], strict=True)
        ],
        edited_says=rows["edited_says"].map(token_label),
        masked_says=rows["masked_says"].str.strip(),
    )
    columns: dict[str, Any] = {
        "result": "Result",
        "prompt": "Prompt",
        "old": "Original",
        "new": "New object",
        "edited_says": "Edited, first token",
        "masked_says": "Under the mask",
        "margin_edited": st.column_config.NumberColumn("Margin edited", format="%.1f"),
        "margin_masked": st.column_config.NumberColumn("Margin masked", format="%.1f"),
    }
    st.dataframe(
        shown[list(columns)],
        hide_index=True,
        column_config=columns,
        key=key,
        height=min(320, 38 + 36 * len(shown)),
        alt=alt,
    )


def draw(kept: KeptMask) -> None:
    """A person's own edits under the mask; draws nothing when there are none."""
    mine = service().masks.own(kept, owner())
    if not mine:
        return
    st.header("Your own edits under it", anchor=False)
    if progress.live(OWN):
        progress.draw(OWN, lambda view: _done(view, kept.id))
        return
    progress.failure(OWN)
    _button(kept, len(mine))
    found: tuple[str, pd.DataFrame] | None = st.session_state.get("mask_own_found")
    if found is not None and found[0] == kept.id:
        table(found[1], "mask_own_table", "Your own edits with what the model says under the mask")


@st.fragment
@told
def _button(kept: KeptMask, count: int) -> None:
    st.caption(
        f"{count} of your last runs can be tried, as far as they are still stored: one fact each, edited in "
        f"{md(kept.model)} by an editor that the mask reads. What you see stays in this session."
    )
    if st.button("Try my edits", icon=":material/play_arrow:", key="mask_own_start"):
        start(lambda: service().masks.start_own(kept.id, owner()), OWN)


def _done(view: JobView, mask_id: str) -> None:
    st.session_state["mask_own_found"] = (mask_id, service().result(view.id, owner()))
