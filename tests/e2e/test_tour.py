"""The tour of the README, step by step: what it says is what this test does, in its order."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mega_core.embedded import examples

README = Path(__file__).resolve().parents[2] / "README.md"
STEPS: list[tuple[str, Callable]] = []


def step(sentence: str) -> Callable[[Callable], Callable]:
    """A step of the tour: the words that the README has for it, and what is done."""

    def keep(act: Callable) -> Callable:
        STEPS.append((sentence, act))
        return act

    return keep


@step("press **Open** on the edit that works")
def open_the_example(one):
    one.go("/", "Edit Anatomy")
    began = time.monotonic()
    one.page.get_by_role("link", name="Open").first.click()
    one.page.locator("svg.marks, canvas.marks").first.wait_for()
    assert time.monotonic() - began < 60  # one click, and the first chart within the first minute


@step("**What the models write**")
def read_the_answers(one):
    one.see_result()
    one.page.get_by_role("heading", name="What the models write").wait_for()
    one.page.get_by_role("heading", name="Margin by prompt").wait_for()


@step("press **Look inside**")
def look_inside(one):
    one.page.get_by_role("link", name="Look inside").click()
    one.page.get_by_role("heading", level=1, name="Anatomy").wait_for()
    one.see("Largest changes")


@step("choose a **Place**")
def choose_a_place(one):
    one.page.get_by_label("Place", exact=True).click()
    one.page.get_by_role("option", name="Layer 6 · Attention").click()
    one.page.get_by_role("heading", name="Layer 6 · Attention").wait_for()


@step("press **Verify**")
def verify(one):
    one.page.get_by_role("button", name="Verify", exact=True).click()
    one.page.get_by_role("heading", name="Predicted and actual effect").wait_for()


@step("press **Compare these methods**")
def compare(one):
    one.page.locator('[data-testid="stMain"]').get_by_role("link", name="Compare methods").click()
    one.page.get_by_role("heading", level=1, name="Compare methods").wait_for()
    one.press("Compare these methods")
    one.page.get_by_role("heading", name="What it took, and what was changed").wait_for()
    one.page.get_by_role("button", name="Cancel").wait_for(state="detached")
    one.settle()


@step("press **W**")
def review(one):
    one.page.locator('[data-testid="stSidebar"]').get_by_role("link", name="Failure review").click()
    one.page.get_by_role("heading", level=1, name="Failure review").wait_for()
    one.page.locator('[class*="st-key-review_form"]').wait_for()
    one.settle()
    one.page.keyboard.press("w")
    one.see("saved ")


@step("**Export**, **Report: one HTML file**")
def export(one):
    one.page.locator('[data-testid="stSidebar"]').get_by_role("link", name="Edit trial").click()
    one.see_result()
    one.page.get_by_role("button", name="Export").first.click()
    with one.page.expect_download() as saved:
        one.page.get_by_role("button", name="Report: one HTML file").click()
    assert "<svg" in Path(saved.value.path()).read_text(encoding="utf-8")


@step("**Next step**")
def learn(one):
    one.page.locator('[data-testid="stSidebar"]').get_by_role("link", name="Learn").click()
    one.page.get_by_role("heading", name="Step 1 of 8").wait_for()
    one.press("Next step")
    one.page.get_by_role("heading", name="Step 2 of 8").wait_for()


def test_the_readme_has_these_steps_in_this_order():
    text = README.read_text(encoding="utf-8")
    tour = re.search(r"## Five minutes\n(.*?)\n## ", text, re.DOTALL)
    assert tour, "the README has no tour"
    words = " ".join(tour[1].split())
    places = [words.find(sentence) for sentence, _ in STEPS]
    assert -1 not in places, [sentence for sentence, _ in STEPS if sentence not in words]
    assert places == sorted(places)
    assert len(re.findall(r"^\d+\. ", tour[1], re.MULTILINE)) == len(STEPS)


def test_the_tour(server, window):
    if not examples.load():
        pytest.skip("no examples are shipped yet (python -m mega_core examples)")
    one = window(server)
    for _, act in STEPS:
        act(one)
