"""The edit page beyond its form: method cards, strength, evidence by group, stack."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from streamlit.testing.v1 import AppTest

from mega_core.errors import BadInput, Busy
from mega_core.records import MethodRef, Receipt
from mega_core.service import Held, StackCheck, StackedEdit
from pages.components import edit_charts, frame
from pages.components.edit_strength import reading
from tests.ui.conftest import APP, words
from tests.ui.fake import EVIL, LEAKS, WORKS, failed, make_report, running
from tests.ui.fakes.steering import dial
from tests.ui.test_pages import specs

STEERED = make_report(method="mega", seed=7)


def stacked(report, name="rome-1", kind="weights"):
    question = report.question
    return StackedEdit(name, kind, question.method, question.requests, question.seed)


@pytest.fixture
def steered(desk):
    desk.reports[STEERED.digest] = STEERED
    return desk.steering


class TestMethods:
    def test_the_chosen_one_says_what_it_does_and_takes(self, visit):
        text = words(visit("edit"))
        assert "Writes the fact into one MLP matrix" in text
        assert "Changes weights" in text
        assert "about 4.3 s" in text

    def test_every_method_is_a_card_and_one_press_chooses(self, visit):
        at = visit("edit")
        at.button(key="edit_all_methods").click().run()
        assert not at.exception
        assert {"ROME", "EMMET", "PMET"} <= {str(title.value) for title in at.subheader}
        assert "not measured yet" in words(at)
        assert at.button(key="choose_rome").disabled
        assert not [button for button in at.button if button.key == "choose_pmet"]  # can't edit this model
        at.button(key="choose_emmet").click().run()
        assert at.selectbox(key="edit_method").value == "emmet"
        assert "exact equality" in words(at)

    def test_the_choice_is_what_is_asked(self, desk, visit):
        at = visit("edit")
        for key, value in (("subject", "Big Ben"), ("template", "{} stands in"), ("new", "Rome")):
            at.text_input(key=f"edit_{key}").set_value(value)
        at.selectbox(key="edit_method").set_value("emmet").run()
        at.button(key="edit_run").click().run()
        (plan,) = desk.submitted
        assert plan.method.name == "emmet"


class TestStrength:
    def test_a_method_without_strength_has_no_slider(self, visit):
        assert "How strong" not in words(visit("edit", run=WORKS.digest))

    def test_without_a_fit_a_button_makes_one_and_a_link_does_not(self, desk, steered, visit):
        at = visit("edit", run=STEERED.digest)
        assert "How strong" in words(at)
        assert steered.prepared == []
        desk.view = replace(running(STEERED.digest), kind="steer")
        at.button(key="steer_prepare").click().run()
        assert not at.exception
        assert steered.prepared == [STEERED.digest]
        assert "Running for 1.9 s" in words(at)

    def test_the_slider_starts_at_the_runs_own_strength_and_asks_anew(self, steered, visit):
        steered.dials[STEERED.digest] = dial(STEERED.digest)
        at = visit("edit", run=STEERED.digest)
        (slider,) = at.slider
        assert (slider.value, slider.min, slider.max) == (1.25, 0.0, 3.0)
        assert "Rome. It is" in words(at)
        assert "Rome wins from α = 1 on" in words(at)
        slider.set_value(0.5).run()
        assert not at.exception
        assert steered.asked[-1] == 0.5
        assert "The model at α = 0.5 writes" in words(at)
        assert "Paris. It is" in words(at)
        at.button(key=f"strength_{STEERED.digest[:8]}_own").click().run()
        assert at.slider[0].value == 1.25

    def test_while_the_model_is_busy_the_page_stays(self, desk, steered, visit):
        steered.dials[STEERED.digest] = dial(STEERED.digest)
        steered.waits, desk.view = True, running(STEERED.digest)
        at = visit("edit", run=STEERED.digest)
        assert "this one is next" in words(at)
        assert at.slider
        desk.view = failed(STEERED.digest)
        assert "ran out of memory" in words(at.run())

    def test_errors_are_told_in_place(self, steered, visit):
        steered.broken = Busy("8 questions are waiting already.", "Try again in a minute.")
        at = visit("edit", run=STEERED.digest)
        at.button(key="steer_prepare").click().run()
        assert "Try again in a minute." in words(at)
        steered.dials[STEERED.digest] = dial(STEERED.digest)
        at.run()
        assert "Try again in a minute." in words(at)
        assert "Rome is now the most likely answer" in words(at)

    def test_the_curve_tells_its_lines_apart_without_colour(self):
        spec = edit_charts.strength_curve(dial("0" * 64).curve, own=1.25, now=0.5).to_dict()
        encodings = [layer["encoding"] for layer in spec["layer"]]
        shapes = next(e["shape"] for e in encodings if "shape" in e)["scale"]["range"]
        assert len(set(shapes)) == 4
        assert sum("strokeDash" in e for e in encodings) == 1

    def test_a_curve_without_an_original_object_leaves_its_line_out(self):
        curve = dial("0" * 64).curve.assign(p_true=float("nan"))
        spec = edit_charts.strength_curve(curve, own=1.25, now=0.5).to_dict()
        assert "P(original object)" not in str(spec)

    def test_the_reading_says_from_where_it_wins_and_what_it_costs(self):
        whole = dial("0" * 64)
        title, sentence = reading(whole, STEERED)
        assert title == "Rome wins from α = 1 on"
        assert "most likely at α = 2, with 95 %" in sentence
        assert "(α = 3) 2 of 6 neighbours are lost" in sentence
        weak = replace(whole, curve=whole.curve.assign(p_new=0.01))
        assert reading(weak, STEERED)[0] == "No strength on this dial is enough"


class TestHeadStart:
    def test_the_browser_gets_it_once_for_each_visit_and_run(self, visit, monkeypatch):
        clock, waits = [5.0], []
        monkeypatch.setattr(frame, "time", SimpleNamespace(sleep=waits.append, monotonic=lambda: clock[0]))
        at = visit("edit", run=WORKS.digest)
        assert waits == [frame.HEAD_START]
        at.segmented_control(key="anatomy_candidate").set_value("new").run()
        assert len(waits) == 1
        at.query_params["run"] = LEAKS.digest
        at.run()
        assert len(waits) == 2
        clock[0] = 6.0  # a server with much to do
        at.query_params["run"] = WORKS.digest
        at.run()
        assert waits[2:] == [0.0]
        assert not at.exception

    @pytest.mark.parametrize(("before", "kept"), [("", True), ("edit", False)])
    def test_another_page_ends_the_visit(self, desk, before, kept):
        at = AppTest.from_file(APP, default_timeout=60)
        at.session_state["page_drawn"], at.session_state["head_start"] = before, WORKS.digest
        at.run()
        assert not at.exception
        assert at.session_state["page_drawn"] == ""  # Start, the first page
        assert ("head_start" in at.session_state) == kept


class TestEvidence:
    def test_groups_have_counts_and_filter(self, visit):
        at = visit("edit", run=LEAKS.digest)
        (group,) = [g for g in at.button_group if g.key == "evidence_group"]
        assert group.options == ["All 5/10", "Edit 1/1", "Paraphrase 3/3", "Neighbourhood 1/6"]
        group.set_value("neighbourhood").run()
        table = next(d.value for d in at.dataframe if list(d.value.columns)[:3] == ["result", "kind", "prompt"])
        assert set(table["kind"]) == {"Neighbour"}
        assert len(table) == 6
        at.toggle(key="evidence_failing").set_value(True).run()
        table = next(d.value for d in at.dataframe if list(d.value.columns)[:3] == ["result", "kind", "prompt"])
        assert table["result"].tolist() == ["✗ fails"] * 5
        assert "0 of 5 prompts answer as they should" in words(at)

    def test_a_group_without_failures_says_so(self, visit):
        at = visit("edit", run=WORKS.digest)
        (group,) = [g for g in at.button_group if g.key == "evidence_group"]
        group.set_value("edit").run()
        at.toggle(key="evidence_failing").set_value(True).run()
        assert "No prompt of this group fails." in words(at)
        assert not at.exception

    def test_passing_has_a_colour_and_a_shape(self, visit):
        spec = next(s for s in specs(visit("edit", run=LEAKS.digest)) if "margin_after" in str(s))
        assert "circle" in str(spec)
        assert "cross" in str(spec)


class TestStack:
    def test_an_empty_stack_says_what_it_is_for(self, visit):
        at = visit("edit", run=WORKS.digest)
        assert "Your stack on atlas-gpt2 is empty" in words(at)
        assert not at.button(key="stack_add").disabled
        assert not [button for button in at.button if button.key == "stack_check"]

    def test_adding_is_a_job_that_is_watched_and_told(self, desk, visit):
        at = visit("edit", run=WORKS.digest)
        desk.view = replace(running("a" * 64), kind="stack")
        at.button(key="stack_add").click().run()
        assert desk.stacks.queued == [("add", WORKS.question)]
        assert at.button(key="stack_add").disabled
        assert at.button(key="stack_cancel")
        desk.stacks.edits = (stacked(WORKS),)
        desk.view = replace(desk.view, state="done")
        at.run()
        assert not at.exception
        assert "Added by ROME." in words(at)
        assert at.button(key="stack_add").label == "This edit is in the stack"
        assert at.button(key="undo_rome-1")

    def test_any_one_can_be_undone(self, desk, visit):
        desk.stacks.edits = (stacked(WORKS), stacked(LEAKS, "rome-2"))
        at = visit("edit", run=WORKS.digest)
        desk.view = replace(running("a" * 64), kind="stack")
        at.button(key="undo_rome-2").click().run()
        assert desk.stacks.queued == [("undo", "rome-2")]

    def test_a_check_says_what_holds_until_the_stack_is_another(self, desk, visit, monkeypatch):
        desk.stacks.edits = (stacked(WORKS), stacked(LEAKS, "rome-2"))
        request = WORKS.question.requests[0]
        found = StackCheck(
            (Held("rome-1", request, 0.93, True), Held("rome-2", request, 0.1, False)),
            ("Text became twice as surprising.",), ("Text became twice as surprising.", "The norm is small."),
            Receipt(True, "a" * 64, "a" * 64, 0),
        )  # fmt: skip
        monkeypatch.setattr(desk, "result", lambda job, owner=None: found)
        at = visit("edit", run=WORKS.digest)
        desk.view = replace(running("a" * 64), kind="stack", state="done")
        at.button(key="stack_check").click().run()
        text = words(at)
        assert "1 of 2 facts holds with every edit applied." in text
        assert "holds, 93 %" in text
        assert "lost, 10 %" in text
        assert "twice as surprising" in text
        desk.stacks.edits = desk.stacks.edits[:1]
        assert "with every edit applied" not in words(at.run())

    def test_a_full_queue_and_a_failure_are_told(self, desk, visit):
        desk.stacks.broken = Busy("8 questions are waiting already.", "Try again in a minute.")
        at = visit("edit", run=WORKS.digest)
        at.button(key="stack_add").click().run()
        assert "Try again in a minute." in words(at)
        desk.stacks.broken, desk.view = None, failed("a" * 64)
        at.button(key="stack_add").click().run()
        assert "ran out of memory" in words(at)
        assert "Rome is now the most likely answer" in words(at)

    def test_a_damaged_stack_can_be_removed(self, desk, visit):
        desk.stacks.damaged = BadInput("stack", "your stack can't be read.", "Remove it and start a new one.")
        at = visit("edit", run=WORKS.digest)
        assert "Remove it and start a new one." in words(at)
        desk.view = replace(running("a" * 64), kind="stack")
        at.button(key="stack_remove").click().run()
        assert desk.stacks.queued == [("remove", "atlas-gpt2")]

    def test_a_model_that_is_not_here_has_no_stack(self, desk, visit):
        desk.available = False
        at = visit("edit", run=WORKS.digest)
        assert "is not on this machine" in words(at)
        assert not [button for button in at.button if button.key == "stack_add"]

    def test_hostile_text_stays_text(self, desk, visit):
        method = MethodRef("rome", 1, ())
        desk.stacks.edits = (StackedEdit("rome-1", "![k](http://evil.example)", method, EVIL.question.requests, 0),)
        at = visit("edit", run=WORKS.digest)
        raw = "\n".join(str(element.value) for element in [*at.markdown, *at.caption])
        assert "![" not in raw.replace("\\!\\[", "")
        assert "<b>" not in raw


def test_the_way_on_leads_to_the_same_run(visit):
    at = visit("edit", run=WORKS.digest)
    links = [element.proto for element in at.get("page_link") if "Look deeper" in element.proto.label]
    assert links
    assert WORKS.digest in links[0].query_string
