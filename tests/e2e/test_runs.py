"""A run leaves as a file and comes back in another browser; its report opens without a network."""

from __future__ import annotations

import json

import pytest

from mega_core.embedded import examples


@pytest.fixture
def example():
    found = examples.load()
    if not found:
        pytest.skip("no examples are shipped yet (python -m mega_core examples)")
    return found[0]


def saved(one, label, tmp_path):
    """Press a download button of the open popover; the file."""
    with one.page.expect_download() as coming:
        one.page.get_by_role("button", name=label).click()
    target = tmp_path / coming.value.suggested_filename
    coming.value.save_as(target)
    return target


def test_a_run_leaves_and_comes_back_in_another_browser(server, window, browser, example, tmp_path):
    one = window(server)
    one.go(f"/edit?run={example.digest}", "Edit trial")
    one.see_result()
    one.press("Export")
    run = saved(one, "run.json", tmp_path)
    report = saved(one, "Report: one HTML file", tmp_path)
    assert json.loads(run.read_bytes())["digest"] == example.digest

    other = window(server)
    other.go("/runs", "No runs yet")
    other.page.get_by_text("Import a run").click()
    other.page.locator('input[type="file"]').set_input_files(run)
    other.see(f"imported, was {example.digest[:8]}")
    other.press("Open this run")
    other.see_result()
    other.see(example.sentence[:40])
    assert example.digest not in other.page.url

    context = browser.new_context(offline=True)
    page = context.new_page()
    asked, trouble = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: trouble.append(message.text))
    page.goto(report.as_uri())
    assert page.locator("h1").inner_text().startswith(example.sentence[:40])
    assert page.locator("figure svg").count() >= 8
    assert all(page.locator("figure svg").nth(i).bounding_box()["height"] > 50 for i in range(8))
    context.close()
    assert asked == [report.as_uri()]
    assert trouble == []
