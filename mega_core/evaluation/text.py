"""What the tables say, in sentences made by rule. No torch.

`verdict` is the sentence of summary.py, so that every place that speaks of a report says the same.
"""

from __future__ import annotations

import pandas as pd

from mega_core.summary import verdict

__all__ = ["reading", "verdict"]

QUIET = 0.05
"""Nats: a smaller change of a module's contribution is not worth a word."""

_MODULE_NAMES = {"attn": "attention", "ffn": "the MLP"}


def reading(module_scores: pd.DataFrame, new: str = "the new object") -> str:
    """Which modules gained and lost most toward the new object, after minus before, averaged over cases.

    A run of layers is a peak and the layers around it that changed the same way, at least half as much.
    """
    scores = module_scores[module_scores["candidate"] == "new"]
    table = scores.pivot_table(index=["module", "layer"], columns="state", values="contribution", aggfunc="mean")
    if not {"before", "after"} <= set(table.columns):
        return "There is nothing to compare: the contributions of one state are missing."
    change = table["after"] - table["before"]
    gained, lost = _largest_run(change), _largest_run(-change)
    parts = []
    if gained is not None:
        where, nats = gained
        parts.append(f"{where} gained most toward {new} (+{nats:.1f} nats)")
    if lost is not None:
        where, nats = lost
        parts.append(f"{where} lost most (-{nats:.1f} nats)")
    if not parts:
        return f"No module's contribution toward {new} changed by more than {QUIET:g} nats."
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _largest_run(change: pd.Series) -> tuple[str, float] | None:
    """(where in words, sum) of the run of layers with the greatest positive sum; None when all is quiet."""
    best: tuple[str, float] | None = None
    for module, of_module in change.groupby(level="module"):
        by_layer = of_module.droplevel("module").sort_index()
        peak = int(by_layer.idxmax())
        if by_layer[peak] <= QUIET:
            continue
        first = last = peak
        while by_layer.get(first - 1, 0.0) >= by_layer[peak] / 2:
            first -= 1
        while by_layer.get(last + 1, 0.0) >= by_layer[peak] / 2:
            last += 1
        total = float(by_layer.loc[first:last].sum())
        layers = f"layer {first}" if first == last else f"layers {first}-{last}"
        if best is None or total > best[1]:
            best = (f"{_MODULE_NAMES.get(str(module), str(module))} in {layers}", total)
    return best
