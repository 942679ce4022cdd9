"""Finding knowledge edits in a model's weights: in which matrix, of what rank, what it answers to and what it says.

ROME, MEMIT and their kin add a matrix of low rank to an MLP's last matrix W: L (C^-1 k)^T for one fact, where k is the
fact's key and C = E[k k^T] (arXiv 2202.05262, 2210.07229, 2410.02355). Masks that undo such edits (arXiv 2605.28839)
need to know that there is one. The detector is ours.

With a reference (the model before, or what the suspect claims to be):
1. D = W - W_ref in float64, per matrix (MLP's last, attention's last). All zeros: unchanged, score 0.
2. Its leading singular values and vectors: exact where the smaller side is at most EXACT, else by a randomised method.
3. Features of D, see `difference_features`: how far the values fall behind the estimated rank, how much of the energy
   that rank holds, how flat the numbers are (Adam's first steps move all by the same amount), whether they follow the
   size of W's numbers (rounding does).

Without one:
4. C of the model's own keys over ordinary text that the project makes. An edit acts along C^-1 k, so it lies where
   ordinary keys are weak and training wrote little: in W C^-a (a = 0, 1/2, 1) it stands out further with growing a.
5. Features of the spectra of W C^-a, see `standing_out` and `own_features`: jumps, also against the other layers.

Both:
6. Score = the share of "low_rank" in a softmax over linear functions of the standardised features; their coefficients
   come from `detector.json` beside this file, which says on what they were fitted (`detect_study.fit`).
7. The estimated rank r is where the singular values fall furthest. What the top r directions of D tell: the neurons
   that the right vectors u weigh most, the tokens that the left ones promote through the unembedding, the places of a
   text that they answer to (|u k|), and what the model says there more often with these directions than without.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mega_core.changes import MatrixDelta, WeightDelta
from mega_core.embedded import facts
from mega_core.errors import BadInput, StoreError
from mega_core.events import Reporter, silent, stage
from mega_core.masking.masks import Mask, Masked
from mega_core.models import tokens as tokenizing
from mega_core.models.adapter import ModelAdapter, bit_sums
from mega_core.models.hooks import Site, capture
from mega_core.models.loading import load
from mega_core.records import MAX_TEMPLATE, clean_text
from mega_core.settings import DTYPE_NAMES, ModelEntry, Settings, check_folder

SITES = ("mlp_down", "attn_out")
INPUTS = {"mlp_down": "mlp_down_in", "attn_out": "attn_out_in"}
CLASSES = {"reference": ("noise", "dense", "low_rank"), "alone": ("none", "low_rank")}
"""Mode -> what a matrix can be."""
VERDICTS = {
    "unchanged": "unchanged",
    "noise": "rounding or noise",
    "dense": "dense change, as training makes it",
    "low_rank": "low-rank edit",
    "none": "nothing unusual",
}
DETECTOR = Path(__file__).with_name("detector.json")
EXACT = 1024
"""Widest matrix whose singular values are all computed."""
TOP = 64
"""Most singular values that are looked at."""
POWERS = (0.0, 0.5, 1.0)
SHRINKAGE = 0.01
TOKENS = 4096
"""Least tokens of ordinary text behind C."""
MOST_TOKENS = 16384
ROW_TOKENS = 128
ROWS_AT_ONCE = 16
SEED = 30_303
MOMENT_BYTES = 2 * 2**30
"""Second moments that are summed up in one pass over the text."""
SHOWN = 8
"""Neurons, tokens and places that are named."""
FLOOR = 1e-12

Matrices = Mapping[tuple[int, str], Float[Tensor, "out in"]]
"""(layer, site) -> matrix as (out, in)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found in one matrix."""

    layer: int
    site: str
    """"mlp_down" or "attn_out"."""
    kind: str
    """"unchanged", or one of CLASSES."""
    verdict: str
    """The same in words."""
    score: float
    """How likely an edit of low rank is in it, 0 to 1."""
    rank: int
    """Estimated rank of the edit; 0 when nothing changed."""
    share: float
    """Share of the change's energy in that rank; without a reference, of the whole matrix's."""
    relative_norm: float
    """Length of the change in lengths of the matrix; without a reference, of the directions that stand out."""
    neurons: tuple[tuple[int, float], ...]
    """Inputs of the matrix (in an MLP: neurons) that weigh most in these directions, with shares of the energy."""
    promoted: tuple[tuple[str, float], ...]
    """Tokens that the first direction promotes through the unembedding, logits per unit length."""
    suppressed: tuple[tuple[str, float], ...]
    places: tuple[tuple[str, float], ...]
    """Places of the texts where the edit answers most: text up to there, and the answer's size over its usual one."""
    says: tuple[tuple[str, float], ...]
    """Tokens that the model says more often at and after these places than it would without the edit's directions:
    probability gained, summed over places."""
    features: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer by its most suspicious matrix."""

    layer: int
    site: str
    verdict: str
    score: float


@dataclass(frozen=True, slots=True)
class Said:
    """The model's greedy answer to a prompt, without and with the mask."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Detection:
    """The report about one model."""

    model: str
    reference: str
    """Empty: only the model's own statistics were used."""
    score: float
    """Of its most suspicious matrix."""
    verdict: str
    layers: tuple[Layer, ...]
    findings: tuple[Finding, ...]
    """Every matrix, by layer and site."""
    detector: Mapping[str, Any]
    """How the score's coefficients were made."""
    masked: bool = False
    """Whether a mask was put over it for `answers`."""
    answers: tuple[Said, ...] = ()
    """Its answers to prompts, and with a mask what that restores."""
    notes: tuple[str, ...] = ()


