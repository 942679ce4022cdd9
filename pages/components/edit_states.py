"""What the edit page shows in place of a result: an unknown run, or nothing yet."""

from __future__ import annotations

import streamlit as st

from mega_core.notebook import Entry
from pages.components import request_form


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
