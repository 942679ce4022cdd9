"""Compare methods: one edit, several methods side by side."""

import streamlit as st

from mega_core.errors import ActionableError
from pages.components import compare_board, compare_form, frame, progress
from pages.components.session import owner, service, tell

frame.enter()
desk = service()
job_id = progress.live("compare")
job = None
try:
    job = desk.job(job_id, owner()) if job_id else None
except ActionableError:
    job = None  # forgotten: progress says so below
plans = compare_form.opened()

st.title("Compare methods", anchor=False)
st.caption("The same edit by up to six methods: what each makes the model say, what else moves, and at what cost.")
if plans == ():
    st.warning(
        "This comparison is not kept here: the link is damaged, or it was made elsewhere. Choose the edit and the "
        "methods again: the same edit gives the same numbers.",
        icon=":material/link_off:",
    )
compare_form.draw(plans or (), running=job_id is not None)
progress.failure("compare")
if job_id:
    progress.draw("compare", compare_board.done)
if plans:
    try:
        compare_board.draw(plans, job)
    except ActionableError as error:
        tell(error)
elif not job_id:
    compare_board.nothing_yet()
if job_id and job is not None and not job.over:
    compare_board.watch(job_id, compare_board.answered(job))
