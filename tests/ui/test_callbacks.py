"""A callback runs to its end, whatever the browser sends meanwhile."""

from __future__ import annotations

import tomllib
from pathlib import Path

from streamlit.testing.v1 import AppTest

from pages.components import callbacks


def page() -> None:
    """A page where the next message arrives in the middle of a callback."""
    import streamlit as st
    from streamlit.runtime.scriptrunner import get_script_run_ctx
    from streamlit.runtime.scriptrunner_utils.script_requests import RerunData

    def pressed() -> None:
        context = get_script_run_ctx()
        assert context is not None
        assert context.script_requests is not None
        context.script_requests.request_rerun(RerunData(page_script_hash=context.page_script_hash))
        st.session_state["first"] = "done"
        st.toast("saved")
        st.session_state["second"] = "done"

    st.button("Press", on_click=pressed)
    st.text(f"{st.session_state.get('first')} {st.session_state.get('second')}")


def test_a_callback_is_not_broken_off_by_the_next_message():
    callbacks.keep_whole()
    at = AppTest.from_function(page).run()
    assert at.text[0].value == "None None"
    at.button[0].click().run()
    assert not at.exception
    assert at.text[0].value == "done done"


def test_fast_reruns_are_off():
    """With them the next message has a thread of its own; what it does to keys is seen in tests/e2e/test_review.py."""
    config = tomllib.loads((Path(__file__).resolve().parents[2] / ".streamlit/config.toml").read_text())
    assert config["runner"]["fastReruns"] is False
