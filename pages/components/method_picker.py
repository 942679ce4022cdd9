"""Choosing a method and its parameters: every widget is drawn from the method's knobs."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from mega_core.methods.base import Knob
from mega_core.records import Scalar
from mega_core.service import MethodInfo
from pages.components.text import md, seconds

FAMILIES = {
    "weights": "changes weights",
    "steering": "steers activations",
    "memory": "adds a memory",
    "prompt": "changes the prompt",
}


def pick_method(methods: Sequence[MethodInfo]) -> MethodInfo | None:
    """Pills of the methods that work on this model, one line about the chosen one, and the reason for each that
    doesn't.
    """
    usable = {info.name: info for info in methods if info.unsupported is None}
    refused = [info for info in methods if info.unsupported is not None]
    chosen = None
    if usable:
        if st.session_state.get("edit_method") not in usable:
            st.session_state["edit_method"] = next(iter(usable))
        name = st.pills(
            "Method",
            list(usable),
            format_func=lambda name: usable[name].title,
            key="edit_method",
            required=True,
            persist_state="session",
        )
        chosen = usable[name] if name else next(iter(usable.values()))
        estimate = f" · about {seconds(chosen.seconds_estimate)}" if chosen.seconds_estimate is not None else ""
        st.caption(f"{md(chosen.summary)} *{FAMILIES.get(chosen.family, chosen.family)}{estimate}*")
    for info in refused:
        st.caption(f":material/block: {md(info.title)}: not for this model: {md(info.unsupported)}")
    return chosen


def draw_knobs(info: MethodInfo) -> dict[str, Scalar]:
    """A widget for each parameter; the values as given. An empty optional number means the model's default."""
    values: dict[str, Scalar] = {}
    columns = st.columns(2, gap="small")
    for index, knob in enumerate(info.knobs):
        key = f"knob_{info.name}_{knob.name}"
        label = knob.name.replace("_", " ").capitalize()
        with columns[index % 2]:
            st.session_state.setdefault(key, _shown(knob))
            if knob.kind is bool:
                values[knob.name] = st.toggle(label, key=key, help=md(knob.help), persist_state="session")
            elif knob.choices:
                values[knob.name] = st.selectbox(
                    label, list(knob.choices), key=key, help=md(knob.help), persist_state="session"
                )
            elif knob.kind is int:
                values[knob.name] = st.number_input(
                    label,
                    value=None,
                    min_value=None if knob.low is None else int(knob.low),
                    max_value=None if knob.high is None else int(knob.high),
                    step=1,
                    key=key,
                    help=md(knob.help),
                    placeholder="automatic",
                    persist_state="session",
                )
            else:
                typed = st.text_input(
                    label, key=key, help=md(knob.help), placeholder="automatic", persist_state="session"
                )
                typed = typed or ""
                values[knob.name] = typed if typed.strip() or not knob.optional else None
    return values


def _shown(knob: Knob) -> Scalar:
    """The default as its widget holds it: floats are typed as text, since a number box rounds 1e-5 away."""
    if knob.kind is bool or knob.kind is int:
        return knob.default
    return "" if knob.default is None else str(knob.default)


def forget_knobs() -> None:
    """Back to the defaults on the next run."""
    for key in [key for key in st.session_state if str(key).startswith("knob_")]:
        del st.session_state[key]
