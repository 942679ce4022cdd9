"""Verification: a cell of a view predicts what its part of the model does; here that part is changed, and we look.

A score says what a vector v contributes to log p(w) at the last token, with everything else held fixed (see nlka). The
model doesn't hold still: later layers read what is missing, and the final norm adapts. So the promise is checked by an
intervention, as NLKA's authors do with sets of neurons (Yu, Ananiadou; arXiv 2312.12141); the controls and everything
about single cells are ours.

1. A cell names a part: a module, a head, a head's read of one source position, a neuron, one number of a head at one
   source position, a neuron or state at any position, an edited matrix. Several joined by "+" are changed together.
2. Action: ablate (its vector becomes zero), scale (times a factor), patch (it takes the value it has in the other state
   of the model), restore (an edited matrix is put back as it was).
3. Predicted, in nats, for the candidates' first tokens, with x the stream just before the module and the final norm
   frozen as in the view:

       predicted = log p(w | x + v') - log p(w | x + v)                  v' = 0: minus the importance score
       direct    = log p(w | h^L - v + v') - log p(w | h^L)              no later layer reacts, the norm stays

   Cells of one module count together, modules are added up. Stream states, neurons at other positions and matrices
   write nothing of their own to the last position: they have no prediction.
4. Actual: the model runs with the part changed, at that position only, and everything behind it reacts:

       actual = log p(w | changed) - log p(w | untouched)

   Each row of a batch is another intervention; row 0 is left alone. Reads of one source position are taken out as they
   were recorded: what is upstream of a single cell doesn't move, but in a set over several layers it does.
5. Control: as many random cells of the same kinds in the same layers, none of them of the set, changed in the same way.
   Where a layer has too few others (a whole module has none), they come from all layers. A matrix's control
   takes something else away: what the edit added, its rows and columns shuffled and their signs drawn, which has the
   same singular values.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from math import isfinite, prod
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mega_core import frames
from mega_core.attribution.recording import Recording, record
from mega_core.errors import ActionableError, BadInput
from mega_core.events import Reporter, silent, stage
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, intervene
from mega_core.models.tokens import TokenBatch
from mega_core.records import EditRequest

ACTIONS = ("ablate", "scale", "patch", "restore")
FORMS: Mapping[str, tuple[str, ...]] = {
    "attn": ("layer",),
    "ffn": ("layer",),
    "head": ("layer", "head"),
    "source": ("layer", "head", "position"),
    "neuron": ("layer", "neuron"),
    "attention_neuron": ("layer", "head", "dim", "position"),
    "query_neuron": ("layer", "neuron", "position"),
    "state": ("layer", "site", "position"),
    "matrix": ("layer", "site"),
}
"""Kind of cell -> what names one, in the order of its text form."""
KNOWN = (
    "attn:5, ffn:3, head:5.2, source:5.2.7 (layer, head, position), neuron:3.118, attention_neuron:5.2.11.7 (layer, "
    "head, dim, position), query_neuron:1.30@6, state:4.block_out.6, matrix:2.mlp_down"
)
STATE_SITES = ("block_in", "attn", "resid_mid", "mlp", "block_out")
MATRIX_SITES = ("mlp_down", "attn_out")
REST = -1
"""Head -1 is what attention writes besides its heads; position -1 is a text in front of the prompt."""
DRAWS = 10
MOST_CELLS = 2048
MOST_FACTOR = 100.0
ROW_BYTES = 2**27
"""Activations and logits of the rows of one forward, about."""
MOST_ROWS = 256

Cells = tuple["Cell", ...]
Logs = npt.NDArray[np.float64]
_NUMBER = re.compile(r"0|[1-9][0-9]{0,6}")


# 1. Cells ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a view; the numbers it doesn't need are None. `str` and `parse` are inverse."""

    kind: str
    layer: int
    head: int | None = None
    dim: int | None = None
    neuron: int | None = None
    site: str | None = None
    position: int | None = None

    def __post_init__(self) -> None:
        form = FORMS.get(self.kind)
        given = {field.name for field in fields(self)[1:] if getattr(self, field.name) is not None}
        if form is None or given != set(form):
            raise BadInput("cell", f"{self.kind[:20]!r} with {', '.join(sorted(given))} is none.", f"Known: {KNOWN}.")
        for name in form:
            value = getattr(self, name)
            low = REST if (self.kind, name) in (("head", "head"), ("source", "position")) else 0
            if name != "site" and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise BadInput("cell", f"{name} {value!r} is no number from {low} on.", f"Known: {KNOWN}.")
        sites = {"state": STATE_SITES, "matrix": MATRIX_SITES}.get(self.kind, (None,))
        if self.site not in sites:
            raise BadInput("cell", f"{str(self.site)[:20]!r} is no site of a {self.kind}.",
                           f"Choose one of: {', '.join(map(str, sites))}.")  # fmt: skip

    def __str__(self) -> str:
        values = [str(getattr(self, name)) for name in FORMS[self.kind]]
        if self.kind == "query_neuron":
            return f"query_neuron:{values[0]}.{values[1]}@{values[2]}"
        return f"{self.kind}:{'.'.join(values)}"

    @classmethod
    def parse(cls, text: str) -> Cell:
        """The cell of its text form. Raises BadInput with the known forms on any other text."""
        wrong = BadInput("cell", f"{text[:40]!r} names no cell.", f"Known: {KNOWN}.")
        kind, colon, rest = text.strip().partition(":")
        form = FORMS.get(kind)
        if form is None or not colon:
            raise wrong
        if kind == "query_neuron":
            if "." in rest.partition("@")[2] or rest.count("@") != 1:
                raise wrong
            rest = rest.replace("@", ".")
        parts = rest.split(".")
        if len(parts) != len(form):
            raise wrong
        given: dict[str, int | str] = {}
        for name, part in zip(form, parts, strict=True):
            if name == "site":
                given[name] = part
            elif _NUMBER.fullmatch(part) or part == str(REST):
                given[name] = int(part)
            else:
                raise wrong
        return cls(kind, **given)  # type: ignore[arg-type]

    def check(self, lm: ModelAdapter, length: int) -> None:
        """Raise BadInput unless this model has the cell on a prompt of `length` tokens."""
        sizes = {"layer": lm.n_layers, "head": lm.n_heads, "dim": lm.head_dim, "neuron": lm.d_mlp, "position": length}
        owner = {"position": f"the prompt ({length} tokens)", "dim": f"a head of {lm.name}"}
        for name, size in sizes.items():
            value = getattr(self, name)
            if value is not None and value >= size:
                raise BadInput(
                    "cell",
                    f"{self}: {owner.get(name, lm.name)} has no {name} {value}.",
                    f"Choose one of 0 to {size - 1}.",
                )


