"""A mask study: many edits one by one, one mask trained on them, and what it does to edits it has never seen.

1. Facts: `split` draws them. Reported are edits of `examples.reported` (subjects of the development split left out): of
   relations that training sees (held-out facts) and of relations that it doesn't (held-out relations). Training draws
   from `candidates(11)` beyond the development split, about subjects that no reported edit is about.
2. Edits: each fact alone, by METHODS[name] with the model's defaults. Their factors are kept in `lm.memo` under model,
   method with parameters, request and seed, so that a second run reads them. Or all facts of a set as one edit.
3. Layer: "auto" takes the method's lowest layer whose MLP matters: without it the model loses facts or language. (Where
   it doesn't, K = 0 reverses edits at no price, see masking/evaluate.)
4. Training (masking/train) on the edit prompt and trained wordings of the same question, never on those that judge.
5. Judging (masking/evaluate): the mask and its controls (masking/controls) on training, held-out facts and held-out
   relations, by edit prompts and by paraphrases; the unedited model under each; perplexity; ROME under the mask, at its
   layer and at another one; over-attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from math import isfinite
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mega_core.alarms import perplexity
from mega_core.changes import DenseDelta, MatrixDelta, WeightDelta
from mega_core.embedded import examples, facts
from mega_core.errors import ActionableError, BadInput, UnknownName
from mega_core.events import Note, Reporter, silent, stage
from mega_core.keys import digest
from mega_core.masking import controls, evaluate
from mega_core.masking import train as training
from mega_core.masking.edits import SITE, Bank, Edit, bank_of, read
from mega_core.masking.masks import Mask, Masked
from mega_core.methods.base import METHODS
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture
from mega_core.records import EditRequest, MethodRef

METHOD_NAMES = ("rome", "memit")
VERSION = 1
"""Part of what names kept edits and splits; raise it whenever these change."""
HELD_RELATIONS = 4
TRAIN_SEED = examples.DEV_SEED
MOST_SHARE = 0.9
"""Of the subjects, one edit each: the last ones take long to be drawn."""
PROMPTS = 4
"""Of each edit that a mask is trained on."""
KNOWN = 400
"""Facts by which the unedited model's recall is measured."""
FLUENT_EDITS = 8
"""Edits whose perplexity is measured, unmasked and masked."""
EDITABLE = 30
"""Facts that are edited under the mask."""
TRAIN, FACTS, RELATIONS = "training", "held-out facts", "held-out relations"
SETS = (TRAIN, FACTS, RELATIONS)


# 1. ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Split:
    """Which facts are edited for what."""

    train: tuple[EditRequest, ...]
    facts: tuple[EditRequest, ...]
    relations: tuple[EditRequest, ...]
    held: tuple[str, ...]
    """Names of the relations that training never sees."""


def held_relations(count: int = HELD_RELATIONS) -> tuple[str, ...]:
    """Relations kept out of training, chosen by a stable hash."""
    return tuple(sorted(sorted(facts.load().relations, key=lambda name: facts.unit_hash(name, "mask"))[:count]))


def split(n: int, judged: int = 100) -> Split:
    """`n` edits to train on, up to `judged` of each kind to judge by; no subject is in both.

    Raises BadInput when the tables have fewer facts than `n`.
    """
    held = held_relations()
    seen: list[EditRequest] = []
    unseen: list[EditRequest] = []
    for request in examples.reported(6 * judged):
        own = unseen if relation_of(request) in held else seen
        if len(own) < judged:
            own.append(request)
    subjects = {request.subject for request in (*seen, *unseen)}
    known = {fact.subject for fact in facts.load().facts if fact.relation not in held and fact.subject not in subjects}
    if not 1 <= n <= MOST_SHARE * len(known):
        most = int(MOST_SHARE * len(known))
        raise BadInput("n", f"{n} edits can't be drawn.", f"Choose from 1 to {most}.")
    stream = examples.candidates(TRAIN_SEED)
    for _ in islice(stream, examples.DEV_COUNT):
        pass
    train: dict[str, EditRequest] = {}
    for request in stream:
        if len(train) == n:
            break
        if relation_of(request) not in held and request.subject not in subjects:
            train.setdefault(request.subject, request)
    return Split(tuple(train.values()), tuple(seen), tuple(unseen), held)


