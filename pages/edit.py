"""Edit trial: ask for one edit, watch it happen, read what it did."""

import streamlit as st

from mega_core.errors import ActionableError
from pages.components import frame, look_deeper, progress, report_view, request_form
from pages.components.session import owner, run_in_address, service, tell

frame.enter()
desk = service()
asked = run_in_address()
if asked is None and st.session_state.get("edit_shown") and not st.session_state.get("edit_job"):
    asked = st.session_state["edit_shown"]  # back from another page
    st.query_params["run"] = asked

report, trouble = None, None
if asked and not st.session_state.get("edit_job"):
    try:
        report = desk.cached(asked)
    except ActionableError as error:
        trouble = error
if report is not None and st.session_state.get("edit_filled") != report.digest:
    request_form.lay_down(request_form.draft_of_plan(report.question))
    st.session_state["edit_filled"] = report.digest
    desk.visited(report, owner())
if report is not None:
    st.session_state["edit_shown"] = report.digest

st.title("Edit trial", anchor=False)
if report is None:
    st.caption(
        "Change one fact of a language model and see what it says, what else moved, and where in the network it "
        "happened."
    )
else:
    report_view.headline(report, share_base=st.context.url.split("?")[0] if st.context.url else "")

left, right = st.columns([1, 2], gap="large")
with left:
    request_form.draw_form()
with right:
    if st.session_state.get("edit_job"):
        progress.draw(st.session_state["edit_job"])
    elif report is not None:
        progress.failure()
        report_view.answers(report)
    elif trouble is not None:
        tell(trouble)
    elif asked is not None:
        progress.unknown_run(asked, desk.entry(asked) if asked else None)
    else:
        progress.failure()
        progress.nothing_yet()
if report is not None:
    report_view.evidence(report)
    report_view.anatomy(report)
    look_deeper.draw(report)
    report_view.receipt(report)
elif asked is None:
    request_form.warm_up()  # whoever comes without a finished run is about to ask for one
