"""The page of runs: the list, what can be done with what is chosen, and bringing a run along."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from mega_core.errors import StoreError
from mega_core.records import MethodRef
from pages.components import runs_compare, runs_list
from pages.components.text import WORD_JOINER
from tests.ui.conftest import words
from tests.ui.fake import EVIL, FAILS, LEAKS, WORKS, FakeService

OWNER = "o" * 32


def choose(desk: FakeService, at, *rows: int):
    """Select these rows of the list."""
    at.session_state[runs_list.table_key(list(desk.entries.values()))] = {
        "selection": {"rows": list(rows), "columns": [], "cells": []}
    }
    at.run()
    assert not at.exception
    return at


@pytest.fixture
def three(desk: FakeService) -> FakeService:
    """A person with three runs."""
    for report in (WORKS, LEAKS, FAILS):
        desk.visited(report, OWNER)
    return desk


class TestList:
    def test_empty(self, visit):
        at = visit("runs")
        assert "No runs yet" in words(at)
        assert at.expander[0].label == "Import a run"

    def test_runs_are_listed_with_where_they_come_from(self, three, visit):
        three.sharing.held[LEAKS.digest] = LEAKS
        table = visit("runs").dataframe[0].value
        assert table["fact"].tolist() == ["Eiffel Tower is located in the city of Rome"] * 3
        assert table["source"].tolist() == ["here", "imported", "here"]
        assert table["measured"].tolist() == ["works", "leaks", "fails"]

    def test_no_match(self, three, visit):
        at = visit("runs")
        at.text_input(key="runs_text").set_value("nothing like it").run()
        assert "No run matches" in words(at)

    def test_a_link_can_carry_words_to_find(self, three, visit):
        at = visit("runs", q="nothing <b>like</b> it")
        assert at.text_input(key="runs_text").value == "nothing <b>like</b> it"
        assert "No run matches" in words(at)

    def test_it_can_be_put_in_order(self, three, visit):
        at = visit("runs")
        at.selectbox(key="runs_order").set_value("Measured").run()
        assert at.dataframe[0].value["measured"].tolist() == ["fails", "leaks", "works"]

    def test_many_runs_come_in_pages(self, three, visit, monkeypatch):
        monkeypatch.setattr(runs_list, "ROWS", 2)
        at = visit("runs")
        assert len(at.dataframe[0].value) == 2
        (pages,) = [box for box in at.selectbox if str(box.key).startswith("runs_page")]
        assert pages.options == ["1 to 2 of 3", "3 to 3 of 3"]
        pages.set_value(2).run()
        assert at.dataframe[0].value["measured"].tolist() == ["fails"]

    def test_all_are_fetched_to_be_sorted(self, desk, visit, monkeypatch):
        """The history comes in portions; the order is over all of them."""
        first = datetime(2026, 1, 1, tzinfo=UTC)
        for i in range(5):
            report = replace(WORKS, digest=f"{i:064x}")
            desk.visited(report, OWNER)
            entry = desk.entries[report.digest]
            desk.entries[report.digest] = replace(entry, run=replace(entry.run, created=first + timedelta(days=i)))
        every = list(desk.entries.values())[::-1]
        monkeypatch.setattr(runs_list, "MAX_PAGE", 2)
        monkeypatch.setattr(desk, "runs", lambda *, limit, offset, **_: every[offset : offset + limit])
        at = visit("runs")
        at.selectbox(key="runs_order").set_value("Oldest first").run()
        assert at.dataframe[0].value["run"].tolist() == ["00000000"] * 5
        assert at.dataframe[0].value["when"].is_monotonic_increasing

    def test_hostile_texts_stay_texts(self, desk, visit):
        desk.visited(EVIL, OWNER)
        at = choose(desk, visit("runs"), 0)
        assert "![x](http://evil.example/a.png) <b>Tower</b>" in words(at).replace(WORD_JOINER, "")
        assert not any("![x](" in header.value for header in at.header)


class TestOne:
    def test_it_is_annotated(self, three, visit):
        at = choose(three, visit("runs"), 0)
        short = WORKS.digest[:12]
        at.text_area(key=f"note_{short}").set_value("looks fine")
        at.text_input(key=f"tags_{short}").set_value("paris, towers")
        next(button for button in at.button if button.label == "Save").click().run()
        assert not at.exception
        assert three.entries[WORKS.digest].notes[0].text == "looks fine"
        assert three.entries[WORKS.digest].tags == ("paris", "towers")

    def test_it_is_opened(self, three, visit):
        at = choose(three, visit("runs"), 1)
        at.button(key="runs_open").click().run()
        assert "The edit" in words(at) or "most likely" in words(at)
        assert at.query_params["run"] in (LEAKS.digest, [LEAKS.digest])


class TestSeveral:
    def test_they_are_deleted_only_after_asking_and_told_what_is_lost(self, three, visit):
        three.note(WORKS.digest, "my note", OWNER)
        three.sharing.held[LEAKS.digest] = LEAKS
        at = choose(three, visit("runs"), 0, 1)
        at.button(key="runs_delete").click().run()
        assert len(three.entries) == 3
        text = words(at)
        assert "2 runs will leave your list" in text.replace("*", "")
        assert "Lost with them: 1 note." in text
        assert "1 imported: only the file it came from brings it back." in text
        at.button(key="confirm_delete").click().run()
        assert not at.exception
        assert list(three.entries) == [FAILS.digest]
        assert not three.sharing.held

    def test_keep_keeps(self, three, visit):
        at = choose(three, visit("runs"), 0)
        at.button(key="runs_delete").click().run()
        at.button(key="confirm_keep").click().run()
        assert len(three.entries) == 3

    def test_only_what_differs_is_shown_until_all_is_wanted(self, three, visit):
        at = choose(three, visit("runs"), 0, 2)
        assert "Side by side" in words(at)
        shown = at.dataframe[1].value
        assert ("Setting", "Seed") in set(zip(shown["about"], shown["what"], strict=True))
        assert "Subject" not in set(shown["what"])
        at.toggle(key="runs_only_differences").set_value(False).run()
        assert "Subject" in set(at.dataframe[1].value["what"])

    def test_different_seeds_have_no_page_of_methods(self, three, visit):
        at = choose(three, visit("runs"), 0, 1)
        assert at.button(key="runs_compare").disabled

    def test_one_edit_by_two_methods_goes_to_the_page_of_methods(self, three, visit):
        other = replace(WORKS, digest="1" * 64, question=replace(WORKS.question, method=MethodRef("memit")))
        three.reports[other.digest] = other
        three.visited(other, OWNER)
        entries = [three.entries[digest] for digest in (WORKS.digest, other.digest)]
        assert runs_compare.why_not(entries, {WORKS.digest: WORKS, other.digest: other}) == ""
        at = choose(three, visit("runs"), 0, 3)
        assert not at.button(key="runs_compare").disabled

    def test_why_runs_are_not_compared_is_said(self, three):
        entries = [three.entries[report.digest] for report in (WORKS, LEAKS)]
        brought = replace(LEAKS, origin="2" * 64)
        assert "cleared" in runs_compare.why_not(entries, {WORKS.digest: WORKS})
        assert "different facts" in runs_compare.why_not(entries, {WORKS.digest: WORKS, LEAKS.digest: LEAKS})
        assert "Imported" in runs_compare.why_not(entries, {WORKS.digest: WORKS, LEAKS.digest: brought})
        assert "Choose 2 to 6" in runs_compare.why_not(entries[:1], {})

    def test_a_cleared_result_is_told(self, three, visit):
        del three.reports[LEAKS.digest]
        at = choose(three, visit("runs"), 0, 1)
        assert "The result of 1 of them has been cleared" in words(at)


class TestImport:
    def upload(self, at, data: bytes):
        at.file_uploader(key="runs_file").upload("run.json", data, "application/json").run()
        assert not at.exception
        return at

    def test_a_run_comes_and_is_marked(self, desk, visit):
        self.upload(visit("runs"), WORKS.to_file())
        (held,) = desk.sharing.held.values()
        assert held.origin == WORKS.digest

    def test_a_damaged_file_is_told_with_its_place(self, desk, visit):
        at = self.upload(visit("runs"), WORKS.to_file().replace(b'"before"', b'"during"', 3))
        assert not desk.sharing.held
        assert "file:" in words(at)
        assert at.error

    def test_a_full_disk_is_told(self, desk, visit):
        desk.sharing.broken = StoreError("The run could not be kept (no space left).", "Free some space, try again.")
        at = self.upload(visit("runs"), WORKS.to_file())
        assert "could not be kept" in words(at)
