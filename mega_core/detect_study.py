"""How well edits are found: edited and unedited variants of a model, the fit of the detector's scores, and its AUC.

1. Variants. Edits by METHODS with the model's defaults: alone, saved as float16 and bfloat16, at other layers, in a
   fine-tuned model, ten in sequence, ten at once. Unedited ones: rounded, with noise, fine-tuned on ordinary text.
   Each says of every matrix that differs from the model's what it is: low_rank, dense or noise.
2. Features of every matrix with and without a reference, by `masking.detect`.
3. Fit: softmax regression with an L2 penalty, classes weighed equally, on variants of one set of subjects.
4. Judged on variants of other subjects, and of the other model: area under the ROC curve of the low_rank score, per
   matrix and per model (its highest score), with bootstrap intervals over variants.

Fine-tuned edits (FT, FT-L, FT-M) have no low rank. They are neither edits nor non-edits in 4.; what they are called is
counted. Without a reference, the statistics of ordinary text are taken from the variant itself where all of it has
changed, and from the unedited model where a few matrices have: a layer's own keys don't depend on its own edit.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mega_core.changes import DenseDelta, MatrixDelta, WeightDelta
from mega_core.errors import ActionableError, BadInput
from mega_core.events import Reporter, silent, stage
from mega_core.masking import detect
from mega_core.masking.detect import CLASSES, Scorer, Standing
from mega_core.methods import METHODS
from mega_core.models import tokens as tokenizing
from mega_core.models.adapter import ModelAdapter
from mega_core.records import EditRequest

Place = tuple[int, str]
NOISES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1)
"""Of the matrix's norm."""
TRAININGS = ((1e-5, 2), (1e-4, 2), (1e-3, 2), (1e-5, 10), (1e-4, 10), (1e-3, 10))
"""Learning rate and steps of fine-tuning on ordinary text."""
ROWS, ROW_TOKENS = 8, 64
"""What fine-tuning reads in a step."""
PENALTY = 0.01
TOGETHER = 10
RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Variant:
    """A model with some matrices replaced."""

    label: str
    """What was done, such as "rome" or "noise 0.01"."""
    edited: bool
    """Whether an edit of low rank is in it."""
    matrices: Mapping[Place, Float[Tensor, "out in"]]
    """Those that differ, float32 on the CPU."""
    kinds: Mapping[Place, str]
    """low_rank, dense or noise for each of them."""
    request: EditRequest | None = None
    everywhere: bool = False
    """Whether the whole model has changed, and not only a few matrices."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One matrix of one variant."""

    variant: int
    label: str
    edited: bool
    """The variant."""
    layer: int
    site: str
    kind: str
    """low_rank, dense, noise, or unchanged."""
    reference: Mapping[str, float]
    """Features with a reference; none for an unchanged matrix."""
    alone: Mapping[str, float]
    """Features without one."""


# 1. Variants ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """How many variants of each kind."""

    single: int = 12
    """ROME edits by themselves; other methods get about half."""
    plain: int = 6
    """Unedited variants of each size of noise and each way of fine-tuning."""

    def share(self, part: float) -> int:
        """A part of `single`, at least one."""
        return max(1, round(self.single * part))


