"""Pictures of the views: a table that keeps its contract in, a specification out."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from pages.components import view_charts
from pages.components.anatomy_pictures import MAKERS, Look
from pages.components.anatomy_place import Place
from tests.ui.frames import inside, table

LOOKS = {
    "head_bars": Look(place=Place(1, "attn", 0)),
    "head_sources": Look(place=Place(1, "attn", 0)),
    "head_attention": Look(place=Place(1, "attn", 0)),
    "neuron_tokens": Look(place=Place(1, "ffn", 5)),
    "attention": Look(state="change"),
}


def marks(spec: dict) -> list[str]:
    return [layer["mark"]["type"] for layer in spec["layer"]]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("candidate", ["new", "difference"])
def test_every_picture_draws_a_run_that_holds_everything(name, candidate) -> None:
    look = replace(LOOKS.get(name, Look()), candidate=candidate)
    made = MAKERS[name](inside(), look)
    assert made is not None
    title, reading, chart, twin = made
    spec = chart.to_dict()
    assert title
    assert "nan" not in reading.split()
    assert len(twin)
    assert spec["layer"]
    assert "facet" not in spec
    assert "width" not in spec
    assert spec["height"] > 0
    assert any(rows for rows in spec["datasets"].values())
    assert max(len(rows) for rows in spec["datasets"].values()) <= 2000


@pytest.mark.parametrize("name", MAKERS)
def test_a_run_without_the_frame_has_no_picture(name) -> None:
    bare = replace(inside(), frames={})
    assert MAKERS[name](bare, LOOKS.get(name, Look())) is None


def test_what_cannot_be_printed_is_spelled_out() -> None:
    assert view_charts.place_label(0, "\x08") == "0 \\x08"
    assert view_charts.place_label(-1, "") == "text in front"


def test_heads_share_one_symmetric_scale() -> None:
    cells = pd.DataFrame({"layer": [0, 0, 1], "head": [0, -1, 0], "contribution": [0.5, 9.0, -2.0]})
    spec = view_charts.head_map(cells).to_dict()
    assert spec["layer"][0]["encoding"]["color"]["scale"]["domain"] == [-2.0, 2.0]  # head -1 is no head


def test_the_lens_marks_the_lasting_lead_and_cuts_what_is_faint() -> None:
    lens = table("lens").drop(columns="case").assign(logprob=lambda t: -30.0 + t.index)
    crossing = table("lens_crossing").assign(lasting_layer=2, lasting_site="block_out")
    spec = view_charts.lens_lines(lens, crossing).to_dict()
    assert marks(spec) == ["line", "rule", "text"]
    assert spec["layer"][0]["encoding"]["y"]["scale"]["domain"][0] == view_charts.FAINT
    never = view_charts.lens_lines(lens, crossing.assign(lasting_layer=-1)).to_dict()
    assert marks(never) == ["line"]


def test_the_lens_shows_ranks_with_the_first_on_top() -> None:
    lens = table("lens").drop(columns="case").assign(rank=lambda t: 1 + t.index)
    y = view_charts.lens_lines(lens, measure="rank").to_dict()["layer"][0]["encoding"]["y"]
    assert y["field"] == "rank"
    assert y["scale"]["reverse"]
    assert y["scale"]["type"] == "log"


def test_states_of_one_picture_share_the_colour_limit() -> None:
    limits = {
        state: MAKERS["head_scores"](inside(), Look("new", state))[2].to_dict()["layer"][0]["encoding"]["color"][
            "scale"
        ]["domain"]
        for state in ("before", "after", "change")
    }
    assert len({tuple(limit) for limit in limits.values()}) == 1
    low, high = limits["change"]
    assert low == -high


def test_a_missing_state_has_no_point() -> None:
    rows = pd.DataFrame({"label": ["a", "b"], "before": [float("nan"), 1.0], "after": [2.0, 1.0], "change": [2.0, 0.0]})
    spec = view_charts.dumbbells(rows, "nats").to_dict()
    assert sum("isValid(datum.before)" in str(layer.get("transform")) for layer in spec["layer"]) == 2
    data = next(rows for rows in spec["datasets"].values() if "way" in rows[0])
    assert [row["way"] for row in data] == ["rises", "hardly moves"]


def test_what_can_be_clicked_names_its_fields() -> None:
    spec = MAKERS["head_scores"](inside(), Look("new", "change", Place(1, "attn", 0)))[2].to_dict()
    (param,) = spec["params"]
    assert param["name"] == view_charts.PICK
    assert param["select"]["fields"] == ["layer", "head"]
    assert marks(spec) == ["rect", "rect"]  # the second is the ring around the chosen head


def test_a_verification_without_a_prediction_has_no_point_for_it() -> None:
    rows = pd.DataFrame(
        {"label": ["L2·mlp_down back · Rome", "L5·H2 out · Rome"], "has_prediction": [False, True],
         "predicted": [0.0, -1.0], "actual": [-3.0, -1.5], "control": [0.1, 0.0], "control_sd": [0.2, 0.0],
         "controls": [10, 0]}
    )  # fmt: skip
    spec = view_charts.effects(rows).to_dict()
    points = next(rows for rows in spec["datasets"].values() if rows and "which" in rows[0])
    shown = sorted((row["label"][:2], row["which"]) for row in points)
    assert shown == [("L2", "actual"), ("L2", "mean of random cells"), ("L5", "actual"), ("L5", "predicted")]