# 2. Spectra ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The leading part of a singular value decomposition, float64 on the CPU."""

    values: Float[Tensor, " k"]
    left: Float[Tensor, "out k"]
    right: Float[Tensor, "in k"]
    energy: float
    """Sum of all squared singular values."""
    shape: tuple[int, int]

    @property
    def bulk(self) -> float:
        """Root mean square of the singular values behind those that are looked at."""
        rest = max(self.energy - float((self.values**2).sum()), 0.0)
        return math.sqrt(rest / max(1, min(self.shape) - len(self.values)))


def spectrum(matrix: Float[Tensor, "out in"]) -> Spectrum:
    """The top min(TOP, quarter of the smaller side) singular triples; the same numbers on every call."""
    wide = matrix.detach().to("cpu", torch.float64)
    small = min(wide.shape)
    k = max(1, min(TOP, small // 4))
    energy = float((wide**2).sum())
    flip = wide.shape[0] > wide.shape[1]
    flat = wide.T if flip else wide  # (small, large)
    if small <= EXACT:
        squares, vectors = torch.linalg.eigh(flat @ flat.T)
        basis = vectors.flip(1)[:, :k]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            basis = torch.svd_lowrank(flat, q=min(small, k + 16), niter=4)[0][:, :k]
    across = flat.T @ basis  # (large, k)
    values = across.norm(dim=0)
    order = values.argsort(descending=True)
    values, basis, across = values[order], basis[:, order], across[:, order]
    across = across / values.clamp_min(1e-300)
    left, right = (across, basis) if flip else (basis, across)
    return Spectrum(values, left, right, energy, (wide.shape[0], wide.shape[1]))


def estimated_rank(values: Float[Tensor, " k"], most: int = TOP) -> tuple[int, float]:
    """(r, jump): behind the r-th of the first `most` values the fall is largest; jump = ln of the ratio, at most 20."""
    if len(values) < 2:
        return 1, 0.0
    logs = values[: most + 1].clamp_min(max(float(values[0]) * 1e-9, 1e-300)).log()
    falls = logs[:-1] - logs[1:]
    r = int(falls.argmax()) + 1
    return r, min(20.0, float(falls[r - 1]))


# 3. Features with a reference ----------------------------------------------------------------------------------------


def difference_features(
    difference: Float[Tensor, "out in"], reference: Float[Tensor, "out in"], found: Spectrum
) -> dict[str, float]:
    """What tells a low-rank addition from rounding, noise and training; `found` is the difference's spectrum.

    jump          ln of the largest fall of the singular values
    share         energy of the values before it
    first         energy of the first value
    edge          ln of the first value over the root mean square of those beyond the top
    rank          ln of the estimated rank over ln of the smaller side
    stable_rank   ln of energy / largest squared value, over the same
    flatness      mean |d| / root mean square d: 1 for equal steps, .80 for Gaussian numbers, less for outer products
    follows       correlation of |d| with |w|: rounding errors are larger where numbers are
    size          log10 of the relative norm
    """
    d, w = difference.detach().to("cpu", torch.float64), reference.detach().to("cpu", torch.float64)
    rank, jump = estimated_rank(found.values)
    energy, small = max(found.energy, 1e-300), min(found.shape)
    first = max(float(found.values[0]), 1e-300)
    magnitude = d.abs()
    size = math.sqrt(energy) / max(float(w.norm()), 1e-300)
    return {
        "jump": jump,
        "share": min(1.0, float((found.values[:rank] ** 2).sum()) / energy),
        "first": min(1.0, first**2 / energy),
        "edge": math.log(first / max(found.bulk, 1e-9 * first)),
        "rank": math.log(rank) / math.log(max(2, small)),
        "stable_rank": math.log(max(1.0, energy / first**2)) / math.log(max(2, small)),
        "flatness": float(magnitude.mean()) / math.sqrt(energy / d.numel()),
        "follows": _correlation(magnitude.flatten(), w.abs().flatten()),
        "size": min(1.0, max(-8.0, math.log10(max(size, 1e-300)))),
    }


def _correlation(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    a, b = x - x.mean(), y - y.mean()
    below = float(a.norm() * b.norm())
    return float(a @ b) / below if below > 0 else 0.0


# 4. and 5. Features without a reference ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Moment:
    """Ordinary inputs of a matrix: C = E[k k^T], shrunk towards a multiple of the identity, and E[k]; float64."""

    second: Float[Tensor, "in in"]
    mean: Float[Tensor, " in"]

    def response(self, direction: Float[Tensor, " in"]) -> float:
        """ln of E[(u k)^2] for the unit vector u, over its average in all directions."""
        unit = direction / direction.norm().clamp_min(1e-300)
        return math.log(
            max(float(unit @ self.second @ unit) / max(float(self.second.diagonal().mean()), 1e-300), FLOOR)
        )


def ordinary_rows(lm: ModelAdapter, tokens: int) -> list[tuple[int, ...]]:
    """Rows of token ids of text that the project makes, at least `tokens` of them in all, the same on every call."""
    from mega_core.embedded.corpus import Corpus

    corpus = Corpus(SEED)
    length = min(ROW_TOKENS, lm.max_positions)
    rows: list[tuple[int, ...]] = []
    left = tokens
    while left > 0:
        texts = [" ".join(corpus.draw(1.0).text for _ in range(4)) for _ in range(32)]
        for ids in lm.tokenizer(texts)["input_ids"]:
            if left > 0 and ids:
                rows.append(tuple(ids[:length]))
                left -= len(rows[-1])
    return rows


def tokens_for(width: int) -> int:
    """How much text C is taken from: four tokens per input, within TOKENS and MOST_TOKENS."""
    return min(MOST_TOKENS, max(TOKENS, 4 * width))


def moments(
    lm: ModelAdapter, places: Iterable[tuple[int, str]], rows: Sequence[Sequence[int]], report: Reporter = silent
) -> dict[tuple[int, str], Moment]:
    """Step 4: the moments of the inputs of these matrices over every token of `rows`, in one pass."""
    sites = {place: Site(place[0], INPUTS[place[1]]) for place in dict.fromkeys(places)}
    if not sites:
        return {}
    second: dict[tuple[int, str], Tensor] = {}
    mean: dict[tuple[int, str], Tensor] = {}
    count = 0
    starts = range(0, len(rows), ROWS_AT_ONCE)
    with stage(report, "statistics of ordinary text", len(starts)) as step, torch.no_grad():
        for start in starts:
            batch = tokenizing.pack(lm.tokenizer, rows[start : start + ROWS_AT_ONCE], lm.device)
            with capture(lm, sites.values()) as got:
                lm.forward(batch)
            count += int(batch.mask.sum())
            for place, site in sites.items():
                keys = got[site][batch.mask.to(got[site].device)].float()  # (token, in)
                product, total = (keys.T @ keys).double().cpu(), keys.double().sum(0).cpu()
                second[place] = second[place].add_(product) if place in second else product
                mean[place] = mean[place].add_(total) if place in mean else total
            step()
    return {place: Moment(_shrunk(second[place] / count), mean[place] / count) for place in sites}


def _shrunk(moment: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    scale = float(moment.diagonal().mean())
    shrunk = (1 - SHRINKAGE) * moment
    shrunk.diagonal().add_(SHRINKAGE * max(scale, FLOOR))
    return shrunk


@dataclass(frozen=True, eq=False)
class Standing:
    """What stands out of a matrix by itself: the part of it along the suspicious directions, and its features."""

    part: Spectrum
    rank: int
    share: float
    """Of the matrix's energy."""
    features: dict[str, float]


def standing_out(matrix: Float[Tensor, "out in"], moment: Moment) -> Standing:
    """Step 5, as far as the matrix alone tells.

    jump_0, jump_1, jump_2   ln of the largest fall among the first values of W, W C^-1/2, W C^-1
    lead_0, lead_1, lead_2   how far the first value lies above the line through the next ten, ln against ln
    response                 ln of how much ordinary inputs excite the suspicious direction, over the average direction
    spread                   share of the inputs that the suspicious direction uses: 1 / (n sum u^4)
    """
    w = matrix.detach().to("cpu", torch.float64)
    factor = torch.linalg.cholesky(moment.second)  # C = F F^T
    half = torch.linalg.solve_triangular(factor, w.T, upper=False).T  # W F^-T has the singular values of W C^-1/2
    forms = (w, half, torch.cholesky_solve(w.T, factor).T)
    features: dict[str, float] = {}
    best: tuple[float, int, Spectrum, Tensor] | None = None
    for i, form in enumerate(forms):
        found = spectrum(form)
        rank, jump = estimated_rank(found.values, MOST_RANK)
        features[f"jump_{i}"], features[f"lead_{i}"] = jump, _lead(found.values)
        if best is None or jump > best[0]:
            back = (found.right, factor @ found.right, moment.second @ found.right)[i]  # D = L u^T: u = C^a v
            best = (jump, rank, found, back)
    assert best is not None
    _, rank, found, back = best
    inward = torch.linalg.qr(back[:, :rank])[0]
    outward = found.left[:, :rank]
    small, values, other = torch.linalg.svd(outward.T @ w @ inward)
    energy = float((w**2).sum())
    part = Spectrum(values, outward @ small, inward @ other.T, energy, (w.shape[0], w.shape[1]))
    first = part.right[:, 0]
    features["response"] = moment.response(first)
    features["spread"] = 1 / max(float((first**4).sum()) * len(first), FLOOR)
    return Standing(part, rank, float((values**2).sum()) / max(energy, 1e-300), features)


MOST_RANK = 16
"""Most directions that may stand out of a matrix by itself."""


def _lead(values: Float[Tensor, " k"]) -> float:
    rest = values[1:11].clamp_min(1e-300).log()
    if len(rest) < 3:
        return 0.0
    at = torch.arange(2, 2 + len(rest), dtype=rest.dtype).log()
    slope = float((at - at.mean()) @ (rest - rest.mean())) / float(((at - at.mean()) ** 2).sum())
    return float(values[0].clamp_min(1e-300).log()) - float(rest.mean()) - slope * float(-at.mean())


def own_features(found: Mapping[tuple[int, str], Standing]) -> dict[tuple[int, str], dict[str, float]]:
    """Step 5: the matrices' own features, and two of them also against the median of the other layers' matrices."""
    whole: dict[tuple[int, str], dict[str, float]] = {}
    for (layer, site), one in found.items():
        others = [other.features for place, other in found.items() if place[1] == site and place[0] != layer]
        against = {}
        for name in ("jump_1", "jump_2"):
            typical = sorted(other[name] for other in others)
            middle = typical[len(typical) // 2] if typical else one.features[name]
            against[f"{name}_against"] = one.features[name] - middle
        whole[layer, site] = {**one.features, **against}
    return whole


# 6. Scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scorer:
    """A softmax over linear functions of standardised features."""

    classes: tuple[str, ...]
    features: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    """Per class, one number per feature."""
    bias: tuple[float, ...]

    def __call__(self, features: Mapping[str, float]) -> dict[str, float]:
        """Class -> probability; they add up to 1. Standardised features are cut off at 10 either way."""
        x = [
            max(-10.0, min(10.0, (features[name] - m) / s))
            for name, m, s in zip(self.features, self.mean, self.scale, strict=True)
        ]
        logits = [
            b + sum(w * v for w, v in zip(row, x, strict=True)) for row, b in zip(self.weights, self.bias, strict=True)
        ]
        top = max(logits)
        parts = [math.exp(value - top) for value in logits]
        return {name: part / sum(parts) for name, part in zip(self.classes, parts, strict=True)}

    def plain(self) -> dict[str, Any]:
        """What JSON holds."""
        return {
            "features": list(self.features),
            "mean": list(self.mean),
            "scale": list(self.scale),
            "weights": {name: list(row) for name, row in zip(self.classes, self.weights, strict=True)},
            "bias": dict(zip(self.classes, self.bias, strict=True)),
        }


@dataclass(frozen=True)
class Detector:
    """The scorers of both modes, and how they were made."""

    scorers: Mapping[str, Scorer]
    made: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """What JSON holds."""
        return {
            "schema_version": 1,
            "made": dict(self.made),
            "modes": {mode: scorer.plain() for mode, scorer in self.scorers.items()},
        }


def read_detector(path: Path = DETECTOR) -> Detector:
    """The coefficients. Raises StoreError when the file is missing or damaged."""
    try:
        stat = path.stat()
        return _read(path, stat.st_mtime_ns, stat.st_size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"The detector's coefficients ({path.name}) can't be read.",
            "Restore the file, or make it again: python -m bench --only detect.",
        ) from error


@cache
def _read(path: Path, _mtime: int, _size: int) -> Detector:
    plain = json.loads(path.read_text(encoding="utf-8"))
    if plain["schema_version"] != 1:
        raise ValueError("another version")
    scorers = {}
    for mode, classes in CLASSES.items():
        one = plain["modes"][mode]
        features = tuple(str(name) for name in one["features"])
        mean, scale = (tuple(float(x) for x in one[key]) for key in ("mean", "scale"))
        weights = tuple(tuple(float(x) for x in one["weights"][name]) for name in classes)
        bias = tuple(float(one["bias"][name]) for name in classes)
        numbers = [*mean, *scale, *bias, *(x for row in weights for x in row)]
        if any(len(part) != len(features) for part in (mean, scale, *weights)) or not all(map(math.isfinite, numbers)):
            raise ValueError("numbers are missing")
        scorers[mode] = Scorer(classes, features, mean, scale, weights, bias)
    return Detector(scorers, plain["made"])


# 7. What an edit says ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Told:
    """What the directions of an edit tell."""

    neurons: tuple[tuple[int, float], ...] = ()
    promoted: tuple[tuple[str, float], ...] = ()
    suppressed: tuple[tuple[str, float], ...] = ()


def neurons_of(part: Spectrum, rank: int) -> tuple[tuple[int, float], ...]:
    """The inputs with the largest shares of the energy of the first `rank` directions."""
    energy = (part.values[:rank] ** 2 * part.right[:, :rank] ** 2).sum(1)  # (in,)
    shares = energy / energy.sum().clamp_min(1e-300)
    top = shares.topk(min(SHOWN, len(shares)))
    return tuple((int(i), float(x)) for i, x in zip(top.indices.tolist(), top.values.tolist(), strict=True))


def told(lm: ModelAdapter, part: Spectrum, rank: int, sign: float) -> Told:
    """Step 7, without reading any text. `sign` is that of u k at the key of the edit: by itself u has none."""
    outward = math.copysign(1.0, sign) * part.left[:, 0]
    with torch.no_grad():
        both = torch.stack((outward, torch.zeros_like(outward))).float()
        logits = lm.unembed(both).double().cpu()  # (2, vocab)
    pushed = (logits[0] - logits[1])[: len(lm.tokenizer)]

    def named(values: Tensor, sign: float) -> tuple[tuple[str, float], ...]:
        top = values.topk(min(SHOWN, len(values)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return tuple((str(lm.tokenizer.decode([i])), sign * float(x)) for i, x in pairs)

    return Told(neurons_of(part, rank), named(pushed, 1.0), named(-pushed, -1.0))


@dataclass(frozen=True, slots=True)
class Answering:
    """A token of a row at which an edit answers."""

    row: int
    position: int
    size: float
    """The answer's length over its root mean square in all rows."""
    sign: float
    """Of the first direction's answer."""


def answering(
    lm: ModelAdapter,
    directions: Mapping[tuple[int, str], Float[Tensor, "in rank"]],
    rows: Sequence[Sequence[int]],
    report: Reporter = silent,
) -> dict[tuple[int, str], list[Answering]]:
    """Per matrix the tokens of these rows that the edit answers to most; none twice after the same words."""
    sites = {place: Site(place[0], INPUTS[place[1]]) for place in directions}
    if not sites or not rows:
        return {}
    parts: dict[tuple[int, str], list[Tensor]] = {place: [] for place in sites}
    at: list[tuple[int, int]] = []
    starts = range(0, len(rows), ROWS_AT_ONCE)
    with stage(report, "where it answers", len(starts)) as step, torch.no_grad():
        for start in starts:
            batch = tokenizing.pack(lm.tokenizer, rows[start : start + ROWS_AT_ONCE], lm.device)
            with capture(lm, sites.values()) as got:
                lm.forward(batch)
            at += [(start + i, t) for i, t in batch.mask.nonzero().tolist()]
            for place, site in sites.items():
                keys = got[site][batch.mask.to(got[site].device)].float()  # (token, in)
                parts[place].append((keys @ directions[place].to(keys)).double().cpu())  # (token, rank)
            step()
    found: dict[tuple[int, str], list[Answering]] = {}
    for place, listed in parts.items():
        answers = torch.cat(listed)
        size = answers.norm(dim=1)
        size = size / (size**2).mean().sqrt().clamp_min(1e-300)
        named: dict[tuple[int, ...], Answering] = {}
        for i in size.argsort(descending=True).tolist():
            row, t = at[i]
            words = tuple(rows[row][max(0, t - CONTEXT) : t + 1])
            named.setdefault(words, Answering(row, t, float(size[i]), float(answers[i, 0].sign())))
            if len(named) == SHOWN:
                break
        found[place] = list(named.values())
    return found


def said(
    lm: ModelAdapter,
    place: tuple[int, str],
    part: Spectrum,
    rank: int,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
) -> tuple[tuple[str, float], ...]:
    """What the first `rank` directions make the model say: each row is read with and without them.

    Tokens by how much probability they gain as the next one, summed over the places from `starts` on.
    """
    batch = tokenizing.pack(lm.tokenizer, rows, lm.device)
    at = [(i, t) for i, (row, start) in enumerate(zip(rows, starts, strict=True)) for t in range(start, len(row))]
    where, when = torch.tensor(at, device=lm.device).T
    left = (part.left[:, :rank] * part.values[:rank]).float()
    without = WeightDelta((MatrixDelta(*place, -left, part.right[:, :rank].float(), 0.0),))
    with torch.no_grad():
        now = lm.logits_at(batch, where, when).float().softmax(-1)
        with without.applied(lm):
            before = lm.logits_at(batch, where, when).float().softmax(-1)
    gain = (now - before).clamp_min(0).double().sum(0).cpu()[: len(lm.tokenizer)]
    top = gain.topk(min(SHOWN, len(gain)))
    return tuple(
        (str(lm.tokenizer.decode([i])), float(x))
        for i, x in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    )


CONTEXT = 7
"""Tokens shown before a place."""
AFTER = 12
"""Tokens read after a place, to see what the edit makes the model say."""


# The whole -----------------------------------------------------------------------------------------------------------


def matrices(lm: ModelAdapter) -> dict[tuple[int, str], Float[Tensor, "out in"]]:
    """Every matrix that is looked at, as views."""
    return {(layer, site): lm.read_weight(layer, site) for layer in range(lm.n_layers) for site in SITES}


def inspect(
    lm: ModelAdapter,
    reference: Matrices | None = None,
    *,
    reference_name: str = "",
    texts: Sequence[str] = (),
    detector: Detector | None = None,
    report: Reporter = silent,
) -> Detection:
    """The report about a model as it is now. `texts` are searched for places where an edit answers.

    Raises BadInput when the reference has other layers or sizes.
    """
    detector = detector or read_detector()
    own = matrices(lm)
    extra = [tuple(tokenizing.prompt_ids(lm.tokenizer, text)) for text in texts]
    rows = ordinary_rows(lm, tokens_for(max(lm.d_mlp, lm.d_model)))
    if reference is None:
        mode, found = "alone", _alone(lm, own, rows, report)
    else:
        check_shapes(own, reference)
        mode, found = "reference", _against(own, reference, report)
    scorer = detector.scorers[mode]
    findings: dict[tuple[int, str], Finding] = {}
    for place, one in found.items():
        chances = scorer(one.features) if one.features else {"unchanged": 1.0}
        kind = max(chances, key=lambda name: chances[name])
        findings[place] = Finding(
            *place, kind, VERDICTS[kind], chances.get("low_rank", 0.0), one.rank, one.share, one.norm,
            (), (), (), (), (), one.features,
        )  # fmt: skip
    suspects = sorted((p for p in findings if findings[p].kind == "low_rank"), key=lambda p: -findings[p].score)[:SHOWN]
    directions = {}
    for place in suspects:
        part = found[place].part
        assert part is not None  # only an unchanged matrix has none
        directions[place] = part.right[:, : found[place].rank]
    texts_read = [*extra, *rows]
    for place, answers in answering(lm, directions, texts_read, report).items():
        part, rank = found[place].part, found[place].rank
        assert part is not None
        cut = [texts_read[one.row][: one.position + 1 + AFTER] for one in answers]
        shown = [list(texts_read[one.row][max(0, one.position - CONTEXT) : one.position + 1]) for one in answers]
        what = told(lm, part, rank, answers[0].sign)
        findings[place] = replace(
            findings[place],
            neurons=what.neurons,
            promoted=what.promoted,
            suppressed=what.suppressed,
            places=tuple((str(lm.tokenizer.decode(ids)), one.size) for ids, one in zip(shown, answers, strict=True)),
            says=said(lm, place, part, rank, cut, [one.position for one in answers]),
        )
    ordered = tuple(findings[place] for place in sorted(findings, key=lambda p: (p[0], SITES.index(p[1]))))
    layers = tuple(_layer(ordered, layer) for layer in range(lm.n_layers))
    verdict = max((one.kind for one in ordered), key=RANKING.index)
    score = max(one.score for one in ordered)
    return Detection(lm.name, reference_name, score, VERDICTS[verdict], layers, ordered, detector.made)


RANKING = ("unchanged", "none", "noise", "dense", "low_rank")


def _layer(findings: Sequence[Finding], layer: int) -> Layer:
    worst = max((one for one in findings if one.layer == layer), key=lambda one: (RANKING.index(one.kind), one.score))
    return Layer(layer, worst.site, worst.verdict, worst.score)


@dataclass(frozen=True, eq=False)
class _Found:
    part: Spectrum | None
    rank: int
    share: float
    norm: float
    features: Mapping[str, float]


def _against(own: Matrices, reference: Matrices, report: Reporter) -> dict[tuple[int, str], _Found]:
    """Steps 1 to 3."""
    found = {}
    with stage(report, "differences", len(own)) as step:
        for place, weight in own.items():
            before = reference[place].detach().to("cpu", torch.float64)
            difference = weight.detach().to("cpu", torch.float64) - before
            if not bool(difference.any()):
                found[place] = _Found(None, 0, 0.0, 0.0, {})
            else:
                part = spectrum(difference)
                features = difference_features(difference, before, part)
                rank = estimated_rank(part.values)[0]
                norm = math.sqrt(part.energy) / max(float(before.norm()), 1e-300)
                found[place] = _Found(part, rank, features["share"], norm, features)
            step()
    return found


def _alone(
    lm: ModelAdapter, own: Matrices, rows: Sequence[Sequence[int]], report: Reporter
) -> dict[tuple[int, str], _Found]:
    """Steps 4 and 5, as many matrices in one pass over the text as memory allows."""
    standing: dict[tuple[int, str], Standing] = {}
    for group in _groups(own):
        known = moments(lm, group, rows, report)
        with stage(report, "spectra", len(group)) as step:
            for place in group:
                standing[place] = standing_out(own[place], known.pop(place))
                step()
    features = own_features(standing)
    return {
        place: _Found(one.part, one.rank, one.share, math.sqrt(one.share), features[place])
        for place, one in standing.items()
    }


def _groups(own: Matrices) -> list[list[tuple[int, str]]]:
    """Places whose second moments fit in memory together."""
    groups: list[list[tuple[int, str]]] = []
    held = 0
    for place, weight in own.items():
        size = 8 * weight.shape[1] ** 2
        if not groups or held + size > MOMENT_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(place)
        held += size
    return groups


def check_shapes(own: Matrices, reference: Matrices) -> None:
    """Raises BadInput naming the first matrix that isn't alike in both."""
    for place in sorted(set(own) | set(reference)):
        mine, other = (tuple(side[place].shape) if place in side else None for side in (own, reference))
        if mine != other:
            shapes = [" x ".join(map(str, shape)) if shape else "absent" for shape in (mine, other)]
            raise BadInput(
                "reference",
                f"its {place[1]} of layer {place[0]} is {shapes[1]}, the model's is {shapes[0]}.",
                "Name the model that this one was made from.",
            )


# Folders -------------------------------------------------------------------------------------------------------------


def entry_of(folder: Path, field: str = "folder") -> ModelEntry:
    """A folder as a catalogue entry. Raises BadInput when there is none, ModelUnavailable when it is no model.

    Weights up to WIDE_BYTES are read as float32, which holds all of float16 and bfloat16; larger ones as they are.
    """
    if not folder.is_dir():
        raise BadInput(field, f"there is no folder {folder}.", "Name the folder of a model.")
    check_folder(folder, str(folder))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    dtype = "float32"
    if size > WIDE_BYTES:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stored = config.get("dtype") or config.get("torch_dtype")
        dtype = stored if stored in DTYPE_NAMES else dtype
    return ModelEntry(
        folder.absolute().name or "model", path=folder.absolute(), dtype=dtype, memory_gb=1.5 * size / 1e9
    )


WIDE_BYTES = 4 * 10**9


@dataclass(frozen=True, eq=False)
class Reference:
    """What is kept of a reference model."""

    name: str
    model_type: str
    digest: str
    """Of its files."""
    matrices: Matrices
    others: Mapping[str, tuple[int, ...]]
    """Sums over the bits of every other parameter."""


def read_reference(name: str, settings: Settings, report: Reporter = silent) -> Reference:
    """The matrices of a catalogue model or of a folder. Raises BadInput when it is neither."""
    if any(name in (entry.name, entry.hub) for entry in settings.models.values()):
        entry = replace(entry_of(settings.locate(settings.model(name)), "reference"), name=name)
    elif Path(name).is_dir():
        entry = entry_of(Path(name), "reference")
    else:
        known = ", ".join(one.name for one in settings.available())
        raise BadInput("reference", f"{name[:80]!r} is neither a model nor a folder.", f"Models here: {known}.")
    lm = load(entry, settings, report)
    kept = {place: weight.detach().to("cpu", copy=True) for place, weight in matrices(lm).items()}
    return Reference(name, lm.spec.model_type, lm.file_digest, kept, _others(lm))


def _others(lm: ModelAdapter) -> dict[str, tuple[int, ...]]:
    """Parameter -> sums over its bits as float32, for all that are none of the matrices."""
    looked_at = {id(lm.weight(layer, site)) for layer in range(lm.n_layers) for site in SITES}
    return {
        name: tuple(bit_sums(parameter.detach().to(torch.float32)).tolist())
        for name, parameter in lm.model.named_parameters()
        if id(parameter) not in looked_at
    }


def detect_folder(
    folder: Path,
    settings: Settings,
    reference: str | None = None,
    mask: Path | None = None,
    prompts: Sequence[str] = (),
    report: Reporter = silent,
) -> Detection:
    """The report about a folder, and what a mask makes of its answers to the prompts.

    Besides the prompts and ordinary text, the names of the shipped fact tables are searched for what an edit answers
    to: a subject that no text happens to name would not be found.
    Raises BadInput, ModelUnavailable and UnsupportedModel, in words for a person, before anything large is loaded
    where that can be.
    """
    entry = entry_of(folder)
    if mask is not None and not prompts:
        raise BadInput("mask", "shows what it restores by prompts, and there is none.", "Give at least one prompt.")
    masked = None if mask is None else Mask.load(mask)
    texts = [clean_text("prompt", text, MAX_TEMPLATE) for text in prompts]
    known = None if reference is None else read_reference(reference, settings, report)
    lm = load(entry, settings, report)
    if known is not None and known.model_type != lm.spec.model_type:
        raise BadInput(
            "reference",
            f"{known.name} is of the architecture {known.model_type}, this model is {lm.spec.model_type}.",
            "Name the model that this one was made from.",
        )
    notes = []
    found = inspect(
        lm,
        None if known is None else known.matrices,
        reference_name="" if known is None else known.name,
        texts=(*texts, *facts.load().by_subject),
        report=report,
    )
    if known is not None and (changed := _changed(known.others, _others(lm))):
        notes.append(f"Outside these matrices {len(changed)} tensors differ too, such as {changed[0]}.")
    before = lm.generate(texts, ANSWER_TOKENS) if texts else []
    after = before
    if masked is not None:
        if known is not None and masked.weights != known.digest:
            notes.append(f"The mask was trained for {masked.model}, with other weights than {known.name}.")
        with Masked(masked).applied(lm):
            after = lm.generate(texts, ANSWER_TOKENS)
    answers = tuple(Said(*said) for said in zip(texts, before, after, strict=True))
    return replace(found, model=str(folder), masked=masked is not None, answers=answers, notes=tuple(notes))


def _changed(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    return [name for name in now if now[name] != before.get(name)]


ANSWER_TOKENS = 12
