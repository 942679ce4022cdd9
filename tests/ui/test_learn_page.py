"""The teaching steps: questions answered from numbers, and the page in each of its states."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mega_core import frames
from mega_core.errors import Busy
from mega_core.records import EditRequest
from pages.components import learn_charts, learn_steps
from pages.components.learn_steps import STEPS
from tests.ui.conftest import words
from tests.ui.fake import EVIL, FAILS, LEAKS, TOWER, WORKS, failed, make_report


def crossing(layer: int) -> object:
    rows = [
        {
            "state": "after", "case": 0, "layer": layer, "site": "block_out", "overtakes": layer >= 0,
            "stays": layer >= 0, "lasting_layer": layer, "lasting_site": "block_out",
        }
    ]  # fmt: skip
    return replace(WORKS, frames={**WORKS.frames, "lens_crossing": frames.from_rows(rows, "lens_crossing")})


class TestQuestions:
    def test_the_next_token_is_the_likeliest_of_the_base(self):
        question = learn_steps.next_token(WORKS)
        assert question.options[question.right] == "Paris"
        assert "94 %" in question.why
        assert len(set(question.options)) == len(question.options)

    def test_how_far_apart_the_objects_are(self):
        question = learn_steps.before_edit(WORKS)
        assert question.options[question.right] == "More than 100 times as likely"
        assert "448 times" in question.why
        likely = WORKS.frames["answers"].copy()
        mine = (likely["state"] == "before") & (likely["prompt_kind"] == "edit") & (likely["candidate"] == "new")
        likely.loc[mine, "prob"] = 0.95
        assert learn_steps.before_edit(replace(WORKS, frames={**WORKS.frames, "answers": likely})).right == 0

    @pytest.mark.parametrize(("parameters", "right"), [(262144 * 5, 3), (262144 * 50, 2), (262144 * 500, 1)])
    def test_the_share_of_weights(self, parameters, right):
        weights = WORKS.frames["weight_change"].assign(kind="weights")
        report = replace(WORKS, frames={**WORKS.frames, "weight_change": weights})
        assert learn_steps.how_much_changes(report, parameters).right == right
        assert learn_steps.how_much_changes(report, 0) is None

    def test_steering_changes_no_weight(self):
        change = WORKS.frames["weight_change"].assign(kind="steering", parameters=0)
        question = learn_steps.how_much_changes(replace(WORKS, frames={**WORKS.frames, "weight_change": change}), 999)
        assert question.options[question.right] == "None of them"

    def test_how_many_follow(self):
        assert learn_steps.how_many_follow(WORKS).options[learn_steps.how_many_follow(WORKS).right] == "3"
        assert learn_steps.how_many_follow(FAILS).options[learn_steps.how_many_follow(FAILS).right] == "0"
        bare = make_report(EditRequest(TOWER.subject, TOWER.template, "Rome", "Paris"))
        assert learn_steps.how_many_follow(bare) is None

    def test_where_it_grows(self):
        question = learn_steps.where_it_grows(WORKS)
        assert question.options[question.right] == "In layer 3, where it acts"
        nowhere = WORKS.frames["weight_change"].assign(layer=-1)
        question = learn_steps.where_it_grows(replace(WORKS, frames={**WORKS.frames, "weight_change": nowhere}))
        assert question.options[question.right] == "In layers 0 to 3"

    @pytest.mark.parametrize(("layer", "right"), [(1, 0), (4, 1), (7, 2), (-1, 3)])
    def test_where_it_overtakes(self, layer, right):
        assert learn_steps.where_it_overtakes(WORKS, crossing(layer)).right == right

    def test_before_the_run_no_answer_is_known(self):
        assert learn_steps.where_it_overtakes(WORKS, None).right is None
        assert learn_steps.which_spares_more(WORKS, None, "MEGA").right is None

    def test_which_spares_more(self):
        assert learn_steps.which_spares_more(WORKS, LEAKS, "MEGA").right == 0
        assert learn_steps.which_spares_more(LEAKS, WORKS, "MEGA").right == 1
        assert learn_steps.which_spares_more(WORKS, WORKS, "MEGA").right == 2

    def test_whether_it_leaks(self):
        assert learn_steps.does_it_leak(LEAKS).right == 2
        assert learn_steps.does_it_leak(WORKS).right == 1
        assert learn_steps.does_it_leak(make_report(leaks=0)).right == 0
        assert learn_steps.does_it_leak(None) is None

    def test_the_count_leaves_out_what_is_not_known(self):
        assert learn_steps.answered([(0, 0), (1, 2), (1, None)]) == "1 of 2 predictions were right"

    def test_the_log_axis_holds_zero(self):
        import pandas as pd

        table = pd.DataFrame({"object": ["a"], "role": ["new"], "prob": [0.0], "percent": ["0 %"]})
        spec = learn_charts.odds_points(table).to_dict(validate=False)
        assert next(iter(spec["datasets"].values()))[0]["at"] == learn_charts.LEAST


def answer(at, number: int, pick: int):
    radio = next(element for element in at.radio if element.key.endswith(f":{number}"))
    radio.set_value(pick).run()
    at.button(key=f"learn_check_{number}").click().run()
    assert not at.exception
    return at


class TestPage:
    def test_first_visit_hides_the_picture_until_a_prediction(self, desk, visit):
        at = visit("learn")
        text = words(at)
        assert "Step 1 of 8" in text
        assert "appear when you have answered" in text
        assert not at.get("vega_lite_chart")
        assert at.button(key="learn_previous").disabled
        assert not desk.submitted

    def test_right_and_wrong_are_told_from_the_numbers(self, visit):
        at = visit("learn")
        right = learn_steps.next_token(WORKS).right
        answer(at, 1, (right + 1) % 3)
        assert "Not this time. The answer: Paris." in words(at)
        answer(at, 1, right)
        assert "Right: Paris." in words(at)
        assert len(at.get("vega_lite_chart")) == 1
        at.button(key="learn_next").click().run()
        assert "Step 2 of 8" in words(at)
        at.button(key="learn_previous").click().run()
        assert "Right: Paris." in words(at)
        assert any(option.startswith("✓ 1") for option in at.pills(key="learn_step").options)

    def test_a_link_opens_its_step_and_its_run(self, desk, visit):
        at = visit("learn", step="4", run=LEAKS.digest)
        assert "Step 4 of 8" in words(at)
        assert at.selectbox(key="learn_fact").value == LEAKS.digest
        at.button(key="learn_skip_4").click().run()
        assert "The answer: 3." in words(at)
        assert not desk.submitted

    @pytest.mark.parametrize("step", ["9", "0", "-1", "<b>", "1; drop"])
    def test_a_hostile_step_is_the_first(self, visit, step):
        assert "Step 1 of 8" in words(visit("learn", step=step))

    def test_a_run_nobody_knows_is_told_and_an_example_followed(self, visit):
        text = words(visit("learn", step="2", run="0" * 64))
        assert "not stored here" in text
        assert "Step 2 of 8" in text

    def test_without_examples_the_way_on_is_shown(self, desk, visit):
        desk.cards = ()
        assert "There is no example to follow" in words(visit("learn"))

    def test_the_lens_waits_for_its_run(self, desk, visit):
        at = visit("learn", step="6")
        answer(at, 6, 2)
        assert "is kept" in words(at)
        assert "What this means" not in words(at)
        assert not desk.submitted
        at.button(key="learn_run").click().run()
        (plan,) = desk.submitted
        assert set(plan.views) == {"lens", "module_scores"}
        assert "Running for" in words(at)

    def test_a_run_that_fails_and_one_that_cannot_wait(self, desk, visit, monkeypatch):
        desk.view = failed("e" * 64)
        at = visit("learn", step="7")
        at.session_state["learn_job"] = "j" * 32
        answer(at, 7, 0)
        assert "ran out of memory" in words(at)

        def busy(*args, **kwargs):
            raise Busy("8 questions are already waiting, which is the limit.", "Try again in a minute.")

        monkeypatch.setattr(desk, "submit", busy)
        at.button(key="learn_run").click().run()
        assert "already waiting" in words(at)

    def test_two_methods_side_by_side(self, desk, visit):
        steered = make_report(method="mega", leaks=0)
        plan = desk.plan(
            "atlas-gpt2", "mega", TOWER.subject, TOWER.template, "Rome", "Paris", TOWER.paraphrases, TOWER.neighbours
        )
        desk.reports[desk.digest(plan)] = steered
        at = visit("learn", step="7")
        answer(at, 7, 1)
        text = words(at)
        assert "Right: MEGA." in text
        assert "ROME keeps 5 of 6 neighbours, MEGA 6 of 6." in text

    def test_the_last_step_counts(self, visit):
        at = visit("learn", step="8")
        answer(at, 8, 2)
        assert "1 of 1 predictions were right" in words(at)
        assert len(at.get("vega_lite_chart")) == 2
        assert at.button(key="learn_next").disabled

    def test_hostile_text_stays_text(self, visit):
        for step in ("1", "4"):
            at = visit("learn", step=step, run=EVIL.digest)
            labels = [element.label for element in at.radio] + [o for element in at.radio for o in element.options]
            for text in (*labels, *(element.value for element in at.markdown)):
                assert "![x](" not in text
                assert "](http" not in text


def test_every_step_has_its_words():
    from pages.components.words import GLOSSARY

    assert len(STEPS) == 8
    assert {word for step in STEPS for word in step.words} <= set(GLOSSARY)