def read_cells(text: str) -> Cells:
    """The cells of "head:5.2", or of "neuron:3.118+neuron:4.7": several that are changed together.

    Raises BadInput on text that is none, or on a cell named twice.
    """
    if text.count("+") >= MOST_CELLS:
        raise BadInput("cell", f"more than {MOST_CELLS} together.", "Name fewer.")
    cells = tuple(Cell.parse(part) for part in text.split("+"))
    if len(set(cells)) < len(cells):
        raise BadInput("cell", f"{text[:60]!r} names a cell twice.", "Name each once.")
    return cells


def cells_text(cells: Cells) -> str:
    """What read_cells understands."""
    return "+".join(map(str, cells))


def of_row(frame: str, row: Mapping[str, Any], length: int) -> str | None:
    """The cell, or cells, that a row of a view's frame is about; None for a row without any, such as the embedding's.

    `length` is that of the prompt. A row without a position (query layers and neurons) is about all positions; one of
    the causal trace about the middle layer of its window; one of the attention about its head.
    """
    layer, module = row.get("layer"), row.get("module")
    if frame in ("module_scores", "residual"):
        return f"{module}:{layer}" if module in ("attn", "ffn") else None
    if frame in ("head_scores", "stress_heads", "attention"):
        return f"head:{layer}.{row['head']}"
    if frame == "head_sources":
        return f"source:{layer}.{row['head']}.{row['position']}"
    if frame == "neuron_scores":
        return f"neuron:{layer}.{row['neuron']}"
    if frame == "attention_neurons":
        return f"attention_neuron:{layer}.{row['head']}.{row['dim']}.{row['position']}"
    if frame == "query_neurons":
        return "+".join(f"query_neuron:{layer}.{row['neuron']}@{p}" for p in range(length))
    if frame == "query_layers" and module in ("attn", "ffn"):
        return "+".join(f"state:{layer}.{'mlp' if module == 'ffn' else 'attn'}.{p}" for p in range(length))
    if frame in ("lens", "trace"):
        return f"state:{layer}.{row['site']}.{row['position']}"
    if frame == "weight_change" and row["kind"] == "weights":
        return f"matrix:{layer}.{row['site']}"
    return None


