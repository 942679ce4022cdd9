"""The app with the frozen service, driven without a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from mega_core.service import Service
from tests.ui.fake import FakeService

APP = str(Path(__file__).resolve().parents[2] / "app.py")


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeService]:
    """The service that the pages will open."""
    fake = FakeService()
    monkeypatch.setattr(Service, "open", classmethod(lambda cls, *_, **__: fake))
    st.cache_resource.clear()
    st.cache_data.clear()
    yield fake
    st.cache_resource.clear()
    st.cache_data.clear()


Visit = Callable[..., AppTest]


@pytest.fixture
def visit(desk: FakeService) -> Visit:
    """visit("edit", run=digest): the page as a person sees it on arrival."""

    def go(page: str = "start", **query: str) -> AppTest:
        at = AppTest.from_file(APP, default_timeout=60)
        at.session_state["owner"] = "o" * 32
        for name, value in query.items():
            at.query_params[name] = value
        at.run()
        if page != "start":
            at.switch_page(f"pages/{page}.py")
            for name, value in query.items():
                at.query_params[name] = value
            at.run()
        assert not at.exception
        return at

    return go


def words(at: AppTest) -> str:
    """All text of the page, escapes taken off."""
    parts = []
    for kind in (
        "title",
        "header",
        "subheader",
        "markdown",
        "caption",
        "error",
        "warning",
        "info",
        "success",
        "text",
        "code",
    ):
        parts += [str(element.value) for element in getattr(at, kind)]
    return "\n".join(parts).replace("\\", "")


def key(at: AppTest, kind: str, name: str):
    """The widget of this kind and key."""
    return getattr(at, kind)(key=name)
