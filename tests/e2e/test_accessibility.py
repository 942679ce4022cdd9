"""axe-core on every page, empty and with a run, light and dark: nothing serious or critical."""

from __future__ import annotations

import pytest

from mega_core.embedded import examples
from pages.components.frame import PAGES
from pages.components.run_bar import LEADS_TO

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")


def addresses() -> list[str]:
    """Each page as it is empty, and those that can be about a run with one."""
    found = [page.address for page in PAGES]
    shipped = examples.load()
    if shipped:
        found += [f"/{name}?run={shipped[0].digest}" for name in LEADS_TO]
    return found


def serious(page) -> list[str]:
    """What axe calls serious or critical, one line each."""
    response = axe.Axe().run(page).response
    return [
        f"{found['id']}: {found['help']}: {[(node['target'], node['html'][:200]) for node in found['nodes'][:3]]}"
        for found in response["violations"]
        if found["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_on_any_page(server, window, scheme):
    one = window(server, scheme)
    wrong = {}
    for address in addresses():
        one.page.goto(server + address)
        one.page.locator('[data-testid="stMain"] h1').first.wait_for()
        one.settle()
        if found := serious(one.page):
            wrong[address] = found
    assert wrong == {}


def test_the_menu_leads_to_every_page_by_keyboard(server, window):
    """Tab reaches a link to each page, in order, and Enter opens it."""
    one = window(server)
    one.go("/", "Edit Anatomy")
    one.settle()
    seen: list[str] = []
    for _ in range(60):
        one.page.keyboard.press("Tab")
        label = one.page.evaluate("document.activeElement.closest('a') ? document.activeElement.innerText : ''").strip()
        if label:
            seen.append(label.splitlines()[-1])
        if label.endswith(PAGES[-1].title):
            break
    titles = [page.title for page in PAGES]
    assert [label for label in seen if label in titles] == titles
    one.page.keyboard.press("Enter")
    one.page.get_by_role("heading", level=1, name=PAGES[-1].title).wait_for()