def action_text(action: str, factor: float = 0.0) -> str:
    """As in the column `action`: "ablate", "scale 0.5"."""
    return f"scale {factor:g}" if action == "scale" else action


def check(lm: ModelAdapter, request: EditRequest, sets: Sequence[Cells], action: str, factor: float = 0.0) -> None:
    """Raise BadInput on a cell, a set, an action or a factor that can't be."""
    if action not in ACTIONS:
        raise BadInput("action", f"there is no {action[:20]!r}.", f"Choose one of: {', '.join(ACTIONS)}.")
    if not sets or not all(sets):
        raise BadInput("cell", "there is none.", f"Name one, such as {KNOWN}.")
    if len(set(sets)) < len(sets) or sum(map(len, sets)) > MOST_CELLS:
        raise BadInput("cell", f"the same twice, or more than {MOST_CELLS}.", "Name fewer.")
    if action == "scale" and not (isfinite(factor) and abs(factor) <= MOST_FACTOR):
        raise BadInput("factor", f"{factor:g} is out of range.", f"Allowed: {-MOST_FACTOR:g} to {MOST_FACTOR:g}.")
    length = len(tokens.prompt_ids(lm.tokenizer, request.prompt))
    for cells in sets:
        kinds: dict[tuple[int, str], set[str]] = defaultdict(set)
        for cell in cells:
            cell.check(lm, length)
            if (cell.kind == "matrix") != (action == "restore"):
                what = "a matrix can only be restored" if cell.kind == "matrix" else "only a matrix can be restored"
                raise BadInput("action", f"{cell}: {what}.", "Choose another action for it.")
            if (module := _module(cell, length)) is not None:
                kinds[module].add(cell.kind)
        if any(len(names) > 1 for names in kinds.values()):
            raise BadInput("cell", f"{cells_text(cells)[:60]!r}: one lies inside another.", "Name them one by one.")


# Verifying -----------------------------------------------------------------------------------------------------------


def see(lm: ModelAdapter, request: EditRequest, sets: Sequence[Cells]) -> Recording:
    """What these cells, and random ones like them, need of the model as it is now."""
    parts = {part for cells in sets for cell in cells for part in _READS.get(cell.kind, (cell.site or "",))}
    return record(lm, [request], sorted(parts))


