"""The whole teaching path: every step answered, the two that need a run are run."""

from __future__ import annotations

import pytest

from mega_core.embedded import examples

RUNS = {6: "Look through the layers", 7: "Run MEGA on the same fact"}


def test_the_whole_teaching_path(server, window):
    if not examples.load():
        pytest.skip("no examples are shipped yet (python -m mega_core examples)")
    one = window(server)
    one.go("/learn", "Step 1 of 8")
    page = one.page
    for number in range(1, 9):
        page.get_by_role("heading", name=f"Step {number} of 8").wait_for()
        picks = page.locator(f'[class*="st-key-learn_pick"][class*="-{number} "] [data-testid="stRadioOption"]')
        picks.nth(1).click()
        page.locator(f'[class*="st-key-learn_check_{number}"] button').click()
        if number in RUNS:
            run = page.get_by_role("button", name=RUNS[number])
            run.or_(page.get_by_role("heading", name="What this means")).first.wait_for()
            if run.count():
                run.click()
        page.get_by_role("heading", name="What this means").wait_for()
        page.locator('[data-testid="stAlert"]', has_text="Right").or_(
            page.locator('[data-testid="stAlert"]', has_text="The answer")
        ).first.wait_for()
        page.locator("svg.marks, canvas").first.wait_for()
        if number < 8:
            one.press("Next step")
    one.see("of 8 predictions were right")
    assert "step=8" in page.url


def test_a_link_to_a_step_starts_nothing(server, window):
    leaks = next((card for card in examples.load() if card.outcome == "leaks"), None)
    if leaks is None:
        pytest.skip("no examples are shipped yet (python -m mega_core examples)")
    one = window(server)
    one.go(f"/learn?step=6&run={leaks.digest}", "Step 6 of 8")
    one.press("Show me")
    one.see("The numbers for this are not there yet")
    assert not one.page.get_by_role("button", name="Cancel").count()
