"""Looking for knowledge edits in a model's folder that the operator has allowed."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from mega_core.service.masks import Detected
from pages.components import figure, mask_charts, progress
from pages.components.figure import About
from pages.components.mask_charts import SITES
from pages.components.mask_form import start
from pages.components.session import owner, service, told
from pages.components.text import clip, md, seconds, token_label

SHOW = "detection_shown"
SHOWN = 6
SCORE = About(
    "For every matrix that editors write to, how likely an edit of low rank is in it: 0 to 1. A ring marks those that "
    "are judged to hold one.",
    "With a reference: the difference of both matrices, its singular values and how flat and large its numbers are. "
    "Without: what stands out of the matrix along directions that ordinary text hardly uses. A linear model over these "
    "features gives the score (ours).",
    "Fitted on edits of the small teaching models; on other models the score is a hint. Dense training that comes "
    "after an edit hides it, and fine-tuning of low rank looks like one.",
)


def shown() -> tuple[Detected | None, bool]:
    """The report of the address, else the one last looked at; and whether the address named one that isn't here."""
    asked = st.query_params.get("detection")
    known = asked if asked is not None else st.session_state.get(SHOW)
    found = service().masks.detection(known) if known else None
    if found is not None:
        show(found.id)
    return found, asked is not None and found is None


def show(report_id: str) -> None:
    """Make this the report that the page is about."""
    st.session_state[SHOW] = report_id
    st.query_params["detection"] = report_id


@st.fragment
@told
def form() -> None:
    """Folder and reference."""
    desk = service()
    suspects = {one.id: one.label for one in desk.masks.suspects()}
    with st.container(border=True):
        st.header("Look for edits", anchor=False)
        if not suspects:
            st.markdown(
                "No folder is allowed yet. Whoever runs this app names folders of models before the start; the models "
                "in and below them can then be chosen here:"
            )
            st.code("MEGA_DETECT_DIRS=/srv/models,/srv/exports streamlit run app.py", language="bash", wrap_lines=True)
            st.caption(
                "python -m mega_core export writes an edited model into a folder; python -m mega_core mask detect "
                "looks at any folder from the command line."
            )
            return
        folder = st.selectbox(
            "Model folder", list(suspects), format_func=lambda one: suspects[one], key="detect_folder",
            help="The model folders in or below those that the operator allows.",
        )  # fmt: skip
        models = {"": "none: its own statistics only"} | {
            info.name: info.title for info in desk.models() if info.available
        }
        reference = st.selectbox(
            "Reference",
            list(models),
            format_func=lambda name: models[name],
            index=min(1, len(models) - 1),
            key="detect_reference",
            help="The model that this one was made from. With it the difference is looked at, which is far surer.",
        )
        if st.button(
            "Look for edits", type="primary", icon=":material/search:", key="detect_start", width="stretch",
            disabled=progress.live("detect") is not None,
        ):  # fmt: skip
            start(lambda: desk.masks.start_detecting(folder, reference, owner()), "detect")


def choose(found: Detected | None) -> None:
    """The reports that are here, in a list. Draws nothing when there is none."""
    every = {one.id: one for one in service().masks.detections()}
    if not every:
        return
    now = found.id if found is not None else None
    if st.session_state.get("detect_list") != now:
        st.session_state["detect_list"] = now
    st.selectbox(
        "Reports made here",
        list(every),
        format_func=lambda one: f"{every[one].label}: {every[one].verdict} · {one[:8]}",
        index=None,
        placeholder="open a report",
        key="detect_list",
        on_change=_opened,
    )


def _opened() -> None:
    chosen = st.session_state.get("detect_list")
    if chosen:
        show(chosen)


def empty() -> None:
    """What stands where a report will be."""
    with st.container(border=True):
        st.header("Was this model edited?", anchor=False)
        st.markdown(
            "Choose a model's folder. Every matrix that editors write to is examined; you will see which ones hold a "
            "change of few directions, what text it answers to, and what it makes the model say."
        )
        st.caption("No code of the folder is run; weights are read from safetensors files only.")


