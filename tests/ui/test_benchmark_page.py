"""The benchmark page as a person meets it: empty, configuring, running, done, stopped, failed, busy, bad links."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from mega_core.errors import BadInput, Busy, ModelUnavailable
from pages.components import benchmark_charts
from tests.ui.conftest import words
from tests.ui.fakes.benchmarks import EVIL, SEQUENCE, SINGLE, cases, setup

TABLE = b"subject,prompt,target_new,target_true\nFrance,The capital of {} is,Rome,Paris\nSpain,no place,Rome,Madrid\n"


@pytest.fixture
def done(desk):
    """A finished benchmark."""
    desk.benchmarks.add(SINGLE, setup())
    return desk.benchmarks


def frame_of(at, key: str):
    return next(one.value for one in at.dataframe if key in one.proto.id)


class TestList:
    def test_first_visit_says_what_will_appear(self, visit):
        at = visit("benchmark")
        assert "What you start is listed here" in words(at)
        assert "18 measurements" in words(at)  # two methods and the unedited model on the fake's six cases
        assert not at.button(key="bench_start").disabled

    def test_each_benchmark_with_its_state_and_buttons(self, desk, visit):
        desk.benchmarks.add(SINGLE, setup(), "running", 0.5)
        desk.benchmarks.add(SEQUENCE, setup(seed=1), "failed", 0.5, error="The disk is full. Free some space.")
        text = words(visit("benchmark"))
        assert "rome, ft_m on atlas-gpt2" in text
        assert "small teaching model" in text
        assert "running" in text
        assert "failed" in text
        assert "The disk is full. Free some space." in text

    def test_stopping_is_asked_twice(self, desk, visit):
        desk.benchmarks.add(SINGLE, setup(), "running", 0.5)
        at = visit("benchmark")
        at.button(key=f"bench_ask_{SINGLE}").click().run()
        assert "Everybody on this machine sees it" in words(at)
        assert desk.benchmarks.stopped == []
        at.button(key=f"bench_let_{SINGLE}").click().run()
        assert "Everybody on this machine sees it, and" not in words(at)
        at.button(key=f"bench_ask_{SINGLE}").click().run()
        at.button(key=f"bench_stop_{SINGLE}").click().run()
        assert desk.benchmarks.stopped == [SINGLE]
        assert at.button(key=f"bench_resume_{SINGLE}").label == "Resume"

    def test_a_stopped_one_is_gone_on_with(self, desk, visit):
        desk.benchmarks.add(SINGLE, setup(), "stopped", 0.5)
        at = visit("benchmark")
        at.button(key=f"bench_resume_{SINGLE}").click().run()
        assert desk.benchmarks.resumed == [SINGLE]
        assert at.button(key=f"bench_ask_{SINGLE}").label == "Stop"

    def test_no_room_to_resume_is_told_where_it_was_asked(self, desk, visit):
        desk.benchmarks.add(SINGLE, setup(), "stopped", 0.5)
        desk.benchmarks.busy = Busy("One benchmark runs and another one waits.", "Wait for one of them.")
        at = visit("benchmark")
        at.button(key=f"bench_resume_{SINGLE}").click().run()
        assert "One benchmark runs and another one waits. Wait" in words(at).replace("*", "")

    @pytest.mark.parametrize("link", ["../results", "zz", "1" * 31, "<b>"])
    def test_a_damaged_link_is_told(self, visit, link):
        assert "should have 32 characters" in words(visit("benchmark", benchmark=link))

    def test_a_link_that_nobody_knows_is_told_and_starts_nothing(self, desk, visit):
        assert "not on this machine" in words(visit("benchmark", benchmark="9" * 32))
        assert desk.benchmarks.started == desk.benchmarks.resumed == []


class TestForm:
    def test_start_opens_what_was_started(self, desk, visit):
        at = visit("benchmark")
        at.number_input(key="bench_limit").set_value(4)
        at.multiselect(key="bench_methods").set_value(["rome"])
        at.number_input(key="bench_seed").set_value(7)
        at.button(key="bench_start").click().run()
        (made,) = desk.benchmarks.started
        assert [one.label for one in made.plan.entrants] == ["unedited", "rome"]
        assert (len(made.plan.ids), made.plan.seed) == (4, 7)
        assert at.query_params["benchmark"] in (SINGLE, [SINGLE])
        assert "No numbers yet" in words(at)

    def test_all_methods_name_those_that_cannot(self, desk, visit):
        at = visit("benchmark")
        at.toggle(key="bench_everyone").set_value(True).run()
        assert desk.benchmarks.planned[-1]["methods"] == ("all",)
        assert "pmet: not measured: attention and MLP run in parallel here" in words(at)

    def test_sequences_ask_how_often(self, desk, visit):
        at = visit("benchmark")
        at.segmented_control(key="bench_mode").set_value("sequential").run()
        at.number_input(key="bench_every").set_value(2).run()
        assert (desk.benchmarks.planned[-1]["mode"], desk.benchmarks.planned[-1]["every"]) == ("sequential", 2)
        assert "one edit after the other" in words(at).casefold()

    def test_a_file_is_read_and_each_problem_has_its_line(self, desk, visit):
        at = visit("benchmark")
        at.selectbox(key="bench_source").set_value("A file of yours").run()
        assert "Choose a file" in words(at)
        assert at.button(key="bench_start").disabled
        at.file_uploader[0].set_value(("facts.csv", TABLE, "text/csv")).run()
        assert "facts.csv: 1 cases read" in words(at)
        assert "1 record can't be used" in words(at)
        (problems,) = [one.value for one in at.dataframe if "line" in one.value.columns]
        assert list(problems["line"]) == [3]
        at.button(key="bench_start").click().run()
        assert desk.benchmarks.started[0].cases[0].request.subject == "France"
        assert len(desk.benchmarks.started[0].problems) == 1

    def test_a_file_that_cannot_be_read_is_told(self, visit):
        at = visit("benchmark")
        at.selectbox(key="bench_source").set_value("A file of yours").run()
        at.file_uploader[0].set_value(("x.json", b'{"a": 1}', "application/json")).run()
        assert "is in no known format" in words(at)
        assert at.button(key="bench_start").disabled

    @pytest.mark.parametrize(
        "error",
        [
            BadInput("protocols", "none has anything to ask about these cases.", "Choose others."),
            ModelUnavailable("Its files are missing.", "Run: python -m mega_core train."),
        ],
    )
    def test_what_cannot_be_measured_is_told_before_the_start(self, desk, visit, error):
        desk.benchmarks.broken = error
        at = visit("benchmark")
        assert error.what in words(at)
        assert error.next_step in words(at)
        assert at.button(key="bench_start").disabled

    def test_a_full_queue_keeps_the_form(self, desk, visit):
        desk.benchmarks.busy = Busy("One benchmark runs and another one waits.", "Wait for one of them.")
        at = visit("benchmark")
        at.number_input(key="bench_limit").set_value(3)
        at.button(key="bench_start").click().run()
        assert "One benchmark runs and another one waits." in words(at)
        assert at.number_input(key="bench_limit").value == 3

    def test_a_model_that_is_not_here_is_told(self, desk, visit):
        desk.available = False
        at = visit("benchmark")
        assert "Its files are missing." in words(at)
        assert at.button(key="bench_start").disabled


class TestCharts:
    ROWS = pd.DataFrame(
        {
            "method": ["unedited", "slow", "quick"],
            "value": [0.0, 0.9, 0.5],
            "n": [10, 10, 10],
            "ci_low": [0.0, 0.8, 0.3],
            "ci_high": [0.2, 1.0, 0.7],
            "seconds": [0.1, 4.0, 0.5],
        }
    )

    def test_a_dot_and_an_interval_per_method_the_best_on_top(self):
        spec = benchmark_charts.dots(
            self.ROWS, unit="share", better="higher", title="Efficacy", chosen="slow"
        ).to_dict()
        assert spec["layer"][0]["encoding"]["y"]["sort"] == ["slow", "quick", "unedited"]
        assert {spec["layer"][0]["encoding"][axis]["field"] for axis in ("x", "x2")} == {"ci_low", "ci_high"}
        assert len(spec["layer"]) == 4
        lower = benchmark_charts.dots(self.ROWS, unit="nats", better="lower", title="KL").to_dict()
        assert lower["layer"][0]["encoding"]["y"]["sort"] == ["quick", "slow", "unedited"]
        assert "less is better" in lower["layer"][0]["encoding"]["x"]["axis"]["title"]

    def test_time_is_logarithmic_and_names_what_nothing_beats(self):
        many = pd.concat(
            [self.ROWS[1:], *(self.ROWS[1:2].assign(method=f"m{i}", seconds=9.0 + i, value=0.1) for i in range(9))]
        )
        spec = benchmark_charts.against_time(many, unit="share", better="higher", title="Efficacy").to_dict()
        assert spec["layer"][0]["encoding"]["x"]["scale"]["type"] == "log"
        rows = next(iter(spec["datasets"].values()))
        assert {row["label"] for row in rows} == {"slow", "quick", ""}

    def test_a_sequence_has_a_band_for_the_chosen_method_only(self):
        rows = pd.concat([self.ROWS.assign(step=step) for step in (2, 4)])
        spec = benchmark_charts.retention(rows, unit="share", title="Efficacy", chosen="slow").to_dict()
        (band,) = [layer for layer in spec["layer"] if layer["mark"]["type"] == "area"]
        assert {row["method"] for row in spec["datasets"][band["data"]["name"]]} == {"slow"}


class TestResults:
    def test_one_protocol_at_a_time_with_intervals_and_n(self, done, visit):
        at = visit("benchmark", benchmark=SINGLE)
        table = frame_of(at, "bench_table")
        assert list(table["Method"]) == ["unedited", "rome", "ft_m"]
        assert [column.split(" (")[0] for column in table.columns[1:]] == [
            "Efficacy, generated: contains", "Neighbourhood, divergence",
        ]  # fmt: skip
        rome = table.iloc[1, 1].replace("\xa0", " ")
        assert rome.startswith("100.0 % (")
        at.segmented_control(key="bench_protocol").set_value("rome").run()
        names = [column.split(" (")[0] for column in frame_of(at, "bench_table").columns[1:]]
        assert len(names) > 2
        assert "Efficacy, generated: contains" not in names

    def test_the_picture_reads_its_numbers_aloud(self, done, visit):
        at = visit("benchmark", benchmark=SINGLE)
        (dots, time) = (element.proto for element in at.get("vega_lite_chart"))
        assert "rome" in dots.alt
        assert [param["name"] for param in json.loads(dots.spec)["params"]] == [benchmark_charts.PICK]
        assert "is the quickest" in time.alt

    def test_every_number_opens_its_answers(self, done, visit):
        at = visit("benchmark", benchmark=SINGLE)
        at.selectbox(key="bench_method").set_value("ft_m").run()
        assert "ft_m · Efficacy, generated: contains: 50.0" in words(at)
        answers = frame_of(at, "bench_answers")
        assert list(answers["result"]) == ["✓ right"] * 3 + ["✗ wrong"] * 3
        at.toggle(key="bench_failures").set_value(True).run()
        assert list(frame_of(at, "bench_answers")["case"]) == ["4", "5", "6"]
        at.text_input(key="bench_find").set_value("land 5").run()
        assert list(frame_of(at, "bench_answers")["case"]) == ["5"]
        at.text_input(key="bench_find").set_value("nothing like it").run()
        assert "No answer matches" in words(at)

    def test_a_number_made_of_several_opens_all_of_them(self, done, visit):
        at = visit("benchmark", benchmark=SINGLE, protocol="rome", metric="S", method="rome")
        assert set(frame_of(at, "bench_answers")["metric"]) == {
            "Efficacy score", "Paraphrase score", "Neighbourhood score"
        }  # fmt: skip
        assert "Made of:" in words(at)

    def test_a_case_becomes_a_draft_and_no_run(self, desk, done, visit):
        at = visit("benchmark", benchmark=SINGLE, method="ft_m")
        at.selectbox(key="bench_case").set_value("5").run()
        assert "The capital of Land 5 is" in words(at)
        at.button(key="bench_as_run").click().run()
        assert at.title[0].value == "Edit trial"
        assert at.text_input(key="edit_subject").value == "Land 5"
        assert at.text_input(key="edit_new").value == "Rome"
        assert desk.submitted == []

    def test_the_link_carries_what_is_looked_at(self, done, visit):
        at = visit("benchmark", benchmark=SINGLE, protocol="rome", metric="PS", method="ft_m")
        assert at.segmented_control(key="bench_protocol").value == "rome"
        assert at.selectbox(key="bench_metric").value == "PS"
        at.selectbox(key="bench_metric").set_value("NS").run()
        assert at.query_params["metric"] in ("NS", ["NS"])
        assert at.query_params["method"] in ("ft_m", ["ft_m"])

    def test_a_link_with_names_that_are_none_shows_the_first(self, done, visit):
        at = visit("benchmark", benchmark=SINGLE, protocol="../x", metric="<b>", method="__import__('os')")
        assert at.segmented_control(key="bench_protocol").value == "ours"
        assert at.selectbox(key="bench_method").value == "rome"

    def test_tables_are_read_once(self, done, visit):
        at = visit("benchmark", benchmark=SINGLE)
        before = done.reads
        at.selectbox(key="bench_method").set_value("ft_m").run()
        assert done.reads == before

    def test_partial_numbers_are_marked_and_change_when_asked(self, desk, visit):
        desk.benchmarks.add(SINGLE, setup(), "running", 0.5)
        at = visit("benchmark", benchmark=SINGLE)
        assert "From 9 of 18 measurements" in words(at)
        assert "42 s left" in str([bar.proto.text for bar in at.get("progress")])
        desk.benchmarks.add(SINGLE, setup(), "running", 0.8)
        assert "From 9 of 18 measurements" in words(at.run())
        at.button(key="bench_newest").click().run()
        assert "From 14 of 18 measurements" in words(at)

    def test_a_sequence_shows_what_is_kept(self, desk, visit):
        desk.benchmarks.add(SEQUENCE, setup(mode="sequential", every=2))
        at = visit("benchmark", benchmark=SEQUENCE)
        assert [element.proto.alt.split(".")[0] for element in at.get("vega_lite_chart")][-1].endswith(
            "as edits add up"
        )
        assert "after 2 edits" in words(at)

    def test_alarms_refusals_and_what_was_not_measured(self, desk, visit):
        about = {
            "not_measured": [{"label": "pmet", "reason": "attention and MLP run in parallel"}],
            "left_out": [{"protocol": "ripple", "reason": "there are no tests", "cases": 6}],
            "problems": [{"line": 3, "record": "7", "text": "subject is empty."}],
        }
        desk.benchmarks.add(SINGLE, setup(), about=about, refused="It can't.", alarm="The change is large.")
        at = visit("benchmark", benchmark=SINGLE)
        titles = [one.label for one in at.expander]
        for title in ("Signs of damage: 1", "Refused edits and cases left out: 1", "Not measured: 2"):
            assert title in titles
        assert "Records of the dataset that could not be used: 1" in titles

    def test_a_clean_benchmark_says_so(self, done, visit):
        text = words(visit("benchmark", benchmark=SINGLE))
        assert "No alarm was raised" in text
        assert "Every record was used" in text

    def test_downloads(self, desk, done, visit):
        labels = [one.proto.label for one in visit("benchmark", benchmark=SINGLE).get("download_button")]
        for label in ("Summary (CSV)", "Answers (CSV)", "Report (HTML)", "Plan (JSON)"):
            assert label in labels
        desk.benchmarks.add(SEQUENCE, setup(seed=1), "running", 0.5)
        at = visit("benchmark", benchmark=SEQUENCE)
        assert "Report (HTML)" not in [one.proto.label for one in at.get("download_button")]
        assert "is written when the benchmark ends" in words(at)

    def test_hostile_text_stays_text(self, desk, visit):
        desk.benchmarks.add(SINGLE, setup(dataset=EVIL, chosen=cases(evil=True)))
        at = visit("benchmark", benchmark=SINGLE, method="ft_m")
        at.selectbox(key="bench_case").set_value(EVIL).run()
        assert not at.exception
        raw = "\n".join(str(one.value) for kind in ("markdown", "caption", "subheader") for one in getattr(at, kind))
        assert "](http" not in raw
        assert "<b>" not in raw
        assert "evil" in words(at)
