"""Multi-hop: does an edited fact carry through a chain of facts, and where does the chain break?"""

import streamlit as st

from mega_core.errors import ActionableError
from mega_core.jobs import JobView
from mega_core.service.chains import Traced
from pages.components import frame, multihop_pick, multihop_view
from pages.components.session import owner, service, tell

frame.enter()
desk = service()


def done(view: JobView) -> None:
    """The chain has been asked: show it."""
    st.query_params["chain"] = str(desk.result(view.id, owner()))


st.title("Multi-hop", anchor=False)
st.caption(
    "A question through several facts tells whether an edit is used, not only repeated: each step before and after the "
    "edit, where the chain breaks, and which neurons carry it."
)

asked = st.query_params.get("chain")
found: Traced | None = None
try:
    found = desk.chains.traced(asked) if asked else None
    if asked and found is None:
        st.warning(
            "The chain of this link is not stored here: it was asked elsewhere or has been cleared. Asking it again "
            "gives the same answers.",
            icon=":material/link_off:",
        )
except ActionableError as error:
    tell(error)

multihop_pick.earlier()
if found is not None:
    multihop_view.draw(found)
else:
    st.info(
        "Nothing is asked yet. Choose a chain below: you will see every step with its answer before and after the "
        "edit, the step at which the chain breaks with each method, and the value and query neurons of its path.",
        icon=":material/route:",
    )
multihop_pick.draw(done, another=found is not None)
