"""Each page as a person meets it: first visit, running, done, empty, error, a link nobody knows."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mega_core.errors import BadInput, Busy
from mega_core.jobs import StageView
from tests.ui.conftest import words
from tests.ui.fake import FAILS, LEAKS, WORKS, failed, running


def fill(at, subject="Eiffel Tower", template="{} is located in the city of", new="Rome", true="Paris"):
    at.text_input(key="edit_subject").set_value(subject)
    at.text_input(key="edit_template").set_value(template)
    at.text_input(key="edit_new").set_value(new)
    at.text_input(key="edit_true").set_value(true)
    return at


def unfold(at, *expanders):
    for key in expanders:
        at.session_state[key] = True
    return at.run()


def specs(at) -> list[dict]:
    return [json.loads(element.proto.spec) for element in at.get("vega_lite_chart")]


class TestStart:
    def test_three_cards_with_their_outcome(self, visit):
        at = visit("start")
        links = [link.proto for link in at.get("page_link") if link.proto.label == "Open"]
        assert [link.query_string for link in links] == [f"run={one.digest}" for one in (WORKS, LEAKS, FAILS)]
        badges = "\n".join(element.value for element in at.markdown)
        assert "Works" in badges
        assert "Leaks" in badges
        assert "Fails" in badges
        assert "0.21 % → 93 %" in words(at)
        assert "other host" in words(at)

    def test_without_examples_the_way_on_is_shown(self, desk, visit):
        desk.cards = ()
        assert "Make your first edit" in words(visit("start"))

    def test_the_last_runs_of_this_person(self, desk, visit):
        desk.visited(WORKS, "o" * 32)
        at = visit("start")
        assert at.get("page_link")
        assert "last five runs will be listed" not in words(at)


class TestEdit:
    def test_first_visit_says_what_will_appear(self, visit):
        at = visit("edit")
        assert "What you will see here" in words(at)
        assert at.button(key="edit_run").label == "Run this edit"
        assert "not for this model: attention and MLP run in parallel here" in words(at)
        assert at.text_input(key="edit_subject").value == ""

    def test_the_preview_follows_the_form(self, visit):
        at = fill(visit("edit")).run()
        assert ":primary-background[Eiffel Tower] is located in the city of" in words(at)

    def test_a_run_is_submitted_and_watched(self, desk, visit):
        at = fill(unfold(visit("edit"), "edit_checks"))
        at.text_area(key="edit_paraphrases").set_value("The Eiffel Tower is in\n\nWhere is the Eiffel Tower? In\n")
        at.button(key="edit_run").click().run()
        assert not at.exception
        (plan,) = desk.submitted
        assert plan.requests[0].prompt == "Eiffel Tower is located in the city of"
        assert plan.requests[0].paraphrases == ("The Eiffel Tower is in", "Where is the Eiffel Tower? In")
        assert dict(plan.method.params)["learning_rate"] == 0.5
        assert dict(plan.method.params)["layer"] is None
        assert dict(plan.method.params)["shrinkage"] is None
        assert "Running for 1.9 s" in words(at)
        assert "9 of 20" in words(at)
        assert at.button(key="edit_run").disabled

    def test_the_earlier_result_stays_while_another_is_made(self, desk, visit):
        desk.view = running("e" * 64)
        at = visit("edit", run=WORKS.digest)
        at.session_state["edit_job"] = "j" * 32
        text = words(at.run())
        assert "Running for 1.9 s" in text
        assert "Rome is now the most likely answer" in text

    def test_earlier_steps_are_counted(self, desk, visit):
        steps = tuple(StageView(f"step {number}", 0.1, 1, 1, True) for number in range(6))
        desk.view = replace(running("e" * 64), stages=(StageView("all", 2.0, 5, 9, False), *steps))
        at = visit("edit")
        at.session_state["edit_job"] = "j" * 32
        text = words(at.run())
        assert "3 earlier steps" in text
        assert "All 5 of 9" in text
        assert "Step 3" in text
        assert "Step 2" not in text

    def test_waiting_shows_the_place_in_the_queue(self, desk, visit):
        desk.view = replace(running("e" * 64), state="queued", ahead=2, stages=(), fraction=None)
        at = visit("edit")
        at.session_state["edit_job"] = "j" * 32
        assert "Waiting: 2 before you" in words(at.run())

    def test_a_finished_job_shows_its_result(self, desk, visit):
        desk.view = replace(running(WORKS.digest), state="done")
        at = visit("edit")
        at.session_state["edit_job"] = "j" * 32
        at.run()
        assert not at.exception
        assert "Rome is now the most likely answer" in words(at)
        assert "edit_job" not in at.session_state
        assert WORKS.digest in desk.entries

    def test_cancel(self, desk, visit):
        at = fill(visit("edit"))
        at.button(key="edit_run").click().run()
        at.button(key="edit_cancel").click().run()
        assert desk.cancelled
        assert "Cancelled. The model was given back" in words(at)
        assert at.text_input(key="edit_subject").value == "Eiffel Tower"

    def test_a_failed_job_says_what_to_do(self, desk, visit):
        desk.view = failed("e" * 64)
        at = visit("edit")
        at.session_state["edit_job"] = "j" * 32
        at.run()
        text = words(at)
        assert "ran out of memory" in text
        assert "smaller model" in text
        assert "deadbeef" in text

    @pytest.mark.parametrize(
        ("subject", "template", "new", "says"),
        [
            ("", "{} is in", "Rome", "subject: is empty."),
            ("Eiffel Tower", "The Eiffel Tower is in", "Rome", 'Write it as "The {} is in"'),
            ("Eiffel Tower", "{} is in", "paris", "is the same as the original object"),
        ],
    )
    def test_a_mistake_is_told_at_its_field_and_nothing_is_lost(self, desk, visit, subject, template, new, says):
        at = fill(visit("edit"), subject, template, new)
        at.button(key="edit_run").click().run()
        assert not at.exception
        assert says in words(at)
        assert not desk.submitted
        assert at.text_input(key="edit_template").value == template
        assert at.text_input(key="edit_new").value == new

    def test_a_parameter_out_of_range_is_told(self, desk, visit):
        at = fill(unfold(visit("edit"), "edit_advanced"))
        at.text_input(key="knob_rome_learning_rate").set_value("much")
        at.button(key="edit_run").click().run()
        assert "rome.learning_rate: 'much' is not a number." in words(at)
        assert not desk.submitted

    def test_a_full_queue_is_told(self, desk, visit):
        desk.broken = Busy("8 questions are waiting already.", "Try again in a minute.")
        at = fill(visit("edit"))
        at.button(key="edit_run").click().run()
        assert "Try again in a minute." in words(at)

    def test_an_unforeseen_error_shows_an_id_and_no_more(self, desk, visit, caplog):
        desk.broken = RuntimeError("secret at /home/someone/file")
        at = fill(visit("edit"))
        at.button(key="edit_run").click().run()
        assert not at.exception
        assert "error id" in words(at)
        assert "secret" not in words(at)
        assert "secret" in caplog.text

    def test_a_link_shows_a_stored_run_and_fills_the_form(self, desk, visit):
        at = visit("edit", run=WORKS.digest)
        text = words(at)
        assert "Rome is now the most likely answer (0.21 % → 93 %)" in text
        assert "9 of 10 prompts answer as they should" in text
        assert at.text_input(key="edit_subject").value == "Eiffel Tower"
        assert at.session_state["edit_neighbours"].startswith("Louvre Museum")
        unfold(at, "edit_checks")
        assert at.text_area(key="edit_neighbours").value.startswith("Louvre Museum")
        assert not desk.submitted
        assert len(specs(at)) == 4  # next tokens, evidence, map, profile
        values = {metric.label: metric.value for metric in at.metric}
        assert values["New object"] == "93 %"
        assert values["Neighbours"] == "5 / 6"

    @pytest.mark.parametrize("run", ["0" * 64, "short", "../../etc/passwd", "<script>alert(1)</script>"])
    def test_an_unknown_run_leaves_the_form_usable(self, desk, visit, run):
        at = visit("edit", run=run)
        assert "This run is not stored here" in words(at)
        fill(at).button(key="edit_run").click().run()
        assert len(desk.submitted) == 1

    def test_a_cleared_run_can_be_refilled_from_the_history(self, desk, visit):
        desk.visited(WORKS, "o" * 32)
        del desk.reports[WORKS.digest]
        at = visit("edit", run=WORKS.digest)
        at.button(key="edit_refill").click().run()
        assert at.text_input(key="edit_subject").value == "Eiffel Tower"
        assert not desk.submitted

    @pytest.mark.parametrize("report", [WORKS, FAILS])
    def test_a_shown_run_asked_again_is_the_same_question(self, desk, visit, report):
        at = visit("edit", run=report.digest)
        at.button(key="edit_run").click().run()
        assert not at.exception
        assert not desk.submitted
        assert at.query_params["run"] in (report.digest, [report.digest])

    def test_a_click_on_the_map_opens_the_detail(self, visit):
        at = visit("edit", run=WORKS.digest)
        pick = f"anatomy_cell_{WORKS.digest[:8]}"
        at.selectbox(key=pick).set_value((5, "attn")).run()
        assert not at.exception
        assert "Layer 5 · Attention" in words(at)
        assert "this attention module's push toward Rome rather than Paris" in words(at)

    def test_ask_the_model_fills_the_original_object(self, desk, visit):
        at = fill(visit("edit"), true="")
        at.button(key="edit_ask_button").click().run()
        at.run()
        assert at.text_input(key="edit_true").value == "Paris"

    def test_surprise_and_reset(self, visit):
        at = visit("edit")
        at.button(key="edit_surprise").click().run()
        assert at.text_input(key="edit_subject").value == "Big Ben"
        at.button(key="edit_reset").click().run()
        assert at.text_input(key="edit_subject").value == ""

    def test_a_fact_or_an_example_fills_the_form(self, visit):
        at = unfold(visit("edit"), "edit_advanced")
        at.selectbox(key="edit_start").set_value("fact:0").run()
        assert at.text_input(key="edit_subject").value == "Louvre Museum"
        at.selectbox(key="edit_start").set_value("example:leaks").run()
        assert at.text_input(key="edit_subject").value == "Eiffel Tower"
        assert at.number_input(key="edit_seed").value == 1

    def test_a_missing_model_is_explained_and_cannot_run(self, desk, visit):
        at = fill(visit("edit"))
        at.selectbox(key="edit_model").set_value("gpt2-xl").run()
        assert "huggingface-cli download" in words(at)
        at.button(key="edit_run").click().run()
        assert not desk.submitted
        assert "edit_job" not in at.session_state

    def test_a_mistake_in_a_folded_field_unfolds_it(self, desk, visit):
        at = fill(unfold(visit("edit"), "edit_checks"))
        at.text_area(key="edit_neighbours").set_value("\n".join(f"Prompt {n}" for n in range(500))).run()
        at.session_state["edit_checks"] = False
        at.run()
        assert not at.text_area
        at.button(key="edit_run").click().run()
        assert "neighbours" in words(at)
        assert at.text_area(key="edit_neighbours").value
        assert not desk.submitted

    def test_the_result_survives_a_visit_elsewhere(self, visit):
        at = visit("edit", run=WORKS.digest)
        at.switch_page("pages/status.py").run()
        at.query_params.clear()
        at.switch_page("pages/edit.py").run()
        assert "Rome is now the most likely answer" in words(at)


def test_an_error_in_a_page_shows_an_id_and_no_more(desk, visit, monkeypatch):
    def fail():
        raise RuntimeError("secret at /home/someone/file")

    monkeypatch.setattr(desk, "examples", fail)
    at = visit("start")
    assert "error id" in words(at)
    assert "secret" not in words(at)


def test_bad_input_names_its_field():
    assert BadInput("subject", "is empty.", "Fill it in.").field == "subject"