def verify(
    lm: ModelAdapter,
    request: EditRequest,
    sets: Sequence[Cells],
    action: str = "ablate",
    *,
    state: str,
    case: int = 0,
    factor: float = 0.0,
    other: Recording | None = None,
    originals: Mapping[tuple[int, str], Tensor] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    report: Reporter = silent,
) -> pd.DataFrame:
    """The frame `verified` of the model as it is now: one row per set of cells and candidate.

    `other` is the other state's see() (patch); `originals` are the stored matrices of the unedited model by layer and
    site (restore). The model is left as it was found. Raises BadInput as check() does.
    """
    check(lm, request, sets, action, factor)
    if action == "restore":
        found = _restored(lm, request, sets, originals or {}, draws, seed, report)
    else:
        found = _changed(lm, request, sets, _Do(action, factor, other), draws, seed, report)
    rows: list[dict[str, object]] = []
    labels = dict(zip(found.candidates, tokens.token_strings(lm.tokenizer, found.candidates.values()), strict=True))
    for i, cells in enumerate(sets):
        kinds = {cell.kind for cell in cells}
        about: dict[str, object] = {
            "state": state,
            "case": case,
            "cells": cells_text(cells),
            "action": action_text(action, factor),
            "kind": kinds.pop() if len(kinds) == 1 else "mixed",
            "layer": min(cell.layer for cell in cells),
            "size": len(cells),
            "has_prediction": bool(found.predictable[i]),
        }
        for c, name in enumerate(found.candidates):
            rows.append(about | {"candidate": name, "token": labels[name]} | found.row(i, c))
    return frames.from_rows(rows, "verified")


@dataclass(frozen=True, eq=False)
class Effects:
    """Predicted and actual effects, in nats, of changing sets of cells; controls as [draw, candidate] per set."""

    candidates: Mapping[str, int]
    predictable: npt.NDArray[np.bool_]
    predicted: Logs
    direct: Logs
    base: Ran
    after: Ran
    controls: Sequence[Logs]

    def row(self, i: int, c: int) -> dict[str, object]:
        """The numbers of one set and candidate."""
        control = self.controls[i][:, c]
        return {
            "predicted": float(self.predicted[i, c]),
            "direct": float(self.direct[i, c]),
            "actual": float(self.after.logprob[i, c] - self.base.logprob[i, c]),
            "prob_before": float(np.exp(self.base.logprob[i, c])),
            "prob_after": float(np.exp(self.after.logprob[i, c])),
            "rank_before": int(self.base.rank[i, c]),
            "rank_after": int(self.after.rank[i, c]),
            "control": float(control.mean()) if len(control) else 0.0,
            "control_sd": float(control.std(ddof=1)) if len(control) > 1 else 0.0,
            "controls": len(control),
        }


class Ran(NamedTuple):
    """What rows of a forward answered: log-probability (nats) and rank (1 = first) of the candidates."""

    logprob: Logs
    rank: npt.NDArray[np.int64]

    def rows(self, picked: slice) -> Ran:
        """Some of them."""
        return Ran(self.logprob[picked], self.rank[picked])

    def repeated(self, times: int) -> Ran:
        """Each row so many times."""
        return Ran(np.repeat(self.logprob, times, 0), np.repeat(self.rank, times, 0))


@dataclass(frozen=True, eq=False)
class _Do:
    """An action with what it needs."""

    action: str
    factor: float = 0.0
    other: Recording | None = None

    def new(self, lm: ModelAdapter, cell: Cell, old: Tensor) -> Tensor:
        """The numbers that a cell has afterwards."""
        if self.action == "patch":
            if self.other is None:
                raise ValueError("patch needs the other state's recording")
            return _numbers(lm, cell, self.other)
        return old * self.times

    @property
    def times(self) -> float:
        return self.factor if self.action == "scale" else 0.0


def _changed(
    lm: ModelAdapter, request: EditRequest, sets: Sequence[Cells], do: _Do, draws: int, seed: int, report: Reporter
) -> Effects:
    """Steps 3 to 5 for everything but matrices."""
    if do.action == "patch" and do.other is None:
        raise BadInput("action", "there is no other state to take a value from.", "Choose ablate or scale.")
    seen = see(lm, request, sets)
    length = seen.length(0)
    controls = [draw(lm, length, cells, draws, seed) for cells in sets]
    everything = [*sets, *(cells for drawn in controls for cells in drawn)]
    predictable, predicted, direct = predict(seen, sets, do.action, do.factor, do.other)
    base, after = _run(seen, [[_turn(lm, seen, cell, do) for cell in cells] for cells in everything], report)
    moved = after.logprob - base.logprob
    ends = np.cumsum([len(sets), *map(len, controls)])
    own = slice(0, len(sets))
    return Effects(
        seen.candidates[0], predictable, predicted, direct, base.rows(own), after.rows(own),
        [moved[start:end] for start, end in zip(ends, ends[1:], strict=False)],
    )  # fmt: skip


