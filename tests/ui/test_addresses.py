"""Hostile and broken addresses on every page of the real app: no traceback, no hang, no work begun."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, cycle
from pathlib import Path
from urllib.parse import quote

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from mega_core.embedded import examples
from mega_core.service import Service
from mega_core.settings import Settings
from pages.components.frame import PAGES
from tests.hostile import ADDRESSES, PAYLOADS
from tests.ui.conftest import APP

NAMES = (
    "run", "runs", "at", "view", "state", "explain", "method", "methods", "comparison", "study", "chain", "mask",
    "detection",
    "benchmark", "protocol", "metric", "queue", "case", "step", "q", "model",
)  # fmt: skip
"""Every name that some page reads from its address, and some that none does."""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The whole service on a folder of its own."""
    folder = tmp_path_factory.mktemp("cache")
    with Service.open(replace(Settings.read(), cache_dir=folder, database_url="")) as service:
        yield service


@pytest.fixture(autouse=True)
def opened(real: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Service, "open", classmethod(lambda cls, *_, **__: real))
    st.cache_resource.clear()
    yield
    st.cache_resource.clear()


EACH = 27
"""Texts that a page is tried with; the pages go on through the list one after the other."""


def texts(page: str) -> list[str]:
    """Some of the hostile addresses, and a good one."""
    everything = [*ADDRESSES, *PAYLOADS]
    first = EACH * [info.name for info in PAGES].index(page)
    return [everything[(first + i) % len(everything)] for i in range(EACH)] + [examples.load()[0].digest]


@pytest.mark.parametrize("page", [info.name for info in PAGES])
def test_no_address_breaks_a_page(page: str, real: Service) -> None:
    names = cycle(NAMES)
    good = examples.load()[0].digest
    for index, text in enumerate(texts(page)):
        name = next(names)
        at = AppTest.from_file(APP, default_timeout=30)
        at.session_state["owner"] = "f" * 32
        at.switch_page(f"pages/{page}.py")
        at.query_params["run"] = good if index % 2 and name != "run" else text
        at.query_params[name] = text
        began = time.monotonic()
        at.run()
        took = time.monotonic() - began
        assert not at.exception, f"{page}?{name}={quote(text)}: {at.exception[0].message}"
        assert not [e.value for e in at.error if "Something went wrong" in e.value], f"{page}?{name}={quote(text)}"
        assert at.title, f"{page}?{name}={quote(text)}: no title"
        assert took < 5, f"{page}?{name}={quote(text)} took {took:.1f} s"
    assert real.core.jobs.load() == (0, 0)


def test_there_are_enough_of_them() -> None:
    assert len(PAGES) * EACH >= 300
    assert len(set(chain(PAYLOADS, ADDRESSES))) >= 80


def test_pages_read_only_names_that_are_tried() -> None:
    """What a page takes from the address is in NAMES."""
    import re

    used: set[str] = set()
    for file in (Path(APP).parent / "pages").rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        used |= set(re.findall(r'query_params(?:\.get\(|\.pop\(|\[)"(\w+)"', source))
    assert used <= set(NAMES), used - set(NAMES)
