"""Failure review as two people do it: one with the keyboard alone, then both on a shared queue."""

from __future__ import annotations

import json
import re

import pytest

from mega_core.embedded import examples

FORM = '[class*="st-key-review_form"]'


def begin(one) -> None:
    if not examples.load():
        pytest.skip("no examples are shipped yet (python -m mega_core examples)")
    one.go("/review", "No cases yet")
    one.press("Add the example runs")
    one.see("Reviewed 0/3")
    one.page.locator(FORM).wait_for()
    one.settle()  # keys reach a button when it has been drawn


def chosen(one, *labels: str) -> None:
    """Wait until exactly these answers are given."""
    one.page.wait_for_function(
        """([form, wanted]) => [...document.querySelectorAll(form + ' [data-testid="stBaseButton-primary"]')]
            .map(button => button.innerText.split(/\\n+/))
            .filter(([icon, label, key]) => icon === 'check_circle' && key).map(([icon, label]) => label)
            .join(', ') === wanted""",
        arg=[FORM, ", ".join(labels)],
    )


def test_three_cases_without_the_mouse(server, window):
    one = window(server)
    begin(one)
    page, keys = one.page, one.page.keyboard
    address = page.url

    def typed(text: str) -> None:
        page.get_by_label("Note", exact=True).focus()
        keys.type(text)

    keys.press("f")
    chosen(one, "Fails")
    keys.press("1")
    chosen(one, "Fails", "Not applied")
    keys.press("Shift+2")
    chosen(one, "Fails", "Not applied", "2 clear")
    one.see("saved ")
    one.see("Reviewed 1/3")
    typed("just 4 words, Jim")  # keys in a field are text
    keys.press("Control+Enter")
    page.wait_for_function("before => location.href !== before", arg=address)
    chosen(one)

    keys.press("Escape")
    page.evaluate("document.activeElement.blur()")
    keys.press("w")
    chosen(one, "Works")
    one.see("Reviewed 2/3")
    keys.press("w")  # the same key again takes it back
    chosen(one)
    keys.press("u")
    chosen(one, "Works")
    keys.press("j")
    chosen(one)
    keys.press("p")
    chosen(one, "Partial")
    one.see("Reviewed 3/3")

    keys.press("k")
    chosen(one, "Works")
    keys.press("k")
    chosen(one, "Fails", "Not applied", "2 clear")
    one.holds("Note", "just 4 words, Jim")
    keys.press("h")
    one.see("undo the last change")
    keys.press("Escape")


def test_two_keys_at_once_are_both_kept(server, window):
    one = window(server)
    begin(one)
    keys = one.page.keyboard
    for _ in range(4):
        keys.press("f")
        keys.press("1")
        chosen(one, "Fails", "Not applied")
        one.settle()
        keys.press("f")
        keys.press("1")
        chosen(one)
        one.settle()


def test_two_reviewers_of_a_shared_queue(server, window):
    one = window(server)
    begin(one)
    one.press("Share as a queue")
    one.type_into("Title", "Odd <b>edits</b>")
    one.press("Make the queue")
    one.type_into("Your reviewer name", "Ann")
    one.press("Fails")
    chosen(one, "Fails")
    one.press("Link")
    token = re.search(r"queue=([\w-]+)", one.page.locator("code", has_text="queue=").inner_text())[1]

    two = window(server)
    two.go(f"/review?queue={token}", "Type a reviewer name above")
    two.type_into("Your reviewer name", "Bob")
    chosen(two)
    two.press("Works")
    chosen(two, "Works")
    two.page.get_by_role("heading", name="Agreement of two reviewers").wait_for()
    two.see("0 of 1")
    two.see("Cases judged differently")
    two.press("Files")
    with two.page.expect_download() as got:
        two.press("Labels as JSONL")
    rows = [json.loads(line) for line in got.value.path().read_text().splitlines()]
    assert {(row["reviewer"], row["verdict"]) for row in rows} == {("Ann", "fails"), ("Bob", "works"), ("", "")}
