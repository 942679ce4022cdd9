"""What a person did is done whole: no callback is broken off by the next message from the browser.

Streamlit looks for a new message whenever a script touches its session state or writes to the page, and breaks off what
it is doing for it (streamlit/streamlit#10578). A callback broken off is not called again: of two keys pressed at once,
or a text left by pressing a button, the first would be lost. `runner.fastReruns` is off in .streamlit/config.toml for
the same reason: with it the next message is handled beside the callback, in another thread.
"""

from __future__ import annotations

from functools import cache

from streamlit.runtime.scriptrunner_utils.script_requests import ScriptRequest, ScriptRequests
from streamlit.runtime.scriptrunner_utils.script_run_context import RunLocation, ThreadState


@cache
def keep_whole() -> None:
    """Look for messages between callbacks only, in this process. Streamlit offers no public way to ask for it.

    st.switch_page relies on such a look: in a callback it takes effect after the callback's end.
    """
    look = ScriptRequests.on_scriptrunner_yield

    def look_between(self: ScriptRequests) -> ScriptRequest | None:
        return None if ThreadState.get().run_location is RunLocation.CALLBACK else look(self)

    ScriptRequests.on_scriptrunner_yield = look_between  # type: ignore[method-assign]
