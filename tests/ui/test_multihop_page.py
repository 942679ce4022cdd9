"""Multi-hop: choosing a chain, asking it, and what became of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest

from mega_core.errors import Busy
from mega_core.records import EditRequest
from pages.components import multihop_charts
from tests.ui.conftest import words
from tests.ui.fake import WORKS, failed, running
from tests.ui.fakes.chains import traced, went

ID = "c" * 32


def charts(at) -> list[dict]:
    return [json.loads(element.proto.spec) for element in at.get("vega_lite_chart")]


def press(at, key="multihop_run"):
    at.button(key=key).click().run()
    assert not at.exception
    return at


class TestChoosing:
    def test_first_visit_says_what_will_appear(self, desk, visit):
        at = visit("multihop")
        text = words(at)
        assert "Nothing is asked yet" in text
        assert "Accord is a product made by" in text
        assert "United States" in text
        assert desk.chains.started == []

    def test_it_is_started_as_chosen(self, desk, visit):
        at = visit("multihop")
        desk.view = running("d" * 64)
        press(at)
        ((model, route, methods),) = desk.chains.started
        assert (model, route.request.target_new, methods) == ("atlas-gpt2", "Apple", ("rome",))
        assert any(button.label == "Cancel" for button in at.button)

    def test_a_question_in_own_words(self, desk, visit):
        at = visit("multihop")
        box = next(one for one in at.text_input if one.label.startswith("Whole question"))
        box.set_value("?").run()
        assert "is no beginning" in words(at)
        box = next(one for one in at.text_input if one.label.startswith("Whole question"))
        box.set_value("The land of the maker of Accord is").run()
        desk.view = running("d" * 64)
        press(at)
        assert desk.chains.started[0][1].chain.questions == ("The land of the maker of Accord is",)

    def test_a_step_whose_edit_leads_nowhere(self, visit):
        at = visit("multihop")
        at.radio[0].set_value("2. Honda → Japan").run()
        assert not at.exception
        assert "edit another step" in words(at)

    def test_from_a_run(self, desk, visit):
        at = visit("multihop", run=WORKS.digest)
        assert "Eiffel Tower is located in the city of" in words(at)
        assert any(one.label == "Chain" for one in at.selectbox)
        at.run()  # what is remembered of the address must not get in a widget's way
        assert not at.exception
        desk.chains.routes = ()
        at = visit("multihop", run=WORKS.digest)
        assert "The tables know no two-hop question through this fact" in words(at)

    def test_busy_and_failed_are_told(self, desk, visit):
        at = visit("multihop")
        desk.chains.refusal = Busy("8 questions are already waiting.", "Try again in a minute.")
        press(at)
        assert "already waiting" in words(at)
        at.session_state["chain_job"] = "j" * 32
        desk.view = failed("d" * 64)
        at.run()
        assert "The machine ran out of memory." in words(at)
        assert at.button(key="multihop_run").label == "Ask the chain"


class TestResult:
    def test_when_it_is_there_its_link_is_in_the_address(self, desk, visit):
        at = visit("multihop")
        desk.chains.stored[ID] = traced()
        desk.result = lambda job, owner: ID
        at.session_state["chain_job"] = "j" * 32
        desk.view = replace(running("d" * 64), state="done", kind="chain")
        at.run()
        assert not at.exception
        assert at.query_params["chain"] in (ID, [ID])

    def test_where_each_method_breaks(self, desk, visit):
        desk.chains.stored[ID] = traced()
        text = words(visit("multihop", chain=ID))
        assert "recalls 2 of 2 steps and gives the old answer to 1 of 1 wordings" in text
        assert "ROME**: ✗ breaks at the composition" in text
        assert "it says “Japan”, not “United States”" in text
        assert "The old answer is still given in 1 of 1" in text
        assert "ace**: ✓ the chain holds" in text
        assert "mega**: made no edit: There is no room." in text
        assert "Value layers 4, query layers 1-3." in text
        assert desk.chains.started == []

    def test_a_step_that_was_never_known(self, desk, visit):
        found = traced()
        broken = went("rome", "Apple", "China", "China")
        desk.chains.stored[ID] = replace(found, after=(broken,), knew=(False, False))
        text = words(visit("multihop", chain=ID))
        assert "breaks at step 2: “Apple is a company from” gives “China”, not “United States”" in text
        assert "the unedited model did not know it either" in text
        assert "it does not know step 2, which no edit here teaches" in text

    def test_the_edited_step_is_marked_and_answers_are_words_too(self, desk, visit):
        desk.chains.stored[ID] = traced()
        at = visit("multihop", chain=ID)
        text = words(at)
        assert "edited" in text
        assert "✓ right" in text
        assert "✗ wrong" in text
        summary = next(f.value for f in at.dataframe if "old answer persists" in f.value)
        assert summary["breaks at"].tolist()[:3] == ["holds", "composition", "holds"]

    def test_three_pictures_with_a_sentence_each(self, desk, visit):
        desk.chains.stored[ID] = traced()
        at = visit("multihop", chain=ID)
        assert len(charts(at)) == 3
        text = words(at)
        assert "The chain holds with 1 of 2 methods: ace." in text
        assert "after ROME most comes from layer 3" in text

    @pytest.mark.parametrize("link", ["0" * 32, "..", "<script>"])
    def test_a_link_nobody_knows(self, visit, link):
        text = words(visit("multihop", chain=link))
        assert "not stored here" in text
        assert "Nothing is asked yet" in text

    def test_hostile_text_stays_text(self, desk, visit):
        evil = EditRequest("![x](http://evil.example/a.png)", "{} <b>is</b> made by", ":red[Apple]", "**Honda**")
        desk.chains.stored[ID] = traced(evil)
        at = visit("multihop", chain=ID)
        shown = [element.value for element in at.markdown if "evil" in element.value]
        assert shown
        assert all(r"\!\[x\]\(http" in value and r"\<b\>" in value for value in shown)


class TestPictures:
    def test_steps_are_marks_and_words(self):
        rows = [{"method": "ROME", "step": step, "prompt": "p", "expected": "e", "said": "s", "right": right}
                for step, right in (("Step 1 (edited)", True), ("Whole 1", False))]  # fmt: skip
        spec = multihop_charts.steps(pd.DataFrame(rows)).to_dict()
        (shown,) = spec["datasets"].values()
        assert [(row["mark"], row["word"]) for row in shown] == [("✓", "right"), ("✗", "wrong")]

    def test_neurons_show_both_states(self):
        found = traced().path["query_layers"]
        table = found[(found["case"] == 0) & (found["candidate"] == "new") & (found["method"] != "ace")]
        spec = multihop_charts.query_lines(table).to_dict()
        shown = next(rows for rows in spec["datasets"].values() if "what" in rows[0])
        assert {(row["what"], row["model"]) for row in shown} == {
            (what, state) for what in ("Attention", "MLP") for state in ("Before", "After")
        }
        bars = pd.DataFrame({"layer": [1, 3], "state": ["before", "after"], "contribution": [1.0, 2.0],
                             "neurons": [2, 2]})  # fmt: skip
        assert multihop_charts.value_bars(bars).to_dict()["layer"][1]["encoding"]["x"]["scale"]["domain"] == [1, 2, 3]