def variants(
    lm: ModelAdapter,
    requests: Sequence[EditRequest],
    defaults: Mapping[str, Mapping[str, Any]],
    plan: Plan,
    seed: int,
    report: Reporter = silent,
) -> Iterator[Variant]:
    """Edited and unedited variants, one by one. Requests are taken in turn, so that each kind has several subjects.

    Raises BadInput when there are fewer requests than TOGETHER.
    """
    if len(requests) < TOGETHER:
        raise BadInput("requests", f"{len(requests)} facts are too few.", f"Give at least {TOGETHER}.")
    base = {place: weight.detach().float().cpu() for place, weight in detect.matrices(lm).items()}
    order = random.Random(seed)
    queue: list[EditRequest] = []

    def draw() -> EditRequest:
        if not queue:
            queue.extend(order.sample(list(requests), len(requests)))
        return queue.pop()

    def made(method: str, count: int, given: Callable[[int], Mapping[str, Any]] = lambda i: {}) -> Iterator[Any]:
        for i in range(count):
            request = draw()
            try:
                yield request, prepare(lm, method, [request], {**defaults.get(method, {}), **given(i)})
            except ActionableError:
                continue  # an edit that a method refuses is no variant

    # edits
    singles = {"rome": 1.0, "memit": 0.6, "pmet": 0.6, "alphaedit": 0.6, "ace": 0.4, "lora": 0.5}
    for method, part in singles.items():
        for request, change in made(method, plan.share(part)):
            yield _variant(method, base, change, request)
    for dtype, name in ((torch.float16, "float16"), (torch.bfloat16, "bfloat16")):
        for request, change in made("rome", plan.share(0.5)):
            yield _rounded(_variant(f"rome, saved as {name}", base, change, request), base, dtype)
    for request, change in made("rome", plan.share(0.7), lambda i: {"layer": i % (lm.n_layers - 1)}):
        yield _variant("rome, any layer", base, change, request)
    for i, (request, change) in enumerate(made("rome", plan.share(0.5))):
        trained = train(lm, base, list(base), *TRAININGS[-1 - i % 3], seed=1000 * seed + 500 + i)
        yield _on_top(_variant("rome, in a fine-tuned model", base, change, request), base, trained)
    for _ in range(plan.share(0.17)):
        yield _variant("rome, ten in sequence", base, _sequence(lm, [draw() for _ in range(TOGETHER)], defaults))
    for method in ("rome", "memit"):
        for _ in range(plan.share(0.1)):
            change = prepare(lm, method, [draw() for _ in range(TOGETHER)], defaults.get(method, {}))
            yield _variant(f"{method}, ten at once", base, change)
    for method in ("ft", "ft_l", "ft_m"):
        for request, change in made(method, plan.share(0.4)):
            yield _variant(method, base, change, request)
    # none
    for dtype, name in ((torch.float16, "float16"), (torch.bfloat16, "bfloat16")):
        rounded = {place: weight.to(dtype).float() for place, weight in base.items()}
        yield _plain(f"saved as {name}", base, rounded, "noise")
    for bits in (8, 4):
        yield _plain(f"rounded to {bits} bits", base, {p: quantised(w, bits) for p, w in base.items()}, "noise")
    generator = torch.Generator().manual_seed(seed)
    for size in NOISES:
        for i in range(plan.plain):
            places = list(base) if i % 2 == 0 else [(order.randrange(lm.n_layers), "mlp_down")]
            noisy = dict(base)
            for place in places:
                weight = base[place]
                noise = torch.randn(weight.shape, generator=generator)
                noisy[place] = weight + size * weight.norm() / weight.numel() ** 0.5 * noise
            yield _plain(f"noise {size:g}", base, noisy, "noise")
    for rate, steps in TRAININGS:
        for i in range(plan.plain):
            places = list(base) if i % 2 == 0 else [(order.randrange(lm.n_layers), "mlp_down")]
            trained = train(lm, base, places, rate, steps, seed=1000 * seed + i)
            yield _plain(f"fine-tuned {rate:g} x {steps}", base, trained, "dense")


def prepare(lm: ModelAdapter, method: str, requests: Sequence[EditRequest], given: Mapping[str, Any]) -> WeightDelta:
    """The edit of a method that changes weights."""
    one = METHODS[method]
    change = one.prepare(lm, requests, one.read(one.ref(given)), 0, silent)
    if not isinstance(change, WeightDelta):
        raise BadInput("method", f"{one.title} changes no weights.", "Choose another method.")
    return change


def _sequence(
    lm: ModelAdapter, requests: Sequence[EditRequest], defaults: Mapping[str, Mapping[str, Any]]
) -> WeightDelta:
    """ROME edits, each prepared on top of those before it, as one change."""
    parts: list[WeightDelta] = []
    with ExitStack() as stack:
        for request in requests:
            parts.append(prepare(lm, "rome", [request], defaults.get("rome", {})))
            stack.enter_context(parts[-1].applied(lm))
    return WeightDelta(tuple(matrix for part in parts for matrix in part.matrices))


def _variant(
    label: str, base: Mapping[Place, Tensor], change: WeightDelta, request: EditRequest | None = None
) -> Variant:
    edited: dict[Place, Tensor] = {}
    kinds: dict[Place, str] = {}
    for matrix in change.matrices:
        place = (matrix.layer, matrix.site)
        update = matrix.update(torch.device("cpu"))
        if bool(update.any()):
            edited[place] = edited.get(place, base[place]) + update
            low = isinstance(matrix, MatrixDelta) and kinds.get(place) != "dense"
            kinds[place] = "low_rank" if low else "dense"
    return Variant(label, "low_rank" in kinds.values(), edited, kinds, request)


