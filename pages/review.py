"""Failure review: Look at failures one by one and say what went wrong."""

import streamlit as st

from pages.components import frame, review_case, review_desk, review_list, review_together

frame.enter()

st.title("Failure review", anchor=False)
sitting = review_desk.sit()
if not sitting.token and not sitting.cases:
    st.caption("Look at edits one by one and say what went wrong, alone or with others.")
    review_list.choose_queue(sitting)
    review_list.nothing_yet()
    st.stop()

left, right = st.columns([3, 7], gap="large")
with left:
    review_list.choose_queue(sitting)
    if sitting.token:
        review_list.name_yourself()
    shown = review_list.draw(sitting)
    case = review_desk.current(sitting, shown)
    review_list.table(sitting, shown, case)
    review_together.actions(sitting, shown)
with right:
    if case is not None:
        review_case.steps(sitting, shown)
        review_case.draw(sitting, shown, case)
review_together.together(sitting)