def fact_of(request: EditRequest) -> facts.Fact:
    """The fact that a request drawn from the tables rewrites."""
    for fact in facts.load().by_subject[request.subject]:
        if fact.object == request.target_true and request.template in (*fact.trained, *fact.templates_held_out):
            return fact
    raise KeyError(f"no table knows {request.subject!r} in these words")


def relation_of(request: EditRequest) -> str:
    """The relation it is about."""
    return fact_of(request).relation


def fit_prompts(request: EditRequest, most: int = PROMPTS) -> tuple[str, ...]:
    """The edit prompt and other wordings the model was trained on with this subject: none that edits are judged by."""
    fact = fact_of(request)
    own = [fact.prompt(form) for form in fact.trained if form != request.template]
    found = dict.fromkeys((request.prompt, *own))
    return tuple(prompt for prompt in found if prompt not in request.paraphrases)[:most]


# 2. ------------------------------------------------------------------------------------------------------------------


def edit_all(
    lm: ModelAdapter,
    method: str,
    defaults: Mapping[str, object],
    requests: Sequence[EditRequest],
    *,
    given: Mapping[str, object] | None = None,
    seed: int = 0,
    together: bool = False,
    report: Reporter = silent,
) -> list[Edit]:
    """Step 2. A fact that the method refuses is left out, with a note; `together` makes one edit of all.

    Raises BadInput on a method that writes no factors, ActionableError when no edit is left.
    """
    if method not in METHOD_NAMES:
        raise BadInput("method", f"{method[:40]!r} is not one whose edits a mask can read.", "Choose rome or memit.")
    ref = METHODS[method].ref(given, defaults)
    found: list[Edit] = []
    refused: list[str] = []
    groups: list[Sequence[EditRequest]] = [requests] if together else [[request] for request in requests]
    with stage(report, f"{METHODS[method].title} edits", len(groups)) as step:
        for group in groups:
            try:
                change = one_edit(lm, ref, group, seed)
                found += [Edit(request, change, fit_prompts(request)) for request in group]
            except ActionableError as error:
                refused.append(str(error))
            step()
    if refused:
        report(Note(f"{len(refused)} of {len(groups)} edits were refused, the first because: {refused[0]}"))
    if not found:
        raise ActionableError("No edit is left.", "See the note, or choose another method.")
    return found


def one_edit(lm: ModelAdapter, ref: MethodRef, requests: Sequence[EditRequest], seed: int = 0) -> WeightDelta:
    """One edit's factors: those that are kept, or new ones, which are then kept."""
    keyed = lm.memo if lm.file_digest and not lm.changes else None
    key = "mask-edit:" + digest(
        {
            "version": VERSION,
            "weights": lm.file_digest,
            "model": lm.ref,
            "method": ref,
            "requests": list(requests),
            "seed": seed,
        }
    )
    kept = None if keyed is None else keyed.get_arrays(key)
    known = None if kept is None else _unpacked(kept)
    if known is not None:
        return known
    method = METHODS[ref.name]
    change = method.prepare(lm, list(requests), method.read(ref), seed, silent)
    if not isinstance(change, WeightDelta):
        raise BadInput("method", f"{method.title} does not write weights.", "Choose rome or memit.")
    if keyed is not None:
        keyed.put_arrays(key, _packed(change))
    return change


def _packed(change: WeightDelta) -> dict[str, Any]:
    arrays: dict[str, Any] = {
        "layers": np.array([matrix.layer for matrix in change.matrices], dtype=np.int64),
        "norms": np.array([matrix.base_norm for matrix in change.matrices], dtype=np.float64),
    }
    for i, matrix in enumerate(change.matrices):
        if not isinstance(matrix, MatrixDelta) or matrix.site != SITE:
            raise BadInput("method", "a mask needs edits of low rank at the MLPs' last matrices.", "Choose rome.")
        arrays |= {f"left.{i}": matrix.left.numpy(), f"right.{i}": matrix.right.numpy()}
    return arrays


