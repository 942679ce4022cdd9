from __future__ import annotations

import pandas as pd

from mega_core import frames, summary
from mega_core.evaluation import text


def test_there_is_one_verdict() -> None:
    assert text.verdict is summary.verdict


def scores(change: dict[tuple[str, int], float], layers: int = 8) -> pd.DataFrame:
    rows: list[dict[str, object]] = [
        {
            "state": state, "case": 0, "layer": layer, "module": module, "candidate": candidate,
            "contribution": 0.5 + (change.get((module, layer), 0.0) if (state, candidate) == ("after", "new") else 0.0),
        }
        for state in ("before", "after") for layer in range(layers)
        for module in ("attn", "ffn") for candidate in ("new", "true")
    ]  # fmt: skip
    return frames.from_rows(rows, "module_scores")


def test_reading_names_the_run_of_layers() -> None:
    table = scores(
        {("attn", 4): 0.8, ("attn", 5): 1.5, ("attn", 6): 0.8, ("attn", 7): 0.1, ("ffn", 7): -1.0, ("ffn", 2): 1}
    )
    said = text.reading(table, "Rome")
    assert (
        said == "Attention in layers 4-6 gained most toward Rome (+3.1 nats); the MLP in layer 7 lost most (-1.0 nats)."
    )


def test_reading_of_one_direction_only() -> None:
    assert (
        text.reading(scores({("ffn", 3): 2.0})) == "The MLP in layer 3 gained most toward the new object (+2.0 nats)."
    )
    assert text.reading(scores({("attn", 0): -2.0})) == "Attention in layer 0 lost most (-2.0 nats)."


def test_reading_of_no_change_and_of_one_state() -> None:
    assert "changed by more than 0.05 nats" in text.reading(scores({}))
    table = scores({})
    assert "nothing to compare" in text.reading(table[table["state"] == "before"])
    assert "nothing to compare" in text.reading(frames.empty("module_scores"))
