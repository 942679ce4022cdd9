"""Multi-hop, in a browser: a chain of known facts, asked before and after an edit by two methods."""

from __future__ import annotations

import re


def test_a_chain_by_two_methods_and_its_link(server, window):
    one = window(server)
    one.go("/multihop", "Nothing is asked yet")
    one.page.get_by_role("button", name="Ask the chain").wait_for()
    for name in ("ACE", "MEGA", "IKE"):  # the first two off, the third on
        one.page.get_by_role("button", name=name, exact=True).click()
    one.press("Ask the chain")
    one.page.get_by_role("button", name="Cancel").wait_for()
    one.page.get_by_role("heading", name="Methods side by side").wait_for()
    one.see("Before any edit the model recalls")
    one.page.get_by_role("heading", name="Query layers: who switches them on").wait_for()
    link = re.search(r"\?chain=[0-9a-f]{32}", one.page.url)
    assert link
    other = window(server, "dark", 390)
    other.go(f"/multihop{link[0]}", "Before any edit the model recalls")
    assert not other.page.get_by_role("button", name="Cancel").count()
    other.settle()
    assert other.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 2")
