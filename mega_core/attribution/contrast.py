"""Contrast: which modules edits move when they work, and how that differs from edits that fail.

Stage A of MEGA (Cao, Wang, Schuetze 2026, arXiv 2603.20795): its abstract says that attribution after an edit contrasts
successes with failures; the formulas below, and all that turns curves into layers, are ours. I(w) is a module's
contribution to candidate w (see nlka), S = 1 where the edit succeeded.

1. Per editor, module m (attn, ffn), layer l, candidate w (new, true), in nats:
       C = mean_{S=1} I_after - mean_{S=0} I_after                            post contrast
       D = mean_{S=1} (I_after - I_before)                                    what an edit moved
       K = mean_{S=1} (I_after - I_before) - mean_{S=0} (I_after - I_before)  controlled: less what the groups
                                                                              differed by before
2. Bootstrap: edits are drawn with replacement, an edit with all its runs, the same draws for all editors. Intervals
   are the 2.5 and 97.5 percentiles; draws in which a group is empty don't count.
3. Failures: C and K are absent with fewer than FEWEST_FAILURES. Failures may be induced (the same editor, made worse on
   purpose); then every row says how.
4. Leverage of a layer, X being D, K or C:  max(0, X^{attn,l}(new)) + beta max(0, -X^{attn,l}(true)). What MLPs do is
   shown, not steered. Editors are averaged after each curve is divided by its standard deviation over the layers; the
   mean is counted from its lowest layer, because a z-score has negative values and a mass has none.
5. Region: the curve smoothed by a mean of neighbours (3 wide); among the layers from floor(first L) to the last but
   `drop_last` those with most, until they hold `mass` of what all of these have; at least `fewest`, at most `cap`.
   A model of at most SMALL layers keeps its last layers: without them and under a cap of ceil(L / 6) an eight-layer
   model would be steered in two layers, and fewer than three rarely carry an edit.
6. For ACE: value layers are the neighbouring layers of the upper half, the last layer left out, whose MLPs gained most
   (4. with ffn). Query layers end right below the lowest layer whose attention has READING of the highest leverage, and
   below the value layers: what attention reads at the subject there must have been written by MLPs further down. On the
   embedded models this gives layers 2-3, where they are known to look facts up.
7. The published pattern, from sums over layers: late attention (from floor(first L) on) promotes the new object, by
   more than everything else together, and both attention and MLPs suppress the old one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor

import numpy as np
import numpy.typing as npt
import pandas as pd

from mega_core import frames
from mega_core.errors import ActionableError, BadInput, FrameError
from mega_core.regions import Claim

Array = npt.NDArray[np.float64]
Taken = npt.NDArray[np.bool_]
_Mean = tuple[Array, Array]
"""A mean, and the same for every draw of edits."""

MODULES = ("attn", "ffn")
CANDIDATES = ("new", "true")
BASES = ("D", "K", "C")
LABELS = {"argmax": "success", "likelier": "likelier"}
"""What counts as a success -> the column of `contrast_runs`: the new object is the most likely, or likelier than the
old one."""
FEWEST_FAILURES = 10
RESAMPLES = 1000
ALL = "all"
"""The editor of rows that average over editors."""
NATURAL, NO_FAILURES = "natural", "none"
"""Where failures come from: they happened; or they play no part (D)."""
READING = 0.1
SMALL = 12
WIDEST = 3


@dataclass(frozen=True, slots=True)
class Rules:
    """From curves to layers; all ours. None: by the number of layers."""

    basis: str = "D"
    beta: float = 1.0
    """Weight of holding down the old object against raising the new one."""
    mass: float = 0.5
    first: float = 0.4
    """Share of the depth below which nothing is steered."""
    cap: int | None = None
    drop_last: int | None = None
    fewest: int = 3
    smooth: int = 3
    """Width of the mean of neighbours; 1 for none."""

    def __post_init__(self) -> None:
        if self.basis not in BASES:
            raise BadInput("basis", f"there is no {self.basis[:20]!r}.", f"Choose one of: {', '.join(BASES)}.")

    def most(self, n_layers: int) -> int:
        """Most layers of a region."""
        return max(self.fewest, ceil(n_layers / 6)) if self.cap is None else self.cap

    def eligible(self, n_layers: int) -> range:
        """Layers that a region may have; never fewer than `fewest` where the model has them."""
        dropped = (2 if n_layers > SMALL else 0) if self.drop_last is None else self.drop_last
        end = max(1, n_layers - dropped)
        return range(max(0, min(self.start(n_layers), end - self.fewest)), end)

    def start(self, n_layers: int) -> int:
        """The first late layer."""
        return floor(self.first * n_layers)


@dataclass(frozen=True)
class Contrast:
    """Everything that was found, as frames (see frames.py), and the layers that follow from it."""

    frames: Mapping[str, pd.DataFrame]
    """contrast, contrast_sums, leverage."""
    layers: tuple[int, ...]
    """The region."""
    value_layers: tuple[int, ...]
    query_layers: tuple[int, ...]
    n_layers: int


@dataclass(frozen=True)
class _Curve:
    """A statistic of one editor: [module, layer, candidate], and the same for every draw of edits."""

    point: Array
    draws: Array
    """[draw, module, layer, candidate]; NaN where a group is empty."""
    successes: int
    failures: int


def contrast(
    runs: pd.DataFrame,
    scores: pd.DataFrame,
    rules: Rules | None = None,
    *,
    label: str = "argmax",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Contrast:
    """Steps 1 to 6 from the frames `contrast_runs` and `run_scores`.

    Raises BadInput on a label that is none, ActionableError where no editor has what the basis needs, FrameError on a
    run without all its scores.
    """
    rules = rules or Rules()
    if label not in LABELS:
        raise BadInput("label", f"there is no {label[:20]!r}.", f"Choose one of: {', '.join(LABELS)}.")
    runs, scores = frames.check(runs, "contrast_runs"), frames.check(scores, "run_scores")
    curves = _curves(runs, scores, LABELS[label], resamples, seed)
    if not curves:
        raise ActionableError("No edit succeeded, so there is nothing to look at.", "Use other editors or settings.")
    n_layers = next(iter(curves.values())).point.shape[1]
    used = _of_basis(curves, rules.basis)
    levers, gains = ({name: _leverage(curve, m, rules.beta) for name, curve in used.items()} for m in range(2))
    if not levers:
        raise ActionableError(
            f"No editor has {FEWEST_FAILURES} failures, which {rules.basis} needs.",
            "Take basis D, more edits, or induce failures.",
        )
    point, draws = _mean_of_editors(levers)
    if not point.any():
        raise ActionableError("No layer gained any leverage.", "Use other editors, or more edits.")
    gain, gain_draws = _mean_of_editors(gains)
    layers, values = region(point, rules), value_layers(gain)
    found = {
        "contrast": _contrast_frame(curves),
        "contrast_sums": _sums_frame(curves, rules.start(n_layers)),
        "leverage": _leverage_frame(
            {"attn": {**levers, ALL: (point, draws)}, "ffn": {**gains, ALL: (gain, gain_draws)}}, rules
        ),
    }
    return Contrast(found, layers, values, query_layers(point, values), n_layers)


# 1. to 3. Curves -----------------------------------------------------------------------------------------------------


def _curves(
    runs: pd.DataFrame, scores: pd.DataFrame, success: str, resamples: int, seed: int
) -> dict[tuple[str, str, str], _Curve]:
    """(editor, statistic, failures) -> curve; what can't be known is absent."""
    edits = np.sort(runs["edit"].unique())
    draw = np.random.default_rng(seed)
    weights = draw.multinomial(len(edits), np.full(len(edits), 1 / len(edits)), size=resamples).astype(float)
    found: dict[tuple[str, str, str], _Curve] = {}
    for editor in runs["editor"].unique():
        mine = runs[runs["editor"] == editor]
        natural = mine[mine["induced"] == ""]
        good = natural.loc[natural[success], "edit"].to_numpy()
        bad = natural.loc[~natural[success], "edit"].to_numpy()
        if not len(good):
            continue
        known = scores[scores["editor"] == editor]
        after, moved = _values(known[known["induced"] == ""], good)
        up_after, up_moved = _group(after, good, edits, weights), _group(moved, good, edits, weights)
        found[editor, "D", NO_FAILURES] = _Curve(*up_moved, len(good), len(bad))
        failing = {NATURAL: ("", bad)}
        for way in mine.loc[mine["induced"] != "", "induced"].unique():
            worse = mine[mine["induced"] == way]
            failing[f"induced: {way}"] = (way, worse.loc[~worse[success], "edit"].to_numpy())
        for kind, (way, failed) in failing.items():
            if len(failed) < FEWEST_FAILURES:
                continue
            after, moved = _values(known[known["induced"] == way], failed)
            for name, (point, draws), down in (
                ("C", up_after, _group(after, failed, edits, weights)),
                ("K", up_moved, _group(moved, failed, edits, weights)),
            ):
                found[editor, name, kind] = _Curve(point - down[0], draws - down[1], len(good), len(failed))
    return found


