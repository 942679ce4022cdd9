"""The Anatomy page as a person meets it: choosing a run, its views, drilling down, asking for more, verifying."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from streamlit.testing.v1 import AppTest

from mega_core import frames
from mega_core.attribution import VIEWS
from mega_core.errors import Busy
from mega_core.service import ViewInfo
from pages.components import anatomy_verify
from pages.components.anatomy_place import Known, Place
from tests.ui.conftest import words
from tests.ui.fake import EVIL, WORKS, failed, running
from tests.ui.frames import HOSTILE, inside

KNOWN = Known(frozenset({(0, "attn"), (0, "ffn"), (5, "attn"), (5, "ffn")}), frozenset({(5, 2)}), frozenset({(5, 118)}))


@pytest.fixture
def whole(desk):
    """The service has a run with everything, and knows every view."""
    desk.reports[inside().digest] = inside()
    desk.views = lambda: tuple(ViewInfo(view.name, view.title, view.summary, view.frames, ()) for view in VIEWS)
    return inside()


def specs(at) -> list[str]:
    return [json.dumps(json.loads(element.proto.spec)) for element in at.get("vega_lite_chart")]


def titles(at) -> list[str]:
    return [str(element.value).replace("\\", "") for kind in ("header", "subheader") for element in getattr(at, kind)]


class TestPlaces:
    @pytest.mark.parametrize("text", ["5", "5.attn", "5.attn.2", "5.ffn.118"])
    def test_its_form_in_the_address_is_read_back(self, text):
        place = KNOWN.read(text)
        assert place is not None
        assert str(place) == text

    @pytest.mark.parametrize(
        "text", [None, "", "x", "5.mlp", "5.attn.-1", "5.attn.2.1", "../../etc", "99999999", "5.attn.2\n", "٣.attn"]
    )
    def test_what_is_none_is_no_place(self, text):
        assert KNOWN.read(text) is None

    def test_a_part_the_run_does_not_know_leads_to_its_module(self):
        assert KNOWN.read("5.attn.99") == Place(5, "attn")
        assert KNOWN.read("5.ffn.1") == Place(5, "ffn")
        assert KNOWN.read("77.ffn") is None

    def test_up_names_and_cells(self):
        head = Place(5, "attn", 2)
        assert head.steps == ("Layer 5", "Attention", "Head 2")
        assert [str(head.up(level)) for level in (1, 2)] == ["5", "5.attn"]
        assert head.cells == ("head:5.2",)
        assert Place(5, "ffn", 118).cells == ("neuron:5.118",)
        assert Place(5, "ffn").cells == ("ffn:5",)
        assert Place(5).cells == ("attn:5", "ffn:5")


class TestWithoutARun:
    def test_says_what_to_do_and_offers_examples(self, visit):
        at = visit("anatomy")
        assert "Choose a run to look inside" in words(at)
        assert at.selectbox(key="run_chosen").options

    def test_a_damaged_link_is_told(self, visit):
        assert "damaged" in words(visit("anatomy", run="../../etc/passwd"))


class TestMap:
    def test_a_run_with_module_scores_only_is_shown(self, visit):
        at = visit("anatomy", run=WORKS.digest)
        assert "What pushes toward Rome rather than Paris" in words(at)
        assert "Largest changes" in titles(at)
        assert "to verify it" in words(at)

    def test_the_keyboard_leads_from_the_largest_change_to_its_inside_and_back(self, whole, visit):
        at = visit("anatomy", run=whole.digest)
        at.selectbox(key="anatomy_pick_place").set_value("1.attn").run()
        assert at.query_params["at"] in ("1.attn", ["1.attn"])
        assert "Layer 1 · Attention" in titles(at)
        at.button(key="anatomy_inside").click().run()
        assert at.query_params["view"] in ("heads", ["heads"])
        assert "Heads of layer 1" in titles(at)
        at.selectbox(key="anatomy_pick_head").set_value("1.attn.0").run()
        assert "Where it looks" in titles(at)
        at.button(key="anatomy_crumb_2").click().run()
        assert at.query_params["at"] in ("1.attn", ["1.attn"])
        at.button(key="anatomy_crumb_0").click().run()
        assert "at" not in at.query_params
        assert not at.exception

    def test_an_address_behind_a_quick_click_doesnt_undo_it(self):
        def look():
            import streamlit as st

            from pages.components import anatomy_place as place

            if "opened" not in st.session_state:
                st.session_state["opened"] = True
                place.arrive()
            known = place.Known(frozenset({(5, "attn")}), frozenset({(5, 2)}), frozenset())
            st.session_state["seen"] = (str(place.place_of(known)), place.chosen("view", ["map", "heads"], "map"))
            st.button("up", on_click=place.go_to, args=(None, "map"))

        at = AppTest.from_function(look)
        at.query_params.update({"at": "5.attn.2", "view": "heads"})
        assert at.run().session_state["seen"] == ("5.attn.2", "heads")
        at.button[0].click().run()
        at.query_params.update({"at": "5.attn.2", "view": "heads"})  # what the browser sent before it heard
        assert at.run().session_state["seen"] == ("None", "map")
        assert "at" not in at.query_params
        assert at.query_params["view"] in ("map", ["map"])

    def test_a_layer_offers_its_two_modules(self, whole, visit):
        at = visit("anatomy", run=whole.digest, at="1")
        assert "Layer 1" in titles(at)
        offered = {str(button.key) for button in at.button if "largest" in str(button.key)}
        assert offered == {"anatomy_largest_1.ffn", "anatomy_largest_1.attn"}


class TestViews:
    @pytest.mark.parametrize(
        ("view", "said"),
        [
            ("map", "What pushes toward"), ("heads", "Heads: what pushes toward"), ("neurons", "MLP neurons"),
            ("lens", "Through the layers"), ("writes", "What is written along"), 
            ("attention", "Attention to the subject"), ("trace", "Causal trace of Paris"),
            ("change", "Singular values of the change"),
            ("stress", "Both objects behind prefixes"),
        ],
    )  # fmt: skip
    def test_each_is_drawn_alone(self, whole, visit, view, said):
        at = visit("anatomy", run=whole.digest, view=view)
        assert not at.exception
        assert not at.error
        assert any(said in title for title in titles(at))
        others = {"map": "What pushes", "lens": "Through the layers", "stress": "Both objects behind"}
        assert not [t for name, start in others.items() if name != view for t in titles(at) if t.startswith(start)]

    def test_unknown_choices_in_the_address_are_replaced(self, whole, visit):
        at = visit("anatomy", run=whole.digest, view="<script>", explain="../..", state="2", at="9.attn;drop")
        assert not at.exception
        assert group(at, "anatomy_view").value == "map"
        assert at.query_params["view"] in ("map", ["map"])
        assert "at" not in at.query_params

    def test_choices_survive_a_visit_elsewhere(self, whole, visit):
        at = visit("anatomy", run=whole.digest, view="heads", explain="new", state="after", at="1.attn.0")
        at.switch_page("pages/status.py").run()
        at.query_params.clear()
        at.switch_page("pages/anatomy.py").run()
        assert not at.exception
        assert "Heads: what pushes toward Rome" in titles(at)
        assert "Where it looks" in titles(at)

    def test_the_states_of_a_picture_have_one_scale(self, whole, visit):
        scales = set()
        for state in ("before", "after", "change"):
            at = visit("anatomy", run=whole.digest, view="heads", state=state)
            spec = json.loads(specs(at)[0])
            scales.add(tuple(spec["layer"][0]["encoding"]["color"]["scale"]["domain"]))
        assert len(scales) == 1

    def test_an_edit_without_matrices_says_so(self, desk, visit):
        bare = {name: frame for name, frame in WORKS.frames.items() if name != "weight_change"}
        desk.reports[WORKS.digest] = replace(WORKS, frames=bare)
        assert "This edit changes no matrix." in words(visit("anatomy", run=WORKS.digest, view="change"))

    def test_a_head_that_was_not_split_can_be(self, desk, whole, visit):
        sources = whole.frames["head_sources"]
        fewer = {**whole.frames, "head_sources": sources[sources["head"] == 1]}
        desk.reports[whole.digest] = replace(whole, frames=fewer)
        at = visit("anatomy", run=whole.digest, view="heads", at="1.attn.0")
        assert "not among the heads" in words(at)
        at.button(key="anatomy_measure_heads").click().run()
        (plan,) = desk.submitted
        assert "heads?heads=6" in plan.views
        assert "heads" not in plan.views

    def test_hostile_words_stay_words(self, desk, whole, visit):
        desk.reports[EVIL.digest] = replace(
            whole, question=replace(whole.question, requests=EVIL.question.requests), digest=EVIL.digest
        )
        for view in ("map", "heads", "neurons", "lens", "trace", "attention", "stress"):
            at = visit("anatomy", run=EVIL.digest, view=view, at="1.ffn.5" if view == "neurons" else "1.attn.0")
            assert not at.exception
            assert not at.error
            for kind in ("markdown", "caption", "header", "subheader"):
                for element in getattr(at, kind):
                    assert "![x](" not in str(element.value)
                    assert "<script>" not in str(element.value).replace("\\<", "")
        assert "evil.example" in HOSTILE


class TestAsking:
    def test_a_view_that_was_not_measured_says_what_it_shows_and_costs(self, visit):
        at = visit("anatomy", run=WORKS.digest, view="heads")
        text = words(at)
        assert "Not measured in this run" in text
        assert "Which heads carry it." in text
        assert "this run took 4.3 s" in text
        assert not at.exception

    def test_one_press_asks_the_same_question_with_it(self, desk, visit):
        at = visit("anatomy", run=WORKS.digest, view="heads")
        at.button(key="anatomy_measure_one").click().run()
        assert not at.exception
        (plan,) = desk.submitted
        assert plan == replace(WORKS.question, views=("heads", "module_scores"))
        assert at.button(key="anatomy_cancel")
        assert at.button(key="anatomy_measure_one").disabled

    def test_all_missing_views_at_once(self, desk, whole, visit):
        del desk.reports[whole.digest]
        at = visit("anatomy", run=WORKS.digest, view="lens")
        at.button(key="anatomy_measure_all").click().run()
        (plan,) = desk.submitted
        assert plan == whole.question

    def test_the_run_that_comes_back_is_shown_in_the_same_view(self, desk, whole, visit):
        del desk.reports[whole.digest]
        at = visit("anatomy", run=WORKS.digest, view="heads")
        at.button(key="anatomy_measure_all").click().run()
        desk.reports[whole.digest] = whole
        desk.view = replace(running(whole.digest), state="done", kind="anatomy")
        at.run()
        at.run()
        assert not at.exception
        assert at.query_params["run"] in (whole.digest, [whole.digest])
        assert "Heads: what pushes toward Rome rather than Paris" in titles(at)

    def test_when_it_fails_the_run_is_still_shown(self, desk, visit):
        at = visit("anatomy", run=WORKS.digest, view="heads")
        at.button(key="anatomy_measure_one").click().run()
        desk.view = failed("e" * 64)
        at.run()
        assert "ran out of memory" in words(at)
        assert "Not measured in this run" in words(at)
        assert at.query_params["run"] in (WORKS.digest, [WORKS.digest])

    def test_a_full_queue_is_told(self, desk, visit, monkeypatch):
        at = visit("anatomy", run=WORKS.digest, view="heads")

        def busy(*_, **__):
            raise Busy("The queue is full.", "Try again in a minute.")

        monkeypatch.setattr(desk, "submit", busy)
        at.button(key="anatomy_measure_one").click().run()
        assert "The queue is full" in words(at)

    def test_a_link_starts_no_work(self, desk, whole, visit):
        visit("anatomy", run=whole.digest, view="trace", at="1.attn.0")
        assert desk.submitted == []
        assert desk.studies.started == []


def verified(cells: str = "head:1.0", predicted: float = -1.0, actual: float = -1.4, **more: object):
    """What a verification gives."""
    rows = [
        {
            "state": "after", "case": 0, "cells": cells, "action": "ablate", "candidate": candidate, "kind": "head",
            "layer": 1, "size": 1, "token": token, "has_prediction": True, "predicted": predicted * sign,
            "direct": predicted * sign, "actual": actual * sign, "prob_before": 0.93, "prob_after": 0.23,
            "rank_before": 1, "rank_after": 2, "control": -0.1, "control_sd": 0.2, "controls": 10, **more,
        }
        for candidate, token, sign in (("new", " Rome", 1), ("true", " Paris", -1))
    ]  # fmt: skip
    return frames.from_rows(rows, "verified")


class TestVerify:
    @pytest.fixture(autouse=True)
    def at_work(self, desk):
        desk.view = running("f" * 64)

    def press(self, visit, digest, at_place="1.attn.0", **query):
        at = visit("anatomy", run=digest, at=at_place, **query)
        at.button(key="anatomy_verify_go").click().run()
        return at

    @pytest.mark.parametrize(
        ("place", "cells"),
        [("1", "attn:1+ffn:1"), ("1.ffn", "ffn:1"), ("1.attn.0", "head:1.0"), ("1.ffn.5", "neuron:1.5")],
    )
    def test_the_place_looked_at_is_what_is_changed(self, desk, whole, visit, place, cells):
        at = self.press(visit, whole.digest, place)
        assert not at.exception
        (asked,) = desk.studies.started
        assert (asked["plan"], asked["cells"]) == (whole.question, [cells])
        assert (asked["action"], asked["state"], asked["owner"]) == ("ablate", "after", "o" * 32)

    def test_scaling_asks_for_a_factor(self, desk, whole, visit):
        at = visit("anatomy", run=whole.digest, at="1.attn.0")
        group(at, "anatomy_verify_action").set_value("scale").run()
        at.number_input(key="anatomy_verify_factor").set_value(2.0).run()
        at.button(key="anatomy_verify_go").click().run()
        (asked,) = desk.studies.started
        assert (asked["action"], asked["factor"]) == ("scale", 2.0)

    def test_only_an_edited_matrix_can_be_put_back(self, desk, whole, visit):
        layer = int(whole.frames["weight_change"]["layer"].iloc[0])
        at = visit("anatomy", run=whole.digest, at=f"{layer}.ffn")
        group(at, "anatomy_verify_action").set_value("restore").run()
        at.button(key="anatomy_verify_go").click().run()
        (asked,) = desk.studies.started
        assert asked["cells"] == [f"matrix:{layer}.mlp_down"]
        other = visit("anatomy", run=whole.digest, at="1.ffn")
        assert "Put weights back" not in group(other, "anatomy_verify_action").options

    def test_what_came_out_is_drawn_told_and_kept(self, desk, whole, visit, monkeypatch):
        at = self.press(visit, whole.digest)
        found = SimpleNamespace(question=whole.question, table=verified(), receipt=SimpleNamespace(restored=True))
        monkeypatch.setattr(desk, "result", lambda job, owner=None: found)
        desk.view = replace(running("f" * 64), state="done", kind="verify")
        at.run()
        at.run()
        assert not at.exception
        text = words(at)
        assert "L1·H0: “Rome” goes from 93 % to 23 %, −1.40 nats; predicted −1.00 (about right)" in text
        assert "10 random places −0.10 on average" in text
        assert any("L1\\u00b7H0 out \\u00b7 Rome" in spec for spec in specs(at))
        at.switch_page("pages/status.py").run()
        at.switch_page("pages/anatomy.py").run()
        assert "Predicted and actual effect" in titles(at)

    def test_a_refusal_is_told(self, desk, whole, visit):
        desk.studies.refusal = Busy("The queue is full.", "Try again in a minute.")
        assert "The queue is full" in words(self.press(visit, whole.digest))

    def test_a_failure_is_told(self, desk, whole, visit):
        at = self.press(visit, whole.digest)
        desk.view = failed("e" * 64)
        at.run()
        assert "ran out of memory" in words(at)
        assert "Verify" in titles(at)

    @pytest.mark.parametrize(
        ("predicted", "actual", "said"),
        [
            (-1.0, -1.9, "about right"), (-1.0, -2.1, "more happens"), (-1.0, -0.4, "less happens"),
            (-1.0, 0.4, "the other way round"), (0.01, -0.02, "next to nothing, as it is"),
        ],
    )  # fmt: skip
    def test_the_sentence_says_how_good_the_prediction_was(self, predicted, actual, said):
        assert f"({said})" in anatomy_verify.sentence(verified(predicted=predicted, actual=actual))

    def test_without_prediction_or_controls_none_is_told(self):
        text = anatomy_verify.sentence(verified("matrix:3.mlp_down", has_prediction=False, controls=0))
        assert text.startswith("L3·mlp_down: ")
        assert "predicted" not in text
        assert "random" not in text


def group(at, key: str):
    """The segmented control of this key."""
    (found,) = [one for one in at.button_group if str(one.key) == key]
    return found
