"""The strength of a steered run: a slider at which the model answers anew, without another fit."""

from __future__ import annotations

from contextlib import suppress

import pandas as pd
import streamlit as st

from mega_core.errors import ActionableError
from mega_core.jobs import JobView
from mega_core.records import Report
from mega_core.service.steering import Dial, Strength
from mega_core.summary import percent
from pages.components import edit_charts, progress
from pages.components.figure import About, figure, heading
from pages.components.session import owner, service, tell, told
from pages.components.text import KINDS, md, seconds, token_label

SLOT = "steer"
PATIENCE = 1.5
"""Seconds a move of the slider waits for its answer before the page goes on without it."""
STEP = 0.05
ABOUT = About(
    "What the steered model says when its maps act more or less: 0 leaves the model alone, the run's own strength "
    "gives the run.",
    "x ← x + α (T(x) − x) at the steered places, with the maps T of one fit. Curves: P of the whole object after the "
    "edit prompt, and the share of all paraphrases and neighbours that hold, by the rule of the evidence below.",
    "Nothing is fitted again: a fit made at that strength could differ. Beyond the run's own strength the maps "
    "extrapolate.",
)


def draw(report: Report) -> None:
    """The slider of this run, or how to get it; nothing for a method without a strength."""
    desk = service()
    if not desk.steering.can(report):
        return
    dial = desk.steering.dial(report.digest)
    heading("How strong", ABOUT)
    if progress.live(SLOT):
        progress.draw(SLOT, _done)
        return
    progress.failure(SLOT)
    if dial is None:
        _prepare(report)
    else:
        _slider(report, dial)


def _done(view: JobView) -> None:
    """The dial is in the service's memory: the next drawing finds it."""


def _prepare(report: Report) -> None:
    method = report.question.method.name
    took = report.timing.get("edit")
    with st.container(border=True):
        st.markdown(
            f"{md(method.upper())} steers activations, so its strength can be turned without fitting again. The fit of "
            "this run is not in memory: it is made once, then every strength answers at once."
        )
        label = f"Prepare the slider (about {seconds(took)})" if took else "Prepare the slider"
        if st.button(label, icon=":material/tune:", key="steer_prepare"):
            try:
                progress.begin(SLOT, service().steering.prepare(report, owner()))
            except ActionableError as error:
                tell(error)
            else:
                st.rerun()


@st.fragment
@told
def _slider(report: Report, dial: Dial) -> None:
    key = f"strength_{report.digest[:8]}"
    own = round(dial.own, 2)
    st.session_state.setdefault(key, own)
    left, right = st.columns([1, 1], gap="large")
    with left:
        with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
            alpha = st.slider(
                "Strength α", 0.0, float(dial.reach), step=STEP, key=key, format="%.2f",
                help=f"The run's own strength is {own:g}; 0 is the base model.", persist_state="session",
            )  # fmt: skip
            st.button(
                f"Own: {own:g}", icon=":material/restart_alt:", key=f"{key}_own", disabled=alpha == own,
                on_click=_set, args=(key, own), help="Back to the strength of the run.",
            )  # fmt: skip
        if dial.note:
            st.caption(f":material/info: {md(dial.note)}")
        found = _answer(report, float(alpha))
        if found is not None:
            _says(report, found)
    with right:
        title, sentence = reading(dial, report)
        figure(
            f"chart_strength_{report.digest[:8]}",
            edit_charts.strength_curve(dial.curve, own=dial.own, now=float(alpha)),
            title=title,
            reading=f"{sentence} Grey dashes: the run's own strength; the full line: the slider.",
            table=dial.curve,
            file=f"strength-{report.digest[:12]}",
            level=3,
        )


def _set(key: str, value: float) -> None:
    st.session_state[key] = value


