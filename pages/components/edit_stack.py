"""The person's stack of a model: edits made one after the other, each of which can be taken out again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import streamlit as st

from mega_core.errors import ActionableError
from mega_core.jobs import JobView
from mega_core.records import Inspection, Report
from mega_core.service import StackCheck, StackedEdit
from mega_core.service.stacks import MAX_STACKED, holds
from mega_core.summary import percent
from pages.components import progress
from pages.components.figure import About, download, heading
from pages.components.session import owner, service, tell
from pages.components.text import md

SLOT = "stack"
ABOUT = About(
    "Edits of one model that are meant to hold together. Adding one prepares it on the model with the earlier edits of "
    "its weights in place; the base model itself is never changed.",
    "Undo takes one edit's change out and leaves the others as they were prepared. The check applies all of them, asks "
    "for every fact, looks for signs of damage, and gives the model back bit for bit.",
    "What stays after an undo is not what a stack without that edit would have learned. Steered edits, memories and "
    "texts are fitted without each other.",
)
KINDS = {
    "weights": "weights",
    "steering": "steering",
    "prefix": "text before the prompt",
    "in-context": "text before the prompt",
    "codebook": "memory",
    "side-memory": "memory",
}


def draw(report: Report) -> None:
    """The stack of this run's model, with a button that puts the run on it."""
    model = report.question.model.name
    heading("Stack of edits", ABOUT)
    if not any(info.name == model and info.available for info in service().models()):
        st.caption(f"{md(model)} is not on this machine, and edits are stacked on a model that is.")
        return
    live = bool(progress.live(SLOT))
    if live:
        progress.draw(SLOT, _done)
    else:
        progress.failure(SLOT)
    try:
        edits = service().stacks.mine(model, owner())
    except ActionableError as error:
        tell(error)
        _removal(model, live)
        return
    _told_once()
    _buttons(report.question, model, edits, live)
    if not edits:
        st.caption(
            f"Your stack on {md(model)} is empty. Edits you add are kept on this machine, so you find them again after "
            "a restart."
        )
        return
    check = _check_of(model, edits)
    for edit in edits:
        _row(edit, model, check, live)
    if check is not None:
        _damage(check)
    _removal(model, live)


def _buttons(plan: Inspection, model: str, edits: Sequence[StackedEdit], live: bool) -> None:
    there = any(holds(edit, plan) for edit in edits)
    full = len(edits) >= MAX_STACKED
    why = "This very edit is in the stack." if there else f"There are {MAX_STACKED} edits already." if full else None
    with st.container(horizontal=True, gap="small"):
        if st.button(
            "This edit is in the stack" if there else "Add to stack",
            icon=":material/check:" if there else ":material/add_to_photos:",
            disabled=live or there or full,
            help=why or "Prepares this edit once more, on top of the edits that are there.",
            key="stack_add",
        ):
            _begin(lambda: service().stacks.start_add(plan, owner()), f"Added by {plan.method.name.upper()}.")
        if edits:
            if st.button(
                "Check all",
                icon=":material/fact_check:",
                disabled=live,
                help="Applies every edit, asks for each fact and looks for signs of damage.",
                key="stack_check",
            ):
                st.session_state["stack_checked_names"] = tuple(edit.name for edit in edits)
                st.session_state["stack_checked_model"] = model
                _begin(lambda: service().stacks.start_check(model, owner()), "")
            with st.popover("Export", icon=":material/download:", width="content"):
                st.caption(
                    "The zip is a folder for `python -m mega_core stack`. `python -m mega_core export --stack FOLDER "
                    "--out NEW` writes the model with these edits in its weights; it refuses edits that steer, "
                    "remember or prompt, because they are not in the weights."
                )
                download(
                    "Stack as zip", lambda: service().stacks.packed(model, owner()), f"stack-{model}.zip",
                    "application/zip", key="stack_zip",
                )  # fmt: skip


def _row(edit: StackedEdit, model: str, check: StackCheck | None, live: bool) -> None:
    with (
        st.container(border=True, key=f"stacked_{edit.name}"),
        st.container(horizontal=True, vertical_alignment="center", gap="small"),
    ):
        with st.container(gap=None, width="stretch"):
            for request in edit.requests:
                original = f" :gray[~~{md(request.target_true)}~~]" if request.target_true else ""
                st.markdown(f"{md(request.prompt)}{original} **{md(request.target_new)}**{_held(edit, check)}")
            st.caption(f"{md(edit.name)} · {md(edit.method.name.upper())} · {md(KINDS.get(edit.kind, edit.kind))}")
        if st.button(
            f"Undo {edit.name}", icon=":material/undo:", disabled=live, key=f"undo_{edit.name}", width="content"
        ):
            _begin(
                lambda: service().stacks.start_undo(model, edit.name, owner()),
                f"{edit.name} was taken out; the others are as they were.",
            )


def _held(edit: StackedEdit, check: StackCheck | None) -> str:
    if check is None:
        return ""
    mine = [held for held in check.held if held.edit == edit.name]
    if not mine:
        return ""
    if all(held.says_new for held in mine):
        return f" :green-badge[:material/check: holds, {percent(mine[0].prob)}]"
    return f" :red-badge[:material/close: lost, {percent(mine[0].prob)}]"


def _damage(check: StackCheck) -> None:
    kept = sum(held.says_new for held in check.held)
    facts = "fact" if len(check.held) == 1 else "facts"
    st.markdown(f"**{kept} of {len(check.held)} {facts} {'holds' if kept == 1 else 'hold'} with every edit applied.**")
    for sign in check.raised:
        st.warning(md(sign), icon=":material/warning:")
    if not check.raised:
        st.caption(":material/health_and_safety: No sign of damage passed its limit.")
    quiet = [sign for sign in check.signs if sign not in check.raised]
    if quiet:
        with st.expander("Signs of damage that were looked for", icon=":material/monitor_heart:"):
            for sign in quiet:
                st.caption(md(sign))
    word = "Restored, bit for bit" if check.receipt.restored else "Not restored: the model was dropped"
    st.caption(f":material/verified: {word}, digest {md(check.receipt.weights_digest_after[:12])}")


def _removal(model: str, live: bool) -> None:
    with st.popover("Remove the whole stack", icon=":material/delete:", width="content", disabled=live):
        st.caption("Every edit in it goes. The runs stay in your history.")
        if st.button("Remove it", icon=":material/delete:", key="stack_remove"):
            _begin(lambda: service().stacks.start_removal(model, owner()), "The stack is gone.")


def _begin(queue: Callable[[], str], said: str) -> None:
    """Queue the work and watch it; `said` is told when it is done."""
    try:
        job = queue()
    except ActionableError as error:
        tell(error)
        return
    st.session_state["stack_said"] = said
    progress.begin(SLOT, job)
    st.rerun()


def _done(view: JobView) -> None:
    found = service().result(view.id, owner())
    if isinstance(found, StackCheck):
        st.session_state["stack_checked"] = found
    st.session_state["stack_tell"] = st.session_state.pop("stack_said", "")


def _told_once() -> None:
    said = st.session_state.pop("stack_tell", "")
    if said:
        st.success(md(said), icon=":material/check_circle:")


def _check_of(model: str, edits: Sequence[StackedEdit]) -> StackCheck | None:
    """The last check, while the stack is still the one that was checked."""
    names = tuple(edit.name for edit in edits)
    same = (st.session_state.get("stack_checked_model"), st.session_state.get("stack_checked_names")) == (model, names)
    found: StackCheck | None = st.session_state.get("stack_checked")
    return found if same else None