# 3. Predicted --------------------------------------------------------------------------------------------------------


def predict(
    seen: Recording, sets: Sequence[Cells], action: str = "ablate", factor: float = 0.0, other: Recording | None = None
) -> tuple[npt.NDArray[np.bool_], Logs, Logs]:
    """(has a prediction, predicted [set, candidate], direct [set, candidate]) of a recording made by see()."""
    lm, do = seen.lm, _Do(action, factor, other)
    known = np.ones(len(sets), bool)
    stream: list[Tensor] = [seen.states[-1, 0]]
    jobs: list[tuple[int, int]] = []  # (set, where its states begin in `stream`)
    for i, cells in enumerate(sets):
        by_module: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for cell in cells:
            module = _module(cell, seen.length(0))
            if module is None:
                known[i] = False
                break
            old = _numbers(lm, cell, seen)
            new = do.new(lm, cell, old)
            by_module[module].append((_written(lm, cell, old), _written(lm, cell, new)))
        if not known[i]:
            continue
        total = torch.zeros_like(stream[0])
        for (layer, name), pairs in by_module.items():
            x = seen.base(layer, name)[0]
            before, after = (torch.stack([pair[n] for pair in pairs]).sum(0).to(x) for n in (0, 1))
            jobs.append((i, len(stream)))
            stream += [x + before, x + after]
            total += after - before
        jobs.append((i, -len(stream)))
        stream.append(stream[0] + total)
    ids = seen.ids()[:1, : len(seen.candidates[0])]
    log_p = seen.lens.row(0).log_probs(torch.stack(stream)[:, None], ids)[:, 0].double().cpu().numpy()
    predicted, direct = np.zeros((2, len(sets), log_p.shape[1]))
    for i, at in jobs:
        if at < 0:
            direct[i] = log_p[-at] - log_p[0]
        else:
            predicted[i] += log_p[at + 1] - log_p[at]
    return known, predicted, direct


_READS: Mapping[str, tuple[str, ...]] = {
    "attn": ("attn",),
    "ffn": ("mlp",),
    "head": ("attn_out_in", "attn"),
    "source": ("attn_out_in", "value", "pattern"),
    "neuron": ("mlp_down_in",),
    "attention_neuron": ("value", "pattern"),
    "query_neuron": ("mlp_down_in",),
}


class _Place(NamedTuple):
    """Where a cell's numbers are in a forward."""

    site: Site
    position: int
    start: int = 0
    end: int | None = None

    def of(self, seen: Recording) -> Tensor:
        return seen.parts[self.site][0, self.position, self.start : self.end]


def _place(lm: ModelAdapter, cell: Cell, length: int) -> _Place:
    layer, last = cell.layer, length - 1
    if cell.kind == "attn" or (cell.kind == "head" and cell.head == REST):
        return _Place(Site(layer, "attn"), last)
    if cell.kind == "ffn":
        return _Place(Site(layer, "mlp"), last)
    if cell.kind == "state":
        return _Place(Site(layer, str(cell.site)), cell.position or 0)
    if cell.neuron is not None:
        at = last if cell.position is None else cell.position
        return _Place(Site(layer, "mlp_down_in"), at, cell.neuron, cell.neuron + 1)
    start = (cell.head or 0) * lm.head_dim + (cell.dim or 0)
    return _Place(Site(layer, "attn_out_in"), last, start, start + (lm.head_dim if cell.dim is None else 1))


def _shares(cell: Cell) -> bool:
    """Whether what is in the cell's place is only partly its own: then its part is added or taken, not set."""
    return cell.kind in ("source", "attention_neuron") or cell.head == REST


