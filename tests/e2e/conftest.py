"""The real app with the embedded model in a real browser. Skipped with a reason where chromium is missing."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 1000 * int(os.environ.get("E2E_PATIENCE_SECONDS", "120"))
"""Milliseconds to wait for anything that computes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(str(item.path)).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.xdist_group("browser"))  # one server and one browser at a time


def serve(cache: Path) -> Iterator[str]:
    """Start the app on a free port; its address. Stopped and its log shown when it doesn't come up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MEGA_", "STREAMLIT_"))}
    environment["MEGA_CACHE_DIR"] = str(cache)
    log = cache / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)],
            cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    base = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            if process.poll() is not None:
                break
            try:
                with urlopen(f"{base}/_stcore/health", timeout=2) as answer:
                    if answer.status == 200:
                        break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(f"the app did not start:\n{log.read_text(errors='replace')[-2000:]}")
        yield base
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One app for the tests of a session."""
    yield from serve(tmp_path_factory.mktemp("app"))


@pytest.fixture
def cold_server(tmp_path: Path) -> Iterator[str]:
    """An app that nobody has visited yet."""
    cache = tmp_path / "cold"
    cache.mkdir()
    yield from serve(cache)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a screen."""
    if not CHROMIUM.exists() and not shutil.which("chromium"):
        pytest.skip("chromium is not installed (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield chromium
        chromium.close()


@dataclass
class Window:
    """A page of the browser that remembers what went wrong on it."""

    page: Any
    base: str
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE)
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._asked)
        self.page.on("dialog", self._dialog)

    def _heard(self, message: Any) -> None:
        # Streamlit itself looks for its server below a page's own path before it looks at the root.
        probing = "404" in message.text and "/_stcore/" in message.location.get("url", "")
        if message.type == "error" and not probing:
            self.errors.append(message.text)

    def _asked(self, request: Any) -> None:
        address = urlparse(request.url)
        if address.scheme.startswith(("http", "ws")) and address.netloc != urlparse(self.base).netloc:
            self.foreign.append(request.url)

    def _dialog(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def go(self, path: str, waits_for: str) -> None:
        """Open an address of the app and wait for a text."""
        self.page.goto(self.base + path)
        self.see(waits_for)

    def see(self, text: str) -> None:
        """Wait until a text is visible."""
        self.page.get_by_text(text).first.wait_for(state="visible")

    def see_result(self) -> None:
        """Wait until a run is shown whole."""
        self.page.get_by_role("heading", name="Where in the network", exact=True).wait_for()

    def settle(self) -> None:
        """Wait until the app has stopped working."""
        self.page.wait_for_function(
            "document.querySelector('[data-testid=\"stApp\"]').dataset.testScriptState === 'notRunning'"
            " && !document.querySelector('[data-testid=\"stSkeleton\"]')"
        )

    def clean(self) -> None:
        """Nothing went wrong since the window was opened."""
        assert self.page.locator('[data-testid="stException"]').count() == 0
        assert self.errors == []
        assert self.foreign == []
        assert self.dialogs == []

    def type_into(self, label: str, text: str) -> None:
        """Fill a field and leave it."""
        box = self.page.get_by_label(label, exact=True)
        box.fill(text)
        box.press("Tab")

    def holds(self, label: str, text: str) -> None:
        """Wait until a field holds a text: the browser fills it a moment after it is drawn, and shows fields of before
        beside it until the page is whole.
        """
        from playwright.sync_api import expect

        box = self.page.get_by_label(label, exact=True)
        expect(box).to_have_count(1, timeout=PATIENCE)
        expect(box).to_have_value(text, timeout=PATIENCE)

    def press(self, name: str) -> None:
        """Click a button once it can be clicked."""
        self.page.get_by_role("button", name=name).first.click()


@pytest.fixture
def window(browser: Any) -> Iterator[Callable[..., Window]]:
    """window(base, scheme="dark", width=390): a fresh visitor; checked clean at the end of the test."""
    opened: list[tuple[Any, Window]] = []

    def make(base: str, scheme: str = "light", width: int = 1440) -> Window:
        context = browser.new_context(viewport={"width": width, "height": 1100}, color_scheme=scheme)
        made = Window(context.new_page(), base)
        opened.append((context, made))
        return made

    yield make
    try:
        for _, one in opened:
            one.clean()
    finally:
        for context, _ in opened:
            context.close()
