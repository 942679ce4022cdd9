"""Fifty hostile texts in every place where a run, a person or a model can put one, on every page that shows text: no
script runs, nothing is fetched from elsewhere, nothing becomes markup.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mega_core.errors import BadInput
from mega_core.records import EditRequest, Report
from mega_core.store import Store
from pages.components.frame import PAGES
from pages.components.run_bar import LEADS_TO
from tests.e2e.conftest import serve
from tests.hostile import PAYLOADS
from tests.ui.fake import make_report

PER_RUN = 8


def allowed(text: str, limit: int) -> str:
    """The text as a request takes it, cut to its limit."""
    return text[:limit].strip()


def hostile_runs() -> list[Report]:
    """Reports that carry every payload in a heading, an object, a continuation, a note and a prompt."""
    reports = []
    for first in range(0, len(PAYLOADS), PER_RUN):
        some = [PAYLOADS[(first + i) % len(PAYLOADS)] for i in range(PER_RUN)]
        try:
            request = EditRequest(
                allowed(some[0].replace("{}", ""), 100),
                allowed(f"{{}} {some[1].replace('{}', '')}", 300),
                allowed(some[2], 60),
                allowed(some[3], 60),
                paraphrases=tuple(some),
                neighbours=tuple(reversed(some)),
            )
        except BadInput as error:  # a payload that no request takes never reaches a page this way
            raise AssertionError(f"{error} in {some[:4]}") from error
        made = make_report(request, seed=first)
        texts = made.frames["generations"].assign(text=lambda t, some=some: (some * len(t))[: len(t)])
        notes = tuple(some)
        reports.append(replace(made, frames={**made.frames, "generations": texts}, notes=notes))
    return reports


RUNS = hostile_runs()


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An app whose store holds the hostile runs."""
    cache: Path = tmp_path_factory.mktemp("poisoned")
    store = Store.open(cache / "results", 2**28)
    for report in RUNS:
        store.put_report(report)
    store.close()
    yield from serve(cache)


def harmless(one) -> None:
    """Nothing ran, nothing was fetched, nothing became an element of the page."""
    main = one.page.locator('[data-testid="stMain"]')
    assert one.page.evaluate("window.__x") is None
    assert main.locator('a[href*="evil"], a[href^="javascript"]').count() == 0
    assert main.locator("iframe, object, video, script, link, style[data-from]").count() == 0
    assert main.locator('img:not([src^="data:"])').count() == 0
    assert one.foreign == []
    assert one.dialogs == []


def test_there_are_enough_payloads():
    assert len(set(PAYLOADS)) >= 40
    carried = {text for run in RUNS for text in run.notes}
    assert carried == set(PAYLOADS)


@pytest.mark.parametrize("name", LEADS_TO)
def test_on_pages_about_a_run(poisoned, window, name):
    one = window(poisoned)
    for report in RUNS:
        one.page.goto(f"{poisoned}/{name}?run={report.digest}")
        one.page.locator('[data-testid="stMain"] h1').first.wait_for()
        one.settle()
        harmless(one)


def test_on_pages_that_list_runs(poisoned, window):
    one = window(poisoned)
    for report in RUNS:  # seen once, they are this person's
        one.page.goto(f"{poisoned}/edit?run={report.digest}")
        one.see_result()
    for page in PAGES:
        one.page.goto(poisoned + page.address)
        one.page.locator('[data-testid="stMain"] h1').first.wait_for()
        one.settle()
        harmless(one)


def test_typed_into_every_field(poisoned, window):
    one = window(poisoned)
    for page in PAGES:
        one.page.goto(poisoned + page.address)
        one.page.locator('[data-testid="stMain"] h1').first.wait_for()
        one.settle()
        boxes = one.page.locator(
            '[data-testid="stTextInput"] input:visible, [data-testid="stTextArea"] textarea:visible'
        )
        for index in range(boxes.count()):
            if index >= boxes.count() or not boxes.nth(index).is_enabled():
                continue
            text = PAYLOADS[(7 * index) % len(PAYLOADS)]
            boxes.nth(index).fill(text)
            boxes.nth(index).press("Tab")
            one.settle()
        harmless(one)
