"""ROME: Rank-One Model Editing (Meng, Bau, Andonian, Belinkov, NeurIPS 2022, arXiv 2202.05262).

An MLP's last matrix W is read as a memory of keys and values, W k ~ v. The key of a fact is what enters W at the last
token of its subject. One edit inserts one new pair at one layer:

1. k*: the key at the subject's last token, averaged over the prompt in several contexts x_j + p:
       k* = 1/N sum_j k(x_j + p)
2. v*: the value that makes the model say the new object o* there; delta = v* - v0 minimises
       L(delta) = 1/N sum_j -log P[o* | x_j + p, delta]
                  + kl_weight KL(P[. | p'] || P[. | p', delta]) + weight_decay |delta| / |v0|^2
   where p' is "{subject} is a" and |delta| stays below clamp * |v0|.
3. W' = W + Lambda (C^-1 k*)^T with Lambda = (v* - W k*) / ((C^-1 k*)^T k*), C = E[k k^T] over ordinary text:
   the smallest change, measured by C, for which W' k* = v*.

`key_form` "original" does as the published code does: it averages the key in C^-1 k* but takes the bare prompt's own
key in the denominator and v*. When these two differ much, the denominator nearly vanishes and the edit wrecks the model
(R-ROME, arXiv 2403.07175). "consistent", the default, uses k* in all places.

Choices that the papers leave open, and ours: in the consistent form v* is W k* + delta, so that the value changes by
exactly the delta that was found; the kept distribution is read at the end of p' (published code: at the subject's last
token); for an object of several tokens the negative log-likelihood is their mean; contexts are fixed texts unless
sampled; the norm that clamp and decay refer to may be the residual stream's, since small models write short MLP
outputs; a search ends early at `stop_probability`.

Several requests are inserted together by EMMET's closed form (arXiv 2403.14236, see solve), which for one is step 3:
every pair holds exactly at `ridge` 0; EMMET's code has 0.1 there, which gives a little when keys are much alike.

`kl_prompts` "auto" is ours: p' are then prompts of the subject's other relations, in words that the model was trained
on, where the fact tables know the subject and the edited relation. All relations of a subject are read off one value,
so nothing but the search keeps them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mega_core.errors import BadInput
from mega_core.events import Note, Reporter
from mega_core.methods import knobs
from mega_core.methods.base import Method, knob
from mega_core.records import EditRequest

if TYPE_CHECKING:
    from mega_core.changes import WeightDelta
    from mega_core.methods import optimise
    from mega_core.models.adapter import ModelAdapter
    from mega_core.models.arch import ArchSpec

BARE = "{}"
AUTO, FALLBACK = "auto", "{} is a"
MOST_KEPT = 8
CONTEXTS = (
    "In fact, {}",
    "Therefore, {}",
    "The teacher said that {}",
    "It was a rainy day. {}",
    "Everyone in the room knows this. {}",
    "As we all know, {}",
    "After lunch they talked for a while. {}",
    "My friend told me that {}",
    "The book begins with a simple sentence. {}",
    "Because of this, {}",
    "She closed the door and sat down. {}",
    "I have heard it many times. {}",
    "On the radio somebody said: {}",
    "Today we learned that {}",
    "He opened the letter and read it aloud. {}",
    "There is one more thing. {}",
    "The train was late again this morning. {}",
    "You may know that {}",
    "They asked a question, and the answer was short. {}",
    "Indeed, {}",
)
"""Texts before the prompt, ours: everyday words that say nothing about a fact."""
OPENINGS = ("The", "Therefore", "Because", "I", "You")
SAMPLED_TOKENS, SAMPLED_FROM = 8, 5
WEAK_MATCH = 0.2
"""Below this share of key match the mismatched form multiplies the update fivefold or more."""


@dataclass(frozen=True, slots=True)
class RomeParams:
    """What can be set."""

    layer: int | None = knobs.layer(
        "Layer whose MLP is edited. Empty: the model's default, or about a third of its depth."
    )
    key_form: str = knob(
        "consistent",
        "One key everywhere (consistent, R-ROME), or the published code's two different ones (original).",
        choices=("consistent", "original"),
        ours=True,
    )
    ridge: float = knob(
        0.0, "Several edits at once: how much the pairs may give (EMMET's lambda, 0.1 in its code).", low=0.0, high=1e6
    )
    covariance: str = knobs.covariance("quick")
    shrinkage: float | None = knobs.shrinkage()
    steps: int = knobs.steps(20)
    learning_rate: float = knobs.learning_rate(0.5)
    clamp: float = knobs.clamp(4.0, "the reference norm")
    clamp_reference: str = knob(
        "value",
        "Reference norm: of the MLP's output (value, as published), or of the residual stream (small models).",
        choices=("value", "residual"),
    )
    kl_weight: float = knobs.kl_weight(0.0625)
    kl_prompts: str = knobs.kl_prompts("{} is a")
    weight_decay: float = knobs.weight_decay(0.5)
    stop_probability: float = knobs.stop_probability(0.99)
    contexts: int = knobs.contexts(6, ours=True)
    context_source: str = knobs.context_source("fixed")


def needs(spec: ArchSpec) -> str | None:
    """Every architecture in the table adds its MLP's output straight to the residual stream, which is all it takes."""
    return None


