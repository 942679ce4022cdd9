"""Success against failure: what ships, a study of one's own, a study of one's runs, and the way to MEGA."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mega_core import frames
from mega_core.errors import BadInput, Busy
from mega_core.regions import Lever
from mega_core.service import contrasted
from mega_core.service.studies import OwnRuns
from pages.components import contrast_charts
from tests.ui.conftest import words
from tests.ui.fake import LAYERS, MEASURED, failed, running

OWN = "5" * 32


def own_study(name=OWN, source="drawn", verdict="The published pattern holds as a whole for no editor."):
    """A study that was made here: with C and K, and leverage."""
    levers = tuple(Lever(i, 0.3 * i, 0.2 * i, 0.4 * i, 0.3 * i, float(i > 4)) for i in range(LAYERS))
    region = replace(MEASURED.region, layers=(5, 6, 7), leverage=levers, edits=12)
    rows = [
        {**row, "statistic": statistic, "failures": failures}
        for row in MEASURED.curves.to_dict(orient="records")
        for statistic, failures in (("D", "none"), ("K", "induced: steps 3"))
    ]
    shape = contrasted.of_measured(replace(MEASURED, region=region))
    return replace(
        shape, id=name, source=source, verdict=verdict, curves=frames.from_rows(rows, "contrast"),
        left_out={"rome": {"not known before": 2}}, made="2026-01-02T03:04:05+00:00",
    )  # fmt: skip


def charts(at) -> list[dict]:
    return [json.loads(element.proto.spec) for element in at.get("vega_lite_chart")]


def press(at, key):
    at.button(key=key).click().run()
    assert not at.exception
    return at


class TestShipped:
    def test_it_shows_at_once(self, visit):
        at = visit("contrast")
        text = words(at)
        assert "The published pattern holds for every editor: rome." in text
        assert "nothing here is evidence about pretrained models" in text
        assert "most in layer 7, +3.50 nats (+1.80 to +5.20, n = 18)" in text
        assert "layers 4-5" in text
        assert any("✓ holds: +9.10 (+8.50 to +9.70)" in frame.value.to_string() for frame in at.dataframe)

    def test_what_is_absent_is_said(self, visit):
        assert "K and C: absent" in words(visit("contrast"))

    def test_its_pictures_are_one_view_each(self, visit):
        specs = charts(visit("contrast"))
        assert len(specs) == 2
        assert not any("facet" in spec for spec in specs)

    def test_a_model_without_one_says_what_will_appear(self, visit):
        at = visit("contrast")
        at.selectbox(key="contrast_model").set_value("gpt2-xl").run()
        assert not at.exception
        assert "No study of GPT-2 XL" in words(at)
        assert "huggingface-cli download" in words(at)

    def test_its_region_goes_to_mega(self, desk, visit):
        at = visit("contrast")
        at.text_input(key="contrast_name_atlas-gpt2").set_value("mine").run()
        press(at, "contrast_send")
        assert desk.studies.kept["mine"].layers == (4, 5)
        assert at.session_state["knob_mega_region"].startswith("4-5")

    def test_a_name_that_is_none_is_told(self, desk, visit):
        at = visit("contrast")
        desk.studies.refusal = BadInput("name", "'a b' is no name for a region.", "Use letters.")
        press(at, "contrast_send")
        assert "no name for a region" in words(at)
        assert "Success against failure" in words(at)


class TestOwn:
    def test_a_study_is_started_as_asked(self, desk, visit):
        at = visit("contrast")
        at.number_input(key="contrast_edits").set_value(7).run()
        at.selectbox(key="contrast_label").set_value("likelier").run()
        desk.view = running("d" * 64)
        press(at, "contrast_run")
        assert desk.studies.started == [
            {"model": "atlas-gpt2", "methods": ("rome",), "edits": 7, "label": "likelier", "basis": "D", "induced": 60,
             "seed": 0}
        ]  # fmt: skip
        assert any(button.label == "Cancel" for button in at.button)

    def test_how_long_it_takes_is_said(self, visit):
        text = words(visit("contrast"))
        assert "20 edits by 1 editor: 20 questions, and up to 60 more where failures have to be induced" in text
        assert "about 86 s, at most 6 min" in text

    def test_when_it_is_there_its_link_is_in_the_address(self, desk, visit):
        at = visit("contrast")
        desk.studies.made[OWN] = own_study()
        desk.result = lambda job, owner: OWN
        at.session_state["contrast_job"] = "j" * 32
        desk.view = replace(running("d" * 64), state="done", kind="contrast")
        at.run()
        assert not at.exception
        assert at.query_params["study"] in (OWN, [OWN])
        assert "holds as a whole for no editor" in words(at)

    def test_a_link_opens_it_and_starts_nothing(self, desk, visit):
        desk.studies.made[OWN] = own_study()
        at = visit("contrast", study=OWN)
        text = words(at)
        assert "holds as a whole for no editor" in text
        assert "The shipped study (dashed, 20 edits) has layers 4-5: 1 of 2 shared" in text
        assert "each of them was chosen in all of the draws" in text
        assert desk.studies.started == []
        assert "not known before (2)" in at.dataframe[0].value.to_string()

    def test_induced_failures_are_named_in_the_legend(self, desk, visit):
        desk.studies.made[OWN] = own_study()
        at = visit("contrast", study=OWN)
        at.session_state["contrast_statistic"] = "K"
        at.run()
        assert not at.exception
        assert "rome (induced: steps 3)" in json.dumps(charts(at)[0])
        assert "n = 18 against 2" in words(at)

    @pytest.mark.parametrize("link", ["0" * 32, "../../etc/passwd", "![x](http://evil.example)"])
    def test_a_link_nobody_knows(self, visit, link):
        at = visit("contrast", study=link)
        assert "not stored here" in words(at)
        assert "The published pattern holds for every editor" in words(at)

    def test_busy_and_failed_are_told_and_the_form_stays(self, desk, visit):
        at = visit("contrast")
        desk.studies.refusal = Busy("8 questions are already waiting.", "Try again in a minute.")
        press(at, "contrast_run")
        assert "already waiting" in words(at)
        desk.studies.refusal = None
        at.session_state["contrast_job"] = "j" * 32
        desk.view = failed("d" * 64)
        at.run()
        assert "The machine ran out of memory." in words(at)
        assert "What was measured is kept" in words(at)
        assert at.button(key="contrast_run").label == "Run this study"

    def test_hostile_text_stays_text(self, desk, visit):
        evil = "![x](http://evil.example/a.png) <b>no</b>"
        desk.studies.made[OWN] = own_study(verdict=evil)
        at = visit("contrast", study=OWN)
        shown = [element.value for element in at.markdown if "evil" in element.value]
        assert shown
        assert all(r"\!\[x\]\(http" in value for value in shown)


class TestMine:
    def test_without_runs_the_missing_ones_are_counted(self, visit):
        assert "10 are missing for one editor" in words(visit("contrast"))

    def test_too_few(self, desk, visit):
        desk.studies.mine = (OwnRuns("rome", 7, 1),)
        assert "rome comes closest: 3 more that work" in words(visit("contrast"))

    def test_enough(self, desk, visit):
        desk.studies.mine = (OwnRuns("ike", 3, 0), OwnRuns("rome", 12, 11))
        at = visit("contrast")
        desk.view = running("d" * 64)
        press(at, "contrast_mine_run")
        assert desk.studies.started == [{"model": "atlas-gpt2", "editors": ("rome",), "label": "argmax"}]


class TestPictures:
    def test_curves_have_band_line_and_region(self):
        table = MEASURED.curves.assign(label="rome")
        table = table[(table["module"] == "attn") & (table["candidate"] == "new")]
        spec = contrast_charts.bands(table, (4, 5), "Change, nats").to_dict()
        assert [layer["mark"]["type"] for layer in spec["layer"]] == ["rect", "rule", "area", "line"]
        shaded = spec["datasets"][spec["layer"][0]["data"]["name"]]
        assert [(row["layer"], row["end"]) for row in shaded] == [(3.5, 4.5), (4.5, 5.5)]
        lines = spec["layer"][3]["encoding"]
        assert {"Successes", "Failures", "95 % from"} <= {one["title"] for one in lines["tooltip"]}

    def test_the_other_study_is_dashed_beside_the_leverage(self):
        mean = own_study().leverage
        spec = contrast_charts.leverage_profile(mean, (5, 6, 7), mean).to_dict()
        assert spec["layer"][-1]["mark"]["strokeDash"] == [5, 4]
        rows = next(rows for rows in spec["datasets"].values() if "often" in rows[0])
        assert [row["often"] for row in rows if row["inside"]] == ["100 %"] * 3

    def test_the_map_frames_attention_of_the_region(self):
        cells = own_study().map
        spec = contrast_charts.leverage_map(cells).to_dict()
        framed = spec["datasets"][spec["layer"][1]["data"]["name"]]
        assert {(row["module"], row["layer"]) for row in framed} == {("attn", 5), ("attn", 6), ("attn", 7)}
        assert len(spec["datasets"][spec["layer"][0]["data"]["name"]]) == 2 * LAYERS
