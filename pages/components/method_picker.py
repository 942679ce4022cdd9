"""Choosing a method and its parameters: a short list for those who know them, cards for those who want to read.

The chosen method lives in the session under `edit_method`; every widget of its parameters is drawn from its knobs.
"""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from mega_core.methods.base import Knob
from mega_core.records import Scalar
from mega_core.service import MethodInfo
from pages.components.session import told
from pages.components.text import md, seconds

FAMILIES = {
    "weights": ("Changes weights", ":material/tune:", "Some matrices of the model get other numbers."),
    "steering": ("Steers activations", ":material/moving:", "The weights stay; states are moved as a prompt is read."),
    "memory": ("Adds a memory", ":material/memory:", "Something beside a layer speaks up for the edited fact."),
    "prompt": ("Changes the prompt", ":material/short_text:", "The model stays; a text stands before every prompt."),
}  # fmt: skip
COLUMNS = 3


def pick_method(methods: Sequence[MethodInfo]) -> MethodInfo | None:
    """The methods that work on this model as a list, the chosen one as a card, and all of them as cards on demand."""
    usable = {info.name: info for info in methods if info.unsupported is None}
    if not usable:
        st.warning("No method can edit this model.", icon=":material/block:")
        return None
    if st.session_state.get("edit_method") not in usable:
        st.session_state["edit_method"] = next(iter(usable))
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        name = st.selectbox(
            "Method",
            list(usable),
            format_func=lambda name: usable[name].title,
            key="edit_method",
            persist_state="session",
        )
        compare = st.button(
            f"All {len(methods)}",
            icon=":material/view_module:",
            key="edit_all_methods",
            help="Every method with what it does, how long it takes here, and whether it can edit this model.",
        )
    chosen = usable[name]
    with st.container(border=True, gap=None, key="chosen_method"):
        st.caption(_what_it_takes(chosen))
        st.markdown(md(chosen.summary))
    for info in methods:
        if info.unsupported is not None:
            st.caption(_refusal(info))
    if compare:
        _cards(methods)
    return chosen


@st.dialog("Methods", width="large")
def _cards(methods: Sequence[MethodInfo]) -> None:
    _draw_cards(methods)


@told
def _draw_cards(methods: Sequence[MethodInfo]) -> None:
    """Every method by family; one press chooses."""
    for family in dict.fromkeys(info.family for info in methods):
        mine = [info for info in methods if info.family == family]
        title, icon, what = FAMILIES.get(family, (family, ":material/help:", ""))
        st.header(f"{icon} {md(title)}", anchor=False)
        st.caption(what)
        for start in range(0, len(mine), COLUMNS):
            row = mine[start : start + COLUMNS]
            for column, info in zip(st.columns(COLUMNS, gap="small"), row, strict=False):
                _card(column.container(border=True, height="stretch", gap="small"), info)


def _card(place: st.delta_generator.DeltaGenerator, info: MethodInfo) -> None:
    chosen = st.session_state.get("edit_method") == info.name
    with place:
        st.subheader(md(info.title), anchor=False)
        st.markdown(md(info.summary))
        st.caption(f":material/timer: {_time(info)} · {md(info.paper)}")
        st.space("stretch")
        if info.unsupported is not None:
            st.caption(_refusal(info))
            return
        if st.button(
            f"{info.title} is chosen" if chosen else f"Choose {info.title}",
            icon=":material/check:" if chosen else None,
            disabled=chosen,
            key=f"choose_{info.name}",
            width="stretch",
            on_click=_choose,
            args=(info.name,),
        ):
            st.rerun()  # the whole page, which closes the cards


def _choose(name: str) -> None:
    """Hand the choice to the form, as a draft."""
    st.session_state["edit_draft"] = {**st.session_state.get("edit_draft", {}), "edit_method": name}


def _what_it_takes(info: MethodInfo) -> str:
    family = FAMILIES.get(info.family, (info.family, "", ""))[0]
    return f":material/category: {md(family)} · :material/timer: {_time(info)}"


def _time(info: MethodInfo) -> str:
    """A measured estimate, in words."""
    if info.seconds_estimate is None:
        return "not measured yet"
    return f"about {md(seconds(info.seconds_estimate))}"


def _refusal(info: MethodInfo) -> str:
    return f":material/block: {md(info.title)}: not for this model: {md(info.unsupported)}"


def draw_knobs(info: MethodInfo) -> None:
    """A widget for each parameter; `knob_values` has what is in them."""
    columns = st.columns(2, gap="small")
    for index, knob in enumerate(info.knobs):
        key = _key(info, knob)
        label = knob.name.replace("_", " ").capitalize()
        with columns[index % 2]:
            st.session_state.setdefault(key, _shown(knob))
            if knob.kind is bool:
                st.toggle(label, key=key, help=md(knob.help), persist_state="session")
            elif knob.choices:
                st.selectbox(label, list(knob.choices), key=key, help=md(knob.help), persist_state="session")
            elif knob.kind is int:
                st.number_input(
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
                st.text_input(label, key=key, help=md(knob.help), placeholder="automatic", persist_state="session")


def knob_values(info: MethodInfo) -> dict[str, Scalar]:
    """The parameters as given. An empty optional number means the model's default."""
    values: dict[str, Scalar] = {}
    for knob in info.knobs:
        value = st.session_state.get(_key(info, knob), _shown(knob))
        if knob.kind is not bool and knob.kind is not int and not knob.choices:
            value = str(value or "")
            value = None if knob.optional and not value.strip() else value
        values[knob.name] = value
    return values


def _key(info: MethodInfo, knob: Knob) -> str:
    return f"knob_{info.name}_{knob.name}"


def _shown(knob: Knob) -> Scalar:
    """The default as its widget holds it: floats are typed as text, since a number box rounds 1e-5 away."""
    if knob.kind is bool or knob.kind is int:
        return knob.default
    return "" if knob.default is None else str(knob.default)


def forget_knobs() -> None:
    """Back to the defaults on the next run."""
    for key in [key for key in st.session_state if str(key).startswith("knob_")]:
        del st.session_state[key]