def default_layer(n_layers: int) -> int:
    """About a third of the depth, where the published ones lie (GPT-2 medium to XL: 8 of 24, 12 of 36, 17 of 48)."""
    return min(n_layers - 1, round(n_layers / 3))


def prepare(
    lm: ModelAdapter, requests: Sequence[EditRequest], params: RomeParams, seed: int, report: Reporter
) -> WeightDelta:
    """The rank-one edit (rank n for n requests) of one MLP's last matrix. Leaves the model as it found it."""
    from mega_core.changes import MatrixDelta, WeightDelta
    from mega_core.methods import covariance, optimise, solve

    layer = default_layer(lm.n_layers) if params.layer is None else params.layer
    weight = lm.read_weight(layer, "mlp_down")  # (out, in); raises on a layer that isn't there
    rows = rows_of(lm, requests, params, seed, "rome")
    factor = covariance.cholesky(lm, layer, params.covariance, params.shrinkage, report)

    # 1. and 2.
    found = optimise.find_values(lm, layer, rows, value_search(params, params.clamp_reference), report)

    # 3.
    u = solve.whiten(found.mean_key, factor)
    key = found.mean_key if params.key_form == "consistent" else found.key
    update = solve.equality_edit(u, key, found.delta, params.ridge)
    if params.key_form == "original":
        match = min(solve.key_match(u, found.mean_key, found.key))
        if abs(match) < WEAK_MATCH:
            report(
                Note(
                    f"The prompt's own key matches the averaged one only by {match:.2f}, so the original form "
                    "makes a very large update. The consistent form avoids it."
                )
            )
    thin = solve.thin(update)
    norm = float(weight.float().norm())
    return WeightDelta((MatrixDelta(layer, "mlp_down", thin.left.float(), thin.right.float(), norm),), {layer: key})


class KeepParams(Protocol):
    """The knobs that say in how many contexts an edit is read, and which prompts are kept."""

    @property
    def contexts(self) -> int:
        """How many contexts."""
        ...

    @property
    def kl_prompts(self) -> str:
        """Prompts to keep."""
        ...

    @property
    def kl_weight(self) -> float:
        """0: none is kept."""
        ...


class ReadParams(KeepParams, Protocol):
    """The knobs that say in which rows an edit is read; all methods of the family have them."""

    @property
    def context_source(self) -> str:
        """fixed or sampled."""
        ...


class SearchParams(Protocol):
    """The knobs that say how a value is searched; all methods of the family have them."""

    @property
    def steps(self) -> int:
        """Most updates."""
        ...

    @property
    def learning_rate(self) -> float:
        """Size of an update."""
        ...

    @property
    def clamp(self) -> float:
        """Of the reference norm."""
        ...

    @property
    def kl_weight(self) -> float:
        """Of the kept prompts."""
        ...

    @property
    def weight_decay(self) -> float:
        """Of the change's size."""
        ...

    @property
    def stop_probability(self) -> float:
        """1 for never."""
        ...


def value_search(params: SearchParams, reference: str) -> optimise.Search:
    """How a value is searched, with clamp and decay measured by `reference` (value or residual)."""
    from mega_core.methods import optimise

    return optimise.Search(
        steps=params.steps,
        learning_rate=params.learning_rate,
        clamp=params.clamp,
        reference="residual" if reference == "residual" else "value",
        kl_weight=params.kl_weight,
        weight_decay=params.weight_decay,
        stop_probability=params.stop_probability if params.stop_probability < 1 else 2.0,
    )