def _numbers(lm: ModelAdapter, cell: Cell, seen: Recording) -> Tensor:
    """A cell's own numbers in a recording, as they stand in its place."""
    length = seen.length(0)
    if cell.kind == "head" and cell.head == REST:
        heads = seen.parts[Site(cell.layer, "attn_out_in")][0, length - 1]
        total: Tensor = seen.parts[Site(cell.layer, "attn")][0, length - 1]
        return total - lm.read_weight(cell.layer, "attn_out").to(heads) @ heads
    place = _place(lm, cell, length)
    if not _shares(cell):
        return place.of(seen)
    head = cell.head or 0
    pattern = seen.parts[Site(cell.layer, "pattern")][0, head, length - 1]  # (pos,)
    values = seen.parts[Site(cell.layer, "value")][0].unflatten(-1, (lm.n_kv_heads, lm.head_dim))[:, lm.kv_head(head)]
    if cell.position == REST:
        return place.of(seen) - (pattern[:length, None] * values[:length]).sum(0)
    one = pattern[cell.position] * values[cell.position]
    return one if cell.dim is None else one[cell.dim : cell.dim + 1]


def _written(lm: ModelAdapter, cell: Cell, numbers: Tensor) -> Float[Tensor, " d_model"]:
    """What these numbers of a cell write to the residual stream."""
    if cell.neuron is not None:
        return numbers * lm.read_weight(cell.layer, "mlp_down")[:, cell.neuron].to(numbers)
    if cell.head is None or cell.head == REST:
        return numbers
    rows = lm.head_out(cell.layer)[cell.head].to(numbers)
    return numbers @ (rows if cell.dim is None else rows[cell.dim : cell.dim + 1])


def _module(cell: Cell, length: int) -> tuple[int, str] | None:
    """The module at the last token that the cell is part of; None: it isn't part of one."""
    if cell.kind in ("neuron", "ffn") or (cell.kind == "query_neuron" and cell.position == length - 1):
        return cell.layer, "ffn"
    if cell.kind in ("attn", "head", "source", "attention_neuron"):
        return cell.layer, "attn"
    if cell.kind == "state" and cell.position == length - 1 and cell.site in ("attn", "mlp"):
        return cell.layer, "ffn" if cell.site == "mlp" else "attn"
    return None


# 4. Actual -----------------------------------------------------------------------------------------------------------


class _Turn(NamedTuple):
    """In one row, what is at a place becomes `keep` times itself plus `add`."""

    place: _Place
    keep: float
    add: Tensor | None


def _turn(lm: ModelAdapter, seen: Recording, cell: Cell, do: _Do) -> _Turn:
    place = _place(lm, cell, seen.length(0))
    if _shares(cell):
        old = _numbers(lm, cell, seen)
        return _Turn(place, 1.0, do.new(lm, cell, old) - old)
    if do.other is not None:
        return _Turn(place, 0.0, _numbers(lm, cell, do.other))
    return _Turn(place, do.times, None)


