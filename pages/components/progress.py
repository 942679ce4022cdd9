"""What stands where a result will be: the work in progress, or its failure.

Work is known by its slot, such as "edit" or "mask": the kind that the service gives its jobs. A page begins a job,
draws it while it lives, and is told once when it is done. A reload loses the session but not the work: a live job of
this person and kind is found again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import streamlit as st

from mega_core.errors import ActionableError
from mega_core.jobs import JobError, JobView, StageView
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
    "methods": "Methods, one after the other",
    "edits": "Compute the edits",
    "alpha": "Find the strength",
    "activations": "Read activations",
    "contributions": "Read contributions",
    "demonstrations": "Choose demonstrations",
    "neighbours": "Look for neighbours",
    "pathway": "Find query and value neurons",
    "check": "Check every edit",
    "verify": "Take it out of the running model",
    "strengths": "Try the strengths",
    "asking": "Ask every step",
    "texts": "Read ordinary texts",
    "samples": "Write samples",
    "neurons": "Score value neurons",
    "query": "Score query neurons",
    "layers": "Spread the change over the layers",
    "contexts": "Choose contexts that the model follows",
    "heads": "Read what the heads say",
    "differences": "Compare the weights",
    "variants": "Try variants of the edit",
    "checks": "Check every part",
    "undo": "Take one edit back",
    "masks": "Compare with other masks",
    "spectra": "Look at the spectra",
}
FINISHED_SHOWN = 3
"""Finished stages that are listed; the box stays in view, so it must not grow with the work."""

Done = Callable[[JobView], None]


def begin(slot: str, job_id: str) -> None:
    """Watch this job from now on."""
    st.session_state[f"{slot}_job"] = job_id
    st.session_state.pop(f"{slot}_failure", None)
    st.session_state.pop(f"{slot}_cancelled", None)


def live(slot: str) -> str | None:
    """The job being watched, or one of this kind that is still at work for this person; None when there is none."""
    job_id = st.session_state.get(f"{slot}_job")
    if job_id is None and not st.session_state.get(f"{slot}_looked"):
        st.session_state[f"{slot}_looked"] = True
        mine = [view for view in service().jobs(owner()) if view.kind == slot and not view.over]
        if mine:
            job_id = st.session_state[f"{slot}_job"] = mine[-1].id
    return job_id


def draw(slot: str, done: Done, *, first_time: str = "") -> None:
    """The stages of the slot's job, polled while it is live. When it is over the whole page is drawn once more, with
    the result or the failure.

    `done` is told when the work brought a result (job.digest, or service().result(job.id)); `first_time` is said while
    nothing is known of the work yet.
    """
    job_id = live(slot)
    if job_id is not None:
        with _in_view(f"work_{slot}"):
            st.fragment(_live, run_every=_pause(job_id))(slot, job_id, done, first_time)


def _in_view(key: str) -> st.delta_generator.DeltaGenerator:
    """A place that stays at the foot of the window while what is above it is longer: frame.css does it by the key."""
    return st.container(key=key)


def _pause(job_id: str) -> float:
    """Seconds between two looks at a job: one that has others before it is looked at less often."""
    with suppress(ActionableError):
        return 1.0 if service().job(job_id, owner()).ahead else 0.5
    return 0.5


@told
def _live(slot: str, job_id: str, done: Done, first_time: str) -> None:
    desk = service()
    try:
        view = desk.job(job_id, owner())
    except ActionableError as error:  # forgotten, as after a restart
        _end(slot, JobError(error.what, error.next_step, "", error.code))
        return
    if view.over:
        if view.state == "done":
            try:
                done(view)
            except ActionableError as error:
                _end(slot, JobError(error.what, error.next_step, "", error.code))
        _end(slot, view.error, cancelled=view.state == "cancelled")
        return
    with st.container(border=True):
        st.header(_heading(view), anchor=False)
        st.progress(view.fraction or 0.0)
        lines = _lines(view.stages)
        if lines:
            st.markdown("  \n".join(lines))
        else:
            st.caption(first_time or "The first edit after a start also loads the libraries and the model.")
        for note in view.notes:
            st.caption(f":material/info: {md(note)}")
        st.button("Cancel", icon=":material/stop_circle:", key=f"{slot}_cancel", on_click=_cancel, args=(job_id,))


def _heading(view: JobView) -> str:
    if view.state == "queued":
        return "Waiting: you are next" if view.ahead == 0 else f"Waiting: {view.ahead} before you"
    parts = [f"Running for {seconds(view.seconds)}"]
    if view.eta_seconds is not None:
        parts.append(f"about {seconds(view.eta_seconds)} left")
    return ", ".join(parts)


def _lines(stages: Sequence[StageView]) -> list[str]:
    """What is under way and the last finished stages, each a line; those finished before are counted in one."""
    earlier = max(0, sum(stage.finished for stage in stages) - FINISHED_SHOWN)
    lines, skipped = [], 0
    for stage in stages:
        if stage.finished and skipped < earlier:
            skipped += 1
        else:
            lines.append(_line(stage.name, stage.finished, stage.done, stage.total, stage.seconds))
    counted = f":material/check_circle: {earlier} earlier step{'s' if earlier > 1 else ''}"
    return [counted, *lines] if earlier else lines


def _line(name: str, finished: bool, done: int, total: int | None, took: float) -> str:
    icon = ":material/check_circle:" if finished else ":material/progress_activity:"
    steps = f" {done} of {total}" if total and not finished else ""
    return f"{icon} {md(STAGE_WORDS.get(name, name[:1].upper() + name[1:]))}{steps} :gray[{seconds(took)}]"


def _cancel(job_id: str) -> None:
    with suppress(ActionableError):  # it was over already; the next look says how
        service().cancel(job_id, owner())


def _end(slot: str, error: JobError | None, *, cancelled: bool = False) -> None:
    st.session_state.pop(f"{slot}_job", None)
    st.session_state[f"{slot}_failure"] = error
    st.session_state[f"{slot}_cancelled"] = cancelled
    st.rerun()


def failure(slot: str) -> bool:
    """How the slot's last job ended when it gave no result; said once. Whether there was anything to say."""
    error: JobError | None = st.session_state.pop(f"{slot}_failure", None)
    cancelled = bool(st.session_state.pop(f"{slot}_cancelled", False))
    if not cancelled and error is None:
        return False
    with _in_view(f"work_{slot}_over"):
        if cancelled:
            st.info("Cancelled. The model was given back as it was; your input is kept.", icon=":material/stop_circle:")
        elif error is not None:
            number = (
                f" Error id `{md(error.error_id)}`: look for it in the log of the server." if error.error_id else ""
            )
            st.error(f"**{md(error.what)}** {md(error.next_step)}{number}", icon=":material/error:")
    return True
