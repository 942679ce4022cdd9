"""Causal trace: which states bring the answer back once the subject is unreadable (Meng et al. 2022, arXiv 2202.05262,
section 2).

1. Clean run: the prompt as it stands. Kept at every layer and position: the stream after the block, what attention
   writes, what the MLP writes (the recording's).
2. Corrupted run, once per draw: Gaussian noise joins the embeddings of the subject's tokens. Its standard deviation is
   `noise` times that of the numbers in the embeddings of known subjects' tokens, each subject read alone. Known
   subjects are those of the fact table that ships (ours; the paper takes those of its own 1,000 prompts).
3. A cell is one state of one position: "block_out", the stream after one block, or "attn" / "mlp", what these modules
   of a window of blocks write there. Restored run of a cell: the corrupted run with that state as in the clean run.
   The window of layer l is l - floor(w/2) ... l + ceil(w/2) - 1, cut at the ends; w = 10 of 48 layers in the paper, the
   same share of the layers here (ours), at least 1.
4. p is the probability of a candidate's first token after the prompt, averaged over the draws; both candidates come
   from the same runs. effect = p(restored) - p(corrupted).

Restored runs are not run whole. Below its first restored block and before its position a restored run is the corrupted
one, so only later blocks run, on positions from the restored one on, with the corrupted run's keys and values in front.
All cells of one position go up together: a cell joins when its first block is reached. Before the subject both runs
are the same, and so the effect is 0.

A model that is steered or has a memory decides by whole rows, counting positions; there every cell is a row of an
ordinary forward. A text in front of the prompt stays clean even where it names the subject (ours).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mega_core import frames
from mega_core.attribution.frozen import LOGITS_AT_ONCE
from mega_core.attribution.recording import Recording
from mega_core.attribution.settings import TraceParams
from mega_core.embedded import facts
from mega_core.events import Reporter, stage
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Fn, Site, capture, intervene, untuple
from mega_core.models.suffix import KeptPast, KeysValues, as_read, block_arguments, run_keeping, suffix_mask

SITES = ("block_out", "attn", "mlp")
PAPER_WINDOW, PAPER_LAYERS = 10, 48
NUMBERS_AT_ONCE = 2**25
"""Numbers in the widest activation of the rows that run together."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What is restored, at whichever position."""

    site: str
    layer: int
    first: int
    """The first block that runs otherwise than in the corrupted run; the number of layers when none does."""
    window: range
    """The layers whose attention or MLP output is restored; empty for "block_out"."""


@dataclass(frozen=True, eq=False)
class Traced:
    """Probabilities of one prompt's candidates, averaged over the draws; float64 on the CPU."""

    clean: Float[Tensor, " candidate"]
    corrupt: Float[Tensor, " candidate"]
    restored: Float[Tensor, "cell pos candidate"]


def look(recording: Recording, params: TraceParams, state: str, report: Reporter) -> Mapping[str, pd.DataFrame]:
    """The frame `trace` of the edit prompts, for "new" and, where it is known, "true"."""
    lm = recording.lm
    chosen = cells(lm.n_layers, params.window, SITES if params.sites == "all" else (params.sites,))
    spread = params.noise * embedding_spread(lm)
    positions = sum(recording.length(i) - span[0] for i, span in enumerate(recording.spans))
    found: list[pd.DataFrame] = []
    with stage(report, "causal trace", total=positions) as step:
        for i in range(len(recording.requests)):
            noise = noise_for(recording, i, params.samples, spread, params.seed)
            found.append(_frame(recording, i, chosen, trace(recording, i, chosen, noise, step), state))
    return {"trace": pd.concat(found, ignore_index=True)}


def window_of(n_layers: int) -> int:
    """How many layers' outputs are restored together by default: the paper's share of the layers (ours)."""
    return max(1, round(n_layers * PAPER_WINDOW / PAPER_LAYERS))


