"""Learn: the anatomy of an edit in eight steps."""

import streamlit as st

from mega_core.errors import ActionableError
from pages.components import frame, learn_view
from pages.components.session import tell

frame.enter()

st.title("Learn: the anatomy of an edit", anchor=False)
st.caption(
    "Eight short steps. In each you predict, look at the numbers, and read what they mean. Nothing here needs to be "
    "known beforehand."
)
at = learn_view.step_asked()
report = learn_view.followed()
if report is None:
    with st.container(border=True):
        st.header("There is no example to follow", anchor=False)
        st.markdown(
            "The steps explain a finished edit with its own numbers, and the shipped examples can't be read. Make an "
            "edit, then open this page with its link."
        )
        st.page_link("pages/edit.py", label="Make an edit", icon=":material/edit_note:")
else:
    learn_view.steps_list(report, at)
    try:
        learn_view.draw(report, at, st.context.url.split("?")[0] if st.context.url else "")
    except ActionableError as error:
        tell(error)
    learn_view.turn_page(at)
