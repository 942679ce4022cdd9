"""The page about masks over the frozen service."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest

from mega_core.errors import Busy
from pages.components import mask_charts
from tests.ui.conftest import key, words
from tests.ui.fake import failed, running
from tests.ui.fakes.masks import HOSTILE, make_detection, make_judgement, make_mask, suspect

MASK = make_mask()


@pytest.fixture
def judged(desk):
    desk.masks.hold(MASK, make_judgement(MASK.id))
    return desk


def done(desk, monkeypatch, kind: str, result: str) -> None:
    desk.view = replace(running("e" * 64), kind=kind, state="done")
    monkeypatch.setattr(desk, "result", lambda job_id, owner=None: result)


def charts(at) -> list[dict]:
    return [json.loads(one.proto.spec) for one in at.get("vega_lite_chart")]


class TestMask:
    def test_empty_says_what_will_appear(self, visit):
        at = visit("mask")
        assert "One mask for many edits" in words(at)
        assert "Takes about 58 s here." in words(at)
        assert not at.get("vega_lite_chart")

    def test_training_asks_for_what_was_chosen(self, desk, visit):
        at = visit("mask")
        desk.view = replace(running("e" * 64), kind="mask")
        at.selectbox(key="mask_method").set_value("memit").run()
        at.slider(key="mask_n").set_value(40).run()
        at.slider(key="mask_pruned").set_value(20).run()
        at.selectbox(key="mask_layer").set_value(3).run()
        at.number_input(key="mask_seed").set_value(7).run()
        at.button(key="mask_train").click().run()
        assert desk.masks.started == [("train", "atlas-gpt2", "memit", 40, 3, 0.2, 7)]
        assert "Running for" in words(at)
        assert at.button(key="mask_train").disabled

    def test_the_layer_is_left_to_the_study_by_default(self, desk, visit):
        at = visit("mask")
        at.button(key="mask_train").click().run()
        assert desk.masks.started == [("train", "atlas-gpt2", "rome", 100, None, 0.3, 0)]

    def test_a_mask_that_is_there_is_opened_without_work(self, judged, visit):
        at = visit("mask")
        at.button(key="mask_train").click().run()
        assert judged.masks.started == []
        assert "The mask in view" in words(at)

    def test_a_finished_training_is_shown_and_offers_to_judge(self, desk, visit, monkeypatch):
        at = visit("mask")
        done(desk, monkeypatch, "mask", MASK.id)
        at.button(key="mask_train").click().run()
        desk.masks.hold(replace(MASK, judged=False))
        at.run()
        text = words(at)
        assert at.query_params["mask"] == MASK.id
        assert "not judged yet" in text
        assert "Where the mask cuts" in text
        assert "Which edits it undoes" not in text
        desk.view = replace(running("e" * 64), kind="mask")
        at.button(key="mask_judge_quick").click().run()
        assert desk.masks.started[-1] == ("judge", MASK.id, "quick")

    def test_a_judged_mask_by_its_link(self, judged, visit):
        at = visit("mask", mask=MASK.id)
        text = words(at)
        for heading in ("Where the mask cuts", "Which edits it undoes", "Edit by edit", "What it costs the model",
                        "Can the model still be edited", "Over-attention", "Attention by layer"):  # fmt: skip
            assert heading in text
        assert "Undoes 75% of edits of unseen facts and 50% of edits of unseen relations" in text
        assert "the best control of the same size, largest change, undoes 40%" in text
        assert "96.0% of the facts (99.0% without a mask)" in text
        assert "ROME works on 25% of 6 facts under the mask, 100% without" in text
        assert "head 1 of layer 5: +8.0 logits after the edit, +2.0 with the mask" in text
        assert judged.masks.started == []

    def test_every_edit_says_whether_it_is_undone(self, judged, visit):
        at = visit("mask", mask=MASK.id)
        table = next(one.value for one in at.dataframe if "masked_says" in one.value.columns)
        assert list(table["result"]) == ["✗ still edited", "✓ undone", "✓ undone", "– did not take"]
        assert "2 of 3 edits that took are undone." in words(at)
        at.segmented_control(key="mask_each").set_value("held-out relations").run()
        assert "2 of 3 edits" in words(at)

    def test_a_degenerate_layer_is_told(self, desk, visit):
        desk.masks.hold(MASK, make_judgement(MASK.id, degenerate=True))
        assert "This layer is degenerate" in words(visit("mask", mask=MASK.id))

    @pytest.mark.parametrize("asked", ["0" * 64, "../../etc/passwd", HOSTILE])
    def test_an_unknown_mask_leaves_the_form_usable(self, desk, visit, asked):
        at = visit("mask", mask=asked)
        assert "This mask is not kept here" in words(at)
        assert not at.button(key="mask_train").disabled

    def test_a_mask_of_the_list_is_opened(self, judged, visit):
        at = visit("mask")
        assert "The mask in view" not in words(at)
        key(at, "selectbox", "mask_list").set_value(MASK.id).run()
        assert at.query_params["mask"] == MASK.id
        assert "The mask in view" in words(at)

    def test_a_full_queue_is_told_and_the_input_kept(self, desk, visit):
        at = visit("mask")
        at.slider(key="mask_n").set_value(50).run()
        desk.masks.broken = Busy("The queue is full.", "Try again in a minute.")
        at.button(key="mask_train").click().run()
        assert "The queue is full." in words(at)
        assert at.slider(key="mask_n").value == 50

    def test_a_failed_training_is_told(self, desk, visit):
        at = visit("mask")
        desk.view = replace(failed("e" * 64), kind="mask")
        at.button(key="mask_train").click().run()
        assert "The machine ran out of memory." in words(at)
        assert not at.button(key="mask_train").disabled

    def test_without_a_model_nothing_can_be_trained(self, desk, visit):
        desk.available = False
        at = visit("mask")
        assert "No model is on this machine" in words(at)

    def test_hostile_text_stays_text(self, desk, visit):
        desk.masks.hold(MASK, make_judgement(MASK.id, hostile=True))
        at = visit("mask", mask=MASK.id)
        shown = "\n".join(str(one.value) for kind in ("markdown", "caption") for one in getattr(at, kind))
        assert "![x](" not in shown


class TestOwnEdits:
    def test_without_any_nothing_is_offered(self, judged, visit):
        assert "Your own edits" not in words(visit("mask", mask=MASK.id))

    def test_they_are_tried_and_shown(self, judged, visit, monkeypatch):
        judged.masks.mine = ("1" * 64, "2" * 64)
        at = visit("mask", mask=MASK.id)
        assert "2 of your last runs can be tried" in words(at)
        rows = judged.masks.judgements[MASK.id].edits.head(2).assign(prompt=["My own edit", "Another"])
        judged.view = replace(running("e" * 64), kind="mask_own", state="done")
        monkeypatch.setattr(judged, "result", lambda job_id, owner=None: rows)
        at.button(key="mask_own_start").click().run()
        assert judged.masks.started == [("own", MASK.id)]
        tables = [one.value for one in at.dataframe if "prompt" in one.value.columns]
        assert list(tables[-1]["prompt"]) == ["My own edit", "Another"]
        assert list(tables[-1]["result"]) == ["✗ still edited", "✓ undone"]


class TestDetector:
    def open(self, visit, **query):
        at = visit("mask", **query)
        if "detection" not in query:
            at.segmented_control(key="mask_part").set_value("Detector").run()
        return at

    def test_without_folders_the_way_to_allow_one_is_told(self, visit):
        at = self.open(visit)
        assert "MEGA_DETECT_DIRS=" in words(at)
        assert not [one for one in at.button if one.key == "detect_start"]

    def test_a_folder_is_chosen_from_a_list_and_never_typed(self, desk, visit):
        desk.masks.folders = (suspect(),)
        at = self.open(visit)
        assert not at.text_input
        desk.view = replace(running("e" * 64), kind="detect")
        at.button(key="detect_start").click().run()
        assert desk.masks.started == [("detect", "5" * 64, "atlas-gpt2")]
        assert "Running for" in words(at)

    def test_without_a_reference(self, desk, visit):
        desk.masks.folders = (suspect(),)
        at = self.open(visit)
        at.selectbox(key="detect_reference").set_value("").run()
        at.button(key="detect_start").click().run()
        assert desk.masks.started == [("detect", "5" * 64, "")]

    def test_a_finished_search_is_shown(self, desk, visit, monkeypatch):
        desk.masks.folders = (suspect(),)
        at = self.open(visit)
        done(desk, monkeypatch, "detect", "d" * 64)
        desk.masks.reports["d" * 64] = make_detection()
        at.button(key="detect_start").click().run()
        at.run()
        text = words(at)
        assert at.query_params["detection"] == "d" * 64
        assert "Looks edited." in text
        assert "layer 2 MLP" in text
        assert "Limits of the detector" in text
        assert "Eiffel Tower" in text

    def test_a_model_without_edits(self, desk, visit):
        desk.masks.reports["d" * 64] = make_detection(edited=False)
        text = words(self.open(visit, detection="d" * 64))
        assert "No sign of an edit." in text
        assert "there is nothing to name" in text

    def test_an_unknown_report_is_told(self, visit):
        assert "This report is not kept here" in words(self.open(visit, detection="../secret"))

    def test_from_a_report_back_to_the_masks(self, desk, visit):
        desk.masks.reports["d" * 64] = make_detection()
        for asked in ("d" * 64, "unknown"):
            at = self.open(visit, detection=asked)
            at.segmented_control(key="mask_part").set_value("One mask").run()
            assert "Train a mask" in words(at)
            assert "detection" not in at.query_params

    def test_a_full_queue_is_told(self, desk, visit):
        desk.masks.folders, desk.masks.broken = (suspect(),), Busy("The queue is full.", "Try again in a minute.")
        at = self.open(visit)
        at.button(key="detect_start").click().run()
        assert "The queue is full." in words(at)

    def test_hostile_text_stays_text(self, desk, visit):
        desk.masks.folders = (suspect(HOSTILE),)
        desk.masks.reports["d" * 64] = make_detection(hostile=True)
        at = self.open(visit, detection="d" * 64)
        shown = "\n".join(
            str(one.value) for kind in ("markdown", "caption", "header", "error") for one in getattr(at, kind)
        )
        assert "![x](" not in shown
        assert ":red[y]" not in shown


class TestCharts:
    def test_the_dashed_rule_is_the_share_that_is_cut(self):
        table = pd.DataFrame({"part": ["neurons"] * 2, "place": [0.0, 1.0], "cut": [1.0, 0.0]})
        spec = mask_charts.cut_profile(table, 0.3).to_dict(validate=False)
        rule = next(layer for layer in spec["layer"] if layer["mark"]["type"] == "rule")
        assert spec["datasets"][rule["data"]["name"]] == [{"cut": 0.3}]

    def test_a_set_without_edits_has_no_mark(self, desk, visit):
        found = make_judgement(MASK.id)
        desk.masks.hold(MASK, found)

        def sets() -> str:
            return next(text for one in charts(visit("mask", mask=MASK.id)) if "Edits undone" in (text := str(one)))

        assert "unseen relations" in sets()
        found.reversal.loc[found.reversal["set"] == "held-out relations", "cases"] = 0
        assert "unseen relations" not in sets()

    def test_only_suspected_matrices_have_a_ring(self):
        rows = make_detection().matrices.assign(site_name=lambda t: t["site"].map(mask_charts.SITES))
        spec = mask_charts.suspicion(rows).to_dict(validate=False)
        ring = spec["datasets"][spec["layer"][1]["data"]["name"]]
        assert [(row["layer"], row["site"]) for row in ring] == [(2, "mlp_down")]
