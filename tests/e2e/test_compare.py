"""Three methods on the edit of an example, from the form to filled columns."""

from __future__ import annotations

import re

import pytest

from mega_core.embedded import examples
from tests.e2e.conftest import PATIENCE


def test_three_methods_from_an_example_to_filled_columns(server, window):
    works = next((card for card in examples.load() if card.outcome == "works"), None)
    if works is None:
        pytest.skip("no examples are shipped yet (python -m mega_core examples)")
    one = window(server)
    one.go(f"/compare?run={works.digest}", "What you will see here")
    one.settle()
    for title in ("MEMIT", "MEGA"):  # of the usual five, three stay
        one.page.get_by_role("button", name=f"Remove {title}").click()
        one.page.get_by_role("button", name=f"Remove {title}").wait_for(state="detached")
    one.press("Compare these methods")
    one.page.get_by_role("heading", name="What it took, and what was changed").wait_for()
    one.page.get_by_role("button", name="Cancel").wait_for(state="detached")
    one.settle()
    for title in ("ROME", "FT-M", "IKE"):
        one.page.locator("strong", has_text=re.compile(f"^{title}$")).first.wait_for()
    one.page.get_by_role("link", name="Anatomy").nth(3).wait_for()  # the navigation's, and one for each method
    assert re.search(r"comparison=[0-9a-f]{64}", one.page.url)
    again = window(server)
    again.go(one.page.url.removeprefix(server), "What it took, and what was changed")
    again.page.get_by_text("Blind labels A, B, C").click()
    again.see("Method A")
    again.page.get_by_role("heading", name="What it took").wait_for(state="detached", timeout=PATIENCE)