def _answer(report: Report, alpha: float) -> Strength | None:
    """The answer at this strength; while it isn't there yet, says so and looks again."""
    desk = service()
    waiting = st.session_state.get("strength_waits")
    if waiting is not None and waiting[1] != alpha:
        with suppress(ActionableError):  # the slider has moved on: nobody wants that answer
            desk.cancel(waiting[0], owner())
    found = desk.steering.at(report.digest, alpha, owner(), PATIENCE)
    if isinstance(found, Strength):
        st.session_state.pop("strength_waits", None)
        return found
    st.session_state["strength_waits"] = (found, alpha)
    st.fragment(_look_again, run_every=0.5)(found)
    return None


@told
def _look_again(job_id: str) -> None:
    """Draw the page again once the job is done; a job that failed is told, and not started again by itself."""
    view = service().job(job_id, owner())
    if view.state == "done":
        st.rerun()
    elif view.error is not None:
        st.error(f"**{md(view.error.what)}** {md(view.error.next_step)}", icon=":material/error:")
    elif not view.over:
        st.caption(":material/hourglass_top: The model is busy with another question; this one is next …")


def _says(report: Report, found: Strength) -> None:
    request = report.question.requests[0]
    first = found.said[0]
    with st.container(border=True, gap="small"):
        st.caption(f"The model at α = {found.alpha:g} writes")
        st.markdown(f":gray[{md(first.prompt)}] {md(first.continuation) or ':gray[(nothing)]'}")
        with st.container(horizontal=True, gap="small"):
            st.metric(md(request.target_new), percent(first.prob_new), help="P of the whole new object")
            if first.prob_true is not None:
                st.metric(
                    md(request.target_true or ""), percent(first.prob_true), help="P of the whole original object"
                )
        likely = ", ".join(f"{token_label(token)} {percent(prob)}" for token, prob in found.next_tokens[:5])
        st.caption(f"Most likely next: {md(likely)}")
    rows = pd.DataFrame(
        [
            {
                "rule": "✓ holds" if said.holds else "✗ fails",
                "says": said.continuation,
                "prompt": said.prompt,
                "kind": KINDS.get(said.kind, said.kind),
                "new": said.prob_new,
                "original": said.prob_true,
            }
            for said in found.said[1:]
        ]
    )
    if not rows.empty:
        st.dataframe(
            rows,
            hide_index=True,
            column_config={
                "rule": st.column_config.TextColumn("Rule", width=62),
                "says": st.column_config.TextColumn("Says", width=120),
                "prompt": st.column_config.TextColumn("Prompt", width=200),
                "kind": st.column_config.TextColumn("Kind", width=84),
                "new": st.column_config.NumberColumn("new", format="percent", width=60, help="P(new object)"),
                "original": st.column_config.NumberColumn("orig.", format="percent", width=60, help="P(original)"),
            },
            key=f"strength_prompts_{report.digest[:8]}",
            alt=f"Paraphrases and neighbours at strength {found.alpha:g}",
        )


def reading(dial: Dial, report: Report) -> tuple[str, str]:
    """A heading and a sentence from the curve: from which strength on the edit holds, and what it costs."""
    curve = dial.curve.sort_values("alpha")
    request = report.question.requests[0]
    wins = curve[curve["p_new"] > (curve["p_true"].fillna(0.5) if dial.curve["p_true"].notna().any() else 0.5)]
    if wins.empty:
        return "No strength on this dial is enough", f"{request.target_new} never overtakes up to α = {dial.reach:g}."
    first = float(wins["alpha"].iloc[0])
    best = curve.loc[curve["p_new"].idxmax()]
    title = f"{request.target_new} wins from α = {first:g} on"
    sentence = f"It is most likely at α = {best['alpha']:g}, with {percent(float(best['p_new']))}."
    kept = curve["neighbours"].dropna()
    if not kept.empty:
        lost = round((1 - float(kept.min())) * dial.neighbours)
        worst = float(curve.loc[kept.idxmin(), "alpha"])
        all_kept = "The only neighbour is" if dial.neighbours == 1 else f"All {dial.neighbours} neighbours are"
        sentence += (
            f" At its worst (α = {worst:g}) {lost} of {dial.neighbours} neighbours {'is' if lost == 1 else 'are'} lost."
            if lost
            else f" {all_kept} kept at every strength."
        )
    return title, sentence