def _run(seen: Recording, rows: Sequence[Sequence[_Turn]], report: Reporter) -> tuple[Ran, Ran]:
    """(untouched, changed) answers of each row; rows run together, beside one that is left alone."""
    lm = seen.lm
    per_row = 4 * (3 * lm.vocab_size + seen.length(0) * (3 * lm.d_mlp + 8 * lm.d_model))
    size = max(1, min(MOST_ROWS, ROW_BYTES // per_row))
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    ids = seen.batch.rows()[0]
    found: list[tuple[Ran, Ran]] = []
    with stage(report, "verify", total=len(groups)) as step:
        for group in groups:
            batch = tokens.pack(lm.tokenizer, [ids] * (len(group) + 1), lm.device)
            with _turned(lm, group):
                ran = _answers(lm, batch, list(seen.candidates[0].values()))
            found.append((ran.rows(slice(0, 1)).repeated(len(group)), ran.rows(slice(1, None))))
            step()
    return _joined([untouched for untouched, _ in found]), _joined([changed for _, changed in found])


def _joined(parts: Sequence[Ran]) -> Ran:
    return Ran(np.concatenate([one.logprob for one in parts]), np.concatenate([one.rank for one in parts]))


def _answers(lm: ModelAdapter, batch: TokenBatch, ids: Sequence[int]) -> Ran:
    with torch.no_grad():
        logits = lm.last_logits(batch).double()
    if not torch.isfinite(logits).all():
        raise ActionableError(f"{lm.name} gives numbers that are not finite.", "Use a smaller factor.")
    picked = logits[:, torch.tensor(ids, device=logits.device)]
    rank = torch.stack([(logits > picked[:, c, None]).sum(-1) for c in range(len(ids))], -1) + 1
    return Ran((picked - logits.logsumexp(-1, keepdim=True)).cpu().numpy(), rank.cpu().numpy())


@contextmanager
def _turned(lm: ModelAdapter, rows: Sequence[Sequence[_Turn]]) -> Iterator[None]:
    """Inside the block row i + 1 of the next batch has its turns."""
    by_site: dict[Site, list[tuple[int, _Turn]]] = defaultdict(list)
    for i, turns in enumerate(rows, start=1):
        for turn in turns:
            by_site[turn.place.site].append((i, turn))
    watch = _Watch(lm)

    def change(listed: Sequence[tuple[int, _Turn]]) -> Callable[[Tensor], Tensor]:
        def turned(value: Tensor) -> Tensor:
            if not watch.acts():
                return value
            new = value.clone()
            for row, (place, keep, add) in listed:
                part = new[row, place.position, place.start : place.end]
                kept = torch.zeros_like(part) if keep == 0 else part * keep
                part.copy_(kept if add is None else kept + add.to(part))
            return new

        return turned

    with lm.reading(watch), intervene(lm, {site: change(listed) for site, listed in by_site.items()}):
        yield


class _Watch:
    """Tells our own batch from the forwards that a gate or a memory runs to look at the prompt."""

    def __init__(self, lm: ModelAdapter) -> None:
        self.lm = lm
        self.begun = False

    def begin(self, batch: TokenBatch) -> None:
        """Told last of all readers: what the others run when they are told is over."""
        self.begun = True

    def advance(self, ids: Int[Tensor, " batch"]) -> None:
        """Nothing is generated here."""

    def acts(self) -> bool:
        """Whether the forward that runs is the batch's own."""
        return self.begun and any(reader is self for reader in self.lm.readers)


# 5. Controls ---------------------------------------------------------------------------------------------------------


def draw(lm: ModelAdapter, length: int, cells: Cells, draws: int, seed: int) -> list[Cells]:
    """Random sets like this one, by its text and `seed` alone; fewer than `draws` where there are not as many."""
    random = np.random.default_rng([seed, crc32(cells_text(cells).encode())])
    families = Counter(_family(cell) for cell in cells)
    if len(cells) == 1:
        (family,) = families
        return [(cell,) for cell in _others(lm, length, family, cells, draws, random)]
    found: list[Cells] = []
    for _ in range(draws):
        drawn = [_others(lm, length, family, cells, count, random) for family, count in families.items()]
        if any(len(some) < count for some, count in zip(drawn, families.values(), strict=True)):
            return []
        found.append(tuple(cell for some in drawn for cell in some))
    return found


class _Family(NamedTuple):
    """Cells that stand in for each other, and the coordinates in which they differ."""

    like: Cell
    free: tuple[str, ...]


def _family(cell: Cell) -> _Family:
    free = {
        "head": ("head",),
        "source": ("head", "position"),
        "neuron": ("neuron",),
        "query_neuron": ("neuron",),
        "attention_neuron": ("head", "dim", "position"),
        "state": ("position",),
    }.get(cell.kind, ())
    kept = tuple(name for name in free if getattr(cell, name) != REST)
    return _Family(_with(cell, dict.fromkeys(kept, 0)), kept)


def _with(cell: Cell, values: Mapping[str, int]) -> Cell:
    return Cell(**{field.name: values.get(field.name, getattr(cell, field.name)) for field in fields(cell)})


def _others(
    lm: ModelAdapter, length: int, family: _Family, taken: Cells, count: int, random: np.random.Generator
) -> list[Cell]:
    """Up to `count` different cells of the family, in its layer if that has enough, none of them taken."""
    sizes = {"layer": lm.n_layers, "head": lm.n_heads, "dim": lm.head_dim, "neuron": lm.d_mlp, "position": length}
    found: list[Cell] = []
    single = len(taken) == 1
    for free in (family.free, ("layer", *family.free)):
        shape = [sizes[name] for name in free]
        total = prod(shape)
        picked = random.choice(total, size=min(total, count + len(taken)), replace=False)
        places = [np.unravel_index(int(at), shape) for at in picked] if shape else [()]
        listed = [_with(family.like, {n: int(v) for n, v in zip(free, at, strict=True)}) for at in places]
        found = [cell for cell in listed if cell not in taken][:count]
        if len(found) == count or (single and found):
            return found
    return found


# Matrices ------------------------------------------------------------------------------------------------------------


def _restored(
    lm: ModelAdapter,
    request: EditRequest,
    sets: Sequence[Cells],
    originals: Mapping[tuple[int, str], Tensor],
    draws: int,
    seed: int,
    report: Reporter,
) -> Effects:
    """Steps 4 and 5 for edited matrices: a forward each."""
    for cell in (cell for cells in sets for cell in cells):
        at = (cell.layer, str(cell.site))
        if at not in originals or torch.equal(lm.weight(*at), originals[at]):
            raise BadInput("cell", f"{cell} is not changed by this edit.", "Name a matrix that is.")
    seen = record(lm, [request])
    ids = list(seen.candidates[0].values())
    base = _answers(lm, seen.batch, ids)
    after, controls = [], []
    with stage(report, "verify", total=len(sets) * (1 + draws)) as step:
        for cells in sets:
            places = {(cell.layer, str(cell.site)): originals[cell.layer, str(cell.site)] for cell in cells}
            with _swapped(lm, places):
                after.append(_answers(lm, seen.batch, ids))
            step()
            random = torch.Generator().manual_seed(crc32(f"{seed} {cells_text(cells)}".encode()))
            moved = []
            for _ in range(draws):
                with _swapped(lm, {at: _shuffled(lm, at, whole, random) for at, whole in places.items()}):
                    moved.append(_answers(lm, seen.batch, ids).logprob[0] - base.logprob[0])
                step()
            controls.append(np.array(moved).reshape(len(moved), len(ids)))
    none = np.zeros((len(sets), len(ids)))
    return Effects(
        seen.candidates[0], np.zeros(len(sets), bool), none, none,
        base.repeated(len(sets)), _joined(after), controls,
    )  # fmt: skip


def _shuffled(lm: ModelAdapter, at: tuple[int, str], original: Tensor, random: torch.Generator) -> Tensor:
    """The edited matrix less the edit's addition shuffled: as much is taken away, but not what was added."""
    now = lm.weight(*at).detach()
    added = now.float() - original.float()
    for dim in (0, 1):
        order = torch.randperm(added.shape[dim], generator=random).to(added.device)
        signs = torch.randint(0, 2, (added.shape[dim],), generator=random).to(added) * 2 - 1
        added = added.index_select(dim, order) * (signs[:, None] if dim == 0 else signs)
    return (now.float() - added).to(now.dtype)


@contextmanager
def _swapped(lm: ModelAdapter, matrices: Mapping[tuple[int, str], Tensor]) -> Iterator[None]:
    """Other matrices inside the block; the ones that were there come back bit for bit."""
    saved = {at: lm.weight(*at).detach().clone() for at in matrices}
    try:
        with torch.no_grad():
            for at, matrix in matrices.items():
                lm.weight(*at).copy_(matrix)
        yield
    finally:
        with torch.no_grad():
            for at, matrix in saved.items():
                lm.weight(*at).copy_(matrix)
