"""What stands where a result will be: the work in progress, its failure, an unknown run, or nothing yet."""

from __future__ import annotations

from contextlib import suppress

import streamlit as st

from mega_core.errors import ActionableError
from mega_core.jobs import JobError, JobView
from mega_core.notebook import Entry
from pages.components import request_form
from pages.components.session import owner, service, told
from pages.components.text import md, seconds

STAGE_WORDS = {
    "before": "Look at the base model",
    "edit": "Compute the edit",
    "key statistics": "Measure ordinary keys of the layer",
    "new value": "Find the new value",
    "after": "Look at the edited model",
    "answers": "Answer every prompt",
    "generations": "Write continuations",
    "views": "Look inside",
    "restore": "Give the model back",
    "ask": "Ask the model",
}


def draw(job_id: str) -> None:
    """The job's stages, polled while it is live. When it is over the whole page is drawn once more, with the result
    or the failure.
    """
    st.fragment(_live, run_every=0.5)(job_id)


@told
def _live(job_id: str) -> None:
    desk = service()
    try:
        view = desk.job(job_id, owner())
    except ActionableError as error:  # forgotten, as after a restart
        _end(JobError(error.what, error.next_step, "", error.code))
        return
    if view.over:
        if view.state == "done":
            st.session_state["edit_shown"] = st.session_state["edit_filled"] = view.digest
            st.query_params["run"] = view.digest
            report = desk.cached(view.digest)
            if report is not None:
                desk.visited(report, owner())
        _end(view.error, cancelled=view.state == "cancelled")
        return
    with st.container(border=True):
        st.header(_heading(view), anchor=False)
        if view.fraction is not None:
            st.progress(view.fraction)
        else:
            st.progress(0.0)
        for stage in view.stages:
            st.markdown(_line(stage.name, stage.finished, stage.done, stage.total, stage.seconds))
        if not view.stages:
            st.caption("The first edit after a start also loads the libraries and the model.")
        for note in view.notes:
            st.caption(f":material/info: {md(note)}")
        st.button("Cancel", icon=":material/stop_circle:", key="edit_cancel", on_click=_cancel, args=(job_id,))


def _heading(view: JobView) -> str:
    if view.state == "queued":
        return "Waiting: you are next" if view.ahead == 0 else f"Waiting: {view.ahead} before you"
    parts = [f"Running for {seconds(view.seconds)}"]
    if view.eta_seconds is not None:
        parts.append(f"about {seconds(view.eta_seconds)} left")
    return ", ".join(parts)


def _line(name: str, finished: bool, done: int, total: int | None, took: float) -> str:
    icon = ":material/check_circle:" if finished else ":material/progress_activity:"
    steps = f" {done} of {total}" if total and not finished else ""
    return f"{icon} {md(STAGE_WORDS.get(name, name.replace('_', ' ').capitalize()))}{steps} :gray[{seconds(took)}]"


def _cancel(job_id: str) -> None:
    with suppress(ActionableError):  # it was over already; the next look says how
        service().cancel(job_id, owner())


def _end(error: JobError | None, *, cancelled: bool = False) -> None:
    st.session_state.pop("edit_job", None)
    st.session_state["edit_failure"] = error
    st.session_state["edit_cancelled"] = cancelled
    before = st.session_state.pop("edit_before", None)
    if before and (error is not None or cancelled):  # the run that more was asked about is still there
        st.session_state["edit_shown"] = st.query_params["run"] = before
    st.rerun()


def failure() -> None:
    """How the last job ended when it gave no result; said once."""
    error: JobError | None = st.session_state.pop("edit_failure", None)
    if st.session_state.pop("edit_cancelled", False):
        st.info("Cancelled. The model was given back as it was; your input is kept.", icon=":material/stop_circle:")
    elif error is not None:
        number = f" Error id `{md(error.error_id)}`: look for it in the log of the server." if error.error_id else ""
        st.error(f"**{md(error.what)}** {md(error.next_step)}{number}", icon=":material/error:")


def unknown_run(digest: str, entry: Entry | None) -> None:
    """A link to a run whose result isn't here. Never starts work; what the notebook still knows fills the form."""
    with st.container(border=True):
        st.header("This run is not stored here", anchor=False)
        if not digest:
            st.markdown(
                "The link's run id is damaged: it should have 64 characters. Ask for the link again, or make the edit "
                "in the form."
            )
        elif entry is None:
            st.markdown(
                "Its result was made on another machine or has been cleared. Make the edit in the form: the same edit "
                "gives the same numbers."
            )
        else:
            st.markdown(
                "Its result has been cleared to make room. The form can be filled from the history; **Run this edit** "
                "makes it again."
            )
            st.button("Fill the form", icon=":material/edit_note:", on_click=_refill, args=(entry,), key="edit_refill")


def _refill(entry: Entry) -> None:
    run = entry.run
    request_form.lay_down(
        {
            "edit_subject": run.subject,
            "edit_template": run.template,
            "edit_new": run.target_new,
            "edit_true": run.target_true or "",
            "edit_model": run.model,
            "edit_method": run.method,
        }
    )


def nothing_yet() -> None:
    """What will appear here."""
    with st.container(border=True):
        st.header("What you will see here", anchor=False)
        st.markdown(
            ":material/verified: **A verdict in words**, with the probabilities behind it\n\n"
            ":material/compare: **Base and edited model side by side**, differing words marked\n\n"
            ":material/bar_chart: **What the next token would be**, before and after\n\n"
            ":material/checklist: **Evidence prompt by prompt**: paraphrases that should follow, neighbours that "
            "should not\n\n"
            ":material/grid_on: **Where in the network it happened**, by layer and module\n\n"
            ":material/receipt_long: **A receipt**: what was changed, and proof that it was undone"
        )
        st.caption("Choose an example or fill in the form, then press Run this edit (Ctrl+Enter).")
