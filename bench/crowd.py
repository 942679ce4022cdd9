"""Eight people at once: browsers of their own, mixed methods and models, every result held against the serial one.

1. Each person opens a finished run of their method, changes the fact, presses Run and waits, again and again.
2. Between edits they change the page and now and then cancel an edit. A ninth visitor, without a browser, asks the
   server for whole pages all the time: that is the rerun which is timed.
3. Afterwards every stored report must be the answer to exactly what its person asked, and equal, frame by frame and
   bit by bit, to the same question answered alone in a service of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any
from urllib.request import Request, urlopen

import pandas as pd

from bench.common import Row, Unmeasured, embedded_models, percentile, temporary_service
from bench.pages import CANCELLED, CELLS, PATIENCE, READY, SHOWN, app, stopwatch, waited
from mega_core.embedded import examples
from mega_core.records import EditRequest
from mega_core.service import Service

PEOPLE, EDITS = 8, 100
METHODS = ("rome", "mega", "ft_m", "memit", "ike", "pmet", "sake", "alphaedit")
RUN = re.compile(r"run=([0-9a-f]{64})")
CANCEL_EVERY = 4


@dataclass
class Person:
    """One browser."""

    number: int
    method: str
    model: str
    seed_run: str
    requests: list[EditRequest]
    made: list[tuple[EditRequest, str]] = field(default_factory=list)
    """What was asked, and the run it became."""
    refused: int = 0
    reruns: list[float] = field(default_factory=list)
    cancels: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def measure(quick: bool, count: int = EDITS) -> list[Row]:
    """Wrong results, refusals, and the waits of eight people who make `count` edits together."""
    if shutil.which("chromium") is None:
        raise Unmeasured("chromium is not installed")
    edits = 16 if quick else count
    with temporary_service() as service, temporary_service() as alone:
        models = embedded_models(service)
        facts = examples.candidates(23, min_neighbours=2)
        everyone = []
        for number in range(PEOPLE):
            method, model = METHODS[number % len(METHODS)], models[number % len(models)]
            first = next(facts)
            plan = service.plan_several(model, method, [first])
            own = edits // PEOPLE + (number < edits % PEOPLE)
            seed_run = service.run(plan).digest
            everyone.append(Person(number, method, model, seed_run, list(islice(facts, own))))
        with app(service.settings.cache_dir, STREAMLIT_SERVER_ENABLE_AGENT_API="true") as url:
            began = time.perf_counter()
            with ThreadPoolExecutor(1) as beside:
                over = Event()
                answering = beside.submit(_ask_server, url, everyone[0].seed_run, over)
                try:
                    asyncio.run(_all(url, everyone))
                finally:
                    over.set()
                at_server = answering.result()
            took = time.perf_counter() - began
        wrong, compared = _compare(service, alone, everyone)
    reruns = [value for person in everyone for value in person.reruns]
    cancels = [value for person in everyone for value in person.cancels]
    errors = [error for person in everyone for error in person.errors]
    if errors:
        raise RuntimeError("; ".join(errors[:3]))
    return [
        Row(
            "crowd",
            "edits by eight people",
            compared,
            "",
            f"{took:.0f} s, {len(METHODS)} methods, {len(models)} models",
        ),
        Row("crowd", "results that are wrong, mixed up or unlike the serial run", wrong, "", f"of {compared}"),
        Row("crowd", "questions refused because the queue was full, asked again", sum(p.refused for p in everyone)),
        Row("crowd", "page rerun at the server p50", percentile(at_server, 50), "ms"),
        Row(
            "crowd",
            "page rerun at the server p95",
            percentile(at_server, 95),
            "ms",
            f"target 600 ms; {len(at_server)} samples, by a ninth visitor without a browser",
        ),
        Row("crowd", "page switch in one of the browsers p50", percentile(reruns, 50), "ms"),
        Row(
            "crowd",
            "page switch in one of the browsers p95",
            percentile(reruns, 95),
            "ms",
            f"{len(reruns)} samples; all eight browsers draw on the server's own {os.cpu_count()} cores",
        ),
        Row("crowd", "cancel p95", percentile(cancels, 95), "ms", f"target 1000 ms; {len(cancels)} samples"),
    ]


def _ask_server(url: str, run: str, over: Event) -> list[float]:
    """Milliseconds that the server takes for a whole page, again and again until it is `over`: the status page and a
    finished run in turn.
    """
    times: list[float] = []
    session = ""
    pages = [{"page": "status"}, {"page": "edit", "query_params": {"run": [run]}}]
    while not over.wait(0.25):
        body = pages[len(times) % 2] | ({"session_id": session} if session else {})
        request = Request(
            f"{url}/_stcore/agent/interact", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        start = time.perf_counter()
        with urlopen(request, timeout=60) as answer:
            session = json.load(answer)["session_id"]
        times.append(1000 * (time.perf_counter() - start))
    open("/tmp/times", "w").write(str([round(t) for t in times]))
    return times[4:]  # the first ones import the pages' modules


def _compare(service: Service, alone: Service, everyone: list[Person]) -> tuple[int, int]:
    """(wrong, compared): stored answers against questions, and against the serial answers."""
    wrong = compared = 0
    for person in everyone:
        for request, digest in person.made:
            compared += 1
            report = service.cached(digest)
            if report is None:
                wrong += 1
                continue
            asked = report.question.requests[0]
            same = (asked.subject, asked.template, asked.target_new) == (
                request.subject, request.template, request.target_new,
            )  # fmt: skip
            same = same and (report.question.method.name, report.question.model.name) == (person.method, person.model)
            serial = alone.run(report.question, fresh=True)
            same = same and set(serial.frames) == set(report.frames) and serial.receipt.restored
            for name, frame in serial.frames.items():
                try:
                    pd.testing.assert_frame_equal(frame, report.frames[name], check_exact=True)
                except AssertionError:
                    same = False
            wrong += not same
    return wrong, compared


async def _all(url: str, everyone: list[Person]) -> None:
    from playwright.async_api import async_playwright

    with TemporaryDirectory() as folder:
        # In life the browsers are on other people's computers: here they only get what the server leaves of this one.
        behind = Path(folder) / "browser"
        behind.write_text(f'#!/bin/sh\nexec nice -n 19 "{shutil.which("chromium")}" "$@"\n')
        behind.chmod(0o700)
        async with async_playwright() as driver:
            browser = await driver.chromium.launch(executable_path=behind, args=["--no-sandbox"])
            await asyncio.gather(*(_live(browser, url, person) for person in everyone))
            await browser.close()


async def _live(browser: Any, url: str, person: Person) -> None:
    """One person's session."""
    context = await browser.new_context(viewport={"width": 1440, "height": 1400})
    page = await context.new_page()
    page.set_default_timeout(PATIENCE)
    try:
        await page.goto(f"{url}/edit?run={person.seed_run}")
        await page.locator(CELLS).first.wait_for()
        await page.locator(READY).wait_for()
        for number, request in enumerate(person.requests):
            await _fill(page, request)
            if number % CANCEL_EVERY == person.number % CANCEL_EVERY:
                await _cancel(page, person)
            digest = await _ask(page, person)
            person.made.append((request, digest))
            await _change(page, person)
    except Exception as error:  # noqa: BLE001 - told with its person at the end
        person.errors.append(f"person {person.number} ({person.method}): {type(error).__name__}: {str(error)[:300]}")
    finally:
        await context.close()


