"""A person's way through the app, and what must never happen on it."""

from __future__ import annotations

import re
import time

import pytest

from mega_core.embedded import examples
from pages.components.frame import PAGES
from pages.components.run_bar import LEADS_TO

NOBODY = "0" * 64


def fill_tower(one, new="Rome"):
    one.type_into("Subject", "Eiffel Tower")
    one.type_into("Prompt template", "{} is located in the city of")
    one.type_into("Original object (optional)", "Paris")
    one.type_into("New object", new)
    one.see("The new fact reads")
    one.page.locator(
        '[data-testid="stMarkdown"]', has_text=f"Eiffel Tower is located in the city of Paris {new}"
    ).first.wait_for()


def click_a_cell(one) -> str:
    """Click a cell that isn't chosen; the place it stands for."""
    cells = one.page.locator('[class*="st-key-chart_map"] .mark-rect path')
    cells.first.wait_for()
    cells.first.scroll_into_view_if_needed()
    pattern = re.compile(r"Layer: (\d+); .*Module: (\w+)")
    chosen = one.page.locator('[class*="st-key-anatomy_cell"] input').input_value()
    for index in range(cells.count()):
        label = cells.nth(index).get_attribute("aria-label") or ""
        found = pattern.search(label)
        if found and f"Layer {found[1]} · {found[2]}" != chosen:
            cells.nth(index).click()
            return f"Layer {found[1]} · {found[2]}"
    pytest.fail("no cell with a label in the heat-map")


def test_a_deep_link_as_the_very_first_request(cold_server, window):
    one = window(cold_server)
    one.go(f"/edit?run={NOBODY}", "This run is not stored here")
    assert one.page.get_by_role("link", name="Status").count()
    assert one.page.get_by_text("Run this edit").first.is_enabled()
    assert "Edit trial" in one.page.title() or "Edit Anatomy" in one.page.title()


def test_from_start_over_an_example_to_the_detail(server, window):
    if not examples.load():
        pytest.skip("no examples are shipped yet (python -m mega_core examples)")
    one = window(server)
    one.go("/", "Edit Anatomy")
    one.page.get_by_role("link", name="Open").first.click()
    one.see_result()
    assert re.search(r"run=[0-9a-f]{64}", one.page.url)
    place = click_a_cell(one)
    one.page.get_by_role("heading", name=place).wait_for()


def test_an_own_edit_its_detail_and_its_link(server, window):
    one = window(server)
    one.go("/edit", "What you will see here")
    fill_tower(one)
    one.page.get_by_label("New object", exact=True).press("Control+Enter")
    one.see_result()
    place = click_a_cell(one)
    one.page.get_by_role("heading", name=place).wait_for()
    link = re.search(r"\?run=[0-9a-f]{64}", one.page.url)
    assert link
    other = window(server)
    began = time.monotonic()
    other.go(f"/edit{link[0]}", "Edit trial")
    other.see_result()
    assert time.monotonic() - began < 15
    other.holds("Subject", "Eiffel Tower")
    one.go("/runs", "Select a row")


def test_cancel(server, window):
    one = window(server)
    one.go("/edit", "What you will see here")
    fill_tower(one, new="Madrid")
    one.page.get_by_text("Advanced").click()
    steps = one.page.get_by_label("Steps", exact=True)
    steps.fill("200")
    steps.press("Tab")
    stop = one.page.get_by_label("Stop probability", exact=True)
    stop.fill("1")
    stop.press("Tab")
    one.settle()
    one.page.set_viewport_size({"width": 1440, "height": 600})  # the form is longer than the window
    one.page.get_by_label("Subject", exact=True).scroll_into_view_if_needed()
    one.page.get_by_label("Subject", exact=True).press("Control+Enter")
    stop = one.page.get_by_role("button", name="Cancel")
    stop.wait_for()
    box = stop.bounding_box()
    assert box["y"] >= 0
    assert box["y"] + box["height"] <= 600  # in view, though its place is at the end of the form
    stop.click()
    one.see("Cancelled. The model was given back")
    one.holds("New object", "Madrid")


def test_a_mistake_is_told_in_the_form(server, window):
    one = window(server)
    one.go("/edit", "What you will see here")
    one.type_into("Subject", "Eiffel Tower")
    one.type_into("Prompt template", "The Eiffel Tower is in")
    one.type_into("New object", "Rome")
    one.press("Run this edit")
    one.see("has the subject itself")


def test_hostile_texts_stay_texts(server, window):
    one = window(server)
    one.go("/edit", "What you will see here")
    one.type_into("Subject", "![x](http://evil.example/a.png) <img src=x onerror=alert(1)>")
    one.type_into("Prompt template", "{} <script>window.__x=1</script> $\\frac{1}{2}$ [in](http://evil.example)")
    one.type_into("New object", ":red[Rome] ![n](http://evil.example/n.png)")
    one.page.wait_for_timeout(1500)
    one.settle()
    assert one.page.evaluate("window.__x") is None
    assert one.page.locator('[data-testid="stMain"] img').count() == 0
    assert one.page.locator('[data-testid="stMain"] a[href*="evil"]').count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_pages_fit_light_and_dark_wide_and_narrow(server, window, scheme, width):
    one = window(server, scheme, width)
    shipped = examples.load()
    about = [f"/{name}?run={shipped[0].digest}" for name in LEADS_TO] if shipped else []
    for address in (*(page.address for page in PAGES), *about):
        one.page.goto(server + address)
        one.page.locator('[data-testid="stMain"] h1').first.wait_for()
        one.settle()
        fits = "document.documentElement.scrollWidth <= window.innerWidth + 2"
        assert one.page.evaluate(fits), f"{address} is wider than {width} px"
        background = one.page.evaluate(
            "getComputedStyle(document.querySelector('[data-testid=\"stApp\"]')).backgroundColor"
        )
        assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(13, 19, 25)")


def test_other_hosts_are_refused(server):
    """The live connection answers to this machine's own names only."""
    import http.client
    from urllib.parse import urlparse

    address = urlparse(server)
    for host, expected in ((address.netloc, 101), ("evil.example", 403)):
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
        connection.putrequest("GET", "/_stcore/stream", skip_host=True)
        for name, value in {
            "Host": host, "Origin": f"http://{host}", "Upgrade": "websocket", "Connection": "Upgrade",
            "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
        }.items():  # fmt: skip
            connection.putheader(name, value)
        connection.endheaders()
        assert connection.getresponse().status == expected
        connection.close()
