"""From an example into its heads, and a head's promise held against the running model."""

from __future__ import annotations

import re

import pytest

from mega_core.embedded import examples


def choose_view(one, name):
    one.page.locator('[class*="st-key-anatomy_view"] button', has_text=re.compile(f"^{name}$")).click()


def click_a_head(one):
    """Click the last cell of the map of heads; its place as in the address."""
    cells = one.page.locator('[class*="st-key-anatomy_chart_head_scores"] .mark-rect path')
    cells.first.wait_for()
    cells.first.scroll_into_view_if_needed()
    for index in reversed(range(cells.count())):
        found = re.search(r"\bLayer: (\d+).*\bHead: (\d+)", cells.nth(index).get_attribute("aria-label") or "")
        if found:
            cells.nth(index).click()
            return f"{found[1]}.attn.{found[2]}"
    pytest.fail("no cell with a label in the heat-map")


def test_from_an_example_to_its_heads_and_the_proof(server, window):
    cards = examples.load()
    if not cards:
        pytest.skip("no examples are shipped yet (python -m mega_core examples)")
    one = window(server)
    one.go(f"/anatomy?run={cards[0].digest}", "Largest changes")
    choose_view(one, "Heads")
    one.see("Not measured in this run")
    one.press("Measure it")
    one.page.get_by_role("heading", name="Heads: what pushes toward").wait_for()
    place = click_a_head(one)
    one.page.wait_for_url(re.compile(re.escape(f"at={place}")))
    one.page.get_by_role("heading", name="Where it looks").or_(
        one.page.get_by_text("is not among the heads")
    ).wait_for()
    one.page.get_by_role("button", name="Verify", exact=True).click()
    one.page.get_by_role("heading", name="Predicted and actual effect").wait_for()
    one.see("random places")
    one.page.get_by_role("button", name="All layers", exact=True).click()
    choose_view(one, "Map")
    one.see("Largest changes")


def test_a_link_leads_to_the_same_place(server, window):
    cards = examples.load()
    if not cards:
        pytest.skip("no examples are shipped yet (python -m mega_core examples)")
    one = window(server, "dark", 390)
    one.go(f"/anatomy?run={cards[0].digest}&view=map&explain=new&at=2.ffn", "It is changed in the running model")
    one.page.get_by_role("heading", name="Layer 2 · MLP").wait_for()
    one.settle()
    assert one.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 2")