def _values(scores: pd.DataFrame, edits: npt.NDArray[np.int64]) -> tuple[Array, Array]:
    """(I_after, I_after - I_before) of these edits, each [edit, module, layer, candidate]."""
    mine = scores[scores["edit"].isin(edits)].sort_values(["edit", "state", "module", "layer", "candidate"])
    n_layers = int(scores["layer"].max()) + 1
    shape = (len(edits), 2, len(MODULES), n_layers, len(CANDIDATES))
    if len(mine) != np.prod(shape) or tuple(sorted(mine["candidate"].unique())) != CANDIDATES:
        raise FrameError("A run lacks some of its scores: each needs both candidates, before and after.")
    order = np.argsort(np.argsort(edits))  # as they were asked for
    values = mine["contribution"].to_numpy(float).reshape(shape)[order]
    after, before = values[:, 0], values[:, 1]  # "after" sorts first
    return after, after - before


def _group(values: Array, mine: npt.NDArray[np.int64], edits: npt.NDArray[np.int64], weights: Array) -> _Mean:
    """Step 2: the mean of a group of edits, and of every draw of all edits the mean of those in the group."""
    drawn = weights[:, np.searchsorted(edits, mine)]  # (draw, edit of the group)
    total = drawn.sum(1)
    with np.errstate(invalid="ignore"):
        draws = (drawn @ values.reshape(len(values), -1)) / np.where(total, total, np.nan)[:, None]
    return values.mean(0), draws.reshape(-1, *values.shape[1:])