def cells(n_layers: int, window: int | None = None, sites: Sequence[str] = SITES) -> tuple[Cell, ...]:
    """Every site at every layer, in the order in which they join on the way up. `window` None: window_of()."""
    width = window_of(n_layers) if window is None else window
    found = []
    for site in sites:
        for layer in range(n_layers):
            reach = range(max(0, layer - width // 2), min(n_layers, layer + ceil(width / 2)))
            none = range(0)
            alone = site == "block_out"
            found.append(Cell(site, layer, layer + 1 if alone else reach.start, none if alone else reach))
    return tuple(sorted(found, key=lambda cell: cell.first))


def embedding_spread(lm: ModelAdapter) -> float:
    """Standard deviation of the numbers in the embeddings of known subjects' tokens, each as often as it occurs."""
    ids: list[list[int]] = lm.tokenizer(sorted(facts.load().by_subject), add_special_tokens=False)["input_ids"]
    table = lm.model.get_input_embeddings().weight.detach()  # (vocab, d_model)
    used, count = torch.tensor([token for row in ids for token in row]).unique(return_counts=True)
    rows, weight = table[used.to(table.device)].double(), count.to(table.device)[:, None]
    total = int(count.sum()) * table.shape[1]
    mean = (rows * weight).sum() / total
    return float((((rows - mean).square() * weight).sum() / total).sqrt())


def noise_for(
    recording: Recording, i: int, samples: int, spread: float, seed: int
) -> Float[Tensor, "sample token d_model"]:
    """The draws for the subject of prompt i: the same whichever prompts it is recorded with. float32 on the CPU."""
    begin, end = recording.spans[i]
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(samples, end - begin, recording.lm.d_model, generator=generator)


def trace(
    recording: Recording,
    i: int,
    chosen: Sequence[Cell],
    noise: Float[Tensor, "sample token d_model"],
    step: Callable[[], None] = lambda: None,
) -> Traced:
    """Trace prompt i over cells as cells() sorts them. `step` is called once per position from the subject on."""
    lm = recording.lm
    watched = lm.hook_count() > (lm.prefix is not None)
    window = getattr(lm.model.config, "sliding_window", None)
    slides = window and (lm.prefix is not None or recording.length(i) > window)
    run = _by_rows if watched or slides else _by_suffixes
    with torch.no_grad():
        return run(recording, i, chosen, noise, step)


# Later blocks on later positions only --------------------------------------------------------------------------------


def _by_suffixes(
    recording: Recording, i: int, chosen: Sequence[Cell], noise: Tensor, step: Callable[[], None]
) -> Traced:
    lm, length, ids = recording.lm, recording.length(i), _candidate_ids(recording, i)
    (begin, end), samples = recording.spans[i], len(noise)
    own = tokens.pack(lm.tokenizer, [recording.batch.rows()[i]], lm.device)
    full, places = as_read(lm, own)
    at = places[0].tolist()  # where the prompt's own positions lie
    width = full.ids.shape[1]

    def corrupt(value: Tensor) -> Tensor:
        new = value.clone()
        for token in range(begin, end):
            new[:, at[token]] = value[:, at[token]] + noise[:, token - begin].to(value)
        return new

    stream = [Site(0, "block_in"), *(Site(layer, "block_out") for layer in range(lm.n_layers))]
    with intervene(lm, {stream[0]: corrupt}), capture(lm, stream, stop=False) as got:  # 2.
        past = run_keeping(lm, full.ids.expand(samples, -1))
    corrupted = [got[site] for site in stream]  # before block 0, after each block: (sample, pos, d_model)
    clean = _probabilities(lm, recording.states[-1, i : i + 1], ids)[0]  # 1.
    broken = _probabilities(lm, corrupted[-1][:, -1], ids).mean(0)
    restored = broken.expand(len(chosen), length, -1).clone()
    for position in range(begin, length):  # 3.
        each = (width - at[position]) * len(chosen) * max(lm.d_mlp, lm.d_model)
        group = max(1, NUMBERS_AT_ONCE // each)
        sums = torch.zeros(len(chosen), ids.shape[0], dtype=torch.float64)
        for start in range(0, samples, group):
            draws = slice(start, start + group)
            last = _climb(recording, i, position, at[position], chosen, [x[draws] for x in corrupted], past, draws)
            sums += _probabilities(lm, last, ids).unflatten(0, (len(chosen), -1)).sum(1)
        restored[:, position] = sums / samples  # 4.
        step()
    return Traced(clean, broken, restored)


def _climb(
    recording: Recording,
    i: int,
    position: int,
    place: int,
    chosen: Sequence[Cell],
    corrupted: Sequence[Float[Tensor, "sample pos d_model"]],
    past: Sequence[KeysValues],
    draws: slice,
) -> Float[Tensor, "rows d_model"]:
    """The last token's final state of every cell at one position, cell by cell, each with all draws.

    `place` is where the position lies in what the model reads.
    """
    lm, (samples, width) = recording.lm, corrupted[0].shape[:2]
    hidden = corrupted[0][:0, place:]
    where = torch.arange(place, width, device=hidden.device)[None]
    allowed = suffix_mask(torch.tensor([place], device=hidden.device), width - place, place)
    for layer in range(lm.n_layers + 1):
        joining = [cell for cell in chosen if cell.first == layer]
        if joining:
            fresh = corrupted[layer][:, place:].to(hidden.device).repeat(len(joining), 1, 1)
            for k, cell in enumerate(joining):
                if cell.site == "block_out":
                    state = recording.part(cell.layer, "block_out")[i, position]
                    fresh[k * samples : (k + 1) * samples, 0] = state.to(fresh)
            hidden = torch.cat((hidden, fresh))
        if layer == lm.n_layers:
            return hidden[:, -1]
        if not len(hidden):
            continue
        running = len(hidden) // samples  # cells that have joined, the first ones
        kept: KeysValues = tuple(x[draws, :, :place].repeat(running, 1, 1, 1) for x in past[layer])  # type: ignore[assignment]
        arguments = block_arguments(lm, hidden, where, allowed, KeptPast({layer: kept}))
        changes = _window_changes(recording, i, position, layer, chosen[:running], samples)
        with intervene(lm, changes):
            hidden = untuple(lm.block(layer)(hidden, **arguments))
    raise AssertionError("the loop returns after the last block")


def _window_changes(
    recording: Recording, i: int, position: int, layer: int, running: Sequence[Cell], samples: int
) -> dict[Site, Fn]:
    """What puts the clean output of a module at the first position of the rows whose cell restores it."""
    changes: dict[Site, Fn] = {}
    for site in ("attn", "mlp"):
        rows = torch.tensor([cell.site == site and layer in cell.window for cell in running])
        if rows.any():
            changes[Site(layer, site)] = partial(
                _put_first, rows.repeat_interleave(samples), recording.part(layer, site)[i, position]
            )
    return changes


def _put_first(rows: Bool[Tensor, " row"], state: Float[Tensor, " d_model"], value: Tensor) -> Tensor:
    new = value.clone()
    new[rows.to(value.device), 0] = state.to(value)
    return new


# Whole rows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    sample: int
    position: int
    cell: Cell | None
    """None: nothing is restored."""

    def restores(self, site: Site) -> bool:
        cell = self.cell
        if cell is None or cell.site != site.part:
            return False
        return site.layer == cell.layer if cell.site == "block_out" else site.layer in cell.window


def _by_rows(recording: Recording, i: int, chosen: Sequence[Cell], noise: Tensor, step: Callable[[], None]) -> Traced:
    length, ids = recording.length(i), _candidate_ids(recording, i)
    begin, samples = recording.spans[i][0], len(noise)
    clean = _run_rows(recording, i, [_Row(-1, 0, None)], noise, ids)[0]
    broken = _run_rows(recording, i, [_Row(draw, 0, None) for draw in range(samples)], noise, ids).mean(0)
    restored = broken.expand(len(chosen), length, -1).clone()
    for position in range(begin, length):
        rows = [_Row(draw, position, cell) for cell in chosen for draw in range(samples)]
        found = _run_rows(recording, i, rows, noise, ids)
        restored[:, position] = found.unflatten(0, (len(chosen), samples)).mean(1)
        step()
    return Traced(clean, broken, restored)


def _run_rows(
    recording: Recording, i: int, rows: Sequence[_Row], noise: Tensor, ids: Int[Tensor, " candidate"]
) -> Float[Tensor, "row candidate"]:
    """Probabilities of the candidates in ordinary forwards of prompt i; a row of sample -1 gets no noise."""
    lm, prompt = recording.lm, recording.batch.rows()[i]
    before = 0 if lm.prefix is None else as_read(lm, tokens.pack(lm.tokenizer, [prompt], lm.device))[0].ids.shape[1]
    group = max(1, min(NUMBERS_AT_ONCE // (max(before, len(prompt)) * lm.d_mlp), LOGITS_AT_ONCE // lm.vocab_size))
    found = []
    for start in range(0, len(rows), group):
        some = rows[start : start + group]
        batch = tokens.pack(lm.tokenizer, [prompt] * len(some), lm.device)
        with intervene(lm, dict(_row_changes(recording, i, some, noise))):
            logits = lm.last_logits(batch)
        found.append(logits.double().softmax(-1)[:, ids.to(logits.device)].cpu())
    return torch.cat(found)


def _row_changes(recording: Recording, i: int, rows: Sequence[_Row], noise: Tensor) -> Iterator[tuple[Site, Fn]]:
    """Noise on the subject, and each row's restored states."""
    lm, (begin, end) = recording.lm, recording.spans[i]
    readers = lm.readers

    def unless_aside(fn: Fn) -> Fn:
        """A gate's own look at the prompt runs through the same hooks, but with other readers."""
        return lambda value: fn(value) if lm.readers is readers else value

    def corrupt(value: Tensor) -> Tensor:
        new = value.clone()
        for k, row in enumerate(rows):
            if row.sample >= 0:
                new[k, begin:end] = value[k, begin:end] + noise[row.sample].to(value)
        return new

    yield Site(0, "block_in"), unless_aside(corrupt)
    for site in (Site(layer, part) for layer in range(lm.n_layers) for part in SITES):
        picked = [(k, row.position) for k, row in enumerate(rows) if row.restores(site)]
        if picked:
            which, where = torch.tensor(picked).unbind(1)

            def put(value: Tensor, site: Site = site, which: Tensor = which, where: Tensor = where) -> Tensor:
                new = value.clone()
                which, where = which.to(value.device), where.to(value.device)
                new[which, where] = recording.part(site.layer, site.part)[i].to(value)[where]
                return new

            yield site, unless_aside(put)


# Numbers and rows of the frame ---------------------------------------------------------------------------------------


def _candidate_ids(recording: Recording, i: int) -> Int[Tensor, " candidate"]:
    return torch.tensor(list(recording.candidates[i].values()))


def _probabilities(
    lm: ModelAdapter, states: Float[Tensor, "n d_model"], ids: Int[Tensor, " candidate"]
) -> Float[Tensor, "n candidate"]:
    """By the model's own norm and head, from states after the last block; float64 on the CPU."""
    group = max(1, LOGITS_AT_ONCE // lm.vocab_size)
    found = []
    for start in range(0, len(states), group):
        logits = lm.unembed(states[start : start + group]).float()
        found.append((logits[:, ids.to(logits.device)] - logits.logsumexp(-1, keepdim=True)).double().exp().cpu())
    return torch.cat(found)


def _frame(recording: Recording, i: int, chosen: Sequence[Cell], traced: Traced, state: str) -> pd.DataFrame:
    """Rows by cell, position and candidate."""
    names = list(recording.candidates[i])
    labels = tokens.token_strings(recording.lm.tokenizer, recording.batch.rows()[i])
    rows = [
        (cell.layer, cell.site, position, name, labels[position])
        for cell in chosen
        for position in range(len(labels))
        for name in names
    ]
    frame = pd.DataFrame(rows, columns=["layer", "site", "position", "candidate", "token"])
    frame["state"], frame["case"] = state, recording.cases[i]
    frame["p_restored"] = traced.restored.flatten().numpy()
    for column, value in (("p_clean", traced.clean), ("p_corrupt", traced.corrupt)):
        frame[column] = value.expand_as(traced.restored).flatten().numpy()
    frame["effect"] = frame["p_restored"] - frame["p_corrupt"]
    return frames.check(frame, "trace")
