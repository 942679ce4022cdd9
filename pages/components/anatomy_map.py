"""Layer x module map of a run with a detail panel, and the layer profile with the sum check."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import streamlit as st

from mega_core.evaluation.text import reading
from mega_core.records import EditRequest, Report
from pages.components import charts, frame, readings, tables
from pages.components.figure import About, figure
from pages.components.prepared import spec_of, tables_of
from pages.components.session import told
from pages.components.text import MODULES, STATES, cell_name, clip, md

ABOUT_MAP = About(
    "How much each layer's attention and MLP module raises (blue) or lowers (orange) the log-probability of the object "
    "at the end of the edit prompt, in the base model, in the edited model, and the change. All pictures of a run "
    "share one colour scale.",
    "The residual stream is read through the final norm and the unembedding before and after each module's output "
    "joins it; the difference in log-probability is the module's contribution, in nats.",
    "Attribution is not causation. Reading middle layers through the unembedding is approximate, and only the object's "
    "first token is explained.",
)


def clicked(
    chart_key: str, places: list[tuple[int, str]], take: Callable[[tuple[int, str]], None]
) -> Callable[[], None]:
    """What the map calls when it is clicked: `take` gets the place."""

    def on_click() -> None:
        event = st.session_state.get(chart_key) or {}
        points = event["selection"].get(charts.CELL, []) if "selection" in event else []
        if points:
            place = (points[0].get("layer"), points[0].get("module"))
            if place in places:  # the browser's word is only an index into our own list
                take(place)

    return on_click


def places_of(cells: pd.DataFrame) -> list[tuple[int, str]]:
    """Every layer and module of the map, in order."""
    pairs = cells[["layer", "module"]].drop_duplicates().sort_values(["layer", "module"])
    return [(int(layer), str(module)) for layer, module in pairs.to_numpy()]


def candidate_label(candidate: str, request: EditRequest) -> str:
    """Short, and never the same for two candidates: the browser sends the label back."""
    if candidate == "difference":
        return "difference"
    word = "new" if candidate == "new" else "original"
    return f"{md(clip(readings.explained(candidate, request), 20))} ({word})"


@st.fragment
@told
def draw(report: Report) -> None:
    """Layer x module map with a detail panel, and the layer profile with the sum check."""
    data = tables_of(report.digest, report)
    cells, request = data["cells"], report.question.requests[0]
    if cells.empty:
        return
    present = [c for c in tables.CANDIDATES if c in set(cells["candidate"])]
    st.header("Where in the network", anchor=False)
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        candidate = st.segmented_control(
            "Explain",
            present,
            default=present[-1],
            format_func=lambda c: candidate_label(c, request),
            key="anatomy_candidate",
            required=True,
            persist_state="session",
        )
        candidate = candidate if candidate in present else present[-1]
        places = places_of(cells)
        pick_key = f"anatomy_cell_{report.digest[:8]}"
        if st.session_state.get(pick_key) not in places:
            change = cells[(cells["candidate"] == candidate) & (cells["state"] == "change")]
            best = change.loc[change["place"].idxmin()] if not change.empty else cells.iloc[0]
            st.session_state[pick_key] = (int(best["layer"]), str(best["module"]))
        place = st.selectbox(
            "Place",
            places,
            format_func=lambda p: cell_name(*p),
            key=pick_key,
            help="The same as clicking a cell.",
            width=220,
        )
    left, right = st.columns([2, 1], gap="medium")
    with left:
        chart_key = f"chart_map_{report.digest[:8]}"

        def take(place: tuple[int, str]) -> None:
            st.session_state[pick_key] = place

        map_figure(report, candidate, place, chart_key, clicked(chart_key, places, take))
    frame.head_start(report.digest)
    with right, st.container(border=True):
        detail(report, place, candidate)
    left, right = st.columns([2, 1], gap="medium")
    with left:
        profile_figure(report, candidate)
    with right:
        sums(report, candidate)


def map_figure(
    report: Report,
    candidate: str,
    place: tuple[int, str] | None,
    key: str,
    on_click: Callable[[], None],
    *,
    level: int = 3,
) -> None:
    """The map of one object in three bands, before, after and change, with a ring around `place`."""
    data = tables_of(report.digest, report)
    cells, request = data["cells"], report.question.requests[0]
    title, sentence = readings.of_module_map(cells, candidate, request)
    if candidate == "new":
        sentence = reading(report.frames["module_scores"], request.target_new)
    triangle = " Triangles mark edited layers." if not data["edited"].empty else ""
    figure(
        key,
        spec_of(report.digest, "map", candidate, place, _report=report),
        title=title,
        reading=f"{sentence}{triangle} Click a cell, or choose it under Place, for its numbers.",
        table=_twin(report.digest, candidate, cells),
        file=f"contributions-{candidate}-{report.digest[:12]}",
        about=ABOUT_MAP,
        columns=_NUMBERS,
        level=level,
        on_select=on_click,
        selection=charts.CELL,
    )


def profile_figure(report: Report, candidate: str, *, level: int = 3) -> None:
    """Contributions by layer."""
    data = tables_of(report.digest, report)
    cells, edited, request = data["cells"], data["edited"], report.question.requests[0]
    title, sentence = readings.of_profile(cells, candidate, request)
    figure(
        "chart_profile",
        spec_of(report.digest, "profile", candidate, _report=report),
        title=title,
        reading=f"{sentence} Dashed and hollow: base model, solid and filled: edited model."
        f"{_tinted(edited['layer'].nunique())}",
        table=_twin(report.digest, candidate, cells),
        file=f"profile-{candidate}-{report.digest[:12]}",
        columns=_NUMBERS,
        level=level,
    )


def sums(report: Report, candidate: str) -> None:
    """Whether the contributions add up to the change of the log-probability."""
    data = tables_of(report.digest, report)
    request = report.question.requests[0]
    st.subheader("Do the parts add up?", anchor=False)
    st.caption(md(readings.of_sums(data["sums"], candidate)))
    check = data["sums"]
    st.dataframe(
        check.assign(
            candidate=check["candidate"].map({"new": request.target_new, "true": request.target_true or "original"})
        )[["candidate", "state", "start", "modules", "end", "residual"]],
        hide_index=True,
        column_config={
            "candidate": "Object",
            "state": "State",
            "start": st.column_config.NumberColumn(
                "Input", format="%.2f", help="log-probability read at the input of the first block"
            ),
            "modules": st.column_config.NumberColumn("Modules", format="%+.2f", help="sum of all contributions"),
            "end": st.column_config.NumberColumn("Output", format="%.2f", help="log-probability of the model"),
            "residual": st.column_config.NumberColumn("Left over", format="%.3f"),
        },
        key="sum_table",
        alt="Sum check of contributions",
    )


_NUMBERS = {name: st.column_config.NumberColumn(name, format="%+.3f") for name in STATES.values()}


@st.cache_data(max_entries=64, show_spinner=False)
def _twin(digest: str, candidate: str, _cells: pd.DataFrame) -> pd.DataFrame:
    """The numbers of one object as a table: layer, module, Before, After, Change."""
    twin = _cells[_cells["candidate"] == candidate].assign(
        module=lambda t: t["module"].map(MODULES), state=lambda t: t["state"].map(STATES)
    )
    return twin.pivot_table(
        index=["layer", "module"], columns="state", values="value", aggfunc="first", sort=False
    ).reset_index()


def detail(report: Report, place: tuple[int, str], candidate: str) -> None:
    """One place: a sentence, and its numbers for every object and state."""
    layer, module = place
    cells, request = tables_of(report.digest, report)["cells"], report.question.requests[0]
    st.subheader(cell_name(layer, module), anchor=False)
    st.markdown(md(readings.of_cell(cells, layer, module, candidate, request)))
    shown = _of_place(report.digest, place, cells, request)
    st.dataframe(
        shown,
        hide_index=True,
        column_config={
            "object": st.column_config.TextColumn("Object", width=108),
            **{s: st.column_config.NumberColumn(STATES[s], format="%+.2f") for s in tables.STATES},
            "share": st.column_config.NumberColumn(
                "Share", format="percent", help="of the sum of all absolute changes"
            ),
            "place": st.column_config.NumberColumn("Rank", help="by absolute change"),
        },
        key=f"detail_table_{layer}_{module}",
        alt=f"Contributions of {cell_name(layer, module)}",
    )


@st.cache_data(max_entries=256, show_spinner=False)
def _of_place(digest: str, place: tuple[int, str], _cells: pd.DataFrame, _request: EditRequest) -> pd.DataFrame:
    """The numbers of one place: a row for each object, its contribution in each state, and the change's share, rank."""
    mine = _cells[(_cells["layer"] == place[0]) & (_cells["module"] == place[1])].copy()
    mine["object"] = [readings.explained(c, _request) if c != "difference" else "difference" for c in mine["candidate"]]
    wide = mine.pivot_table(index="object", columns="state", values="value", aggfunc="first", sort=False)
    extra = mine[mine["state"] == "change"].set_index("object")[["share", "place"]]
    return wide.reindex(columns=[s for s in tables.STATES if s in wide]).join(extra).reset_index()


def _tinted(layers: int) -> str:
    """What the tint of the profile means; nothing where no layer was touched."""
    if not layers:
        return ""
    return " The tinted layer is where the edit acts." if layers == 1 else " The edit acts in the tinted layers."