def interval(draws: Array) -> tuple[Array, Array]:
    """The 2.5 and 97.5 percentiles over the first axis; draws that are NaN don't count."""
    kept = draws[~np.isnan(draws.reshape(len(draws), -1)).any(1)]
    low, high = np.percentile(kept, [2.5, 97.5], axis=0)
    return low, high


def _contrast_frame(curves: Mapping[tuple[str, str, str], _Curve]) -> pd.DataFrame:
    rows: list[dict[str, object]] = []
    for (editor, statistic, failures), curve in curves.items():
        low, high = interval(curve.draws)
        for at in np.ndindex(*curve.point.shape):
            module, layer, candidate = at
            rows.append(
                {
                    "editor": editor,
                    "statistic": statistic,
                    "failures": failures,
                    "module": MODULES[module],
                    "layer": layer,
                    "candidate": CANDIDATES[candidate],
                    "mean": float(curve.point[at]),
                    "low": float(low[at]),
                    "high": float(high[at]),
                    "n_success": curve.successes,
                    "n_failure": curve.failures,
                }
            )
    return frames.from_rows(rows, "contrast")


def _sums_frame(curves: Mapping[tuple[str, str, str], _Curve], late: int) -> pd.DataFrame:
    """Sums over layers with intervals of their own: those of single layers don't add up."""
    rows: list[dict[str, object]] = []
    for (editor, statistic, failures), curve in curves.items():
        both = np.concatenate((curve.point[None], curve.draws))  # (1 + draw, module, layer, candidate)
        spans = {"early": both[:, :, :late].sum(2), "late": both[:, :, late:].sum(2), "all": both.sum(2)}
        parts = {(MODULES[m], span): sums[:, m] for span, sums in spans.items() for m in range(len(MODULES))}
        parts["attn", "late over rest"] = 2 * spans["late"][:, 0] - spans["all"].sum(1)
        for (module, span), sums in parts.items():
            low, high = interval(sums[1:])
            for c, candidate in enumerate(CANDIDATES):
                key = {"editor": editor, "statistic": statistic, "failures": failures, "module": module, "span": span}
                value = {"mean": float(sums[0, c]), "low": float(low[c]), "high": float(high[c])}
                rows.append({**key, "candidate": candidate, **value})
    return frames.from_rows(rows, "contrast_sums")


