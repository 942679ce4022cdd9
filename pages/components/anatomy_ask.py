"""Views that a run hasn't got: what they would show, what they cost, and a button that asks the same question with
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import streamlit as st

from mega_core.errors import ActionableError
from mega_core.jobs import JobView
from mega_core.records import Report
from pages.components import progress
from pages.components.session import owner, service, show_run, start, tell
from pages.components.text import md, seconds

SLOT = "anatomy"
FORWARDS = {
    "superficiality": "It adds one pass of the model per prefix and state.",
    "trace": "The slowest view: one pass of the model per noise draw, layer and token of the subject and behind it.",
}
"""What a view costs beside the run itself, where that is more than reading the run's own passes again."""


def lacking(report: Report, asks: Sequence[str]) -> list[str]:
    """Which of these views the run was not asked for."""
    has = {text.partition("?")[0] for text in report.question.views}
    return [view.name for view in service().views() if view.name in asks and view.name not in has]


def offer(report: Report, names: Sequence[str]) -> None:
    """What the views would show and cost, and the buttons that measure them, or all that are missing."""
    views = {view.name: view for view in service().views()}
    with st.container(border=True):
        st.subheader("Not measured in this run", anchor=False)
        for name in names:
            st.markdown(f"**{md(views[name].title)}.** {md(views[name].summary)}")
        st.caption(f"{cost(report, names)} The result is a run of its own, and this page goes on with it.")
        every = lacking(report, list(views))
        with st.container(horizontal=True, gap="small"):
            _button(report, "Measure it" if len(names) == 1 else "Measure them", names, "one", primary=True)
            if set(every) - set(names):
                _button(report, f"Measure all {len(every)} missing views", every, "all")


def offer_all(report: Report) -> None:
    """One quiet line at the end of the page for what is missing elsewhere."""
    names = lacking(report, [view.name for view in service().views()])
    if names:
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.caption(f"{len(names)} views of this run are not measured yet.", width="content")
            _button(report, "Measure all views", names, "all")


def cost(report: Report, names: Sequence[str]) -> str:
    """What measuring takes, from this run's own time."""
    took = sum(report.timing.values())
    more = " ".join(FORWARDS[name] for name in names if name in FORWARDS)
    reads = "" if len(more) and len(names) == 1 else " Looking inside reads the same passes of the model."
    return f"The same edit is made again; this run took {seconds(took)}.{reads} {more}".strip()


def split_every_head(report: Report, heads: int) -> None:
    """A button that has all heads of the model split by source token."""
    views = [text for text in report.question.views if text.partition("?")[0] != "heads"]
    _button(report, f"Split all {heads} heads", [f"heads?heads={min(heads, 200)}"], "heads", base=views)


def _button(
    report: Report,
    label: str,
    names: Sequence[str],
    key: str,
    *,
    primary: bool = False,
    base: Sequence[str] | None = None,
) -> None:
    busy = progress.live(SLOT) is not None
    pressed = st.button(
        label, icon=":material/troubleshoot:", key=f"anatomy_measure_{key}", type="primary" if primary else "secondary",
        disabled=busy, help="A measurement is at work already." if busy else None,
    )  # fmt: skip
    if not pressed:
        return
    views = (*(report.question.views if base is None else base), *names)
    try:
        start(replace(report.question, views=views), SLOT)
    except ActionableError as error:
        tell(error)
        return
    st.rerun()


def done(view: JobView) -> None:
    """The run with the new views is there: look at it."""
    show_run(view.digest)
    report = service().cached(view.digest)
    if report is not None:
        service().visited(report, owner())
