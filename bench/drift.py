"""Where the new object overtakes the old one on its way through the model, and where attention goes, after edits.

1. The first COUNT development edits, one at a time by METHOD with the model's defaults.
2. Views `lens` (last token) and `attention` (all neighbours), and the answers, before and after.
3. Crossings by place; failures() of attention_drift over all edits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import pandas as pd

from bench.common import Row, Unmeasured, open_model
from mega_core.attribution import look_at, read_view
from mega_core.attribution.attention_drift import failures, link
from mega_core.embedded import examples
from mega_core.errors import ActionableError
from mega_core.evaluation import looks
from mega_core.events import silent
from mega_core.methods import METHODS
from mega_core.records import EditRequest
from mega_core.settings import Settings

if TYPE_CHECKING:
    from mega_core.models.adapter import ModelAdapter

VIEWS = ("lens?positions=last", "attention?neighbours=32")


def measure(
    quick: bool, models: Sequence[str] = (), methods: Sequence[str] = (), count: int | None = None
) -> list[Row]:
    """Rows "model / method / what"."""
    settings = Settings.read()
    names = list(models) or [entry.name for entry in settings.available() if entry.embedded]
    if not names:
        raise Unmeasured("no embedded model is here")
    rows: list[Row] = []
    for model in names:
        for method in methods or ("rome",):
            rows += _one(model, method, count or (6 if quick else examples.DEV_COUNT))
    return rows


def _one(model: str, name: str, count: int) -> Iterator[Row]:
    lm, method = open_model(model), METHODS[name]
    params = method.read(method.ref(Settings.read().model(model).defaults.get(name, {})))
    crossings: list[pd.DataFrame] = []
    links: list[pd.DataFrame] = []
    for request in islice(examples.candidates(examples.DEV_SEED), count):
        before = _seen(lm, request, "before")
        try:
            change = method.prepare(lm, (request,), params, 0, silent)
        except ActionableError:
            continue
        with change.applied(lm):
            after = _seen(lm, request, "after")
        both = {key: pd.concat((before[key], after[key]), ignore_index=True) for key in before}
        links.append(link(both["attention"], both["answers"]))
        crossings.append(both["lens_crossing"])
    start = f"{model} / {name}"
    for state, table in pd.concat(crossings).groupby("state", sort=False):
        ends = table[table["lasting_layer"] >= 0]
        share = 100 * len(ends) / len(table)
        note = ""
        if len(ends):
            low, middle, high = ends["lasting_layer"].quantile([0.25, 0.5, 0.75])
            place, often = Counter(f"layer {r.lasting_layer} {r.lasting_site}" for r in ends.itertuples()).most_common(
                1
            )[0]
            note = f"for good from layer {middle:g} ({low:g} to {high:g}); most often {place} ({often})"
        yield Row("drift", f"{start} / new object ahead at the end, {state}", share, "%", note or f"{len(table)} edits")
    for row in failures(links).itertuples():
        interval = f"[{row.low:+.3f}, {row.high:+.3f}], n = {row.n}"
        yield Row("drift", f"{start} / {row.measure}, {row.statistic}", float(row.value), "", interval)


def _seen(lm: ModelAdapter, request: EditRequest, state: str) -> Mapping[str, pd.DataFrame]:
    found = {"answers": looks.answers(lm, [request], state)}
    for tables in look_at(lm, [read_view(text) for text in VIEWS], [request], state, silent).values():
        found |= tables
    return found