# 4. and 5. Leverage and region ---------------------------------------------------------------------------------------


def _of_basis(curves: Mapping[tuple[str, str, str], _Curve], basis: str) -> dict[str, _Curve]:
    """Editor -> the curve that leverage is read from; natural failures before induced ones."""
    found: dict[str, _Curve] = {}
    for (editor, statistic, _), curve in curves.items():
        if statistic == basis:
            found.setdefault(editor, curve)
    return found


def _leverage(curve: _Curve, module: int, beta: float) -> _Mean:
    """Step 4 for one editor: [layer], and [draw, layer]; nats."""

    def lever(values: Array) -> Array:
        result: Array = np.maximum(0, values[..., module, :, 0]) + beta * np.maximum(0, -values[..., module, :, 1])
        return result

    return lever(curve.point), lever(curve.draws)


def _mean_of_editors(levers: Mapping[str, _Mean]) -> _Mean:
    """Step 4: the editors' mean in standard deviations, from its lowest layer; a flat curve has no say."""

    def mean(values: Sequence[Array]) -> Array:
        deviations = [np.std(each, axis=-1, keepdims=True) for each in values]
        scaled = [each / np.where(spread > 0, spread, np.inf) for each, spread in zip(values, deviations, strict=True)]
        total = np.mean(scaled, axis=0)
        result: Array = total - total.min(-1, keepdims=True)
        return result

    return mean([point for point, _ in levers.values()]), mean([draws for _, draws in levers.values()])


def smoothed(curve: Array, width: int = 3) -> Array:
    """The mean of each layer and its neighbours, as many of them as there are; over the last axis."""
    reach = width // 2
    n = curve.shape[-1]
    parts = [curve[..., max(0, i - reach) : i + reach + 1].mean(-1) for i in range(n)]
    return np.stack(parts, axis=-1)


def region(leverage: Array, rules: Rules | None = None) -> tuple[int, ...]:
    """Step 5: the layers of a curve, ascending. Of equal layers the lower one comes first."""
    return tuple(int(layer) for layer in np.flatnonzero(_regions(leverage[None], rules or Rules())[0]))


def _regions(leverage: Array, rules: Rules) -> Taken:
    """[curve, layer] -> whether the curve's region has the layer."""
    curves = smoothed(leverage, rules.smooth)
    n_layers = curves.shape[1]
    eligible = np.array(rules.eligible(n_layers))
    ranked = eligible[np.argsort(-curves[:, eligible], axis=1, kind="stable")]  # (curve, rank) -> layer
    held = np.take_along_axis(curves, ranked, axis=1).cumsum(1)
    needed = 1 + (held < rules.mass * held[:, -1:]).sum(1)  # layers until they hold that share
    counts = np.clip(np.maximum(needed, rules.fewest), 0, rules.most(n_layers))
    taken = np.zeros(curves.shape, dtype=bool)
    np.put_along_axis(taken, ranked, np.arange(len(eligible)) < counts[:, None], axis=1)
    return taken


