"""What pages share: the one service of this process, who is asking, and how an error is told."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable
from functools import wraps
from hashlib import sha256
from typing import ParamSpec

import streamlit as st

from mega_core.errors import ActionableError
from mega_core.records import Inspection
from mega_core.service import Service
from pages.components.text import md

P = ParamSpec("P")

log = logging.getLogger(__name__)

RUN_ID = re.compile(r"[0-9a-f]{64}")


@st.cache_resource(show_spinner=False, on_release=lambda service: service.close())
def service() -> Service:
    """The service of this process; loads no model."""
    return Service.open()


def owner() -> str:
    """A name for the person at this browser that nobody can guess: work and history are looked up by it.

    The token inside Streamlit's own anti-forgery cookie outlives a reload, so a person finds their runs again
    without another cookie.
    """
    if "owner" not in st.session_state:
        token = _browser_token(st.context.cookies.get("_streamlit_xsrf", "") if st.context.cookies else "")
        st.session_state["owner"] = sha256(token).hexdigest()[:32] if token else secrets.token_hex(16)
    return str(st.session_state["owner"])


def _browser_token(cookie: str) -> bytes | None:
    """The secret of a version 2 token "2|mask|masked|time" with its mask taken off."""
    try:
        version, mask_hex, masked_hex, _ = cookie.strip("\"'").split("|")
        mask, masked = bytes.fromhex(mask_hex), bytes.fromhex(masked_hex)
    except ValueError:
        return None
    if version != "2" or len(mask) != 4 or len(masked) < 16:
        return None
    return bytes(byte ^ mask[i % 4] for i, byte in enumerate(masked))


def run_in_address() -> str | None:
    """The run id of ?run=, or None. Anything that isn't 64 hex characters counts as unknown and comes back as ""."""
    asked = st.query_params.get("run")
    if asked is None:
        return None
    return asked if RUN_ID.fullmatch(asked) else ""


def shown_run() -> str | None:
    """The run this page is about: that of the address, else the one that was last looked at on any page, put back
    into the address. "" for an address that is damaged, None when there is none.
    """
    asked = run_in_address()
    if asked is None and st.session_state.get("run_shown"):
        asked = str(st.session_state["run_shown"])
        st.query_params["run"] = asked
    return asked


def show_run(digest: str) -> None:
    """Make this the run that pages are about."""
    st.session_state["run_shown"] = digest
    st.query_params["run"] = digest


def forget_run() -> None:
    """No run is looked at."""
    st.session_state.pop("run_shown", None)
    st.query_params.pop("run", None)


def start(plan: Inspection, slot: str = "edit") -> None:
    """Open the stored answer of a question, else queue it under a slot of `progress`. Raises as Service.submit does."""
    desk = service()
    digest = desk.digest(plan)
    if desk.cached(digest) is None:
        st.session_state[f"{slot}_job"] = desk.submit(plan, owner(), kind=slot)
    else:
        show_run(digest)


def told(draw: Callable[P, None]) -> Callable[P, None]:
    """A fragment's body with its errors told in its place; without it Streamlit's own box would show."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            draw(*args, **kwargs)
        except Exception as error:  # a rerun or a stop is a BaseException and passes
            tell(error)

    return drawn


def tell(error: Exception) -> None:
    """Say what happened and what to do next."""
    what, next_step = (error.what, error.next_step) if isinstance(error, ActionableError) else unforeseen(error)
    st.error(f"**{md(what)}** {md(next_step)}", icon=":material/error:")


def unforeseen(error: Exception) -> tuple[str, str]:
    """(what, next step) of an error nobody foresaw. It is logged under an id, and only the id is shown."""
    number = secrets.token_hex(4)
    log.error("error %s", number, exc_info=error)
    return (
        "Something went wrong on our side.",
        f"Your input is kept. Try again; if it happens again, look for error id {number} in the log of the server.",
    )