def _rounded(variant: Variant, base: Mapping[Place, Tensor], dtype: torch.dtype) -> Variant:
    """The variant as a file of this dtype has it: all matrices are rounded."""
    whole = {place: variant.matrices.get(place, weight).to(dtype).float() for place, weight in base.items()}
    return _with(variant, base, whole, "noise")


def _on_top(variant: Variant, base: Mapping[Place, Tensor], trained: Mapping[Place, Tensor]) -> Variant:
    """The variant's changes in a model that was trained further."""
    whole = {
        place: trained[place] + (variant.matrices[place] - weight if place in variant.matrices else 0.0)
        for place, weight in base.items()
    }
    return _with(variant, base, whole, "dense")


def _with(variant: Variant, base: Mapping[Place, Tensor], whole: Mapping[Place, Tensor], kind: str) -> Variant:
    plain = _plain(variant.label, base, whole, kind)
    return replace(plain, edited=variant.edited, kinds={**plain.kinds, **variant.kinds}, request=variant.request)


def _plain(label: str, base: Mapping[Place, Tensor], whole: Mapping[Place, Tensor], kind: str) -> Variant:
    changed = {place: weight for place, weight in whole.items() if not torch.equal(weight, base[place])}
    return Variant(label, False, changed, dict.fromkeys(changed, kind), everywhere=len(changed) > 1)


def quantised(weight: Float[Tensor, "out in"], bits: int) -> Float[Tensor, "out in"]:
    """Rounded to so many bits, each row by its own largest number."""
    step = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
    return (weight / step).round() * step


def train(
    lm: ModelAdapter, base: Mapping[Place, Tensor], places: Sequence[Place], rate: float, steps: int, seed: int
) -> dict[Place, Float[Tensor, "out in"]]:
    """All matrices after AdamW has moved those at `places` on ordinary text; the model itself stays as it is."""
    from mega_core.embedded.corpus import Corpus

    corpus = Corpus(seed)
    names = {id(parameter): name for name, parameter in lm.model.named_parameters()}
    live = {place: lm.weight(*place) for place in places}
    moved = {place: weight.detach().float().clone().requires_grad_() for place, weight in live.items()}
    adam = torch.optim.AdamW(list(moved.values()), lr=rate, weight_decay=0.01)
    for _ in range(steps):
        texts = [" ".join(corpus.draw(1.0).text for _ in range(3)) for _ in range(ROWS)]
        rows = [ids[:ROW_TOKENS] for ids in lm.tokenizer(texts)["input_ids"]]
        batch = tokenizing.pack(lm.tokenizer, rows, lm.device)
        substituted = {names[id(live[place])]: weight.to(live[place].dtype) for place, weight in moved.items()}
        with torch.enable_grad():
            given = {"input_ids": batch.ids, "attention_mask": torch.ones_like(batch.ids), "use_cache": False}
            logits = torch.func.functional_call(lm.model, substituted, kwargs=given).logits[:, :-1]
            labels = batch.ids.masked_fill(~batch.mask, -100)[:, 1:]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    found = dict(base)
    for place, weight in moved.items():
        found[place] = (weight.T if lm.conv1d(*place) else weight).detach().cpu().contiguous()
    return found


# 2. Features ---------------------------------------------------------------------------------------------------------


class Measurer:
    """Features of a model's variants; what the unedited model gives is computed once."""

    def __init__(self, lm: ModelAdapter, report: Reporter = silent) -> None:
        self.lm = lm
        self.base = {place: weight.detach().float().cpu() for place, weight in detect.matrices(lm).items()}
        self.rows = detect.ordinary_rows(lm, detect.tokens_for(lm.d_mlp))
        self.moments = detect.moments(lm, list(self.base), self.rows, report)
        self.standing = {place: detect.standing_out(w, self.moments[place]) for place, w in self.base.items()}

    def samples(self, variant: Variant, number: int) -> list[Sample]:
        """Every matrix of a variant."""
        alone = detect.own_features(self._standing(variant))
        found = []
        for place, before in self.base.items():
            kind = variant.kinds.get(place, "unchanged")
            features: Mapping[str, float] = {}
            if kind != "unchanged":
                difference = variant.matrices[place].double() - before.double()
                features = detect.difference_features(difference, before, detect.spectrum(difference))
            found.append(Sample(number, variant.label, variant.edited, *place, kind, features, alone[place]))
        return found

    def _standing(self, variant: Variant) -> dict[Place, Standing]:
        moments = self.moments
        if variant.everywhere:
            with self.applied(variant):
                moments = detect.moments(self.lm, list(self.base), self.rows)
            changed = list(self.base)
        else:
            changed = list(variant.matrices)
        fresh = {
            place: detect.standing_out(variant.matrices.get(place, self.base[place]), moments[place])
            for place in changed
        }
        return {**self.standing, **fresh}

    def applied(self, variant: Variant) -> Any:
        """A context in which the model is the variant."""
        deltas = [
            DenseDelta(*place, weight - self.base[place], float(self.base[place].norm()))
            for place, weight in variant.matrices.items()
        ]
        return WeightDelta(tuple(deltas)).applied(self.lm)