def _leverage_frame(levers: Mapping[str, Mapping[str, _Mean]], rules: Rules) -> pd.DataFrame:
    """Module -> editor -> leverage, as rows: attention's with the region (5.), MLPs' with the value layers (6.)."""
    rows: list[dict[str, object]] = []
    for module, editors in levers.items():
        for editor, (point, draws) in editors.items():
            low, high = interval(draws)
            smooth = smoothed(point, rules.smooth)
            mine = _taken(module, point[None], rules)[0]
            often = _taken(module, draws[~np.isnan(draws).any(1)], rules).mean(0)
            for layer in range(len(point)):
                rows.append(
                    {
                        "editor": editor,
                        "basis": rules.basis,
                        "module": module,
                        "layer": layer,
                        "leverage": float(point[layer]),
                        "low": float(low[layer]),
                        "high": float(high[layer]),
                        "smoothed": float(smooth[layer]),
                        "in_region": bool(mine[layer]),
                        "chosen": float(often[layer]),
                    }
                )
    return frames.from_rows(rows, "leverage")


def _taken(module: str, curves: Array, rules: Rules) -> Taken:
    return _regions(curves, rules) if module == "attn" else _windows(curves)


# 6. ACE --------------------------------------------------------------------------------------------------------------


def value_layers(gain: Array) -> tuple[int, ...]:
    """Step 6: where MLPs gained most, in a window of a quarter of the model, at most WIDEST layers."""
    return tuple(int(layer) for layer in np.flatnonzero(_windows(gain[None])[0]))


def _windows(gains: Array) -> Taken:
    """[curve, layer] -> whether the curve's value layers have the layer."""
    n_layers = gains.shape[1]
    last = max(0, n_layers - 2)
    first = min(n_layers // 2, last)
    width = min(_width(n_layers), last - first + 1)
    sums = np.stack([gains[:, start : start + width].sum(1) for start in range(first, last - width + 2)], axis=1)
    start = first + sums.argmax(1)[:, None]
    layers = np.arange(n_layers)
    result: Taken = (layers >= start) & (layers < start + width)
    return result


def query_layers(leverage: Array, values: Sequence[int]) -> tuple[int, ...]:
    """Step 6: the layers right below the lowest one whose attention counts, and below the value layers."""
    reading = int(np.argmax(leverage >= READING * leverage.max()))
    end = max(1, min(reading, values[0]))
    return tuple(range(max(0, end - _width(len(leverage))), end))


def _width(n_layers: int) -> int:
    return max(1, min(WIDEST, n_layers // 4))


# 7. The pattern ------------------------------------------------------------------------------------------------------

CLAIMS = (
    ("late attention promotes the new object", "attn", "late", "new", 1),
    ("late attention does more of it than all else together", "attn", "late over rest", "new", 1),
    ("attention suppresses the old object", "attn", "all", "true", -1),
    ("MLPs suppress the old object", "ffn", "all", "true", -1),
)
"""Text, module, span, candidate, sign of the published finding."""


def verdict(sums: pd.DataFrame, editor: str, statistic: str = "D") -> tuple[Claim, ...]:
    """Step 7 for one editor, from the frame `contrast_sums`; the first kind of failures where there are several."""
    mine = sums[(sums["editor"] == editor) & (sums["statistic"] == statistic)]
    found = []
    for text, module, span, candidate, sign in CLAIMS:
        rows = mine[(mine["module"] == module) & (mine["span"] == span) & (mine["candidate"] == candidate)]
        if rows.empty:
            continue
        row = rows.iloc[0]
        low, high = sorted((sign * float(row["low"]), sign * float(row["high"])))
        holds = "yes" if low > 0 else "no" if high < 0 else "unclear"
        found.append(Claim(text, holds, sign * float(row["mean"]), low, high))
    return tuple(found)


def in_words(claims: Mapping[str, Sequence[Claim]]) -> str:
    """Whether the published pattern holds, over editors -> claims, in one or two sentences."""
    whole = [name for name, parts in claims.items() if parts and all(part.holds == "yes" for part in parts)]
    rest = [name for name in claims if name not in whole]
    if not rest:
        return f"The published pattern holds for every editor: {', '.join(whole)}."
    text = f"The published pattern holds as a whole for {', '.join(whole) or 'no editor'}."
    for name in rest:
        failing = [f"{part.text} ({part.holds})" for part in claims[name] if part.holds != "yes"]
        text += f" {name}: all but {'; '.join(failing)}." if failing else f" {name}: unknown."
    return text
