"""The views of the Anatomy page: one is chosen, and only that one is computed and drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import streamlit as st

from mega_core.records import Report
from pages.components import anatomy_ask, anatomy_map, anatomy_verify, tables
from pages.components import anatomy_tables as rearranged
from pages.components.anatomy_about import ABOUT
from pages.components.anatomy_pictures import SEGMENTS, Look, picture
from pages.components.anatomy_place import (
    Known,
    Place,
    arrive,
    breadcrumb,
    chosen,
    go_to,
    known,
    place_of,
    remember,
    turn,
)
from pages.components.figure import figure
from pages.components.prepared import tables_of
from pages.components.session import told
from pages.components.text import STATES, cell_name, md, signed
from pages.components.view_charts import PICK, TRACE_SITES

LARGEST = 6
SEGMENTED = 45
"""Characters of all labels up to which choices stand side by side: a phone shows no more in a row."""


@dataclass(frozen=True, slots=True)
class Twin:
    """The keyboard's way to what can be clicked: a list of places."""

    label: str
    options: Sequence[Place]
    here: Place | None


@dataclass(frozen=True, slots=True)
class View:
    """One way of looking: the measurements it asks a run for, the controls it answers to, and how it is drawn."""

    title: str
    asks: tuple[str, ...]
    frames: tuple[str, ...]
    """It can be drawn when the run has rows of one of these."""
    draw: Callable[[Report, Look, Known], None]
    explains: bool = True
    states: bool = False
    twin: Callable[[Report, Look, Known], Twin] | None = None
    absent: str = ""
    """Said when the run was asked and there is nothing to show."""


def draw(report: Report) -> None:
    """Controls, breadcrumb, the chosen view, and verification of the place looked at."""
    arrive()
    _body(report)


@st.fragment
@told
def _body(report: Report) -> None:
    places = known(report.digest, report)
    place = place_of(places)
    name = chosen("view", list(VIEWS), "map")
    view = VIEWS[name]
    st.segmented_control(
        "View", list(VIEWS), format_func=lambda one: VIEWS[one].title, key="anatomy_view", required=True,
        on_change=remember("view"),
    )  # fmt: skip
    look = _controls(report, view, place, places)
    if place is not None:
        breadcrumb(place)
    missing = anatomy_ask.lacking(report, view.asks)
    if _drawable(report, view):
        view.draw(report, look, places)
    elif not missing:
        st.info(view.absent or "This run has nothing to show here.", icon=":material/info:")
    if missing:
        anatomy_ask.offer(report, missing)
    else:
        anatomy_ask.offer_all(report)
    if place is not None:
        anatomy_verify.draw(report, place)
    else:
        st.caption("Choose a place, such as a cell of the map, to verify it: predicted against actual effect.")


def _drawable(report: Report, view: View) -> bool:
    return any(not rearranged.rows(report, frame).empty for frame in view.frames)


def _controls(report: Report, view: View, place: Place | None, places: Known) -> Look:
    """What the view can be asked, in one row."""
    request = report.question.requests[0]
    candidates = list(tables.CANDIDATES) if request.target_true else ["new"]
    candidate = chosen("explain", candidates, candidates[-1])
    state = chosen("state", list(STATES), "change")
    look = Look(candidate, state, place)
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        if view.explains:
            st.segmented_control(
                "Explain", candidates, format_func=lambda one: anatomy_map.candidate_label(one, request),
                key="anatomy_explain", required=True, on_change=remember("explain"),
            )  # fmt: skip
        if view.states:
            st.segmented_control(
                "State", list(STATES), format_func=lambda one: STATES[one], key="anatomy_state", required=True,
                on_change=remember("state"),
            )  # fmt: skip
        if view.twin is not None and _drawable(report, view):
            _pick(view.twin(report, look, places))
    return look


def _option(label: str, name: str, options: Mapping[str, str], default: str | None = None) -> str:
    """A choice of one view, kept as the others are; `options`: value -> label."""
    value = chosen(name, list(options), default or next(iter(options)))
    if sum(map(len, options.values())) <= SEGMENTED:
        st.segmented_control(
            label, list(options), format_func=lambda one: md(options[one]), key=f"anatomy_{name}", required=True,
            on_change=remember(name),
        )  # fmt: skip
    else:
        st.selectbox(
            label, list(options), format_func=lambda one: options[one], key=f"anatomy_{name}", on_change=remember(name)
        )
    return value