def _unpacked(arrays: Mapping[str, Any]) -> WeightDelta | None:
    try:
        matrices = tuple(
            MatrixDelta(
                int(layer),
                SITE,
                torch.from_numpy(np.array(arrays[f"left.{i}"])),
                torch.from_numpy(np.array(arrays[f"right.{i}"])),
                float(arrays["norms"][i]),
            )
            for i, layer in enumerate(arrays["layers"].tolist())
        )
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    return WeightDelta(matrices)


# 3. ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Removed:
    """What the unedited model loses with the whole matrix of a layer (K = 0)."""

    layer: int
    recall: float
    recall_whole: float
    perplexity: float
    perplexity_whole: float

    @property
    def recall_kept(self) -> float:
        """Share of the recall that is left."""
        return self.recall / self.recall_whole if self.recall_whole else 0.0

    @property
    def language(self) -> float:
        """Perplexity against that of the whole model."""
        return self.perplexity / self.perplexity_whole if isfinite(self.perplexity) else float("inf")

    @property
    def matters(self) -> bool:
        """Whether facts or language go with it."""
        return not evaluate.degenerate(1.0, self.recall_kept, self.language)


def without(lm: ModelAdapter, layer: int, known: Sequence[tuple[str, str]]) -> Removed:
    """Measure K = 0 on the unedited model."""
    whole = evaluate.recall(lm, known), perplexity(lm)
    shape = lm.read_weight(layer, SITE).shape
    nothing = Mask(torch.zeros(shape, dtype=torch.bool), layer, lm.name, lm.file_digest)
    with Masked(nothing).applied(lm):
        return Removed(layer, evaluate.recall(lm, known), whole[0], perplexity(lm), whole[1])


def known_facts(count: int = KNOWN) -> list[tuple[str, str]]:
    """(prompt, object) of facts in trained words, drawn by a stable hash."""
    drawn = sorted(facts.facts(), key=lambda fact: facts.unit_hash(fact.subject, fact.relation, "known"))[:count]
    return [(fact.prompt(fact.templates_edit[0]), fact.object) for fact in drawn]


