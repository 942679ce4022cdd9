"""Causal trace: ours against one whole forward per cell, on random weights and on the models that ship.

With `--methods A,B` also what the views `trace` and `superficiality` say before and after `--count` edits (30) of the
development split: mean effects by layer, and how often the original object is said (OM) or preferred (OP).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from statistics import median
from time import process_time
from typing import TYPE_CHECKING

from bench.common import Row, open_model
from mega_core.embedded.examples import DEV_SEED, candidates
from mega_core.events import silent
from mega_core.records import EditRequest

if TYPE_CHECKING:
    import pandas as pd

    from mega_core.models.adapter import ModelAdapter

PROMPT = EditRequest("The Eiffel Tower", "{} is in the city of London, the city of", "Rome", "Paris")
"""13 tokens of the random model's tokenizer, the subject the first 3: every position has to be run."""


def measure(
    quick: bool, methods: Sequence[str] = (), models: Sequence[str] = (), count: int | None = None
) -> list[Row]:
    """CPU milliseconds each way, their ratio, and how far the effects differ; see the file's head for `methods`."""
    from mega_core.settings import Settings

    names = list(models) or [entry.name for entry in Settings.read().available() if entry.embedded]
    requests = list(islice(candidates(DEV_SEED), count or (3 if quick else 30)))
    if methods:
        return [row for name in names for row in findings(name, methods, requests)]
    from tests.reference.plain_optimise import gpt2_small_shape

    rows = compared("GPT-2 small's shape", gpt2_small_shape(), PROMPT, repeats=1 if quick else 3)
    for name in names:
        lm = open_model(name)
        rows += compared(name, lm, requests[0], repeats=2 if quick else 5)
        rows.append(whole_view(name, lm, requests[: 1 if quick else 5]))
    return rows


def compared(label: str, lm: ModelAdapter, request: EditRequest, repeats: int) -> list[Row]:
    """One draw, "block_out" at every layer and position: ours and plainly, in turn, median CPU time of each."""
    import torch

    from mega_core.attribution import causal_trace
    from mega_core.attribution.recording import record
    from tests.reference.trace_reference import clean_states, plain_cell

    cells = causal_trace.cells(lm.n_layers, sites=("block_out",))
    seen = record(lm, [request], ("block_out",))
    ids, span = seen.batch.rows()[0], seen.spans[0]
    noise = causal_trace.noise_for(seen, 0, 1, 3 * causal_trace.embedding_spread(lm), 0)
    tokens = list(seen.candidates[0].values())

    def ours() -> torch.Tensor:
        again = record(lm, [request], ("block_out",))
        return causal_trace.trace(again, 0, cells, noise).restored

    def plain() -> torch.Tensor:
        clean = clean_states(lm, ids)
        found = [
            plain_cell(lm, ids, span, noise, clean, cell.site, cell.layer, position, 1)[tokens]
            for cell in cells
            for position in range(len(ids))
        ]
        return torch.stack(found).unflatten(0, (len(cells), len(ids)))

    ours()
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(repeats):
        start = process_time()
        fast = ours()
        times["ours"].append(process_time() - start)
        start = process_time()
        slow = plain()
        times["plain"].append(process_time() - start)
    mine, theirs = median(times["ours"]), median(times["plain"])
    note = f"{len(cells)} layers x {len(ids)} tokens, subject {span[0]} to {span[1] - 1}, one draw"
    return [
        Row("trace", f"{label} / one forward per cell", 1000 * theirs, "ms CPU", note),
        Row("trace", f"{label} / ours", 1000 * mine, "ms CPU"),
        Row("trace", f"{label} / plain : ours", theirs / mine, "x"),
        Row("trace", f"{label} / greatest difference", float((fast - slow).abs().max()), "probability"),
    ]


def whole_view(label: str, lm: ModelAdapter, requests: Sequence[EditRequest]) -> Row:
    """CPU seconds of the view with its defaults (10 draws, three sites), per edit prompt."""
    from mega_core.attribution import look_at, read_view

    start = process_time()
    look_at(lm, [read_view("trace")], requests, "before", silent)
    seconds = (process_time() - start) / len(requests)
    return Row("trace", f"{label} / whole view, per prompt", seconds, "s CPU", f"{len(requests)} prompts, 10 draws")


def findings(name: str, methods: Sequence[str], requests: Sequence[EditRequest]) -> list[Row]:
    """Both views on the unedited model, and after each request was edited alone by each method."""
    import pandas as pd

    from mega_core.attribution import look_at, read_view
    from mega_core.methods import METHODS
    from mega_core.settings import Settings

    lm = open_model(name)
    # A text in front of the prompt makes every row many times longer: fewer draws, the same for all states.
    views = [read_view("trace?samples=3"), read_view("superficiality?heads=false")]
    rows: list[Row] = []
    for setup in ("unedited", *methods):
        traces, stresses = [], []
        for number, request in enumerate(requests):
            if setup == "unedited":
                found = look_at(lm, views, [request], setup, silent)
            else:
                method = METHODS[setup]
                params = method.read(method.ref({}, Settings.read().model(name).defaults.get(setup, {})))
                with method.prepare(lm, [request], params, 0, silent).applied(lm):
                    found = look_at(lm, views, [request], setup, silent)
            trace, stress = (found[view.text][frame] for view, frame in zip(views, ("trace", "stress"), strict=True))
            spans = span_groups(lm, request)
            traces.append(trace.assign(case=number, group=trace["position"].map(spans)))
            stresses.append(stress.assign(case=number))
        rows += _effects(f"{name} / {setup}", pd.concat(traces))
        rows += _stress(f"{name} / {setup}", pd.concat(stresses))
    return rows


def span_groups(lm: ModelAdapter, request: EditRequest) -> dict[int, str]:
    """Position -> "subject", "subject last", "between" or "last" (those before the subject are left out)."""
    from mega_core.models import tokens

    begin, end = tokens.subject_span(lm.tokenizer, request.template, request.subject)
    length = len(tokens.prompt_ids(lm.tokenizer, request.prompt))
    groups = {position: "subject" if position < end else "between" for position in range(begin, length)}
    return {**groups, end - 1: "subject last", length - 1: "last"}


def _effects(label: str, trace: pd.DataFrame) -> list[Row]:
    """Mean effect by site, group of positions and candidate: its highest layer, and every layer in the note."""
    rows = []
    clean = trace.groupby("candidate")[["p_clean", "p_corrupt"]].mean()
    for candidate, p in clean.iterrows():
        note = f"{p['p_corrupt']:.2f} with the subject corrupted"
        rows.append(Row("trace", f"{label} / p({candidate})", float(p["p_clean"]), "", note))
    layers = trace.groupby(["candidate", "site", "group", "layer"])["effect"].mean().unstack("layer")
    for (candidate, site, group), effects in layers.iterrows():
        note = f"layer {effects.idxmax()}; all: " + " ".join(f"{100 * value:.0f}" for value in effects)
        rows.append(Row("trace", f"{label} / {site} at {group} / p({candidate})", 100 * effects.max(), "points", note))
    return rows


def _stress(label: str, stress: pd.DataFrame) -> list[Row]:
    """OM and OP, in %, by kind of prefix."""
    return [
        Row("trace", f"{label} / {name} / {kind}", 100 * float(rows[column].mean()), "%", f"{len(rows)} edits")
        for kind, rows in stress.groupby("kind", sort=False)
        for name, column in (("OM", "says_true"), ("OP", "prefers_true"))
    ]
