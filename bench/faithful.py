"""Do the views say what matters? Their scores against what happens when the cells are really taken out.

1. Edits: `quality.test_split`, ROME with the model's defaults, one at a time.
2. Ranks: in the edited model, every cell of a view is ablated (attribution/verify) and its score is compared with the
   effect, by Spearman's rank correlation over the cells of one edit; here the mean over the edits with a bootstrap
   interval of 95 %. A score is good if taking out what it rates high lowers log p most. Views with thousands of cells
   give their 50 best and 50 random ones. Scores without a sign (attention weights, trace) say so.
3. Top 10: ten MLP neurons are zeroed together at the last token, chosen by the view `neurons` or by simpler scores,
   against ten random ones of the same layers (the mean of 10 draws). The target is what the model then says: the true
   object before the edit, the new one after it. Zero, not the mean activation, as in the paper's test.
4. Query neurons: the 30 best of the view `query` zeroed at every token, against 30 random ones of the same layers.
"""

# ruff: noqa: T201
from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bench.common import Row, Unmeasured, open_model
from bench.quality import Kept, test_split
from mega_core.errors import ActionableError
from mega_core.events import silent
from mega_core.keys import digest

if TYPE_CHECKING:
    import pandas as pd

    from mega_core.attribution.recording import Recording
    from mega_core.attribution.verify import Cells
    from mega_core.models.adapter import ModelAdapter
    from mega_core.records import EditRequest

COUNT = 50
VERSION = 2
"""Part of the mark on what is kept; raise it when the numbers are made otherwise."""
TOP, SOME, TEN, DRAWS = 50, 50, 10, 10
QUERIES, QUERY_DRAWS = 30, 3
RESAMPLES = 2000
RATIO = 5.0
BOTH = (f"neurons?top={TOP}&tail=0&read=0", f"query?top={QUERIES}")
VIEWS = (
    *BOTH,
    "heads?heads=16",
    f"attention_neurons?top={TOP}&tail=0&read=0",
    "lens?positions=last",
    "residual",
    "trace?samples=2",
)
OURS, RANDOM = "log-prob increase (view neurons)", "random, same layers"
QUERY, QUERY_RANDOM = "30 query neurons, all tokens", "30 random, same layers, all tokens"
PAIRS = {"10 neurons": (OURS, RANDOM), "30 query neurons": (QUERY, QUERY_RANDOM)}
CANDIDATES = ("new", "true")
TARGETS = {"before": "true", "after": "new"}

Numbers = npt.NDArray[np.float64]
Lost = tuple[float, ...]


@dataclass
class Found:
    """What one edit gave; as plain values in what is kept, with keys joined by " / "."""

    ranks: dict[str, float] = field(default_factory=dict)
    """"score / candidate" -> rank correlation."""
    cells: dict[str, int] = field(default_factory=dict)
    """Score -> cells."""
    zeroed: dict[str, Lost] = field(default_factory=dict)
    """"state / chosen by" -> what the target loses."""


def measure(quick: bool, models: Sequence[str] = (), count: int | None = None, keep: Path | None = None) -> list[Row]:
    """Rows "model / ranks / ..." and "model / top 10 / ..."; see the file's head. A run goes on from what is kept."""
    from mega_core.settings import Settings

    names = list(models) or [entry.name for entry in Settings.read().available() if entry.embedded]
    if not names:
        raise Unmeasured("no embedded model is here")
    kept = Kept(keep)
    rows: list[Row] = []
    for name in names:
        rows += told(name, of_model(name, count or (5 if quick else COUNT), kept))
    return rows


