"""What the Anatomy page looks at: view, object, state and place, kept in the session and in the address.

The address is text from anybody: each part counts only when it names one of our own choices. It is read when the page
is opened and written afterwards: behind a quick click the browser still sends the address of the click before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import streamlit as st

from mega_core.records import Report
from pages.components.text import MODULES

_PLACE = re.compile(r"(\d{1,4})(?:\.(attn|ffn)(?:\.(\d{1,7}))?)?")
PARTS = {"attn": "Head", "ffn": "Neuron"}


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A layer, one of its modules, or a head or neuron of that; `str` is its form in the address, "5.attn.2"."""

    layer: int
    module: str | None = None
    part: int | None = None

    def __str__(self) -> str:
        return ".".join(str(value) for value in (self.layer, self.module, self.part) if value is not None)

    @property
    def title(self) -> str:
        """For people: "Layer 5 · Attention · Head 2"."""
        return " · ".join(self.steps)

    @property
    def steps(self) -> tuple[str, ...]:
        """One name for each level."""
        names = [f"Layer {self.layer}"]
        if self.module is not None:
            names.append(MODULES[self.module])
            if self.part is not None:
                names.append(f"{PARTS[self.module]} {self.part}")
        return tuple(names)

    def up(self, level: int) -> Place:
        """The place of the first `level` steps."""
        return Place(self.layer, self.module if level > 1 else None, self.part if level > 2 else None)

    @property
    def cells(self) -> tuple[str, ...]:
        """What verification calls it."""
        if self.module is None:
            return (f"attn:{self.layer}", f"ffn:{self.layer}")
        if self.part is None:
            return (f"{self.module}:{self.layer}",)
        return (f"{'head' if self.module == 'attn' else 'neuron'}:{self.layer}.{self.part}",)


@dataclass(frozen=True)
class Known:
    """The places that a run has something to say about."""

    modules: frozenset[tuple[int, str]]
    heads: frozenset[tuple[int, int]]
    neurons: frozenset[tuple[int, int]]
    """Only those that are listed."""

    def has(self, place: Place) -> bool:
        """Whether it is one of them."""
        if place.module is None:
            return place.layer in {layer for layer, _ in self.modules}
        if (place.layer, place.module) not in self.modules:
            return False
        listed = self.heads if place.module == "attn" else self.neurons
        return place.part is None or (place.layer, place.part) in listed

    def read(self, text: str | None) -> Place | None:
        """The place of its form in the address; of a part that isn't known the module; None when it is none at all."""
        found = _PLACE.fullmatch(text or "")
        if found is None:
            return None
        place = Place(int(found[1]), found[2], None if found[3] is None else int(found[3]))
        return next((one for one in (place, place.up(2), place.up(1)) if self.has(one)), None)


@st.cache_data(max_entries=32, show_spinner=False)
def known(digest: str, _report: Report) -> Known:
    """The places of a run, by its id."""

    def pairs(name: str, part: str, least: int = 0) -> frozenset[tuple[int, int]]:
        frame = _report.frames.get(name)
        if frame is None:
            return frozenset()
        rows = frame[(frame["case"] == 0) & (frame[part] >= least)][["layer", part]].drop_duplicates()
        return frozenset((int(layer), int(number)) for layer, number in rows.to_numpy())

    heads, neurons = pairs("head_scores", "head"), pairs("neuron_scores", "neuron")
    scores = _report.frames.get("module_scores", pd.DataFrame({"layer": [], "module": []}))
    modules = {(int(layer), str(module)) for layer, module in scores[["layer", "module"]].drop_duplicates().to_numpy()}
    modules |= {(layer, "attn") for layer, _ in heads} | {(layer, "ffn") for layer, _ in neurons}
    return Known(frozenset(modules), heads, neurons)


# In the session and in the address ------------------------------------------------------------------------------------


def arrive() -> None:
    """The page is opened: what the address asks for is looked at once."""
    st.session_state["anatomy_asked"] = st.query_params.to_dict()


def _asked(name: str) -> str | None:
    asked: dict[str, str] = st.session_state.get("anatomy_asked", {})
    return asked.pop(name, None)


def chosen(name: str, options: Sequence[str], default: str) -> str:
    """The choice `name`: as the address asked, else as it was last, else the default; set for the widget of this key.
    The default must be an option.
    """
    asked = (_asked(name), st.session_state.get(_kept(name)), default)
    value = next(option for one in asked for option in options if option == one)
    st.session_state[f"anatomy_{name}"] = value
    _choose(name, value)
    return value


def _kept(name: str) -> str:
    return f"anatomy_kept_{name}"  # a widget's own key is forgotten when its page is left


def _choose(name: str, value: str) -> None:
    st.session_state[_kept(name)] = value
    if st.query_params.get(name) != value:
        st.query_params[name] = value


def remember(name: str) -> Callable[[], None]:
    """What a widget with the key anatomy_<name> calls when it changes: the address follows."""

    def changed() -> None:
        if (value := st.session_state.get(f"anatomy_{name}")) is not None:
            _choose(name, str(value))

    return changed


def turn() -> int:
    """How often the place was changed other than by a click: part of the key of what can be clicked."""
    return int(st.session_state.get("anatomy_turn", 0))


def place_of(places: Known) -> Place | None:
    """The place looked at, when this run knows it: as the address asked, else as it was last."""
    asked = _asked("at")
    place = places.read(st.session_state.get("anatomy_at") if asked is None else asked)
    _keep(place)
    return place


def go_to(place: Place | None, view: str | None = None, *, clicked: bool = False) -> None:
    """Look at another place, and in another view. Unless a picture was clicked, the pictures forget their clicks: the
    same mark can then be clicked again.
    """
    if not clicked:
        st.session_state["anatomy_turn"] = turn() + 1
    _keep(place)
    if view is not None:
        _choose("view", view)


def _keep(place: Place | None) -> None:
    if place is None:
        st.session_state.pop("anatomy_at", None)
        st.query_params.pop("at", None)
        return
    st.session_state["anatomy_at"] = str(place)
    if st.query_params.get("at") != str(place):
        st.query_params["at"] = str(place)


def breadcrumb(place: Place | None) -> None:
    """All layers › Layer 5 › Attention › Head 2, each step a button but the last."""
    steps = ("All layers", *(place.steps if place else ()))
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
        for level, name in enumerate(steps):
            if level:
                st.markdown("›", width="content")
            if level == len(steps) - 1:
                st.markdown(f"**{name}**", width="content")
                continue
            target = place.up(level) if place and level else None
            st.button(
                name, type="tertiary", key=f"anatomy_crumb_{level}", on_click=go_to, args=(target,),
                help="Up one level" if level else "The whole map",
            )  # fmt: skip