def _chart_key(report: Report, name: str, more: str = "") -> str:
    return f"anatomy_chart_{name}{more}_{report.digest[:8]}_{turn()}"


def _show(
    report: Report, name: str, look: Look, *, on_select: Callable[[], None] | None = None, key: str = "", level: int = 2
) -> bool:
    """One picture, when the run has it."""
    made = picture(report, name, look)
    if made is None:
        return False
    chart_key = _chart_key(report, name, key)
    figure(
        chart_key, made.spec, title=made.title, reading=made.reading, table=made.table,
        file=f"{name}-{report.digest[:12]}", about=ABOUT.get(name), level=level, on_select=on_select,
        selection=PICK if on_select else None,
    )  # fmt: skip
    return True


def _clicked(
    report: Report, name: str, take: Callable[[Mapping[str, object]], Place | None], places: Known, key: str = ""
) -> Callable[[], None]:
    """A click on a mark leads to the place that `take` makes of it, when the run knows it."""
    chart_key = _chart_key(report, name, key)

    def on_click() -> None:
        event = st.session_state.get(chart_key) or {}
        points = event["selection"].get(PICK, []) if "selection" in event else []
        place = take(points[0]) if points else None
        if place is not None and places.has(place):
            go_to(place, clicked=True)

    return on_click


