"""One mask: train one binary mask that undoes edits, judge it, and look for edits in a model's folder."""

import streamlit as st

from mega_core.jobs import JobView
from pages.components import frame, mask_detector, mask_form, mask_view, progress
from pages.components.session import owner, service

frame.enter()
desk = service()
MASK, DETECTOR = "One mask", "Detector"


def trained(view: JobView) -> None:
    """A mask was trained or judged: show it."""
    mask_form.show(desk.result(view.id, owner()))


def detected(view: JobView) -> None:
    """A report is there: show it."""
    mask_detector.show(desk.result(view.id, owner()))


st.title("One mask", anchor=False)
st.caption("One binary mask that undoes many edits, and a detector that says whether a model was edited.")
link = st.query_params.get("detection")
if "mask_part" not in st.session_state or link not in (None, st.session_state.get("mask_link")):
    st.session_state["mask_part"] = DETECTOR if link is not None else MASK
st.session_state["mask_link"] = link
part = st.segmented_control(
    "What to look at", [MASK, DETECTOR], key="mask_part", required=True, persist_state="session"
)

left, right = st.columns([1, 2], gap="large")
if part == DETECTOR:
    st.query_params.pop("mask", None)
    report, unknown = mask_detector.shown()
    job = progress.live("detect")
    with left:
        mask_detector.form()
        mask_detector.choose(report)
    with right:
        if job:
            progress.draw("detect", detected, first_time="The models are loaded from their files first.")
        else:
            progress.failure("detect")
            if unknown:
                st.warning("This report is not kept here. Look for edits again.", icon=":material/link_off:")
            if report is None:
                mask_detector.empty()
            else:
                mask_detector.draw(report)
else:
    st.query_params.pop("detection", None)
    kept, unknown = mask_form.shown()
    job = progress.live("mask")
    with left:
        mask_form.draw()
        mask_form.choose(kept)
    with right:
        if job:
            progress.draw("mask", trained)
        else:
            progress.failure("mask")
            if unknown:
                st.warning(
                    "This mask is not kept here. Training it again gives the same mask.", icon=":material/link_off:"
                )
        if kept is None and not job:
            mask_form.empty()
        elif kept is not None:
            mask_view.head(kept)
    if kept is not None:
        mask_view.draw(kept)