def collect(
    lm: ModelAdapter,
    requests: Sequence[EditRequest],
    defaults: Mapping[str, Mapping[str, Any]],
    plan: Plan,
    seed: int,
    report: Reporter = silent,
) -> list[Sample]:
    """Steps 1 and 2: every matrix of every variant."""
    measurer = Measurer(lm, report)
    found: list[Sample] = []
    with stage(report, "variants") as step:
        for number, variant in enumerate(variants(lm, requests, defaults, plan, seed, report)):
            found += measurer.samples(variant, number)
            step()
    return found


# 3. Fit --------------------------------------------------------------------------------------------------------------


def fit(samples: Sequence[Sample], mode: str) -> Scorer:
    """Softmax regression of a matrix's class on its features, by L-BFGS in float64. Raises BadInput without samples."""
    classes = CLASSES[mode]
    rows = [(features_of(one, mode), class_of(one, mode)) for one in samples]
    usable = [(features, kind) for features, kind in rows if features and kind in classes]
    if len({kind for _, kind in usable}) < len(classes):
        raise BadInput("samples", "some class has no sample.", "Make more variants.")
    names = tuple(usable[0][0])
    x = torch.tensor([[features[name] for name in names] for features, _ in usable], dtype=torch.float64)
    y = torch.tensor([classes.index(kind) for _, kind in usable])
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    x = ((x - mean) / scale).clamp(-10, 10)
    balance = 1 / torch.bincount(y, minlength=len(classes)).double()
    weights = torch.zeros(len(classes), len(names), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(classes), dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS([weights, bias], max_iter=300, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        descent.zero_grad()
        logs = (x @ weights.T + bias).log_softmax(-1)
        nll = -(logs[torch.arange(len(y)), y] * balance[y]).sum() / len(classes)
        total: Tensor = nll + PENALTY * (weights**2).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    with torch.enable_grad():
        descent.step(loss)  # type: ignore[no-untyped-call,arg-type]
    return Scorer(
        classes,
        names,
        tuple(mean.tolist()),
        tuple(scale.tolist()),
        tuple(tuple(row) for row in weights.detach().tolist()),
        tuple(bias.detach().tolist()),
    )


def features_of(sample: Sample, mode: str) -> Mapping[str, float]:
    """The features of this mode."""
    return sample.reference if mode == "reference" else sample.alone


def class_of(sample: Sample, mode: str) -> str:
    """The class of this mode. Without a reference everything but low rank is "none", and FT edits are left out."""
    if mode == "reference" or sample.kind == "low_rank":
        return sample.kind
    return "left out" if sample.label in FINE_TUNED else "none"


FINE_TUNED = ("ft", "ft_l", "ft_m")


# 4. Judging ----------------------------------------------------------------------------------------------------------


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """How often a positive's score is above a negative's; ties count half. nan when either is empty."""
    if not positive or not negative:
        return math.nan
    low = torch.tensor(sorted(negative), dtype=torch.float64)
    high = torch.tensor(list(positive), dtype=torch.float64)
    below = torch.searchsorted(low, high)
    upto = torch.searchsorted(low, high, right=True)
    return float((below + upto).double().mean() / 2 / len(low))


@dataclass(frozen=True, slots=True)
class Area:
    """An area under the ROC curve with its interval and what it was counted on."""

    value: float
    low: float
    high: float
    positives: int
    negatives: int


def area(positive: Mapping[int, Sequence[float]], negative: Mapping[int, Sequence[float]]) -> Area:
    """AUC of scores by variant, with a 95 % bootstrap interval: variants are drawn with replacement, whole."""
    flat = [[score for scores in side.values() for score in scores] for side in (positive, negative)]
    value = auc(*flat)
    if math.isnan(value):
        return Area(value, value, value, len(flat[0]), len(flat[1]))
    above, below = (torch.tensor(scores, dtype=torch.float64) for scores in flat)
    wins = (above[:, None] > below).double() + 0.5 * (above[:, None] == below).double()  # (positive, negative)
    sizes = [torch.tensor([len(scores) for scores in side.values()]) for side in (positive, negative)]
    owners = [torch.arange(len(size)).repeat_interleave(size) for size in sizes]
    by_variant = torch.zeros(len(sizes[0]), len(flat[1]), dtype=torch.float64).index_add(0, owners[0], wins)
    by_variant = torch.zeros(len(sizes[0]), len(sizes[1]), dtype=torch.float64).index_add(1, owners[1], by_variant)
    generator = torch.Generator().manual_seed(0)
    drawn = [  # (resample, variant): how often each was drawn
        torch.zeros(RESAMPLES, len(size), dtype=torch.float64).scatter_add(
            1,
            torch.randint(len(size), (RESAMPLES, len(size)), generator=generator),
            torch.ones(RESAMPLES, len(size), dtype=torch.float64),
        )
        for size in sizes
    ]
    pairs = (drawn[0] @ sizes[0].double()) * (drawn[1] @ sizes[1].double())
    values = ((drawn[0] @ by_variant * drawn[1]).sum(1) / pairs).sort().values
    low, high = (float(values[int(q * (RESAMPLES - 1))]) for q in (0.025, 0.975))
    return Area(value, low, high, len(flat[0]), len(flat[1]))


@dataclass(frozen=True, slots=True)
class Judged:
    """A scorer on samples it has not seen."""

    matrices: Mapping[str, Area]
    """Label of the edits, or "all" -> edited matrices against all that are not."""
    models: Mapping[str, Area]
    """The same by the highest score of a model."""
    called: Mapping[str, Mapping[str, float]]
    """Label -> kind -> share of the matrices that truly differ so called, in per cent."""
    false_alarms: float
    """Share of unedited models of which some matrix is called an edit, in per cent."""


def judge(samples: Sequence[Sample], scorer: Scorer, mode: str) -> Judged:
    """Step 4. A matrix without change scores 0 where there is a reference to know it by."""
    scored = []
    for one in samples:
        features = features_of(one, mode)
        chances = scorer(features) if features else {"unchanged": 1.0}
        scored.append((one, chances.get("low_rank", 0.0), max(chances, key=lambda name: chances[name])))
    edits = [entry for entry in scored if entry[0].label not in FINE_TUNED]
    none: dict[int, list[float]] = {}
    for one, score, _ in edits:
        if one.kind != "low_rank":
            none.setdefault(one.variant, []).append(score)
    unedited = _highest((one, score) for one, score, _ in edits if not one.edited)
    labels = list(dict.fromkeys(one.label for one, _, _ in edits if one.edited))
    matrices, models = {}, {}
    for label in (*labels, "all"):
        chosen = [(one, score) for one, score, _ in edits if one.edited and label in (one.label, "all")]
        within: dict[int, list[float]] = {}
        for one, score in chosen:
            if one.kind == "low_rank":
                within.setdefault(one.variant, []).append(score)
        matrices[label] = area(within, none)
        models[label] = area(_highest(iter(chosen)), unedited)
    called: dict[str, dict[str, float]] = {}
    for label in dict.fromkeys(one.label for one, _, _ in scored):
        changed = [kind for one, _, kind in scored if one.label == label and (one.kind == "low_rank" or _is_plain(one))]
        called[label] = {kind: 100 * changed.count(kind) / len(changed) for kind in dict.fromkeys(changed)}
    alarms = [max(scores) > 0.5 for scores in unedited.values()]
    return Judged(matrices, models, called, 100 * sum(alarms) / max(1, len(alarms)))


def _is_plain(one: Sample) -> bool:
    """Whether this is what its variant's label speaks of: in an unedited one all that differs, in FT the edit."""
    return one.kind != "unchanged" and not one.edited


def _highest(scored: Iterator[tuple[Sample, float]]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for one, score in scored:
        found[one.variant] = [max(score, *found.get(one.variant, [0.0]))]
    return found
