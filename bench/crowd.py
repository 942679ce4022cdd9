"""Eight people at once: browsers of their own, mixed methods and models, every result held against the serial one.

1. Each person opens a finished run of their method, changes the fact, presses Run and waits, again and again.
2. Between edits they change the page and now and then cancel an edit. A ninth visitor, without a browser, asks the
   server for whole pages all the time and cancels edits too: those are the waits that are held against the targets.
3. Afterwards every stored report must be the answer to exactly what its person asked, and equal, frame by frame and
   bit by bit, to the same question answered alone in a service of its own.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any
from urllib.request import Request, urlopen

import pandas as pd

from bench.common import Row, Unmeasured, embedded_models, percentile, temporary_service
from bench.pages import CELLS, HEADING, PATIENCE, READY, app
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
                visitor = Visitor(url, everyone[0].seed_run)
                answering = beside.submit(visitor.stay, over)
                try:
                    asyncio.run(_all(url, everyone))
                finally:
                    over.set()
                answering.result()
            took = time.perf_counter() - began
        wrong, compared = _compare(service, alone, everyone)
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
        Row("crowd", "page rerun at the server p50", percentile(visitor.reruns, 50), "ms"),
        Row(
            "crowd",
            "page rerun at the server p95",
            percentile(visitor.reruns, 95),
            "ms",
            f"target 600 ms; {len(visitor.reruns)} samples, by a ninth visitor without a browser",
        ),
        Row(
            "crowd",
            "cancel at the server p95",
            percentile(visitor.cancels, 95),
            "ms",
            f"target 1000 ms; {len(visitor.cancels)} samples, with the whole page that tells it",
        ),
    ]


@dataclass
class Visitor:
    """One who talks to the server without a browser, so that no drawing is in the times."""

    url: str
    run: str
    reruns: list[float] = field(default_factory=list)
    cancels: list[float] = field(default_factory=list)
    session: str = ""

    def stay(self, over: Event) -> None:
        """Ask for whole pages until it is `over`: the status page and a finished run in turn. Now and then begin an
        edit there and cancel it.
        """
        self._ask(page="status")  # the first ones import the pages' modules
        self._ask(page="edit", query_params={"run": [self.run]})
        number = 0
        while not over.wait(0.25):
            number += 1
            self.reruns.append(self._ask(page="status")[0])
            self.reruns.append(self._ask(page="edit", query_params={"run": [self.run]})[0])
            if number % 5 == 0:
                text = self._ask(widget_state={"edit_subject": f"Visitor {number}"}, trigger={"key": "edit_run"})[1]
                if "edit_cancel" in text:
                    took, text = self._ask(trigger={"key": "edit_cancel"})
                    if "Cancelled." in text:
                        self.cancels.append(took)

    def _ask(self, **what: Any) -> tuple[float, str]:
        """(milliseconds, the whole page as JSON)."""
        body = json.dumps({**what, **({"session_id": self.session} if self.session else {})}).encode()
        request = Request(f"{self.url}/_stcore/agent/interact", body, {"Content-Type": "application/json"})
        start = time.perf_counter()
        with urlopen(request, timeout=60) as answer:
            text = answer.read().decode()
        took = 1000 * (time.perf_counter() - start)
        self.session = json.loads(text)["session_id"]
        return took, text


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
        behind.write_text(
            # A session of its own has its own share of the processors, which nice can't be raised out of from inside.
            '#!/bin/sh\nexec setsid sh -c \'echo 19 2>/dev/null > /proc/self/autogroup; exec nice -n 19 "$0" "$@"\''
            f' "{shutil.which("chromium")}" "$@"\n'
        )
        behind.chmod(0o700)
        async with async_playwright() as driver:
            browser = await driver.chromium.launch(executable_path=behind, args=["--no-sandbox", "--disable-gpu"])
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
            await _change(page)
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
    """Begin an edit and stop it, if it is not quicker than that."""
    from playwright.async_api import TimeoutError as PlaywrightTimeout

    seed = page.get_by_label("Seed", exact=True)
    if not await seed.is_visible():
        await page.locator("summary", has_text="Advanced").first.click()
        await seed.wait_for()
    await seed.fill(str(500 + len(person.made)))
    await seed.press("Tab")
    await page.locator(READY).wait_for()
    await _press_run(page, person)
    stop = page.get_by_role("button", name="Cancel")
    with suppress(PlaywrightTimeout):  # it may be done before it can be stopped
        await stop.click(timeout=2000)
    await stop.wait_for(state="detached")
    await page.locator(READY).wait_for()
    await seed.fill("0")
    await seed.press("Tab")
    await page.locator(READY).wait_for()


async def _change(page: Any) -> None:
    """Go to another page and back, while others' edits are at work."""
    for title in ("Status", "Edit trial"):
        await page.locator('[data-testid="stSidebar"] a', has_text=title).click()
        await page.locator(HEADING, has_text=title).wait_for()
        await page.locator(READY).wait_for()
    await page.locator(CELLS).first.wait_for()
