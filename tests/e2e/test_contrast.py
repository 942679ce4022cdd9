"""Success against failure, in a browser: what ships, a small study of one's own, and its region sent to MEGA."""

from __future__ import annotations

import re


def test_a_study_of_ones_own_and_its_region(server, window):
    one = window(server)
    one.go("/contrast", "The published pattern holds")
    one.page.get_by_role("heading", name="Leverage of every editor").wait_for()
    one.page.locator('[class*="st-key-contrast_editors"] button', has_text="MEMIT").click()
    for label, value in (("Edits", "5"), ("Edits to induce failures on", "0")):
        one.type_into(label, value)
    one.see("5 edits by 1 editor: 5 questions; about")
    one.press("Run this study")
    one.page.get_by_role("button", name="Cancel").wait_for()
    one.see("Made here: 5 edits of random facts")
    link = re.search(r"\?study=[0-9a-f]{32}", one.page.url)
    assert link
    one.see("The shipped study (dashed, 200 edits)")
    other = window(server)
    other.go(f"/contrast{link[0]}", "Made here: 5 edits of random facts")
    assert not other.page.get_by_role("button", name="Cancel").count()
    other.press("Send to MEGA")
    other.page.get_by_role("heading", name="Edit trial").wait_for()
    other.page.get_by_text("Advanced").click()
    region = other.page.get_by_label("Region", exact=True)
    region.wait_for()
    assert "(measured: rome)" in region.input_value()
