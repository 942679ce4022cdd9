"""The state of a review: which queue, who reviews, which case, and what a key press does.

Everything a press needs is looked up afresh in its callback: presses can come faster than pages are drawn. An opinion
goes to the case that was on the screen when it was given; the case on the screen is the run of the address.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import sha256
from typing import Any
from unicodedata import normalize
from zoneinfo import ZoneInfo

import streamlit as st

from mega_core.errors import ActionableError
from mega_core.notebook import Opinion
from mega_core.service.reviews import ME, Case
from pages.components.session import owner, run_in_address, service, show_run, shown_run, tell

KEPT_UNDO = 200


@dataclass(frozen=True, slots=True)
class Sitting:
    """One person before one queue."""

    token: str
    """Empty for the own runs."""
    title: str
    mine: bool
    """Whether this session made the queue."""
    reviewer: str
    """Empty while a shared queue waits for a name."""
    cases: tuple[Case, ...]

    def place(self, digest: str) -> Place:
        """Where an opinion of this case goes."""
        return Place(self.token, self.reviewer, digest)


@dataclass(frozen=True, slots=True)
class Place:
    """Queue, reviewer and case of one opinion."""

    token: str
    reviewer: str
    digest: str

    def key(self, part: str) -> str:
        """The key of a field about this place. After an undo it is another field, with the text it had before."""
        place = sha256(repr(self).encode()).hexdigest()[:16]
        return f"review_{part}_{place}_{st.session_state.get('review_undone', 0)}"


def sit() -> Sitting:
    """The queue of the address, else the one that was open last, else the own runs."""
    desk = service()
    asked = st.query_params.get("queue")
    token = asked if asked is not None else str(st.session_state.get("review_token", ""))
    if token:
        try:
            queue = desk.reviews.queue(token)
            cases = desk.reviews.cases(token, owner())
        except ActionableError as error:
            tell(error)
            open_queue("")
        else:
            run = run_in_address()
            if asked is not None or run is None or run in {case.run.digest for case in cases}:
                open_queue(token)
                st.session_state.setdefault("review_known", {})[token] = queue.title
                return Sitting(token, queue.title, queue.owner == owner(), _name(), cases)
            open_queue("")
    cases = desk.reviews.cases("", owner())
    run = shown_run()
    if run and run not in {case.run.digest for case in cases}:
        report = desk.cached(run)
        if report is not None:
            desk.visited(report, owner())
            cases = desk.reviews.cases("", owner())
    return Sitting("", "My runs", True, ME, cases)


def _name() -> str:
    """The reviewer's name as the notebook keeps it."""
    return normalize("NFC", " ".join(str(st.session_state.get("review_name") or "").split()))


def open_queue(token: str) -> None:
    """Make this the queue that is reviewed, and put it into the address."""
    st.session_state["review_token"] = token
    if token:
        st.query_params["queue"] = token
    else:
        st.query_params.pop("queue", None)


def current(sitting: Sitting, shown: tuple[Case, ...]) -> Case | None:
    """The case on the screen: that of the address when the queue has it, else the first that the filters leave."""
    asked = shown_run()
    case = next((case for case in sitting.cases if case.run.digest == asked), shown[0] if shown else None)
    if case is not None and case.run.digest != asked:
        show_run(case.run.digest)
    return case


# What a press does -----------------------------------------------------------------------------------------------


def go(digest: str) -> None:
    """Bring a case to the screen."""
    show_run(digest)


def move(order: list[str], shown: set[str], step: int) -> None:
    """To the next (or previous) case that the filters leave, seen from the one on the screen."""
    at = shown_run()
    start = order.index(at) if at in order else -step
    ahead = order[start + 1 :] if step > 0 else order[:start][::-1] if start > 0 else []
    target = next((digest for digest in ahead if digest in shown), None)
    if target is None:
        st.toast("This is the last case." if step > 0 else "This is the first case.", icon=":material/last_page:")
    else:
        go(target)


def choose(place: Place, part: str, value: str | int) -> None:
    """Say one thing of a case, or take it back when it was said."""
    try:
        said = service().reviews.said(place.token, owner(), place.digest, place.reviewer)
    except ActionableError as error:
        st.session_state["review_trouble"] = error
        return
    _say(place, **{part: getattr(Opinion(), part) if getattr(said, part) == value else value})


def take(place: Place, part: str, key: str) -> None:
    """Say what the case's note or tags field holds."""
    value = st.session_state.get(key)
    _say(place, **{part: tuple(value or ()) if part == "tags" else value or ""})


def undo(token: str, reviewer: str) -> None:
    """Take the last change of this reviewer in this queue back, and bring its case to the screen."""
    stack: list[tuple[Place, Opinion]] = st.session_state.get("review_undo", [])
    mine = [i for i, (place, _) in enumerate(stack) if (place.token, place.reviewer) == (token, reviewer)]
    if not mine:
        return
    place, before = stack[mine[-1]]
    try:
        service().reviews.label(place.token, owner(), place.digest, place.reviewer, before)
    except ActionableError as error:
        st.session_state["review_trouble"] = error
        return
    del stack[mine[-1]]
    st.session_state["review_undone"] = st.session_state.get("review_undone", 0) + 1
    st.session_state["review_saved"] = (place, _clock())
    go(place.digest)
    st.toast("The last change is undone.", icon=":material/undo:")


def can_undo(sitting: Sitting) -> bool:
    """Whether there is a change to take back."""
    stack: list[tuple[Place, Opinion]] = st.session_state.get("review_undo", [])
    return any((place.token, place.reviewer) == (sitting.token, sitting.reviewer) for place, _ in stack)


def saved_at(place: Place) -> str:
    """When this visit last saved something of this case; empty when it has not."""
    last, when = st.session_state.get("review_saved", (None, ""))
    return when if last == place else ""


def trouble() -> None:
    """Tell why the last change was not saved; once."""
    error = st.session_state.pop("review_trouble", None)
    if error is not None:
        tell(error)


def _say(place: Place, **changes: Any) -> None:
    reviews = service().reviews
    try:
        before = reviews.said(place.token, owner(), place.digest, place.reviewer)
        after = replace(before, **changes)
        if after == before:
            return
        reviews.label(place.token, owner(), place.digest, place.reviewer, after)
    except ActionableError as error:
        st.session_state["review_trouble"] = error
        return
    stack = st.session_state.setdefault("review_undo", [])
    stack.append((place, before))
    del stack[:-KEPT_UNDO]
    st.session_state["review_saved"] = (place, _clock())


def _clock() -> str:
    """The time of day where the browser is."""
    try:
        zone = ZoneInfo(st.context.timezone or "UTC")
    except (ValueError, OSError, KeyError):
        zone = ZoneInfo("UTC")
    return datetime.now(zone).strftime("%H:%M:%S")