def _number(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else -1


def _pick(twin: Twin) -> None:
    key = f"anatomy_pick_{twin.label.lower()}"
    texts = {str(one): one for one in twin.options}
    st.session_state[key] = str(twin.here) if twin.here in twin.options else None

    def changed() -> None:
        if (text := st.session_state.get(key)) in texts:
            go_to(texts[text])

    st.selectbox(
        twin.label, list(texts), index=None, format_func=lambda text: texts[text].title, key=key, on_change=changed,
        placeholder="choose one", help="The same as clicking in the picture.", width=260,
    )  # fmt: skip


# Map -----------------------------------------------------------------------------------------------------------------


def _cells(report: Report, look: Look, places: Known) -> Twin:
    cells = [Place(layer, module) for layer, module in sorted(places.modules)]
    return Twin("Place", cells, look.place.up(2) if look.place else None)


def _map(report: Report, look: Look, places: Known) -> None:
    cells = tables_of(report.digest, report)["cells"]
    place = look.place
    at = (place.layer, place.module) if place and place.module else None
    key = _chart_key(report, "map")
    left, right = st.columns([2, 1], gap="medium")
    with left:
        take = anatomy_map.clicked(key, anatomy_map.places_of(cells), lambda cell: go_to(Place(*cell), clicked=True))
        anatomy_map.map_figure(report, look.candidate, at, key, take, level=2)
        anatomy_map.profile_figure(report, look.candidate, level=2)
    with right:
        with st.container(border=True):
            if at is not None:
                anatomy_map.detail(report, at, look.candidate)
                inside = "heads" if at[1] == "attn" else "neurons"
                st.button(
                    f"Its {inside}", icon=":material/zoom_in:", key="anatomy_inside", on_click=go_to,
                    args=(place, inside),
                )  # fmt: skip
                if at[1] == "attn":
                    _show(report, "head_bars", look, key="_map", level=3)
            else:
                _largest(report, look, place)
        anatomy_map.sums(report, look.candidate)


def _largest(report: Report, look: Look, place: Place | None) -> None:
    """Buttons for the cells that changed most, of one layer or of all."""
    cells = tables_of(report.digest, report)["cells"]
    change = cells[(cells["candidate"] == look.candidate) & (cells["state"] == "change")]
    if place is not None:
        change = change[change["layer"] == place.layer]
    st.subheader("Largest changes" if place is None else f"Layer {place.layer}", anchor=False)
    st.caption("Change of the contribution in nats. Choose one to look inside it.")
    with st.container(gap="xxsmall"):
        for row in change.sort_values("place").head(LARGEST).to_dict("records"):
            cell = Place(int(row["layer"]), str(row["module"]))
            st.button(
                f"{cell_name(cell.layer, str(cell.module))}: {signed(float(row['value']))}",
                icon=":material/zoom_in:", key=f"anatomy_largest_{cell}", type="tertiary", on_click=go_to, args=(cell,),
            )  # fmt: skip


# Heads and neurons ---------------------------------------------------------------------------------------------------


def _every_head(report: Report, look: Look, places: Known) -> Twin:
    return Twin("Head", [Place(layer, "attn", head) for layer, head in sorted(places.heads)], look.place)


def _heads(report: Report, look: Look, places: Known) -> None:
    place = look.place if look.place and look.place.module == "attn" else None
    left, right = st.columns([3, 2], gap="medium")
    with left:

        def of_cell(point: Mapping[str, object]) -> Place:
            return Place(_number(point.get("layer")), "attn", _number(point.get("head")))

        _show(report, "head_scores", look, on_select=_clicked(report, "head_scores", of_cell, places))
    with right:
        if place is None:
            st.caption("Click a head, or choose an attention cell of the map, to see its layer's heads side by side.")
            return

        def of_row(point: Mapping[str, object]) -> Place:
            return Place(place.layer, "attn", _number(point.get("head")))

        _show(report, "head_bars", look, on_select=_clicked(report, "head_bars", of_row, places))
    if place.part is None:
        return
    left, right = st.columns(2, gap="medium")
    with left:
        split = _show(report, "head_sources", look)
    with right:
        _show(report, "head_attention", look)
    if not split:
        st.info(
            f"{md(place.title)} is not among the heads that this run split by source token.", icon=":material/info:"
        )
        anatomy_ask.split_every_head(report, len(places.heads))


def _neuron_look(look: Look) -> Look:
    """Within an MLP or a layer only its neurons."""
    place = look.place if look.place and look.place.module != "attn" else None
    return Look(look.candidate, look.state, place, {"within": "layer"} if place else {})


def _listed_neurons(report: Report, look: Look, places: Known) -> Twin:
    look = _neuron_look(look)
    made = picture(report, "neuron_scores", look)
    rows = [] if made is None else made.table.to_dict("records")
    listed = {Place(int(row["layer"]), "ffn", int(row["neuron"])) for row in rows}
    if look.place is not None and look.place.part is not None:
        listed.add(look.place)
    return Twin("Neuron", sorted(listed), look.place)


def _neurons(report: Report, look: Look, places: Known) -> None:
    look = _neuron_look(look)
    place = look.place
    left, right = st.columns([3, 2], gap="medium")
    with left:

        def of_row(point: Mapping[str, object]) -> Place:
            return Place(_number(point.get("layer")), "ffn", _number(point.get("neuron")))

        if not _show(report, "neuron_scores", look, on_select=_clicked(report, "neuron_scores", of_row, places)):
            st.info(_NO_NEURONS, icon=":material/info:")
    with right:
        if place is None or place.part is None:
            st.caption("Choose a neuron to see the tokens that it promotes and suppresses.")
        elif not _show(report, "neuron_tokens", look):
            st.caption("The tokens of this neuron were not read: only those of the strongest are.")
    free = Look(look.candidate, look.state)
    left, right = st.columns(2, gap="medium")
    with left:
        _show(report, "attention_neurons", free)
    with right:
        if not rearranged.rows(report, "query_layers").empty:
            if look.candidate == "difference":
                st.caption("What switches the neurons on is told for one object: choose it under Explain.")
            else:
                values = _option("Value neurons", "values", {"ffn": "MLP", "attn": "Attention"})
                _show(report, "query_layers", Look(free.candidate, free.state, None, {"values": values}))


_NO_NEURONS = (
    "No neuron is on the lists here. The lists hold the strongest neurons of the whole model for each object, and the "
    "difference needs a neuron that is on both: go up to all layers, or explain one object."
)


# Lens, writes, attention, trace, change, stress ----------------------------------------------------------------------


def _lens(report: Report, look: Look, places: Known) -> None:
    positions = {str(position): label for position, label in rearranged.lens_positions(report).items()}
    measures = {"logprob": "log-probability", "rank": "rank"}
    if report.question.requests[0].target_true:
        measures["margin"] = "new − original"
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        measure = _option("Measure", "measure", measures)
        token = _option("At token", "token", positions)
    _show(report, "lens", Look(look.candidate, look.state, None, {"measure": measure, "token": token}))


def _writes(report: Report, look: Look, places: Known) -> None:
    _show(report, "residual", look)


def _attention(report: Report, look: Look, places: Known) -> None:
    frame = rearranged.rows(report, "attention")
    kinds = {"neighbourhood": "neighbours", "edit": "edit prompt"}
    there = {kind: name for kind, name in kinds.items() if kind in set(frame["prompt_kind"])}
    segments = {name: word for name, word in SEGMENTS.items() if frame.loc[frame["segment"] == name, "mass"].any()}
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        prompts = _option("Prompts", "prompts", there)
        segment = _option("Attention to", "segment", segments)
    look = Look(look.candidate, look.state, look.place, {"prompts": prompts, "segment": segment})
    left, right = st.columns([3, 2], gap="medium")
    with left:

        def of_cell(point: Mapping[str, object]) -> Place:
            return Place(_number(point.get("layer")), "attn", _number(point.get("head")))

        _show(report, "attention", look, on_select=_clicked(report, "attention", of_cell, places))
    with right:
        _show(report, "drift", look)


def _trace(report: Report, look: Look, places: Known) -> None:
    request = report.question.requests[0]
    names = {"true": request.target_true or "", "new": request.target_new}
    options = {
        f"{candidate}.{state}": f"{name}, {state} the edit"
        for candidate, name in names.items() if name
        for state in ("before", "after")
    }  # fmt: skip
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        trace = _option("Trace", "trace", options)
        site = _option("Restore", "site", TRACE_SITES)
    look = Look(look.candidate, look.state, None, {"trace": trace, "site": site})
    _show(report, "trace", look)
    left, right = st.columns(2, gap="medium")
    with left:
        _show(report, "trace_profile", look)
    with right:
        if not rearranged.rows(report, "module_scores").empty:
            anatomy_map.profile_figure(report, look.candidate, level=2)


def _change(report: Report, look: Look, places: Known) -> None:
    matrices = rearranged.matrices(report)
    more = {}
    if len(matrices) > 1:
        more["matrix"] = _option("Matrix", "matrix", matrices)
    _show(report, "weight_spectrum", Look(look.candidate, look.state, None, more))
    st.subheader("What the edit changes", anchor=False)
    st.dataframe(
        rearranged.rows(report, "weight_change"),
        hide_index=True,
        column_config={
            "layer": "Layer", "site": "Where", "kind": "Kind",
            "norm": st.column_config.NumberColumn("Size", format="%.3g", help="Frobenius norm of the change"),
            "relative_norm": st.column_config.NumberColumn(
                "Relative size", format="percent", help="against the unedited matrix"
            ),
            "rank": "Rank", "parameters": st.column_config.NumberColumn("Numbers touched", format="localized"),
        },
        key="anatomy_change_table", alt="What the edit changes",
    )  # fmt: skip


def _stress(report: Report, look: Look, places: Known) -> None:
    left, right = st.columns(2, gap="medium")
    with left:
        when = _option("Model", "when", {"after": "edited", "before": "base"})
        _show(report, "stress", Look(look.candidate, when))
    with right:
        prefixes = {"wiki": "statement", "repeat": "repeated", "question": "question"}
        there = set(rearranged.rows(report, "stress_heads").get("kind", []))
        options = {kind: name for kind, name in prefixes.items() if kind in there}
        if options:
            prefix = _option("Prefix", "prefix", options)
            _show(report, "stress_heads", Look(look.candidate, look.state, None, {"prefix": prefix}))


VIEWS: dict[str, View] = {
    "map": View("Map", ("module_scores",), ("module_scores",), _map, twin=_cells),
    "heads": View("Heads", ("heads",), ("head_scores",), _heads, states=True, twin=_every_head),
    "neurons": View(
        "Neurons", ("neurons", "attention_neurons", "query"), ("neuron_scores", "attention_neurons", "query_layers"),
        _neurons, states=True, twin=_listed_neurons,
    ),
    "lens": View("Lens", ("lens",), ("lens",), _lens, explains=False),
    "writes": View("Writes", ("residual",), ("residual",), _writes),
    "attention": View(
        "Attention", ("attention",), ("attention",), _attention, explains=False, states=True, twin=_every_head,
    ),
    "trace": View("Trace", ("trace",), ("trace",), _trace),
    "change": View(
        "Change", (), ("weight_spectrum", "weight_change"), _change, explains=False,
        absent="This edit changes no matrix.",
    ),
    "stress": View("Stress", ("superficiality",), ("stress",), _stress, explains=False),
}  # fmt: skip