def verdict(found: Detected) -> None:
    """The report's headline."""
    suspects = found.matrices[found.matrices["kind"] == "low_rank"]
    against = f"against {md(found.reference)}" if found.reference else "without a reference"
    if len(suspects):
        where = ", ".join(
            f"layer {int(row.layer)} {SITES.get(str(row.site), str(row.site))}" for row in suspects.head(4).itertuples()
        )
        more = f" and {len(suspects) - 4} more" if len(suspects) > 4 else ""
        st.error(
            f"**Looks edited.** {len(suspects)} of {len(found.matrices)} matrices hold a low-rank change: "
            f"{where}{more}. Highest score {found.score:.2f}, {against}.",
            icon=":material/search:",
        )
    elif found.verdict in ("unchanged", "nothing unusual"):
        st.success(
            f"**No sign of an edit.** {md(found.verdict.capitalize())} in all {len(found.matrices)} matrices, "
            f"{against}.",
            icon=":material/check_circle:",
        )
    else:
        st.warning(
            f"**Changed, but not as editors change.** {md(found.verdict.capitalize())}, {against}.",
            icon=":material/info:",
        )


def draw(found: Detected) -> None:
    """The whole report."""
    st.header(md(found.label), anchor=False)
    verdict(found)
    for note in found.notes:
        st.caption(f":material/info: {md(note)}")
    rows = found.matrices.assign(site_name=found.matrices["site"].map(SITES))
    worst = rows.loc[rows["score"].idxmax()]
    figure.figure(
        "detect_scores",
        mask_charts.suspicion(rows),
        title="Matrix by matrix",
        reading=f"The most suspicious matrix is the {worst['site_name']} of layer {int(worst['layer'])}, score "
        f"{worst['score']:.2f}: {worst['verdict']}.",
        table=rows[["layer", "site_name", "score", "verdict", "rank", "share", "relative_norm"]],
        file=f"detection_{found.id[:8]}",
        about=SCORE,
        columns={
            "layer": "Layer", "site_name": "Matrix", "score": st.column_config.NumberColumn("Score", format="%.2f"),
            "verdict": "Verdict", "rank": "Rank",
            "share": st.column_config.NumberColumn("Energy in it", format="percent"),
            "relative_norm": st.column_config.NumberColumn("Relative length", format="%.3g"),
        },
    )  # fmt: skip
    _clues(found)
    st.header("Limits of the detector", anchor=False)
    st.markdown(
        "- The score was fitted on edits of the small teaching models, so on other models it is a hint, not evidence.\n"
        "- Without a reference only edits that stand out of a matrix's own statistics are seen.\n"
        "- Names are searched in ordinary text and the shipped fact tables; a subject in neither is not named.\n"
        "- Only the last matrices of the MLPs and of attention are examined; changes elsewhere show in the notes."
    )
    st.caption(f"Took {seconds(found.seconds)}.")


def _clues(found: Detected) -> None:
    figure.heading("What the edit answers to, and what it says")
    if not found.clues:
        st.caption("No matrix holds a change of few directions, so there is nothing to name.")
        return
    rows = []
    for one in found.clues:
        where = f"Layer {one['layer']} · {SITES.get(one['site'], one['site'])}"
        told_of = {
            "Answers to": [f"{clip(text.strip(), 50)} (×{size:.0f})" for text, size in one["places"][:SHOWN]],
            "Says there": [token_label(text) for text, _ in one["says"][:SHOWN]],
            "Promotes": [token_label(text) for text, _ in one["promoted"][:SHOWN]],
            "Suppresses": [token_label(text) for text, _ in one["suppressed"][:SHOWN]],
            "Weighs neurons": [f"{index} ({share:.0%})" for index, share in one["neurons"][:SHOWN]],
        }
        rows += [{"where": where, "what": what, "found": ", ".join(texts)} for what, texts in told_of.items()]
    st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        key="detect_clues",
        height="content" if len(rows) <= 10 else 400,
        column_config={"where": "Matrix", "what": "What", "found": "Strongest first"},
        alt="What each suspected matrix answers to and says",
    )
    first = found.clues[0]
    if first["places"] and first["says"]:
        said = ", ".join(md(token_label(text)) for text, _ in first["says"][:3])
        st.caption(
            f"The most suspected matrix answers to “{md(clip(first['places'][0][0].strip(), 60))}” and makes the model "
            f"say {said} more often there. A number after × is the answer's size against that to ordinary text."
        )
