"""A benchmark from the form to the answers behind a number, and one that is stopped."""

from __future__ import annotations

import re


def configure(one, methods, cases):
    configured = one.page.locator("details", has_text="Configure")
    configured.wait_for()
    if configured.get_attribute("open") is None:
        one.page.locator("summary", has_text="Configure").click()
    one.type_into("Cases at most", str(cases))
    chosen = one.page.get_by_label("Methods", exact=True)
    chosen.click()
    for _ in range(2):  # those that are chosen to begin with
        chosen.press("Backspace")
    for method in methods:
        chosen.fill(method)
        one.page.get_by_role("option", name=re.compile(f"^{method}(,|$)")).click()
    chosen.press("Escape")
    one.see(f"{(len(methods) + 1) * cases} measurements")


def unfold(one, label):
    """Open a list of choices. One that is opened while the page still scrolls is closed again."""
    box = one.page.get_by_label(label, exact=True)
    box.evaluate("box => box.scrollIntoView({block: 'center'})")
    one.settle()
    one.page.wait_for_timeout(500)
    box.click()


def choose(one, label, text):
    unfold(one, label)
    one.page.get_by_role("option", name=text, exact=True).click()


def test_from_the_form_to_the_answers_behind_a_number(server, window):
    one = window(server)
    one.go("/benchmark", "New benchmark")
    configure(one, ["ROME", "FT-M"], 4)
    one.press("Start")
    one.see("All benchmarks")
    assert re.search(r"benchmark=[0-9a-f]{32}", one.page.url)
    one.page.get_by_role("button", name="Report (HTML)").wait_for()  # it is done
    one.see("Answers behind the number")
    one.settle()
    choose(one, "Method", "ft_m")
    one.see("ft_m · Efficacy, generated: contains")
    other = window(server)
    other.page.goto(one.page.url)  # the link says what is looked at
    other.see("ft_m · Efficacy, generated: contains")
    other.page.get_by_role("button", name="Report (HTML)").wait_for()  # drawn to the end
    other.settle()
    unfold(other, "Case")
    other.page.get_by_role("option").first.click()
    other.press("Open as a run")
    other.see("Run this edit")
    assert other.page.get_by_label("Subject", exact=True).input_value()


def test_one_that_is_stopped_can_be_gone_on_with(server, window):
    one = window(server)
    one.go("/benchmark", "New benchmark")
    configure(one, ["ROME"], 90)
    one.press("Start")
    one.see("All benchmarks")
    one.press("Stop")
    one.see("Everybody on this machine sees it")
    one.press("Stop it")
    one.page.get_by_role("button", name="Resume").wait_for()
    one.press("All benchmarks")
    one.page.get_by_role("button", name="Resume").wait_for()
