"""The benchmarks of this machine: how far each is, with Open, Stop and Resume. Polled only while one runs."""

from __future__ import annotations

import re
from contextlib import suppress

import streamlit as st

from mega_core.errors import ActionableError
from mega_core.service import Sweep
from pages.components.session import service, tell, told
from pages.components.text import clip, md, seconds

NAME = re.compile(r"[0-9a-f]{32}")
POLL_SECONDS = 2.0
SHOWN = 8
STATES = {
    "queued": ("waiting", ":material/hourglass_top:", "gray"),
    "running": ("running", ":material/progress_activity:", "blue"),
    "done": ("done", ":material/check_circle:", "green"),
    "stopped": ("stopped", ":material/stop_circle:", "orange"),
    "failed": ("failed", ":material/error:", "red"),
}
CHOICES = ("benchmark", "protocol", "metric", "method")
"""What a link to results may say."""


def in_address() -> str | None:
    """The name of ?benchmark=, None without one, "" for one that is damaged."""
    asked = st.query_params.get("benchmark")
    if asked is None:
        return None
    return asked if NAME.fullmatch(asked) else ""


def opened(name: str | None) -> Sweep | None:
    """The benchmark of this name, None when there is none."""
    if name:
        with suppress(ActionableError):
            return service().benchmarks.sweep(name)
    return None


def unknown(name: str | None) -> None:
    """Say that the link leads nowhere, if it does."""
    if name == "":
        st.warning("The link's benchmark is damaged: it should have 32 characters.", icon=":material/link_off:")
    elif name is not None:
        st.warning(
            "This benchmark is not on this machine: it ran elsewhere, or has been cleared. Choose one of the list.",
            icon=":material/link_off:",
        )


def go_to(name: str | None) -> None:
    """Open a benchmark, or go back to the list."""
    for choice in CHOICES:
        st.query_params.pop(choice, None)
    if name is not None:
        st.query_params["benchmark"] = name


def title(sweep: Sweep) -> str:
    """What a benchmark is about, on one line: "ROME, FT-M on atlas-gpt2"."""
    labels = [one.label for one in sweep.plan.entrants if one.method is not None]
    names = ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
    return clip(f"{names} on {sweep.plan.model.name}", 120)


def draw() -> None:
    """The list, newest first."""
    st.header("Benchmarks of this machine", anchor=False)
    sweeps = service().benchmarks.all()
    if not sweeps:
        st.caption("None yet. What you start is listed here with its progress, and stays after a restart.")
        return
    live = any(one.live for one in sweeps)
    st.fragment(_list, run_every=POLL_SECONDS if live else None)(_states(sweeps))


def draw_one(sweep: Sweep) -> None:
    """The head of one benchmark's page: what it is and how far."""
    st.button("All benchmarks", icon=":material/arrow_back:", key="bench_back", on_click=go_to, args=(None,))
    st.fragment(_one, run_every=POLL_SECONDS if sweep.live else None)(sweep.name, _looks(sweep))


@told
def _list(drawn: dict[str, str]) -> None:
    sweeps = service().benchmarks.all()
    if _states(sweeps) != drawn:
        st.rerun()
    everything = len(sweeps) <= SHOWN or st.session_state.get("bench_older", False)
    for sweep in sweeps if everything else sweeps[:SHOWN]:
        with st.container(border=True, gap="small"):
            st.subheader(md(title(sweep)), anchor=False)
            _card(sweep, open_too=True)
    if len(sweeps) > SHOWN:
        st.toggle(f"Show all {len(sweeps)}", key="bench_older")


@told
def _one(name: str, drawn: tuple[str, bool]) -> None:
    sweep = service().benchmarks.sweep(name)
    if _looks(sweep) != drawn:
        st.rerun()
    with st.container(border=True, gap="small"):
        st.header(md(title(sweep)), anchor=False)
        _card(sweep, open_too=False)


def _looks(sweep: Sweep) -> tuple[str, bool]:
    """What the rest of the page depends on: its state, and whether there is any number."""
    return sweep.state, sweep.done > 0


def _states(sweeps: tuple[Sweep, ...]) -> dict[str, str]:
    return {one.name: one.state for one in sweeps}


def _card(sweep: Sweep, *, open_too: bool) -> None:
    word, icon, color = STATES[sweep.state]
    plan = sweep.plan
    with st.container(horizontal=True, gap="small"):
        st.badge(word, icon=icon, color=color)  # type: ignore[arg-type]
        st.badge(md(clip(plan.dataset, 60)), icon=":material/dataset:", color="gray")
        st.badge(f"{len(plan.ids)} cases", color="gray")
        st.badge(plan.mode + (f", every {plan.every}" if plan.every else ""), color="gray")
        st.badge(f"seed {plan.seed}", color="gray")
        if sweep.small:
            st.badge("small teaching model", icon=":material/school:", color="gray")
    share = sweep.done / sweep.total if sweep.total else 0.0
    left = f", about {seconds(sweep.eta_seconds)} left" if sweep.eta_seconds is not None else ""
    begun = f"Started {sweep.started[:16].replace('T', ' ')} UTC" if sweep.started else "Not begun yet"
    if sweep.state != "done":
        st.progress(min(share, 1.0), text=f"{sweep.done:,} of {sweep.total:,} measurements{left}")
    st.caption(f"{sweep.total:,} measurements · {md(begun)}" if sweep.state == "done" else md(begun))
    if sweep.error:
        st.error(
            f"**It ended before it was done.** {md(sweep.error)} What is measured is kept.", icon=":material/error:"
        )
    _buttons(sweep, open_too=open_too)
    trouble = st.session_state.get("bench_trouble")
    if trouble is not None and trouble[0] == sweep.name:
        tell(trouble[1])


def _buttons(sweep: Sweep, *, open_too: bool) -> None:
    name = sweep.name
    if st.session_state.get("bench_stopping") == name and sweep.live:
        st.warning(
            "**Stop this benchmark?** Everybody on this machine sees it, and somebody may be waiting for it. What is "
            "measured stays, and Resume goes on from there.",
            icon=":material/stop_circle:",
        )
        with st.container(horizontal=True, gap="small"):
            st.button("Stop it", type="primary", key=f"bench_stop_{name}", on_click=_stop, args=(name,))
            st.button("Let it run", key=f"bench_let_{name}", on_click=_ask_to_stop, args=(None,))
        return
    with st.container(horizontal=True, gap="small"):
        if open_too and st.button("Open", icon=":material/table_chart:", key=f"bench_open_{name}"):
            go_to(name)
            st.rerun()
        if sweep.live:
            st.button(
                "Stop", icon=":material/stop_circle:", key=f"bench_ask_{name}", on_click=_ask_to_stop, args=(name,)
            )
        elif sweep.state != "done":
            st.button(
                "Resume", icon=":material/play_arrow:", key=f"bench_resume_{name}", on_click=_resume, args=(name,)
            )


def _ask_to_stop(name: str | None) -> None:
    st.session_state["bench_stopping"] = name


def _stop(name: str) -> None:
    st.session_state.pop("bench_stopping", None)
    service().benchmarks.stop(name)


def _resume(name: str) -> None:
    st.session_state.pop("bench_trouble", None)
    try:
        service().benchmarks.resume(name)
    except ActionableError as error:
        st.session_state["bench_trouble"] = (name, error)
