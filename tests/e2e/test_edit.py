"""The edit page with the real model: a method from its card, the strength of a steered run, the stack."""

from __future__ import annotations

import re

import pytest

from mega_core.embedded import examples
from tests.e2e.test_app import fill_tower

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect


def choose(one, title):
    """A method by its card, from the keyboard."""
    one.press("All 15")
    one.page.get_by_role("dialog").get_by_role("button", name=f"Choose {title}", exact=True).press("Enter")
    one.page.get_by_role("dialog").wait_for(state="hidden")
    expect(one.page.get_by_role("combobox", name="Method")).to_have_value(title)


def run(one, method, new="Rome") -> str:
    """An edit of the tower by this method; the run id in the address."""
    one.go("/edit", "What you will see here")
    fill_tower(one, new)
    choose(one, method)
    one.press("Run this edit")
    one.see_result()
    found = re.search(r"run=[0-9a-f]{64}", one.page.url)
    assert found
    return found[0]


def test_another_method_for_an_example_and_its_evidence_by_group(server, window):
    cards = examples.load()
    if not cards:
        pytest.skip("no examples are shipped yet (python -m mega_core examples)")
    one = window(server)
    one.go(f"/edit?run={cards[0].digest}", "Where in the network")
    choose(one, "MEMIT")
    one.page.locator('[class*="st-key-evidence_group"] button', has_text="Paraphrase").click()
    one.see("prompts answer as they should")
    one.page.get_by_text("Only those that fail").click()
    one.settle()
    one.page.get_by_role("link", name="Look deeper into this run").click()
    one.page.get_by_role("heading", name="Anatomy", exact=True).wait_for()
    one.page.wait_for_url(re.compile(f"run={cards[0].digest}"))


def test_the_slider_answers_at_another_strength(server, window):
    one = window(server)
    run(one, "MEGA")
    one.press("Prepare the slider")
    slider = one.page.get_by_role("slider")
    slider.wait_for()
    said = one.page.get_by_text(re.compile(r"^The model at α = "))
    own = said.inner_text()
    slider.focus()
    for _ in range(3):
        slider.press("ArrowLeft")
    expect(said).not_to_have_text(own)
    one.page.get_by_role("button", name="Own: ").click()
    expect(said).to_have_text(own)
    slider.press("Home")
    expect(said).to_have_text("The model at α = 0 writes")
    one.page.locator(
        '[data-testid="stMarkdown"]', has_text="Eiffel Tower is located in the city of Paris"
    ).last.wait_for()


def test_an_edit_is_stacked_checked_and_undone(server, window):
    one = window(server)
    link = run(one, "FT-M", "Vienna")
    one.press("Add to stack")
    one.see("Added by FT_M.")
    undo = one.page.get_by_role("button", name="Undo ft_m-1")
    undo.wait_for()
    one.press("Check all")
    one.see("with every edit applied")
    one.see("Restored, bit for bit, digest")
    other = window(server)  # somebody else has an empty stack
    other.go(f"/edit?{link}", "Stack of edits")
    other.see("is empty")
    undo.click()
    one.see("ft_m-1 was taken out")
    undo.wait_for(state="detached")
