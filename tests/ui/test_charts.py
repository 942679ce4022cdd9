"""Charts: a table in, a specification out."""

from __future__ import annotations

import pandas as pd
import pytest

from pages.components import charts, tables
from tests.ui.fake import HOSTILE, LAYERS, TOWER, WORKS, make_report

CELLS = tables.module_cells(WORKS)
EDITED = tables.edited_places(WORKS)


def marks(spec: dict) -> list[str]:
    return [layer["mark"]["type"] for layer in spec["layer"]]


def channel(spec: dict, mark: str, name: str) -> dict:
    return next(layer["encoding"][name] for layer in spec["layer"] if layer["mark"]["type"] == mark)


class TestModuleMap:
    def spec(self, **more) -> dict:
        return charts.module_map(CELLS, EDITED, candidate="new", limit=3.0, **more).to_dict()

    def test_one_cell_per_place_and_state(self):
        spec = self.spec()
        rows = next(iter(spec["datasets"].values()))
        assert len([row for row in rows if "value" in row]) == LAYERS * 2 * 3

    def test_the_scale_is_symmetric_diverging_and_follows_the_theme(self):
        color = channel(self.spec(), "rect", "color")
        assert color["scale"]["domain"] == [-3.0, 3.0]
        assert color["scale"]["range"] == "diverging"

    def test_the_selection_is_named_and_carries_fields(self):
        (param,) = self.spec()["params"]
        assert param["name"] == charts.CELL
        assert param["select"]["fields"] == ["layer", "module"]
        assert param["select"]["toggle"] is False

    def test_edited_layers_and_the_chosen_cell_are_marked(self):
        assert marks(self.spec(selected=(3, "ffn"))) == ["rect", "point", "rect"]
        assert marks(charts.module_map(CELLS, EDITED.head(0), candidate="new", limit=9.0).to_dict()) == ["rect"]

    def test_a_cell_beyond_the_limit_is_marked(self):
        assert "point" in marks(charts.module_map(CELLS, EDITED.head(0), candidate="new", limit=0.5).to_dict())

    def test_the_chart_can_be_narrow(self):
        assert "facet" not in self.spec()
        assert "width" not in self.spec()

    def test_many_layers_thin_out_the_labels(self):
        cells = tables.module_cells(make_report(layers=48))
        spec = charts.module_map(cells, EDITED.head(0), candidate="new", limit=3.0).to_dict()
        assert len(channel(spec, "rect", "x")["axis"]["values"]) == 16


def test_the_profile_shows_both_states_and_the_edited_layer():
    spec = charts.layer_profile(CELLS, EDITED, candidate="difference").to_dict()
    assert marks(spec) == ["rect", "rule", "line", "point", "point"]
    assert channel(spec, "line", "strokeDash")["scale"]["domain"] == ["Base", "Edited"]


def test_bars_use_identity_colours():
    spec = charts.next_token_bars(tables.next_tokens(WORKS)).to_dict()
    scale = channel(spec, "bar", "color")["scale"]
    assert dict(zip(scale["domain"], scale["range"], strict=True)) == {
        "new object": charts.NEW,
        "original object": charts.TRUE,
        "other": charts.OTHER,
    }


def test_margins_pass_by_colour_and_shape():
    table = tables.evidence(WORKS)
    spec = charts.margin_dumbbell(table, axis_title="margin").to_dict()
    shape = next(layer["encoding"]["shape"] for layer in spec["layer"] if "shape" in layer["encoding"])
    assert shape["scale"]["range"] == ["circle", "cross"]
    assert "rule" in marks(spec)


def test_no_chart_links_or_loads_anything():
    report = make_report(HOSTILE)
    cells = tables.module_cells(report)
    edited = tables.edited_places(report)
    for chart in (
        charts.module_map(cells, edited, candidate="new", limit=1.0, selected=(0, "ffn")),
        charts.layer_profile(cells, edited, candidate="new"),
        charts.next_token_bars(tables.next_tokens(report)),
        charts.margin_dumbbell(tables.evidence(report), axis_title="margin"),
    ):
        spec = chart.to_dict()
        for layer in spec["layer"]:
            assert not {"href", "url"} & set(layer["encoding"])
            assert layer["mark"]["type"] != "image"
        assert "usermeta" not in spec


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("background", ["#ffffff", "#0d1319"])
@pytest.mark.parametrize(
    "color",
    [charts.NEW, charts.TRUE, charts.ATTENTION, charts.MLP, charts.HOLDS, charts.BROKEN, charts.INK, charts.SELECTED],
)
def test_fixed_colours_stand_out_on_both_backgrounds(color, background):
    assert contrast(color, background) >= 3.0


class TestTables:
    def test_difference_and_change_are_computed(self):
        def value(candidate: str, state: str) -> float:
            rows = CELLS[(CELLS["layer"] == 3) & (CELLS["module"] == "ffn")]
            return float(rows[(rows["candidate"] == candidate) & (rows["state"] == state)]["value"].iloc[0])

        assert value("difference", "after") == pytest.approx(value("new", "after") - value("true", "after"))
        assert value("new", "change") == pytest.approx(value("new", "after") - value("new", "before"))
        assert value("difference", "change") == pytest.approx(value("new", "change") - value("true", "change"))

    def test_shares_add_up_and_places_count(self):
        one = CELLS[(CELLS["candidate"] == "new") & (CELLS["state"] == "change")]
        assert one["share"].sum() == pytest.approx(1.0)
        assert sorted(one["place"]) == list(range(1, 2 * LAYERS + 1))

    def test_the_sum_check_finds_what_is_left_over(self):
        check = tables.sum_check(WORKS)
        assert len(check) == 4
        assert check["residual"].to_numpy() == pytest.approx(0.001)

    def test_evidence_passes_by_the_rule_of_its_kind(self):
        table = tables.evidence(WORKS)
        assert table["prompt_kind"].tolist() == ["edit"] + ["paraphrase"] * 3 + ["neighbourhood"] * 6
        assert table["passed_after"].tolist() == [True] * 4 + [False] + [True] * 5
        assert table["passed_before"].tolist() == [False] * 4 + [True] * 6

    def test_without_an_original_object(self):
        from dataclasses import replace

        report = make_report(replace(TOWER, target_true=None))
        table = tables.evidence(report)
        assert "p_true_after" not in table
        assert table["passed"].iloc[0]

    def test_next_tokens_hold_both_states_and_objects(self):
        table = tables.next_tokens(WORKS)
        assert set(table["state"]) == {"before", "after"}
        assert table.iloc[0]["token"] == " Paris"
        assert {"new", "true", "other"} == set(table["role"])
        assert isinstance(table, pd.DataFrame)
