"""Asking for a study of one's own: of random facts, or of the runs in one's history."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from mega_core.errors import ActionableError
from mega_core.service import MethodInfo, ModelInfo
from mega_core.service.studies import FEWEST_EDITS, FEWEST_MINE, MOST_EDITORS, MOST_EDITS
from pages.components import progress
from pages.components.contrast_view import MEANING, STATISTICS
from pages.components.figure import heading
from pages.components.session import owner, service, tell, told
from pages.components.text import md, seconds

LABELS = {"argmax": "The new object comes first", "likelier": "The new object is likelier than the original"}
USUAL = ("rome", "memit")


def draw(model: ModelInfo, done: progress.Done) -> None:
    """Both ways, and between them the study that is being made; `done` is told when it is there."""
    heading("Run your own study")
    if not model.available:
        st.warning(f"{md(model.reason)} {md(model.how)}", icon=":material/cloud_off:")
        return
    _drawn(model)
    if progress.live("contrast"):
        progress.draw("contrast", done, first_time="The first edit also loads the libraries and the model.")
    elif progress.failure("contrast"):
        st.caption("What was measured is kept: the same study goes on where it was.")
    _mine(model)


@st.fragment
@told
def _drawn(model: ModelInfo) -> None:
    desk = service()
    usable = {info.name: info for info in desk.methods(model.name) if info.unsupported is None}
    usual = [name for name in USUAL if name in usable] or list(usable)[:1]
    st.subheader("Of random facts", anchor=False)
    editors = st.pills(
        f"Editors, up to {MOST_EDITORS}",
        list(usable),
        selection_mode="multi",
        default=usual,
        format_func=lambda name: usable[name].title,
        key=f"contrast_editors_{model.name}",
        persist_state="session",
    )
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        edits = st.number_input(
            "Edits", FEWEST_EDITS, MOST_EDITS, 20, step=5, key="contrast_edits", persist_state="session",
            help="Random counterfactual edits of facts the model knows, one per subject; each is made by every editor.",
        )  # fmt: skip
        induced = st.number_input(
            "Edits to induce failures on", 0, MOST_EDITS, 60, step=5, key="contrast_induced", persist_state="session",
            help="Where an editor fails fewer than ten times, it is made worse on purpose on so many of the edits: K "
            "and C need failures. 0: never.",
        )  # fmt: skip
        seed = st.number_input(
            "Seed", 0, 2**31 - 1, 0, step=1, key="contrast_seed", persist_state="session",
            help="Which facts are drawn, and the draws of the intervals.",
        )  # fmt: skip
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        label = st.selectbox(
            "A success", list(LABELS), format_func=lambda one: LABELS[one], key="contrast_label",
            persist_state="session",
        )  # fmt: skip
        basis = st.selectbox(
            "Leverage is read from", list(STATISTICS), format_func=lambda one: f"{one}: {MEANING[one]}",
            key="contrast_basis", persist_state="session",
        )  # fmt: skip
    infos = [usable[name] for name in editors]
    st.caption(_estimate(infos, int(edits), min(int(induced), int(edits))))
    if len(editors) > MOST_EDITORS:
        st.warning(f"{len(editors)} editors are chosen; take at most {MOST_EDITORS}.", icon=":material/warning:")
    pressed = st.button(
        "Run this study", type="primary", icon=":material/play_arrow:", key="contrast_run",
        disabled=not 1 <= len(editors) <= MOST_EDITORS or bool(st.session_state.get("contrast_job")),
    )  # fmt: skip
    if pressed:
        try:
            name, job = desk.studies.start_contrast(
                model.name, editors, int(edits), owner(), label=str(label), basis=str(basis), induced=int(induced),
                seed=int(seed),
            )  # fmt: skip
        except ActionableError as error:
            tell(error)
            return
        _started(name, job)


def _estimate(infos: list[MethodInfo], edits: int, induced: int) -> str:
    """How long it takes, from what single edits took; methods without a time count as the mean of the others."""
    if not infos:
        return "Choose at least one editor."
    known = [info.seconds_estimate for info in infos if info.seconds_estimate is not None]
    text = f"{edits} edits by {len(infos)} editor{'s' if len(infos) > 1 else ''}: {edits * len(infos)} questions"
    if induced:
        text += f", and up to {3 * induced * len(infos)} more where failures have to be induced"
    if known:
        each = sum(known) / len(known)
        text += f"; about {seconds(each * edits * len(infos))}"
        text += f", at most {seconds(each * len(infos) * (edits + 3 * induced))}" if induced else ""
        text += " (some of these methods have not been timed here)" if len(known) < len(infos) else ""
    return (
        f"{text}. What is stored answers at once, so a study that was stopped goes on where it was. While it runs, "
        "other people's questions are answered in between; your own wait."
    )


@st.fragment
@told
def _mine(model: ModelInfo) -> None:
    desk = service()
    st.subheader("Of my runs", anchor=False)
    counts = desk.studies.own_runs(model.name, owner())
    st.caption(
        "Your runs of single edits with an original object, the newest of each edit. It takes "
        f"{FEWEST_MINE} that worked for D, and {FEWEST_MINE} that failed as well for K and C."
    )
    if not counts:
        st.info(
            f"You have no such runs of this model yet: {FEWEST_MINE} are missing for one editor. Make edits on the "
            "edit page, or compare methods; they are counted here.",
            icon=":material/history:",
        )
        return
    rows = [
        {
            "editor": one.editor,
            "worked": one.worked,
            "failed": one.failed,
            "missing for D": max(0, FEWEST_MINE - one.worked),
            "missing for K and C": max(0, FEWEST_MINE - one.failed),
        }
        for one in counts
    ]
    st.dataframe(pd.DataFrame(rows), hide_index=True, key="contrast_mine", alt="Your runs by editor and outcome")
    enough = [one.editor for one in counts if one.worked >= FEWEST_MINE]
    if not enough:
        best = max(counts, key=lambda one: one.worked)
        st.caption(f"{md(best.editor)} comes closest: {FEWEST_MINE - best.worked} more that work.")
        return
    editors = st.pills("Editors of my runs", enough, selection_mode="multi", default=enough, key="contrast_mine_pick")
    label = st.selectbox(
        "A success of my runs", list(LABELS), format_func=lambda one: LABELS[one], key="contrast_mine_label"
    )
    if st.button("Contrast my runs", icon=":material/balance:", disabled=not editors, key="contrast_mine_run"):
        try:
            name, job = desk.studies.start_contrast_of_mine(model.name, editors, owner(), label=str(label))
        except ActionableError as error:
            tell(error)
            return
        _started(name, job)


def _started(name: str, job: str | None) -> None:
    """Watch the job, or open what is there already."""
    if job is None:
        st.query_params["study"] = name
    else:
        progress.begin("contrast", job)
    st.rerun()