async def _fill(page: Any, request: EditRequest) -> None:
    for label, text in (
        ("Subject", request.subject),
        ("Prompt template", request.template),
        ("Original object (optional)", request.target_true or ""),
        ("New object", request.target_new),
    ):
        box = page.get_by_label(label, exact=True)
        await box.fill(text)
        await box.press("Tab")
    for label in ("Paraphrases: the same question in other words", "Neighbours: other subjects, must not change"):
        box = page.get_by_label(label)
        if not await box.is_visible():
            await page.locator("summary", has_text="Prompts to check with").first.click()
            await box.wait_for()
        await box.fill("")
        await box.press("Tab")
    await page.locator(READY).wait_for()


async def _press_run(page: Any, person: Person) -> None:
    """Press Run until the queue takes the question."""
    busy = page.get_by_text(re.compile("already waiting|already have"))
    for _ in range(200):
        await page.get_by_role("button", name="Run this edit").click()
        await page.locator(READY).wait_for()
        await page.wait_for_timeout(150)
        if not await busy.count():
            return
        person.refused += 1
        await page.wait_for_timeout(1000)
    raise TimeoutError("the queue never took it")


async def _ask(page: Any, person: Person) -> str:
    """Press Run; the run that the address names once it is shown."""
    before = RUN.search(page.url)
    await _press_run(page, person)
    end = time.perf_counter() + PATIENCE / 1000
    while time.perf_counter() < end:
        found = RUN.search(page.url)
        if found and (before is None or found[1] != before[1]):
            await page.locator(CELLS).first.wait_for()
            await page.locator(READY).wait_for()
            return found[1]
        await page.wait_for_timeout(50)
    raise TimeoutError("no result came")


async def _cancel(page: Any, person: Person) -> None:
    """Begin an edit and stop it; if it is quicker than that, nothing is measured."""
    seed = page.get_by_label("Seed", exact=True)
    if not await seed.is_visible():
        await page.locator("summary", has_text="Advanced").first.click()
        await seed.wait_for()
    await seed.fill(str(500 + len(person.made)))
    await seed.press("Tab")
    await page.locator(READY).wait_for()
    await _press_run(page, person)
    await page.evaluate(stopwatch(CANCELLED))
    try:
        await page.get_by_role("button", name="Cancel").click(timeout=2000)
    except Exception:  # noqa: BLE001 - it was done before it could be stopped
        await page.locator(CELLS).first.wait_for()
    else:
        took = float(await page.evaluate(waited(10_000)))
        if took > 0:
            person.cancels.append(took)
        else:
            await page.locator(CELLS).first.wait_for()
    await page.locator(READY).wait_for()
    await seed.fill("0")
    await seed.press("Tab")
    await page.locator(READY).wait_for()


async def _change(page: Any, person: Person) -> None:
    """Go to another page and back: two full runs of a page script, while others' edits are at work."""
    for title in ("Status", "Edit trial"):
        await page.evaluate(stopwatch(f"{SHOWN} === '{title}'"))
        await page.locator('[data-testid="stSidebar"] a', has_text=title).click()
        person.reruns.append(float(await page.evaluate(waited(PATIENCE))))
        await page.locator(READY).wait_for()
    await page.locator(CELLS).first.wait_for()