def of_model(name: str, count: int, kept: Kept) -> list[dict[str, Any]]:
    """Steps 1 to 4 on one model: a record per edit."""
    from mega_core.methods import METHODS
    from mega_core.settings import Settings

    lm = open_model(name)
    rome = METHODS["rome"]
    ref = rome.ref({}, Settings.read().model(name).defaults.get("rome", {}))
    mark = digest({"version": VERSION, "weights": lm.file_digest, "method": ref})
    key = f"faithful {name}"
    records = list(kept.get(key, mark) or [])
    start = perf_counter()
    for number, request in enumerate(test_split(count)):
        if number < len(records) and records[number]["subject"] == request.subject:
            continue
        found = Found()
        try:
            change = rome.prepare(lm, [request], rome.read(ref), 0, silent)
            state(lm, request, "before", number, found)
            with change.applied(lm):
                state(lm, request, "after", number, found)
        except ActionableError as error:
            records[number:] = [{"subject": request.subject, "refused": str(error)}]
        else:
            records[number:] = [{"subject": request.subject, **asdict(found)}]
        kept.put(key, mark, records)
        if (number + 1) % 10 == 0:
            print(f"  {name}: {number + 1} of {count}, {perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return records[:count]


def state(lm: ModelAdapter, request: EditRequest, name: str, number: int, found: Found) -> None:
    """One state of one edit: everything is ablated in one go."""
    import pandas as pd

    from mega_core.attribution import look_at, read_view, verify

    asked = [read_view(view) for view in (VIEWS if name == "after" else BOTH)]
    tables: dict[str, pd.DataFrame] = {}
    for frames in look_at(lm, asked, [request], name, silent).values():
        tables |= {key: frame for key, frame in frames.items() if key != "neuron_tokens"}
    chosen = tens(lm, request, tables["neuron_scores"], TARGETS[name], number)
    groups = views(lm, request, tables, number) if name == "after" else {}
    wanted = [*(one for sets in chosen.values() for one in sets)]
    wanted += [cells for by_cell in groups.values() for cells, _ in by_cell]
    table = verify.verify(lm, request, list(dict.fromkeys(wanted)), state=name, draws=0)
    effects = table.set_index(["candidate", "cells"])
    for how, sets in queries(lm, request, tables["query_neurons"], TARGETS[name], number).items():
        parts_of = [verify.verify(lm, request, [cells], state=name, draws=0) for cells in sets]
        lost = pd.concat(parts_of)
        found.zeroed[f"{name} / {how}"] = lost_by(lost[lost["candidate"] == TARGETS[name]])
    for how, sets in chosen.items():
        rows = effects.loc[[(TARGETS[name], verify.cells_text(cells)) for cells in sets]]
        found.zeroed[f"{name} / {how}"] = lost_by(rows)
    for (score, candidate), by_cell in groups.items():
        own = effects.loc[[(candidate, verify.cells_text(cells)) for cells, _ in by_cell]]
        actual = -own["actual"].to_numpy()
        scores = np.array([value for _, value in by_cell])
        sizes = np.abs(actual) if "size of" in score else actual
        found.ranks[f"{score} / {candidate}"] = spearman(scores, sizes)
        found.cells[score] = len(by_cell)
        if score in DIRECT:
            found.ranks[f"{DIRECT[score]} / {candidate}"] = spearman(-own["direct"].to_numpy(), actual)
            found.cells[DIRECT[score]] = len(by_cell)


def lost_by(rows: pd.DataFrame) -> Lost:
    """Means over draws: log p, p and 1 / rank before, the same after, and the sizes of the changes of log p and p."""
    before, after = rows["prob_before"], rows["prob_after"]
    parts = [np.log(before), before, 1 / rows["rank_before"], np.log(after), after, 1 / rows["rank_after"]]
    parts += [rows["actual"].abs(), (after - before).abs()]
    return tuple(float(part.mean()) for part in parts)


# 2. Ranks ------------------------------------------------------------------------------------------------------------

MODULES, HEADS, NEURONS, ANEURONS, SOURCES = (
    "modules: contribution", "heads: contribution", "MLP neurons, 50 best and 50 random: contribution",
    "attention neurons, 50 best and 50 random: contribution", "reads of the 16 strongest heads: contribution",
)  # fmt: skip
DIRECT = {
    score: f"{score.partition(':')[0]}: direct effect at the last state"
    for score in (MODULES, HEADS, NEURONS, ANEURONS, SOURCES)
}
"""Not a view's score: what `verified` has as `direct`, as a mark to measure by."""

Scored = list[tuple["Cells", float]]


def views(
    lm: ModelAdapter, request: EditRequest, tables: Mapping[str, pd.DataFrame], number: int
) -> dict[tuple[str, str], Scored]:
    """(score, candidate) -> its cells with their scores."""
    from mega_core.attribution import verify
    from mega_core.attribution.verify import Cell

    modules: list[Cells] = [(Cell(kind, layer),) for kind in ("attn", "ffn") for layer in range(lm.n_layers)]
    seen = verify.see(lm, request, [verify.read_cells("attn:0+ffn:0+neuron:0.0+attention_neuron:0.0.0.0")])
    found: dict[tuple[str, str], Scored] = {}
    for c, candidate in enumerate(seen.candidates[0]):

        def own(name: str, candidate: str = candidate) -> Iterator[Any]:
            frame = tables[name]
            return frame[frame["candidate"] == candidate].itertuples()

        def scored(sets: Sequence[Cells], c: int = c) -> Scored:
            _, predicted, _ = verify.predict(seen, sets)
            return list(zip(sets, -predicted[:, c], strict=True))

        found[MODULES, candidate] = scored(modules)
        dots = {(row.module, row.layer): row.dot for row in own("residual")}
        found["modules: dot product (view residual)", candidate] = [
            (cells, dots[cells[0].kind, cells[0].layer]) for cells in modules
        ]
        steps = lens_steps(own("lens"), lm.n_layers)
        found["modules: step of log p (view lens)", candidate] = [
            (cells, steps[cells[0].kind, cells[0].layer]) for cells in modules
        ]
        found[HEADS, candidate] = [
            ((Cell("head", row.layer, head=row.head),), row.contribution) for row in own("head_scores") if row.head >= 0
        ]
        sources = [
            ((Cell("source", row.layer, head=row.head, position=row.position),), row) for row in own("head_sources")
        ]
        found[SOURCES, candidate] = [(cells, row.contribution) for cells, row in sources]
        found["reads of the 16 strongest heads: attention weight (size of the effect)", candidate] = [
            (cells, row.attention) for cells, row in sources
        ]
        neurons = [(Cell("neuron", row.layer, neuron=row.neuron),) for row in own("neuron_scores")]
        found["MLP neurons, 50 best: contribution", candidate] = scored(neurons)
        found[NEURONS, candidate] = scored([*neurons, *spread(lm, seen, neurons, number)])
        inner = [
            (Cell("attention_neuron", row.layer, head=row.head, dim=row.dim, position=row.position),)
            for row in own("attention_neurons")
        ]
        found["attention neurons, 50 best: contribution", candidate] = scored(inner)
        found[ANEURONS, candidate] = scored([*inner, *spread(lm, seen, inner, number)])
        for site in ("block_out", "attn", "mlp"):
            found[f"states, {site}: causal trace", candidate] = [
                ((Cell("state", row.layer, site=site, position=row.position),), row.effect)
                for row in own("trace")
                if row.site == site
            ]
    return found


def lens_steps(rows: Iterator[Any], n_layers: int) -> dict[tuple[str, int], float]:
    """(module, layer) -> how much log p rises there by the lens, whose norm is each state's own."""
    path = {(row.site, row.layer): row.logprob for row in rows}
    steps: dict[tuple[str, int], float] = {}
    for layer in range(n_layers):
        start = path["block_in", 0] if layer == 0 else path["block_out", layer - 1]
        middle = path["resid_mid", layer]
        steps["attn", layer], steps["ffn", layer] = middle - start, path["block_out", layer] - middle
    return steps


def spread(lm: ModelAdapter, seen: Recording, taken: Sequence[Cells], number: int) -> list[Cells]:
    """Random cells of the whole model of the same kind, none of them taken."""
    from mega_core.attribution.verify import Cell

    random = np.random.default_rng([number, len(taken[0][0].kind)])
    kind = taken[0][0].kind
    sizes = {"layer": lm.n_layers, "head": lm.n_heads, "dim": lm.head_dim, "neuron": lm.d_mlp}
    sizes["position"] = seen.length(0)
    names = ("layer", "neuron") if kind == "neuron" else ("layer", "head", "dim", "position")
    chosen: list[Cells] = []
    while len(chosen) < SOME:
        cells = (Cell(kind, **{name: int(random.integers(sizes[name])) for name in names}),)  # type: ignore[arg-type]
        if cells not in taken and cells not in chosen:
            chosen.append(cells)
    return chosen


def spearman(x: Numbers, y: Numbers) -> float:
    """Rank correlation; ties share their mean rank. 0 where one of them is constant."""
    import pandas as pd

    ranks = [pd.Series(values).rank().to_numpy() for values in (x, y)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


# 3. Top 10 -----------------------------------------------------------------------------------------------------------


def tens(
    lm: ModelAdapter, request: EditRequest, scores: pd.DataFrame, target: str, number: int
) -> dict[str, list[Cells]]:
    """How they were chosen -> ten neurons (for random ones: several times)."""
    from mega_core.attribution import verify
    from mega_core.attribution.verify import Cell

    best = scores[(scores["candidate"] == target) & (scores["rank"] > 0)].nsmallest(TEN, "rank")
    top = tuple(
        Cell("neuron", int(layer), neuron=int(neuron))
        for layer, neuron in zip(best["layer"], best["neuron"], strict=True)
    )
    chosen: dict[str, list[Cells]] = {OURS: [top]}
    seen = verify.see(lm, request, [(top[0],)])
    for name, values in baselines(seen, target).items():
        order = np.argsort(-values, kind="stable")[:TEN]
        chosen[name] = [tuple(Cell("neuron", int(i) // lm.d_mlp, neuron=int(i) % lm.d_mlp) for i in order)]
    chosen[RANDOM] = verify.draw(lm, seen.length(0), top, DRAWS, seed=number)
    return chosen


def queries(
    lm: ModelAdapter, request: EditRequest, scores: pd.DataFrame, target: str, number: int
) -> dict[str, list[Cells]]:
    """Step 4: neurons at all positions of the prompt."""
    from mega_core.attribution import verify
    from mega_core.attribution.verify import Cell

    best = scores[(scores["candidate"] == target) & (scores["score"] > 0)].nlargest(QUERIES, "score")
    length = len(lm.encode([request.prompt]).rows()[0])
    top = tuple(
        Cell("neuron", int(layer), neuron=int(neuron))
        for layer, neuron in zip(best["layer"], best["neuron"], strict=True)
    )

    def everywhere(cells: Cells) -> Cells:
        return tuple(
            Cell("query_neuron", cell.layer, neuron=cell.neuron, position=at) for cell in cells for at in range(length)
        )

    drawn = verify.draw(lm, length, top, QUERY_DRAWS, seed=number)
    return {QUERY: [everywhere(top)], QUERY_RANDOM: [everywhere(cells) for cells in drawn]} if top else {}


def baselines(seen: Recording, target: str) -> dict[str, Numbers]:
    """Simpler scores of all neurons, [layer * d_mlp], as the paper compares them; `target` is a candidate."""
    import torch

    lm, lens = seen.lm, seen.lens.row(0)
    token, head = seen.candidates[0][target], lm.head_weight.float()
    found: dict[str, list[Any]] = defaultdict(list)
    for layer in range(lm.n_layers):
        m = seen.last(layer, "mlp_down_in")[0].to(lens.scale.device)  # (d_mlp,)
        columns = lm.read_weight(layer, "mlp_down").T.float()  # (d_mlp, d_model)
        v = m[:, None] * columns
        x = lens.state(seen.base(layer, "ffn")[:1])[0]
        log_p = torch.log_softmax(x @ head.T + (0 if lm.head_bias is None else lm.head_bias.float()), -1)
        logits = lens.vector(v[:, None])[:, 0] @ head.T  # (d_mlp, vocab): small models only
        own = logits[:, token]
        risen = log_p[token] + own - (logits + log_p).logsumexp(-1)
        found["prob increase"].append(risen.exp() - log_p[token].exp())
        found["log prob of v alone"].append(own - logits.logsumexp(-1))
        found["logit of v"].append(own)
        found["size of v (m * norm)"].append(m.abs() * columns.norm(dim=-1))
        found["size of m"].append(m.abs())
        found["norm"].append(columns.norm(dim=-1))
        above, below = (logits > own[:, None]).sum(-1), (logits < own[:, None]).sum(-1)
        found["rank of the token in fc2"].append(-torch.where(m > 0, above, below).float())
    return {name: torch.cat(parts).double().cpu().numpy() for name, parts in found.items()}


# Telling -------------------------------------------------------------------------------------------------------------


def told(model: str, records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The figures as rows."""
    rows = []
    known = [record for record in records if "refused" not in record]
    ranks, zeroed = (
        {name: np.array([one[part][name] for one in known if name in one[part]]) for name in names_of(known, part)}
        for part in ("ranks", "zeroed")
    )
    for name, rhos in ranks.items():
        mean, low, high = interval(rhos, lambda part: part.mean(0))
        cells = fmean(record["cells"][name.rpartition(" / ")[0]] for record in known)
        note = f"[{low:.2f}, {high:.2f}], {len(rhos)} edits, {cells:.0f} cells each"
        rows.append(Row("faithful", f"{model} / ranks / {name}", mean, "rho", note))
    for name, values in zeroed.items():
        start = f"{model} / top 10 / {name}"
        drop, low, high = interval(values, lambda part: (part[:, 0] - part[:, 3]).mean())
        rows.append(Row("faithful", f"{start} / log p lost", drop, "nats", f"[{low:.2f}, {high:.2f}]"))
        lost, low, high = interval(values, lambda part: (part[:, 1] - part[:, 4]).mean())
        rows.append(Row("faithful", f"{start} / p lost", 100 * lost, "points", f"[{100 * low:.1f}, {100 * high:.1f}]"))
        before, after = 100 * values[:, 1].mean(), 100 * values[:, 4].mean()
        rows.append(Row("faithful", f"{start} / p", after, "%", f"from {before:.1f}"))
        rows.append(Row("faithful", f"{start} / MRR", values[:, 5].mean(), "", f"from {values[:, 2].mean():.3f}"))
    for name in TARGETS:
        for pair, (ours, random) in PAIRS.items():
            if f"{name} / {ours}" not in zeroed:
                continue
            top, other = zeroed[f"{name} / {ours}"], zeroed[f"{name} / {random}"]
            for what, a, b, size in (("log p", 0, 3, 6), ("p", 1, 4, 7)):
                both = np.stack([top[:, a] - top[:, b], other[:, size]], 1)
                value, low, high = interval(both, times)
                held = int((both[:, 0] >= RATIO * both[:, 1]).sum())
                note = f"[{low:.0f}, {high:.0f}]; at least {RATIO:g} times in {held} of {len(both)} edits"
                rows.append(Row("faithful", f"{model} / times random / {name} / {pair} / {what}", value, "times", note))
    if len(known) < len(records):
        rows.append(Row("faithful", f"{model} / refused", len(records) - len(known), "edits"))
    return rows


def names_of(records: Sequence[Mapping[str, Any]], part: str) -> list[str]:
    """The names in a part of the records, each once, in the order they came."""
    return list(dict.fromkeys(name for record in records for name in record[part]))


def times(both: Numbers) -> float:
    """Mean loss by the chosen ones against the mean size of what random ones do: their losses and gains cancel out."""
    top, random = both.mean(0)
    return float(top / random)


def interval(values: Numbers, what: Any) -> tuple[float, float, float]:
    """A figure and its 95 % over draws of edits with replacement."""
    random = np.random.default_rng(0)
    draws = [what(values[random.integers(len(values), size=len(values))]) for _ in range(RESAMPLES)]
    low, high = np.quantile(draws, (0.025, 0.975), method="nearest")
    return float(what(values)), float(low), float(high)


def markdown(rows: Sequence[Row]) -> str:
    """Two tables: ranks by view, and the ten neurons."""
    by_name = {row.name: row for row in rows}
    split = [row.name.split(" / ") for row in rows]
    models = list(dict.fromkeys(parts[0] for parts in split))
    scores = list(dict.fromkeys(parts[2] for parts in split if parts[1] == "ranks"))
    head = [f"{model}, {candidate}" for model in models for candidate in CANDIDATES]
    lines = ["Rank correlation of a score with the effect of taking the cell out (edited model, mean over edits).", ""]
    lines += [f"| score | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for score in scores:
        cells = []
        for model in models:
            for candidate in CANDIDATES:
                row = by_name.get(f"{model} / ranks / {score} / {candidate}")
                cells.append(f"{row.value:.2f} {row.note.partition(']')[0]}]" if row else "")
        lines.append(f"| {score} | {' | '.join(cells)} |")
    lines += ["", "MLP neurons zeroed, ten at the last token unless it says otherwise: what the target loses.", ""]
    lines += ["| model, state | chosen by | log p lost | p lost, points | p, % | MRR |", "|---|---|---|---|---|---|"]
    for model, state_, how in dict.fromkeys((p[0], p[2], p[3]) for p in split if p[1] == "top 10"):
        start = f"{model} / top 10 / {state_} / {how}"
        log_p, p, now, mrr = (by_name[f"{start} / {what}"] for what in ("log p lost", "p lost", "p", "MRR"))
        lines.append(
            f"| {model}, {state_} | {how} | {log_p.value:.3f} {log_p.note} | {p.value:.2f} {p.note} | "
            f"{now.value:.1f} ({now.note}) | {mrr.value:.3f} ({mrr.note}) |"
        )
    lines.append("")
    for row in rows:
        parts = row.name.split(" / ")
        if parts[1] == "times random":
            start = f"- {parts[0]}, {parts[2]} the edit, {parts[3]}"
            lines.append(f"{start}: {row.value:.0f} times the size of what random ones do to {parts[4]} {row.note}.")
    return "\n".join(lines) + "\n"
