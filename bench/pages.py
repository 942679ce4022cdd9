"""What a person waits for in a browser: first paint, another page, a stored run, a click on a chart, the queue."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from bench.common import Row, Unmeasured, embedded_models, percentile, random_plans, temporary_service

ROOT = Path(__file__).resolve().parents[1]
READY = '[data-testid="stApp"][data-test-script-state="notRunning"]'
HEADING = '[data-testid="stMain"] h1'
CELLS = '[class*="st-key-chart_map"] [aria-roledescription="rect mark"]'
SHOWN = f"document.querySelector('{HEADING}')?.innerText"
PLACE = 'input[aria-label="Place"]'
CANCELLED = "[...document.querySelectorAll('[data-testid=stAlert]')].some(a => a.innerText.includes('Cancelled.'))"
PATIENCE = 180_000
SAMPLES = 200
TARGETS = {
    "first paint, cold server": 2500,
    "first paint, warm server": 2500,
    "page switch": 400,
    "click on a chart, until its numbers show": 300,
    "Run pressed, until its place in the queue shows": 200,
    "stored run, until its map is drawn": 500,
    "Cancel pressed, until it is over": 1000,
}
"""Milliseconds that 95 of 100 should stay below."""


def measure(quick: bool, count: int = SAMPLES) -> list[Row]:
    """p50 and p95 of each wait, `count` times (starts of the whole server a tenth as often)."""
    count = 6 if quick else count
    starts = max(1, count // 10)
    found: dict[str, list[float]] = {}
    with temporary_service() as service, chromium() as browser:
        (plan,) = random_plans(service, embedded_models(service)[0], 1, seed=5)
        digest = service.run(plan).digest
        cache = service.settings.cache_dir
        with TemporaryDirectory() as empty:
            found["first paint, cold server"] = [_cold(browser, Path(empty) / str(i)) for i in range(starts)]
        with app(cache) as url:
            _first(browser, url)
            found["first paint, warm server"] = [_first(browser, url) for _ in range(count)]
            found["page switch"] = _switches(browser, url, count)
            found["stored run, until its map is drawn"] = _opens(browser, url, count)
            found["click on a chart, until its numbers show"] = _clicks(browser, f"{url}/edit?run={digest}", count)
            queued, cancelled = _submits(browser, f"{url}/edit?run={digest}", count)
            found["Run pressed, until its place in the queue shows"] = queued
            found["Cancel pressed, until it is over"] = cancelled
    rows = []
    for name, target in TARGETS.items():
        values = found[name]
        over = percentile(values, 95) > target
        rows.append(Row("pages", f"{name} p50", percentile(values, 50), "ms"))
        note = f"target {target} ms{', missed' if over else ''}; {len(values)} samples"
        rows.append(Row("pages", f"{name} p95", percentile(values, 95), "ms", note))
    return rows


# The app and the browser ---------------------------------------------------------------------------------------------


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a screen. Raises Unmeasured where there is none."""
    path = shutil.which("chromium")
    if path is None:
        raise Unmeasured("chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextmanager
def app(cache: Path, **options: str) -> Iterator[str]:
    """The app on a free port of this machine; `options` are further environment variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless", "true"]
    command += ["--server.port", str(port), "--server.address", "127.0.0.1"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "MEGA_CACHE_DIR": str(cache), **options},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(1200):
            try:
                urlopen(f"{url}/_stcore/health", timeout=2).close()
                break
            except (URLError, OSError):
                time.sleep(0.05)
        else:
            raise Unmeasured("the app did not start within a minute")
        yield url
    finally:
        process.terminate()
        process.wait(20)


# The waits, in milliseconds ------------------------------------------------------------------------------------------


STOPWATCH = """() => {
  window.waited = new Promise(done => document.addEventListener("click", click => {
    const before = (CONDITION_VALUE);
    const look = () => (CONDITION) ? done(performance.now() - click.timeStamp) : requestAnimationFrame(look);
    requestAnimationFrame(look);
  }, {capture: true, once: true}));
}"""
"""Runs in the page, so that no time of the driver's is in it: from the click until a frame in which CONDITION holds.
CONDITION may speak of `before`, the value of CONDITION_VALUE when the click came.
"""


def stopwatch(condition: str, value: str = "null") -> str:
    """The script that makes the page wait for a click and then for a condition, written in JavaScript."""
    return STOPWATCH.replace("CONDITION_VALUE", value).replace("CONDITION", condition)


def waited(patience: int) -> str:
    """The script that gives what the stopwatch found, -1 when it found nothing within `patience` milliseconds."""
    return f"() => Promise.race([window.waited, new Promise(done => setTimeout(() => done(-1), {patience}))])"


def clicked(page: Any, target: Any, condition: str, value: str = "null", *, patience: int = 20_000) -> float:
    """Milliseconds from a click on `target` until a condition holds. Raises Unmeasured when it does not within
    `patience` milliseconds.
    """
    page.evaluate(stopwatch(condition, value))
    target.click(force=True)
    took = float(page.evaluate(waited(patience)))
    if took < 0:
        raise Unmeasured(f"after a click, nothing fulfilled: {condition}")
    return took


def _first(browser: Any, url: str) -> float:
    """From navigation to the heading, in a browser that has never been here."""
    context = browser.new_context()
    page = context.new_page()
    start = time.perf_counter()
    page.goto(url, wait_until="commit")
    page.locator(HEADING).first.wait_for(timeout=PATIENCE)
    took = 1000 * (time.perf_counter() - start)
    page.locator(READY).wait_for(timeout=PATIENCE)
    context.close()
    return took


def _cold(browser: Any, cache: Path) -> float:
    """As _first, the first visit after the server's start."""
    with app(cache) as url:
        return _first(browser, url)


def _switches(browser: Any, url: str, count: int) -> list[float]:
    """From a click in the menu to the other page's heading."""
    from pages.components.frame import PAGES

    page = browser.new_page(viewport={"width": 1440, "height": 1000})
    page.goto(url)
    page.locator(HEADING).first.wait_for(timeout=PATIENCE)
    page.locator(READY).wait_for(timeout=PATIENCE)
    times = []
    for number in range(count + len(PAGES)):
        link = page.locator('[data-testid="stSidebar"] a').nth((number + 1) % len(PAGES))
        took = clicked(page, link, f"{SHOWN} && {SHOWN} !== before", SHOWN)
        page.locator(READY).wait_for(timeout=PATIENCE)
        if number >= len(PAGES):  # the first round imports each page's modules
            times.append(took)
    page.close()
    return times


def _opens(browser: Any, url: str, count: int) -> list[float]:
    """From a click on an example's Open button to its drawn map, in a browser that has been on the page of examples."""
    page = browser.new_page(viewport={"width": 1440, "height": 1600})
    page.goto(url)
    times = []
    for _ in range(count + 1):
        opening = page.get_by_role("link", name="Open").first
        opening.wait_for(timeout=PATIENCE)
        page.locator(CELLS).first.wait_for(state="detached", timeout=PATIENCE)
        page.locator(READY).wait_for(timeout=PATIENCE)
        times.append(clicked(page, opening, f"document.querySelector('{CELLS}')"))
        page.locator(READY).wait_for(timeout=PATIENCE)
        page.locator('[data-testid="stSidebar"] a').first.click()
    page.close()
    return times[1:]


def _clicks(browser: Any, url: str, count: int) -> list[float]:
    """From clicking a cell until the list beside the map names it."""
    page = browser.new_page(viewport={"width": 1440, "height": 1600})
    page.goto(url)
    page.locator(CELLS).first.wait_for(timeout=PATIENCE)
    page.locator(READY).wait_for(timeout=PATIENCE)
    shown = f"document.querySelector('{PLACE}').value"
    times: list[float] = []
    for number in range(2 * count):
        cells = page.locator(CELLS)
        with suppress(Unmeasured):  # a corner mark, or the same cell, selects nothing
            target = cells.nth((7 * number) % cells.count())
            times.append(clicked(page, target, f"{shown} !== before", shown, patience=2000))
        page.locator(READY).wait_for(timeout=PATIENCE)
        if len(times) > count:
            break
    page.close()
    if len(times) < 2:
        raise Unmeasured("no click changed the selected place")
    return times[1:]  # the first one also warms the page


def _submits(browser: Any, url: str, count: int) -> tuple[list[float], list[float]]:
    """From Run to the place in the queue or the progress; and from Cancel until it is told."""
    page = browser.new_page(viewport={"width": 1440, "height": 1600})
    page.goto(url)
    page.locator(CELLS).first.wait_for(timeout=PATIENCE)
    page.locator(READY).wait_for(timeout=PATIENCE)
    page.locator("summary", has_text="Advanced").first.click()
    seed = page.get_by_label("Seed", exact=True)
    queued, cancelled = [], []
    progress = r"[...document.querySelectorAll('h2')].some(h => /^(Running for|Waiting:)/.test(h.innerText))"
    for number in range(count + 1):
        seed.fill(str(1000 + number))
        seed.press("Tab")
        page.locator(READY).wait_for(timeout=PATIENCE)
        queued.append(clicked(page, page.get_by_role("button", name="Run this edit"), progress))
        try:
            cancelled.append(clicked(page, page.get_by_role("button", name="Cancel"), CANCELLED, patience=5000))
        except Exception:  # noqa: BLE001 - it was done before it could be stopped
            page.locator(CELLS).first.wait_for(timeout=PATIENCE)
        page.locator(READY).wait_for(timeout=PATIENCE)
    page.close()
    return queued[1:], cancelled[1:]
