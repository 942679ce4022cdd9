"""A mask from the form to its picture, and the way to the detector."""

from __future__ import annotations

import re

import pytest


@pytest.mark.slow
def test_a_mask_is_trained_shown_and_found_again_by_its_link(server, window):
    one = window(server)
    one.go("/mask", "One mask for many edits")
    edits = one.page.get_by_role("slider", name="Edits to train on")
    edits.focus()
    edits.press("Home")
    one.see("Takes about 14 s here.")
    one.press("Train this mask")
    one.page.get_by_role("heading", name="The mask in view", exact=True).wait_for()
    one.see("Trained, not judged yet")
    one.page.get_by_role("heading", name="Where the mask cuts", exact=True).wait_for()
    link = re.search(r"/mask\?mask=[0-9a-f]{64}$", one.page.url)
    assert link
    other = window(server, scheme="dark", width=390)
    other.go(link[0], "10 edits")
    other.page.get_by_role("heading", name="Where the mask cuts", exact=True).wait_for()
    other.settle()
    assert other.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_detector_says_how_to_allow_a_folder(server, window):
    one = window(server)
    one.go("/mask", "One mask for many edits")
    one.page.get_by_text("Detector", exact=True).click()
    one.see("No folder is allowed yet")
    one.see("MEGA_DETECT_DIRS=")
    assert one.page.get_by_role("textbox").count() == 0
