"""Edit trial: ask for one edit, watch it happen, read what it did."""

import streamlit as st

from mega_core.errors import ActionableError
from mega_core.jobs import JobView
from pages.components import (
    anatomy_map,
    edit_headline,
    edit_stack,
    edit_states,
    edit_strength,
    frame,
    report_view,
    request_form,
)
from pages.components.session import owner, service, show_run, shown_run, tell

frame.enter()
desk = service()
asked = shown_run()


def done(view: JobView) -> None:
    """The run is there: show it."""
    st.session_state["edit_filled"] = view.digest
    show_run(view.digest)
    report = desk.cached(view.digest)
    if report is not None:
        desk.visited(report, owner())


report, trouble = None, None
if asked:
    try:
        report = desk.cached(asked)
    except ActionableError as error:
        trouble = error
if report is not None and st.session_state.get("edit_filled") != report.digest:
    request_form.lay_down(request_form.draft_of_plan(report.question))
    st.session_state["edit_filled"] = report.digest
    desk.visited(report, owner())
if report is not None:
    st.session_state["run_shown"] = report.digest

st.title("Edit trial", anchor=False)
if report is None:
    st.caption(
        "Change one fact of a language model and see what it says, what else moved, and where in the network it "
        "happened."
    )
else:
    edit_headline.draw(report)

# What a person came for is drawn first: what the models say, and the map; then the form, and the rest.
left, right = st.columns([1, 2], gap="large")
evidence, inside = st.container(), st.container()
with right:
    if report is not None:
        report_view.answers(report)
    elif trouble is not None:
        tell(trouble)
    elif asked is not None:
        edit_states.unknown_run(asked, desk.entry(asked) if asked else None)
    else:
        edit_states.nothing_yet()
if report is not None:
    with inside:
        anatomy_map.draw(report)
        edit_headline.ways(report, {"anatomy": "Look deeper into this run: heads, neurons, lens, causal trace"})
with left:
    request_form.draw_form()
    with st.container(key="work_edit_form"):  # stays in view below a form that doesn't fit: see frame.css
        request_form.draw_run(done)
if report is not None:
    with evidence:
        edit_strength.draw(report)
        report_view.evidence(report)
    report_view.receipt(report)
    edit_stack.draw(report)
elif asked is None:
    request_form.warm_up()  # whoever comes without a finished run is about to ask for one
