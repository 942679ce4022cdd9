"""Compare methods as a person meets it: empty, running, done, failed, busy, a link nobody knows."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pandas as pd
import pytest

from mega_core.errors import Busy
from mega_core.jobs import StageView
from pages.components import compare_charts, compare_tables
from pages.components.compare_tables import BASE, Column
from tests.ui.conftest import words
from tests.ui.fake import EVIL, TOWER, WORKS, failed, make_report, running

EMMET = make_report(method="emmet", works=False, leaks=0)


def columns(*reports, labels="XYZ") -> list[Column]:
    return [Column(label, r.question, r.digest, "done", r) for label, r in zip(labels, reports, strict=False)]


@pytest.fixture
def pair(desk):
    """A kept comparison of two methods, both answered."""
    desk.reports[EMMET.digest] = EMMET
    return desk.comparisons.save([WORKS.question, EMMET.question])


def specs(at) -> list[dict]:
    return [json.loads(element.proto.spec) for element in at.get("vega_lite_chart")]


def table_with(at, column: str) -> pd.DataFrame:
    """The table of the page that has this column."""
    return next(element.value for element in at.dataframe if column in element.value.columns)


class TestPage:
    def test_first_visit_says_what_will_appear(self, visit):
        at = visit("compare")
        assert "What you will see here" in words(at)
        assert at.button(key="compare_run").disabled
        assert not at.get("vega_lite_chart")

    def test_a_link_with_a_run_brings_its_edit_and_starts_nothing(self, desk, visit):
        at = visit("compare", run=WORKS.digest)
        assert "Eiffel Tower is located in the city of" in words(at)
        assert at.selectbox(key="compare_source").value == WORKS.digest
        assert not desk.submitted
        assert not at.button(key="compare_run").disabled

    def test_run_asks_only_for_what_is_not_there(self, desk, visit):
        at = visit("compare", run=WORKS.digest)
        assert at.multiselect(key="compare_methods").value == ["rome"]
        at.multiselect(key="compare_methods").set_value(["rome", "emmet"]).run()
        assert "EMMET not measured yet" in words(at)
        at.button(key="compare_run").click().run()
        assert not at.exception
        (plan,) = desk.submitted
        assert plan.method.name == "emmet"
        assert plan.requests == WORKS.question.requests
        assert plan.seed == WORKS.question.seed
        (name,) = desk.comparisons.kept
        assert at.query_params["comparison"] in (name, [name])
        assert "Running for" in words(at)
        assert at.button(key="compare_run").disabled

    def test_a_typed_fact(self, desk, visit):
        at = visit("compare")
        at.selectbox(key="compare_source").set_value("typed").run()
        for name, text in (("subject", TOWER.subject), ("template", TOWER.template), ("new", "Rome"), ("true", "")):
            at.text_input(key=f"compare_{name}").set_value(text)
        at.multiselect(key="compare_methods").set_value(["emmet"]).run()
        at.button(key="compare_run").click().run()
        (plan,) = desk.submitted
        assert plan.requests[0].prompt == TOWER.prompt
        assert plan.requests[0].target_true is None

    def test_a_mistake_is_told_and_nothing_is_lost(self, desk, visit):
        at = visit("compare")
        at.selectbox(key="compare_source").set_value("typed").run()
        at.text_input(key="compare_subject").set_value("Eiffel Tower")
        at.multiselect(key="compare_methods").set_value(["emmet"]).run()
        at.button(key="compare_run").click().run()
        assert "template: is empty." in words(at)
        assert at.text_input(key="compare_subject").value == "Eiffel Tower"
        assert not desk.submitted

    def test_a_full_queue_is_told(self, desk, visit, monkeypatch):
        def busy(plans, owner):
            raise Busy("8 questions are already waiting, which is the limit.", "Try again in a minute.")

        monkeypatch.setattr(desk, "submit_several", busy)
        at = visit("compare", run=WORKS.digest)
        at.multiselect(key="compare_methods").set_value(["emmet"]).run()
        at.button(key="compare_run").click().run()
        assert "already waiting" in words(at)
        assert at.multiselect(key="compare_methods").value == ["emmet"]

    def test_columns_fill_while_it_runs(self, desk, visit):
        name = desk.comparisons.save([WORKS.question, EMMET.question])
        desk.view = replace(running(EMMET.digest), kind="compare", stages=(StageView("methods", 1.0, 0, 1, False),))
        at = visit("compare", comparison=name)
        at.session_state["compare_job"] = "j" * 32
        at.session_state["compare_asked"] = [EMMET.digest]
        at.run()
        text = words(at)
        assert "Works" in text
        assert "Working" in text
        assert "How likely each object is next" in text

    def test_done_shows_everything(self, visit, pair):
        at = visit("compare", comparison=pair)
        text = words(at)
        for heading in (
            "Metrics", "What the models write", "Where in the network", "How likely each object is next",
            "What it took, and what was changed",
        ):  # fmt: skip
            assert heading in text
        assert len(specs(at)) == 3
        table = table_with(at, "metric")
        assert list(table.columns)[:4] == ["metric", BASE, "ROME", "EMMET"]
        assert table.loc[table["metric"] == "Efficacy score", "ROME"].item() == "1.000 best"
        assert table.loc[table["metric"] == "Efficacy score", "EMMET"].item() == "0.000"

    def test_protocols_are_never_mixed_and_switches_do_what_they_say(self, visit, pair):
        at = visit("compare", comparison=pair)
        everything = len(table_with(at, "kind"))
        assert "Scales differ" not in words(at)
        at.segmented_control(key="compare_protocol").set_value("exact")
        at.toggle(key="compare_differ").set_value(True)
        at.toggle(key="compare_locked").set_value(False).run()
        names = ["Exact match", "Paraphrase exact match", "Neighbourhood exact match"]
        assert list(table_with(at, "metric")["metric"]) == names
        shown = table_with(at, "kind")
        assert 0 < len(shown) < everything
        assert shown[["ROME", "EMMET"]].apply(lambda c: c.str.startswith("✎")).any(axis=1).all()
        assert "Scales differ" in words(at)

    def test_blind_labels_hide_the_names_until_revealed(self, visit, pair):
        at = visit("compare", comparison=pair)
        at.toggle(key="compare_blind").set_value(True).run()
        tables = table_with(at, "metric")
        assert {"Method A", "Method B"} <= set(tables.columns)
        assert not {"ROME", "EMMET"} & set(tables.columns)
        assert "What it took" not in words(at)
        assert not [link for link in at.get("page_link") if "run=" in str(link.proto.query_string)]
        assert "ROME" not in json.dumps(specs(at))
        at.toggle(key="compare_blind").set_value(False).run()
        assert "Revealed: Method A was" in words(at)

    def test_a_method_that_failed_says_why_and_can_be_run_again(self, desk, visit):
        name = desk.comparisons.save([WORKS.question, EMMET.question])
        at = visit("compare", comparison=name)
        assert "1 of 2 methods have no result here" in words(at)
        assert not desk.submitted
        at.session_state["compare_failed"] = {EMMET.digest: "The value did not settle. Give more steps."}
        at.run()
        assert "The value did not settle" in words(at)
        at.button(key="compare_missing").click().run()
        assert [plan.method.name for plan in desk.submitted] == ["emmet"]

    def test_a_failed_job_keeps_what_is_there(self, desk, visit, pair):
        desk.view = failed("e" * 64)
        at = visit("compare", comparison=pair)
        at.session_state["compare_job"] = "j" * 32
        at.run()
        assert "ran out of memory" in words(at)
        assert "How likely each object is next" in words(at)

    @pytest.mark.parametrize("name", ["0" * 64, "../../etc/passwd", "<script>"])
    def test_a_link_nobody_knows(self, visit, name):
        assert "not kept here" in words(visit("compare", comparison=name))

    def test_hostile_text_stays_text(self, desk, visit):
        name = desk.comparisons.save([EVIL.question])
        at = visit("compare", comparison=name)
        for element in (*at.markdown, *at.header, *at.caption):
            assert not re.search(r"(?<!\\)(<img|<b>|!\[x)", element.value)


class TestTables:
    def test_best_is_by_direction_and_silent_when_all_are_level(self):
        table = compare_tables.metric_rows(columns(WORKS, EMMET), "rome").set_index("metric")
        assert table.loc["Efficacy score", "best"] == ["X"]
        assert table.loc["Neighbourhood score", "best"] == ["Y"]
        same = compare_tables.metric_rows(columns(WORKS, WORKS), "rome")
        assert not any(same["best"])

    def test_words_the_base_did_not_say_are_marked(self):
        assert compare_tables.bracketed("in Paris. It is", "in old Rome. It is") == "in «old Rome.» It is"
        assert compare_tables.bracketed("same", "same") == "same"

    def test_changes_are_after_minus_before(self):
        cells = compare_tables.changes(columns(WORKS), "new")
        scores = WORKS.frames["module_scores"]
        mine = scores[(scores["layer"] == 3) & (scores["module"] == "ffn") & (scores["candidate"] == "new")]
        by = mine.set_index("state")["contribution"]
        got = cells[(cells["layer"] == 3) & (cells["module"] == "ffn")].iloc[0]
        assert got["value"] == pytest.approx(by["after"] - by["before"])
        assert bool(got["edited"])

    def test_blind_order_is_the_seeds(self):
        made = columns(WORKS, EMMET)
        assert [c.digest for c in compare_tables.blinded(made, 4)] == [
            c.digest for c in compare_tables.blinded(made, 4)
        ]
        orders = {tuple(c.digest for c in compare_tables.blinded(made, seed)) for seed in range(9)}
        assert len(orders) == 2

    def test_one_locked_scale_or_one_each(self):
        cells = compare_tables.changes(columns(WORKS, EMMET), "new")
        cells.loc[cells["method"] == "Y", ["value", "limit"]] *= 10
        locked = compare_charts.method_maps(cells, ["X", "Y"], locked=True).to_dict(validate=False)
        free = compare_charts.method_maps(cells, ["X", "Y"], locked=False).to_dict(validate=False)

        def domain(spec):
            return spec["layer"][0]["encoding"]["color"]["scale"]["domain"]

        assert domain(locked) == pytest.approx([-cells["limit"].max(), cells["limit"].max()])
        assert domain(free) == [-1, 1]
        rows = free["layer"][0]["encoding"]["y"]["scale"]["domain"]
        assert "±" in rows[0]

    def test_costs_say_what_is_changed(self):
        def changed(**values):
            frame = WORKS.frames["weight_change"].assign(**values)
            return replace(WORKS, frames={**WORKS.frames, "weight_change": frame})

        made = columns(changed(kind="weights"), changed(kind="steering", parameters=0))
        table = compare_tables.costs(made).set_index("method")
        assert table.loc["X", "weights"] == 262144
        assert table.loc["Y", "weights"] == 0
        assert table.loc["Y", "changed"] == "activations, no weight"
