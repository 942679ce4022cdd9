"""The self-check: a button, its progress, and what it found."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from mega_core.jobs import JobView
from mega_core.service.checks import Check
from pages.components import pictures, progress
from pages.components.charts import layer_profile
from pages.components.session import owner, service, told
from pages.components.text import md, seconds


def draw() -> None:
    """The button, the work in progress, or the result of the last check of this session."""
    st.header("Self-check", anchor=False)
    st.caption(
        "Loads the smallest teaching model, makes one tiny edit and proves that the model is given back; writes and "
        "reads a result and a line of the history; draws a picture. Takes some seconds."
    )
    if progress.live("check"):
        progress.draw("check", _done)
        return
    progress.failure("check")
    _button()
    found: tuple[Check, ...] = st.session_state.get("check_found", ())
    for check in found:
        icon = ":material/check_circle:" if check.good else ":material/error:"
        mark = "✓" if check.good else "✗"
        st.markdown(f"{icon} **{mark} {md(check.name)}** :gray[{seconds(check.seconds)}]  \n{md(check.told)}")
    if found:
        failed = sum(not check.good for check in found)
        st.caption(f"{failed} of {len(found)} failed." if failed else f"All {len(found)} passed.")


@st.fragment
@told
def _button() -> None:
    if st.button("Run the self-check", icon=":material/fact_check:", key="check_start"):
        progress.begin("check", service().checks.start(owner(), {"Draw a picture": _picture}))
        st.rerun()


def _done(view: JobView) -> None:
    st.session_state["check_found"] = service().result(view.id, owner())


def _picture() -> str:
    """Draw a small chart as PNG and SVG."""
    cells = pd.DataFrame(
        [
            {"candidate": "new", "state": state, "module": module, "layer": layer, "value": layer * scale}
            for state, scale in (("before", 0.5), ("after", 1.0))
            for module in ("attn", "ffn")
            for layer in range(4)
        ]
    )
    edited = pd.DataFrame({"layer": [1], "module": ["ffn"]})
    spec = layer_profile(cells, edited, candidate="new").to_dict(validate=False)
    size = len(pictures.png(spec, "Self-check")) + len(pictures.svg(spec, "Self-check"))
    return f"PNG and SVG were drawn, {size // 1024} KB."
