"""What a person waits for in a browser: the first page, a stored result, a click on the map of contributions."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from bench.common import Row, Unmeasured, embedded_models, percentile, random_plans, temporary_service

ROOT = Path(__file__).resolve().parents[1]
READY = '[data-testid="stApp"][data-test-script-state="notRunning"]'
CELLS = '[aria-roledescription="rect mark"]'
PLACE = 'input[aria-label="Place"]'
PATIENCE = 180_000


def measure(quick: bool) -> list[Row]:
    """p50 and p95 over fresh visits and over clicks on cells."""
    browser_path = shutil.which("chromium")
    if browser_path is None:
        raise Unmeasured("chromium is not installed")
    from playwright.sync_api import sync_playwright

    visits, clicks = (3, 5) if quick else (15, 60)
    with temporary_service() as service:
        (plan,) = random_plans(service, embedded_models(service)[0], 1, seed=5)
        digest = service.run(plan).digest
        with _app(service.settings.cache_dir) as url, sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
            first = [_visit(browser, url, "h1") for _ in range(visits)]
            stored = [_visit(browser, f"{url}/edit?run={digest}", CELLS) for _ in range(visits)]
            clicked = _clicks(browser, f"{url}/edit?run={digest}", clicks)
            browser.close()
    rows = []
    for name, values, count in (
        ("first page, from address to heading", first, "visits"),
        ("stored result, from address to drawn map", stored, "visits"),
        ("click on a cell, until its numbers show", clicked, "clicks"),
    ):
        rows.append(Row("pages", f"{name} p50", percentile(values, 50), "ms"))
        rows.append(Row("pages", f"{name} p95", percentile(values, 95), "ms", f"{len(values)} {count}"))
    return rows


@contextmanager
def _app(cache: Path) -> Iterator[str]:
    """The app on a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless", "true"]
    command += ["--server.port", str(port), "--server.address", "127.0.0.1"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "MEGA_CACHE_DIR": str(cache)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urlopen(f"{url}/_stcore/health", timeout=2).close()
                break
            except (URLError, OSError):
                time.sleep(0.25)
        else:
            raise Unmeasured("the app did not start within a minute")
        yield url
    finally:
        process.terminate()
        process.wait(20)


def _visit(browser: Any, url: str, until: str) -> float:
    """Milliseconds from navigation until the thing is visible, in a browser that has never been here."""
    context = browser.new_context()
    page = context.new_page()
    start = time.perf_counter()
    page.goto(url)
    page.locator(until).first.wait_for(timeout=PATIENCE)
    elapsed = 1000 * (time.perf_counter() - start)
    page.locator(READY).wait_for(timeout=PATIENCE)
    context.close()
    return elapsed


def _clicks(browser: Any, url: str, count: int) -> list[float]:
    """Milliseconds from clicking a cell until the list beside the map names it."""
    page = browser.new_page(viewport={"width": 1400, "height": 1600})
    page.goto(url)
    page.locator(CELLS).first.wait_for(timeout=PATIENCE)
    page.locator(READY).wait_for(timeout=PATIENCE)
    place = page.locator(PLACE).first
    times: list[float] = []
    for number in range(count + 1):
        cells = page.locator("svg.marks").filter(has=page.locator(CELLS)).first.locator(CELLS)
        before = _shown(place)
        target = cells.nth((7 * number) % cells.count())
        start = time.perf_counter()
        target.click(force=True)
        while _shown(place) == before and time.perf_counter() - start < 10:
            time.sleep(0.005)
        elapsed = 1000 * (time.perf_counter() - start)
        if number and _shown(place) != before:  # the first click also warms the page; a corner mark selects nothing
            times.append(elapsed)
        page.locator(READY).wait_for(timeout=PATIENCE)
    if not times:
        raise Unmeasured("no click changed the selected place")
    return times


def _shown(place: Any) -> str:
    return str(place.input_value(timeout=PATIENCE))
