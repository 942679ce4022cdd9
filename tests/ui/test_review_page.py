"""Failure review with the frozen service: its states, what a press does, and text that stays text."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mega_core.errors import StoreError
from mega_core.notebook import Opinion, ReviewLabel
from mega_core.service.reviews import ME, Case, agreement
from pages.components import review_charts
from tests.ui.conftest import words
from tests.ui.fake import EVIL, FAILS, LEAKS, WORKS
from tests.ui.fakes.reviews import NOON, TOKEN, run_of

RUNS = (run_of(FAILS, "fails"), replace(run_of(LEAKS, "leaks"), method="memit"), run_of(WORKS))


@pytest.fixture
def review(desk, visit):
    """review(queue=..., run=...): the page with three own cases: failing, leaking, working."""
    desk.reviews.held[""] = [Case(run) for run in RUNS]
    return lambda **query: visit("review", **query)


def share(desk, *said: dict[str, Opinion]) -> None:
    """A shared queue of the three cases with these labels."""
    desk.reviews.held[TOKEN] = [
        Case(run, {name: ReviewLabel(run.digest, name, one, NOON) for name, one in labels.items()})
        for run, labels in zip(RUNS, (*said, {}, {}, {}), strict=False)
    ]
    desk.reviews.titles[TOKEN], desk.reviews.owners[TOKEN] = "Odd edits", "o" * 32


def press(at, label: str):
    """The answer of this name, or the button of this label; the first match."""
    next(button for button in at.button if button.label == label).click().run()
    assert not at.exception
    return at


def at_run(at) -> str:
    found = at.query_params["run"]
    return found[0] if isinstance(found, list) else found


def said(desk, number: int, reviewer: str = ME, token: str = "") -> Opinion:
    return desk.reviews.held[token][number].said(reviewer)


class TestStates:
    def test_empty_says_what_a_review_is_and_examples_are_one_press_away(self, desk, visit):
        at = visit("review")
        assert "No cases yet" in words(at)
        assert "eight failure types" in words(at)
        at.button(key="review_examples").click().run()
        assert not at.exception
        assert set(desk.entries) == {WORKS.digest, LEAKS.digest, FAILS.digest}

    def test_without_examples_only_an_edit_is_offered(self, desk, visit):
        desk.cards = ()
        assert [b.key for b in visit("review").button if b.key in ("review_make", "review_examples")] == ["review_make"]

    def test_a_case_is_shown_whole(self, review):
        at = review()
        text = words(at)
        assert at_run(at) == FAILS.digest
        assert "Eiffel Tower is located in the city of" in text
        assert "What the models write" in text
        assert "prompts answer as they should" in text
        assert "What pushes toward Rome rather than Paris" in text
        assert len(at.get("vega_lite_chart")) == 3
        assert len(at.dataframe[0].value) == 3
        assert list(at.dataframe[0].value["measured"]) == ["fails", "leaks", "works"]

    def test_a_run_in_the_address_is_the_case_shown(self, review):
        assert at_run(review(run=WORKS.digest)) == WORKS.digest

    @pytest.mark.parametrize("run", ["0" * 64, "<script>", ""])
    def test_a_run_nobody_knows_leads_to_the_first_case(self, review, run):
        assert at_run(review(run=run)) == FAILS.digest

    def test_a_cleared_report_keeps_its_labels_and_fills_the_form(self, desk, review):
        del desk.reports[FAILS.digest]
        desk.reviews.label("", "", FAILS.digest, ME, Opinion("fails", note="kept"))
        at = review()
        assert "not stored here any more" in words(at)
        assert [a.value for a in at.text_area] == ["kept"]
        at = press(at, "Fill the edit form")
        assert at.text_input(key="edit_subject").value == "Eiffel Tower"

    @pytest.mark.parametrize("token", [TOKEN, "../../x", "<b>", "%00"])
    def test_a_queue_that_is_not_there_is_told_and_own_runs_are_shown(self, review, token):
        at = review(queue=token)
        assert "there is none at this link" in words(at)
        assert "Your review" in words(at)
        assert "queue" not in at.query_params

    def test_a_change_that_is_not_saved_is_told_and_the_text_stays(self, desk, review):
        at = review()
        desk.reviews.broken = StoreError("Could not save the review: the disk is full.", "Make room and try again.")
        at.text_area[0].set_value("my long note").run()
        assert not at.exception
        assert "the disk is full" in words(at)
        assert at.text_area[0].value == "my long note"
        assert said(desk, 0) == Opinion()
        assert at.button(key="review_undo_button").disabled


class TestReviewing:
    def test_every_change_is_saved_and_progress_follows(self, desk, review):
        at = press(review(), "Fails")
        assert said(desk, 0) == Opinion("fails")
        at = press(press(at, "Neighbour bleed"), "3 severe")
        at.text_area[0].set_value("look at the Louvre").run()
        at.multiselect[0].set_value(["odd"]).run()
        assert said(desk, 0) == Opinion("fails", "neighbour bleed", 3, ("odd",), "look at the Louvre")
        assert "saved " in words(at)
        assert at.dataframe[0].value["done"].tolist() == ["✓", "·", "·"]
        press(at, "Fails")  # again: taken back
        assert said(desk, 0).verdict == ""

    def test_undo_goes_back_step_by_step(self, desk, review):
        at = press(press(review(), "Fails"), "Partial")
        at.text_area[0].set_value("note").run()
        at = press(press(at, "Next"), "Works")
        assert (said(desk, 0), said(desk, 1)) == (Opinion("partial", note="note"), Opinion("works"))
        at = press(at, "Undo")
        assert (said(desk, 1), at_run(at)) == (Opinion(), LEAKS.digest)
        at = press(at, "Undo")  # of the case before: it comes back to the screen
        assert (said(desk, 0), at_run(at)) == (Opinion("partial"), FAILS.digest)
        assert at.text_area[0].value == ""
        at = press(at, "Undo")
        at = press(at, "Undo")
        assert said(desk, 0) == Opinion()
        assert at.button(key="review_undo_button").disabled

    def test_a_field_brings_what_is_stored_along(self, review):
        """A browser that drew another case in between may have forgotten it."""
        at = review()
        at.text_area[0].set_value("look at the Louvre").run()
        at.multiselect[0].set_value(["odd"]).run()
        at = press(press(at, "Next"), "Previous")
        note, tags = at.text_area[0].proto, at.multiselect[0].proto
        assert (note.default, note.set_value) == ("look at the Louvre", False)
        assert [tags.options[i] for i in tags.default] == ["odd"]
        assert not tags.set_value

    def test_the_ways_between_cases(self, review):
        at = press(review(), "Previous")
        assert at_run(at) == FAILS.digest
        at = press(at, "Save & next")
        assert at_run(at) == LEAKS.digest
        at = press(press(at, "Next"), "Next")
        assert at_run(at) == WORKS.digest

    def test_a_reviewed_case_leaves_the_filter_but_stays_on_the_screen(self, desk, review):
        at = review()
        at.toggle(key="review_unreviewed").set_value(True).run()
        at = press(at, "Fails")
        assert at_run(at) == FAILS.digest
        assert len(at.dataframe[0].value) == 2
        at = press(at, "Next")
        assert at_run(at) == LEAKS.digest

    @pytest.mark.parametrize(
        ("key", "value", "left"),
        [("review_measured", "leaks", 1), ("review_method", "rome", 2), ("review_verdict", "fails", 1)],
    )
    def test_filters(self, desk, review, key, value, left):
        desk.reviews.label("", "", WORKS.digest, ME, Opinion("fails"))
        at = review()
        at.selectbox(key=key).set_value(value).run()
        assert len(at.dataframe[0].value) == left
        at.text_input(key="review_text").set_value("nowhere").run()
        assert "No case matches" in words(at)
        assert "Your review" in words(at)

    def test_keys_of_the_buttons_are_each_used_once(self, review):
        at = review()
        before = {b.proto.shortcut: b.proto.id for b in at.button if b.proto.shortcut}
        assert len(before) == len([b for b in at.button if b.proto.shortcut]) == 4 + 4 + 8 + 3 + 1
        at = press(at, "Next")
        # The next case has the very same buttons: beside an old one of its own a key press would reach both.
        assert {b.proto.shortcut: b.proto.id for b in at.button if b.proto.shortcut} == before

    def test_the_help_sheet(self, review):
        at = press(review(), "Keys")
        assert "Shift+1" in words(at)


class TestTogether:
    def test_a_queue_is_made_and_opened(self, desk, review):
        at = press(review(), "Share as a queue")
        at.text_input(key="review_share_title").set_value("Odd edits")
        at = press(at, "Make the queue")
        assert at.query_params["queue"] in (TOKEN, [TOKEN])
        assert f"queue={TOKEN}" in words(at)
        assert len(desk.reviews.held[TOKEN]) == 3

    def test_a_name_comes_first_and_labels_carry_it(self, desk, review):
        share(desk)
        at = review(queue=TOKEN)
        assert "Type a reviewer name" in words(at)
        assert not [b for b in at.button if b.label == "Fails"]
        at.text_input(key="review_name").set_value("  Ann ").run()
        press(at, "Fails")
        assert said(desk, 0, "Ann", TOKEN) == Opinion("fails")
        assert said(desk, 0) == Opinion()

    def test_agreement(self, desk, review):
        share(
            desk,
            {"Ann": Opinion("fails", "partial"), "Bob": Opinion("fails", "partial")},
            {"Ann": Opinion("works"), "Bob": Opinion("fails", "other")},
            {"Ann": Opinion("works"), "Bob": Opinion("works")},
        )
        at = review(queue=TOKEN)
        values = {metric.label: metric.value for metric in at.metric}
        assert (values["Both judged"], values["Agreement"], values["Cohen's κ"]) == ("3", "67 %", "0.40")
        assert "Ann says “works” where Bob says “fails” (1 case)" in words(at)
        at.segmented_control(key="review_what").set_value("failure").run()
        assert not at.exception
        assert {metric.label: metric.value for metric in at.metric}["Cohen's κ"] == "0.50"

    def test_kappa_that_is_not_defined_says_why(self, desk, review):
        share(desk, {"Ann": Opinion("fails"), "Bob": Opinion("fails")})
        at = review(queue=TOKEN)
        assert {metric.label: metric.value for metric in at.metric}["Cohen's κ"] == "not defined"
        assert "same answer every time" in words(at)

    def test_one_reviewer_alone(self, desk, review):
        share(desk, {"Ann": Opinion("fails")})
        assert "When two people have reviewed" in words(review(queue=TOKEN))

    def test_only_the_maker_may_delete(self, desk, review):
        share(desk)
        desk.reviews.owners[TOKEN] = "somebody else"
        assert not [b for b in review(queue=TOKEN).button if b.key == "review_delete"]
        desk.reviews.owners[TOKEN] = "o" * 32
        at = press(review(queue=TOKEN), "Delete queue")
        at.button(key="review_delete_yes").click().run()
        assert not at.exception
        assert TOKEN not in desk.reviews.titles
        assert "queue" not in at.query_params


HOSTILE = "![x](http://evil.example/a.png) <b onclick=x>:red[bold]</b> $x$ cases"


def test_hostile_text_stays_text(desk, visit):
    run = run_of(EVIL, HOSTILE[:40])
    labels = {
        name: ReviewLabel(run.digest, name, Opinion("fails", tags=(HOSTILE[:40],), note=HOSTILE), NOON)
        for name in (HOSTILE[:59], "cases", "first")
    }
    desk.reviews.held[TOKEN] = [Case(run, labels)]
    desk.reviews.titles[TOKEN], desk.reviews.owners[TOKEN] = HOSTILE, "o" * 32
    at = visit("review", queue=TOKEN)
    at.text_input(key="review_name").set_value(HOSTILE[:59]).run()
    assert not at.exception
    assert at.text_area[0].value == HOSTILE
    for kind in ("markdown", "caption", "header", "warning", "error", "info", "success"):
        for element in getattr(at, kind):
            assert "](http" not in element.value.replace("\\]", "")
            assert "<b" not in element.value.replace("\\<", "")
    at.selectbox(key="review_second").set_value("first").run()
    assert not at.exception
    at = press(at, "Delete queue")
    assert "](http" not in "".join(m.value for m in at.markdown).replace("\\]", "")


def test_the_picture_of_two_reviewers() -> None:
    cases = [
        Case(run, {"a": ReviewLabel(run.digest, "a", one, NOON), "b": ReviewLabel(run.digest, "b", two, NOON)})
        for run, one, two in zip(
            RUNS, (Opinion("fails"), Opinion("works"), Opinion("fails")), (Opinion("fails"),) * 3, strict=True
        )
    ]
    table = review_charts.pair_table(agreement(cases, "a", "b", "verdict").table, ("works", "partial", "fails"))
    assert table.to_dict("list") == {
        "first": ["works", "works", "fails", "fails"], "second": ["works", "fails", "works", "fails"],
        "n": [0, 1, 0, 2], "same": [True, False, False, True],
    }  # fmt: skip
    spec = review_charts.pairs(table, "a", "b").to_dict(validate=False)
    assert [layer["mark"]["type"] for layer in spec["layer"]] == ["rect", "rect", "text"]
    assert json.dumps(spec).count("a says") >= 1
    assert spec["height"] < 300