def layer_of(lm: ModelAdapter, edits: Sequence[Edit], wanted: int | None, report: Reporter = silent) -> int:
    """Step 3. Raises BadInput on a layer where no edit writes, with a note where the layer doesn't matter."""
    layers = sorted({matrix.layer for edit in edits for matrix in edit.change.matrices})
    if wanted is not None:
        if wanted not in layers:
            raise BadInput(
                "layer", f"these edits write nothing at layer {wanted}.", f"Choose {', '.join(map(str, layers))}."
            )
        return wanted
    known = known_facts(KNOWN // 2)
    for layer in layers:
        if without(lm, layer, known).matters:
            return layer
    report(Note("The model does without the edited matrices: reversing edits there will show nothing."))
    return layers[0]


# 4. ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """What a mask is trained on; part of its file, so that it can be judged on what it has not seen."""

    method: str = "rome"
    n: int = 200
    judged: int = 100
    seed: int = 0
    together: bool = False
    given: tuple[tuple[str, Any], ...] = ()
    """Parameters of the method beyond the model's defaults."""


def train_mask(
    lm: ModelAdapter,
    plan: Plan,
    defaults: Mapping[str, object],
    layer: int | None = None,
    params: training.TrainParams = training.TOP,
    report: Reporter = silent,
    edits: Sequence[Edit] | None = None,
    rows: training.Rows | None = None,
) -> Mask:
    """Steps 1 to 4; `edits` and `rows` of an earlier call save making them again. The model is left as it was."""
    drawn = split(plan.n, plan.judged)
    if edits is None:
        edits = edit_all(
            lm,
            plan.method,
            defaults,
            drawn.train,
            given=dict(plan.given),
            seed=plan.seed,
            together=plan.together,
            report=report,
        )
    at = layer_of(lm, edits, layer, report)
    rows = training.prepare(lm, at, edits, report) if rows is None else rows
    trained = training.train(lm, at, rows, params, plan.seed, report)
    last = trained.history[-1]
    how = {
        "paper": "arXiv 2605.28839",
        "split": VERSION,
        "plan": {**asdict(plan), "given": dict(plan.given)},
        "edits": len(edits),
        "held_relations": list(drawn.held),
        "params": asdict(params),
        "loss": last.loss,
        "requests": digest([edit.request for edit in edits]),
    }
    return Mask(trained.binary(), at, lm.name, lm.file_digest, params.gamma, how)


def settings_of(name: str, pruned: float, epochs: int | None) -> training.TrainParams:
    """The settings of this name ("top", "small", "published"), with the share to prune."""
    known = {"top": training.TOP, "small": training.SMALL, "published": training.PUBLISHED}
    if name not in known:
        raise UnknownName("settings", name, known)
    params = replace(known[name], s_max=pruned)
    return params if epochs is None else replace(params, epochs=epochs)


def plan_of(mask: Mask) -> Plan:
    """How it was trained. Raises BadInput on a mask of another origin."""
    try:
        plain = mask.trained["plan"]
        if mask.trained["split"] != VERSION:
            raise BadInput("mask", "it was trained on another choice of facts.", "Train it again.")
        return Plan(
            str(plain["method"]),
            int(plain["n"]),
            int(plain["judged"]),
            int(plain["seed"]),
            bool(plain["together"]),
            tuple(sorted(plain["given"].items())),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput("mask", "it doesn't say what it was trained on.", "Train it: mask train.") from error


# 5. ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Judged:
    """One mask on one set of edits, by one kind of prompt."""

    mask: str
    set: str
    kind: str
    """"edit" or "paraphrase"."""
    scores: evaluate.Scores


@dataclass(frozen=True, slots=True)
class Collateral:
    """What one mask does to the unedited model."""

    mask: str
    pruned: float
    recall: float
    perplexity: float


@dataclass(frozen=True, slots=True)
class Editability:
    """ROME run under a mask: shares of edits whose new object's first token comes first."""

    where: str
    n: int
    accuracy: float
    paraphrase: float


@dataclass(frozen=True)
class Evaluation:
    """Everything about one mask."""

    mask: Mask
    plan: Plan
    rows: tuple[Judged, ...]
    collateral: tuple[Collateral, ...]
    editability: tuple[Editability, ...]
    shares: tuple[evaluate.Share, ...]
    language: Mapping[str, float]
    """Perplexity: "original"; "edited" and "masked", means over some held-out edits."""
    removed: Removed

    def row(self, mask: str, set_: str, kind: str = "edit") -> evaluate.Scores:
        """One entry. Raises KeyError."""
        for row in self.rows:
            if (row.mask, row.set, row.kind) == (mask, set_, kind):
                return row.scores
        raise KeyError(f"{mask}, {set_}, {kind}")

    @property
    def degenerate(self) -> bool:
        """Whether reversing edits at this layer shows nothing."""
        return evaluate.degenerate(self.row("K = 0", FACTS).rsr, self.removed.recall_kept, self.removed.language)

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that are none become null."""
        plain = {
            "schema_version": 1,
            "model": self.mask.model,
            "layer": self.mask.layer,
            "site": self.mask.site,
            "pruned": self.mask.pruned,
            "degenerate": self.degenerate,
            "plan": {**asdict(self.plan), "given": dict(self.plan.given)},
            "rows": [asdict(row) for row in self.rows],
            "collateral": [asdict(row) for row in self.collateral],
            "editability": [asdict(row) for row in self.editability],
            "over_attention": [share._asdict() for share in self.shares],
            "perplexity": dict(self.language),
            "removed": asdict(self.removed),
        }
        clean: dict[str, Any] = _finite(plain)
        return clean


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


@dataclass(frozen=True)
class _Set:
    """Edits of one set with what the unedited and the edited model say."""

    edits: tuple[Edit, ...]
    bank: Bank
    cases: list[evaluate.Case]
    unedited: evaluate.Answers
    edited: evaluate.Answers

    def judge(self, name: str, set_: str, masked: evaluate.Answers) -> list[Judged]:
        kinds = torch.tensor([case.kind == "edit" for case in self.cases])
        found = [Judged(name, set_, "edit", evaluate.scores(self.unedited, self.edited, masked, kinds))]
        if not bool(kinds.all()):
            found.append(Judged(name, set_, "paraphrase", evaluate.scores(self.unedited, self.edited, masked, ~kinds)))
        return found


def _asked(lm: ModelAdapter, edits: Sequence[Edit], report: Reporter) -> _Set:
    bank, whose = bank_of(edits, lm.device)
    cases = evaluate.cases_of(edits, whose)
    return _Set(
        tuple(edits),
        bank,
        cases,
        evaluate.answers(lm, cases, None, report=report),
        evaluate.answers(lm, cases, bank, report=report),
    )


def evaluate_mask(
    lm: ModelAdapter,
    mask: Mask,
    method_defaults: Mapping[str, Mapping[str, object]],
    n: int = 100,
    report: Reporter = silent,
    *,
    seed: int = 0,
    train_cases: int = 100,
    editable: int = EDITABLE,
    full: bool = True,
) -> Evaluation:
    """Step 5, on up to `n` edits of each held-out kind; `full` False leaves out all controls but K = 0.

    The model is left as it was. Raises BadInput on a mask of another model or of unknown training.
    """
    mask.check(lm)
    plan = plan_of(mask)
    drawn = split(plan.n, plan.judged)
    if n > plan.judged:
        raise BadInput("n", f"{plan.judged} edits of each kind were kept out of training.", "Ask for no more.")
    chosen = {TRAIN: drawn.train[:train_cases], FACTS: drawn.facts[:n], RELATIONS: drawn.relations[:n]}
    defaults = method_defaults.get(plan.method, {})
    sets: dict[str, _Set] = {}
    for name, requests in chosen.items():
        if plan.together and name == TRAIN:
            every = edit_all(lm, plan.method, defaults, drawn.train, given=dict(plan.given), seed=plan.seed,
                             together=True, report=report)  # fmt: skip
            edits = every[:train_cases]
        else:
            edits = edit_all(lm, plan.method, defaults, requests, given=dict(plan.given), seed=plan.seed,
                             together=plan.together, report=report)  # fmt: skip
        sets[name] = _asked(lm, edits, report)

    weight = lm.read_weight(mask.layer, SITE)
    reading = _reading(lm, mask.layer, sets[TRAIN].edits, report)
    same = controls.all_of(mask.keep, weight, sets[TRAIN].bank, reading, seed)
    masks: dict[str, tuple[Tensor, bool]] = {"trained": (mask.keep, False)}
    if full:
        masks |= {name: (keep, False) for name, keep in same.items()}
        masks["restore W0"] = (mask.keep, True)
    masks["K = 0"] = (torch.zeros_like(mask.keep), False)

    rows: list[Judged] = []
    known = known_facts()
    collateral = [Collateral("none", 0.0, evaluate.recall(lm, known), perplexity(lm))]
    with stage(report, "masks", len(masks) * len(sets)) as step:
        for name, (keep, restore) in masks.items():
            layer_mask = {mask.layer: keep.float().to(lm.device)}
            for set_, asked in sets.items():
                rows += asked.judge(name, set_, evaluate.answers(lm, asked.cases, asked.bank, layer_mask, restore))
                step()
            if not restore:  # restoring leaves the unedited model as it is
                one = replace(mask, keep=keep)
                with Masked(one).applied(lm):
                    collateral.append(Collateral(name, one.pruned, evaluate.recall(lm, known), perplexity(lm)))
    for set_, asked in sets.items() if full else ():
        masked = own_changes(lm, mask, asked.bank, asked.cases)
        if masked is not None:
            rows += asked.judge("own largest change, restore W0", set_, masked)

    held = sets[FACTS]
    edit_prompts = [case for case in held.cases if case.kind == "edit"] if full else []
    return Evaluation(
        mask,
        plan,
        tuple(rows),
        tuple(collateral),
        tuple(
            editability(
                lm, mask, method_defaults.get("rome", {}), drawn.facts[: min(editable, n)], same["random"], report
            )
        )
        if editable
        else (),
        tuple(evaluate.over_attention(lm, edit_prompts, held.bank, {mask.layer: mask.matrix()}, report)),
        _language(lm, mask, held.edits),
        without(lm, mask.layer, known),
    )


def _reading(lm: ModelAdapter, layer: int, edits: Sequence[Edit], report: Reporter) -> Any:
    bank, whose = bank_of(edits, lm.device)
    rows = [tokens.prompt_ids(lm.tokenizer, edit.request.prompt) for edit in edits]
    return read(lm, layer, rows, bank, torch.tensor(whose), report)


def own_changes(lm: ModelAdapter, mask: Mask, bank: Bank, cases: Sequence[evaluate.Case]) -> evaluate.Answers | None:
    """A reference, no mask for all: each edit's own largest |D| set back to W0, at the mask's sparsity, one by one."""
    if mask.layer not in bank.left:
        return None
    whole = Bank(())
    old, new = torch.zeros(len(cases)), torch.zeros(len(cases))
    top = torch.zeros(len(cases), max(evaluate.TOP), dtype=torch.long)
    for i in range(bank.count):
        own = [c for c, case in enumerate(cases) if case.edit == i]
        if not own:
            continue
        keep = controls.own_change(bank, i, mask.layer, mask.pruned)
        matrices: list[MatrixDelta | DenseDelta] = []
        for layer in bank.layers:
            update = (bank.left[layer][i].T @ bank.right[layer][i]).cpu()
            matrices.append(DenseDelta(layer, SITE, update * keep if layer == mask.layer else update, 1.0))
        with WeightDelta(tuple(matrices)).applied(lm):
            found = evaluate.answers(lm, [cases[c]._replace(edit=-1) for c in own], whole)
        old[own], new[own], top[own] = found.old, found.new, found.top
    return evaluate.Answers(old, new, top)


@dataclass(frozen=True, slots=True)
class Reach:
    """Why a mask of this share can or can't undo unseen edits (ours)."""

    seen: float
    """Part of the training edits that sits in the inputs, as many as the share allows, that carry most on average."""
    unseen: float
    """Part of the held-out edits in the same inputs."""
    needed: float
    """Smallest part, in tenths, whose removal from every held-out edit reverses half of them."""


def reach(lm: ModelAdapter, layer: int, train: Sequence[Edit], held: Sequence[Edit], share: float) -> Reach:
    """Measure it on the edits' factors, and on edits made weaker."""
    seen, unseen = (
        evaluate.parts_of_edits(Bank([edit.change for edit in edits]), layer, _keys(lm, layer, edits))
        for edits in (train, held)
    )
    inside = evaluate.carried(seen, unseen, share)
    bank, whose = bank_of(held, lm.device)
    cases = evaluate.cases_of(held, whose, paraphrases=False)
    unedited, edited = evaluate.answers(lm, cases, None), evaluate.answers(lm, cases, bank)
    for tenth in range(1, 11):
        weaker = Bank([_scaled(edit.change, layer, 1 - tenth / 10) for edit in held], lm.device)
        if evaluate.scores(unedited, edited, evaluate.answers(lm, cases, weaker)).rsr >= 0.5:
            return Reach(*inside, tenth / 10)
    return Reach(*inside, float("nan"))


def _keys(lm: ModelAdapter, layer: int, edits: Sequence[Edit]) -> Tensor:
    """The unedited model's input of the matrix at the subject's last token in each edit prompt."""
    batch = lm.encode([edit.request.prompt for edit in edits])
    at = [tokens.subject_last(lm.tokenizer, edit.request.template, edit.request.subject) for edit in edits]
    site = Site(layer, "mlp_down_in")
    with torch.no_grad(), capture(lm, [site]) as got:
        lm.forward(batch)
    return got[site][torch.arange(len(at)), torch.tensor(at)].float().cpu()


def _scaled(change: WeightDelta, layer: int, factor: float) -> WeightDelta:
    return WeightDelta(
        tuple(
            replace(matrix, left=matrix.left * factor)
            if isinstance(matrix, MatrixDelta) and matrix.layer == layer
            else matrix
            for matrix in change.matrices
        )
    )


def editability(
    lm: ModelAdapter,
    mask: Mask,
    defaults: Mapping[str, object],
    requests: Sequence[EditRequest],
    random: Tensor,
    report: Reporter = silent,
) -> list[Editability]:
    """ROME from scratch under the mask, which stays in place: what the edit writes at the masked places is lost."""
    place = mask.layer
    usual = METHODS["rome"].ref({}, defaults)
    at = dict(usual.params).get("layer")
    other = int(at) if isinstance(at, int) and at != place else place + 1 if place + 1 < lm.n_layers else place - 1
    setups: list[tuple[str, Mask | None, int]] = [
        (f"free, layer {place}", None, place),
        (f"masked, layer {place}", mask, place),
        (f"random mask, layer {place}", replace(mask, keep=random), place),
        (f"free, layer {other}", None, other),
        (f"masked at {place}, layer {other}", mask, other),
    ]
    found = []
    with stage(report, "editing under the mask", len(setups) * len(requests)) as step:
        for where, over, layer in setups:
            ref = METHODS["rome"].ref({"layer": layer}, defaults)
            hits: dict[str, list[float]] = {"edit": [], "paraphrase": []}
            for request in requests:
                for kind, right in _edited_under(lm, over, ref, request):
                    hits[kind].append(right)
                step()
            shares = [fmean(values) if values else float("nan") for values in hits.values()]
            found.append(Editability(where, len(requests), *shares))
    return found


def _edited_under(lm: ModelAdapter, mask: Mask | None, ref: MethodRef, request: EditRequest) -> list[tuple[str, float]]:
    """(kind of prompt, whether the new object's first token comes first) after an edit under the mask."""
    edit = Edit(request, WeightDelta(()), (request.prompt,))
    cases = evaluate.cases_of([edit], [-1])

    def said() -> list[tuple[str, float]]:
        best = evaluate.answers(lm, cases, None).top[:, 0].tolist()
        firsts = [tokens.target_ids(lm.tokenizer, case.prompt, case.new)[0] for case in cases]
        return [(case.kind, float(b == f)) for case, b, f in zip(cases, best, firsts, strict=True)]

    try:
        if mask is None:
            with one_edit(lm, ref, [request]).applied(lm):
                return said()
        with Masked(mask).applied(lm):
            change = one_edit(lm, ref, [request])
            with change.applied(lm), Masked(mask).applied(lm):  # (W * K + D) * K
                return said()
    except ActionableError:  # the method refuses: the fact stays
        return [(case.kind, 0.0) for case in cases]


def _language(lm: ModelAdapter, mask: Mask, edits: Sequence[Edit]) -> dict[str, float]:
    chosen = list({id(edit.change): edit for edit in edits}.values())[:FLUENT_EDITS]
    edited, masked = [], []
    for edit in chosen:
        with edit.change.applied(lm):
            edited.append(perplexity(lm))
            with Masked(mask).applied(lm):
                masked.append(perplexity(lm))
    return {"original": perplexity(lm), "edited": fmean(edited), "masked": fmean(masked)}
