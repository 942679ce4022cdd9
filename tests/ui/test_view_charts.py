"""Every picture of Look deeper: a table that keeps its contract in, a specification out."""

from __future__ import annotations

from itertools import product

import pandas as pd
import pytest

from mega_core import frames
from pages.components import view_charts
from pages.components.look_deeper import PANELS
from tests.ui.fake import WORKS

CHOICES = {
    "state": ["before", "after"],
    "candidate": ["new", "true"],
    "case": [0],
    "layer": [0, 1, 2],
    "head": [0, 1],
    "position": [0, 3],
    "neuron": [5, 9],
    "dim": [1],
    "module": ["attn", "ffn"],
    "values": ["ffn", "attn"],
    "site": ["resid_mid", "block_out"],
    "prompt_kind": ["edit", "neighbourhood"],
    "prompt": ["The tower is in"],
    "segment": ["first", "subject", "last"],
    "kind": ["none", "wiki"],
    "index": [0, 1, 2],
}
HOSTILE = '\x08<script>"&'


def table(name: str) -> pd.DataFrame:
    """Rows for every combination of keys, with numbers that differ."""
    contract = frames.CONTRACTS[name]
    keys = list(contract.keys)
    rows = []
    for number, values in enumerate(product(*(CHOICES[key] for key in keys))):
        row = dict(zip(keys, values, strict=True))
        for column, kind in contract.values.items():
            row[column] = {"float": (-1) ** number * (number + 1) / 100, "int": number, "bool": True, "text": HOSTILE}[
                kind
            ]
        rows.append(row)
    frame = frames.from_rows(rows, name)
    return frame.assign(site="block_out") if name == "trace" else frame


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.frame)
def test_every_panel_draws_its_frame(panel) -> None:
    frame = table(panel.frame)
    frame = frame.drop(columns="case") if "case" in frame else frame
    if panel.frame == "trace":
        frame = frame.drop_duplicates(["state", "layer", "position", "candidate"])
    spec = panel.draw(frame, WORKS).to_dict()
    assert spec["layer"]
    assert "facet" not in spec
    assert "width" not in spec
    assert spec["height"] > 0
    assert any(rows for rows in spec["datasets"].values())


def test_what_cannot_be_printed_is_spelled_out() -> None:
    bars = view_charts.source_bars(
        pd.DataFrame({"position": [0, -1], "token": ["\x08", ""], "contribution": [1.0, 0.5], "attention": [0.5, 0.5]})
    ).to_dict()
    (rows,) = bars["datasets"].values()
    assert [row["place"] for row in rows] == ["0 \\x08", "text in front"]


def test_a_change_needs_both_states() -> None:
    scores = pd.DataFrame({"state": ["before", "after", "after"], "head": [0, 0, 1], "contribution": [1.0, 3.0, 5.0]})
    assert view_charts.change(scores, ["head"], "contribution").to_dict("records") == [{"head": 0, "contribution": 2.0}]


def test_heads_share_one_symmetric_scale() -> None:
    cells = pd.DataFrame({"layer": [0, 0, 1], "head": [0, -1, 0], "contribution": [0.5, 9.0, -2.0]})
    spec = view_charts.head_map(cells).to_dict()
    assert spec["layer"][0]["encoding"]["color"]["scale"]["domain"] == [-2.0, 2.0]  # head -1 is no head


def test_the_lens_marks_the_lasting_lead_and_cuts_what_is_faint() -> None:
    lens = table("lens").drop(columns="case").assign(logprob=lambda t: -30.0 + t.index)
    crossing = table("lens_crossing").assign(lasting_layer=2, lasting_site="block_out")
    spec = view_charts.lens_lines(lens, crossing).to_dict()
    assert [layer["mark"]["type"] for layer in spec["layer"]] == ["line", "rule"]
    assert spec["layer"][0]["encoding"]["y"]["scale"]["domain"][0] == view_charts.FAINT
    never = view_charts.lens_lines(lens, crossing.assign(lasting_layer=-1)).to_dict()
    assert [layer["mark"]["type"] for layer in never["layer"]] == ["line"]


def test_contrasts_have_a_band_for_each_editor() -> None:
    curves = pd.DataFrame(
        {"editor": ["rome", "rome", "ike", "ike"], "layer": [0, 1, 0, 1], "mean": [0.0, 1.0, 0.5, 2.0],
         "low": [-1.0, 0.0, 0.0, 1.0], "high": [1.0, 2.0, 1.0, 3.0]}
    )  # fmt: skip
    spec = view_charts.contrast_bands(curves).to_dict()
    band = next(layer for layer in spec["layer"] if layer["mark"]["type"] == "area")
    assert band["encoding"]["color"]["scale"]["domain"] == ["rome", "ike"]