def rows_of(
    lm: ModelAdapter, requests: Sequence[EditRequest], params: ReadParams, seed: int, method: str
) -> list[optimise.Row]:
    """The rows of all requests: their prompts in every context, and the prompts to keep. `method` names the fields.

    Raises BadInput on prompts to keep without a place for the subject, and on rows longer than the model reads.
    """
    from mega_core.methods import optimise

    contexts = context_texts(lm, params.contexts, params.context_source, seed)
    rows = []
    for i, request in enumerate(requests):
        rows += optimise.rows_for(lm, i, request, contexts, kept(request, params, method))
    return rows


def kept(request: EditRequest, params: KeepParams, method: str) -> tuple[str, ...]:
    """Templates of the prompts to keep for a request; none at no weight. Raises as kept_prompts does."""
    return kept_prompts(request, params.kl_prompts, f"{method}.kl_prompts") if params.kl_weight else ()


def kept_prompts(request: EditRequest, text: str, field: str) -> tuple[str, ...]:
    """Templates about the subject whose next word should stay, as the knob says."""
    if text.strip().lower() == AUTO:
        return other_relations(request) or (FALLBACK,)
    prompts = tuple(part.strip() for part in text.split("|") if part.strip())
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise BadInput(field, f"{prompt[:60]!r} needs exactly one {{}} for the subject.", "For example: {} is a")
    return prompts


def other_relations(request: EditRequest) -> tuple[str, ...]:
    """A trained template of each other relation of the subject, where the tables know subject and edited relation.

    Left out are relations that follow from the edited one, or that it follows from (a landmark's city and country).
    A template that serves edits is taken only where there is no other: those words are what edits are judged by.
    """
    from mega_core.embedded import facts

    world = facts.load()
    known = world.by_subject.get(request.subject, ())
    name = edited_relation(request)
    if name is None:
        return ()
    own = world.relations[name]
    found = []
    for fact in known:
        derived = world.relations[fact.relation].derived or ()
        if fact.relation != own.name and own.name not in derived and fact.relation not in (own.derived or ()):
            forms = fact.templates_paraphrase or fact.templates_edit
            found.append(min(forms, key=lambda form: facts.unit_hash(request.subject, form, "keep")))
    return tuple(found[:MOST_KEPT])


def edited_relation(request: EditRequest) -> str | None:
    """The relation that the edit is about, where the tables know its subject and template."""
    from mega_core.embedded import facts

    world = facts.load()
    names = [fact.relation for fact in world.by_subject.get(request.subject, ())]
    return next((n for n in names if request.template in world.relations[n].edit + world.relations[n].pool), None)


def context_texts(lm: ModelAdapter, count: int, source: str, seed: int) -> tuple[str, ...]:
    """The bare prompt and texts before it, `count` in all, each with one {}; the seed decides about sampled ones."""
    others = count - 1
    if source == "fixed" or not others:
        return (BARE, *CONTEXTS[:others])
    return (BARE, *_sampled_contexts(lm, others, seed))


def _sampled_contexts(lm: ModelAdapter, count: int, seed: int) -> list[str]:
    """Short continuations of common openings, each drawn among the likeliest tokens; the seed decides."""
    import torch

    from mega_core.models import tokens

    generator = torch.Generator().manual_seed(seed)
    rows = [list(tokens.prompt_ids(lm.tokenizer, OPENINGS[i % len(OPENINGS)])) for i in range(count)]
    for _ in range(SAMPLED_TOKENS):
        batch = tokens.pack(lm.tokenizer, rows, lm.device)
        with torch.no_grad():
            top = lm.last_logits(batch).float().cpu().topk(SAMPLED_FROM)
        picks = torch.multinomial(top.values.softmax(-1), 1, generator=generator)  # (row, 1)
        for row, token in zip(rows, top.indices.gather(-1, picks)[:, 0].tolist(), strict=True):
            row.append(token)
    texts = [str(lm.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
    return [" ".join(text.replace("{", " ").replace("}", " ").split()) + ". {}" for text in texts]


ROME = Method(
    name="rome",
    title="ROME",
    summary="Writes one new fact into one MLP matrix by a rank-one update.",
    family="weights",
    paper="arXiv 2202.05262",
    params=RomeParams,
    prepare=prepare,
    needs=needs,
)
