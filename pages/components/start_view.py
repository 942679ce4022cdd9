"""The first page below its heading: finished examples, where to go, the models here, and where you left off."""

from __future__ import annotations

import streamlit as st

from mega_core import __version__
from mega_core.service import Service
from pages.components import example_cards, frame
from pages.components.session import owner, service
from pages.components.text import md
from pages.components.words import PRIVACY

WAYS = {
    "edit": "Change one fact, by any of the methods, and read what it did.",
    "compare": "The same fact by several methods, side by side.",
    "anatomy": "Which layers, heads and neurons carry an edit.",
    "contrast": "What edits that work have in common, and those that fail.",
    "multihop": "Whether questions over two facts follow the edit.",
    "benchmark": "Many edits at once, with intervals.",
}
"""What a person can do here, by page."""


def draw() -> None:
    """Everything below the heading."""
    desk = service()
    _examples(desk)
    _ways()
    left, right = st.columns([3, 2], gap="large")
    with left:
        _models(desk)
    with right:
        _left_off(desk)
    st.divider()
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.badge("works offline", icon=":material/wifi_off:", color="green")
        st.badge(f"version {__version__}", color="gray")
        st.caption(PRIVACY)


def _examples(desk: Service) -> None:
    examples = desk.examples()
    if examples:
        st.header("Three finished edits", anchor=False)
        st.caption("Real runs, kept with their numbers: opening one loads no model.")
        example_cards.draw(examples)
        return
    with st.container(border=True):
        st.header("Make your first edit", anchor=False)
        st.markdown("Choose a fact the model knows, say what it should say instead, and press Run.")
        if st.button("Go to the edit trial", type="primary", icon=":material/edit_note:"):
            st.switch_page("pages/edit.py")


def _ways() -> None:
    st.header("What you can do here", anchor=False)
    pages = {info.name: info for info in frame.PAGES}
    for first in range(0, len(WAYS), 3):
        for column, name in zip(st.columns(3, gap="medium"), list(WAYS)[first : first + 3], strict=True):
            with column.container(gap=None):
                st.page_link(pages[name].file, label=f"**{pages[name].title}**", icon=pages[name].icon)
                st.caption(WAYS[name])


def _models(desk: Service) -> None:
    st.header("Models", anchor=False)
    models = desk.models()
    st.dataframe(
        [
            {
                "model": info.title,
                "ready": "✓ ready" if info.available else "○ to be added",
                "parameters": info.parameters / 1e6 if info.parameters else None,
                "memory": info.memory_gb,
            }
            for info in models
        ],
        hide_index=True,
        column_config={
            "model": st.column_config.TextColumn("Model", width=180),
            "ready": st.column_config.TextColumn("Here", width=90),
            "parameters": st.column_config.NumberColumn("Size", format="%.0f M", width=66, help="Parameters"),
            "memory": st.column_config.NumberColumn("Needs", format="%.1f GB", width=70, help="Memory for an edit"),
        },
        key="models_table",
        alt="Models of the catalogue, which of them are on this machine, and what they need",
    )
    st.caption("Small teaching models ship with the app and need nothing. Their results are no evidence about others.")
    missing = [info for info in models if not info.available and info.how]
    if missing:
        with st.expander("How to add a model", icon=":material/add_circle:"):
            for info in missing:
                st.markdown(f"**{md(info.title)}**: {md(info.reason)} {md(info.how)}")


def _left_off(desk: Service) -> None:
    st.header("Where you left off", anchor=False)
    recent = desk.runs(session=owner(), limit=5)
    if not recent:
        st.caption("Your last five runs will be listed here.")
    for entry in recent:
        run = entry.run
        prompt = run.template.replace("{}", run.subject)
        st.page_link(
            "pages/edit.py",
            label=f"{md(prompt)} **{md(run.target_new)}** · {md(run.method.upper())} · "
            f"{md(run.verdict or 'no verdict')}",
            icon=":material/restore:",
            query_params={"run": run.digest},
        )
