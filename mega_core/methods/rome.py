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
outputs; a search ends early at `stop_probability`; several requests are inserted together by the closed form for many
keys (see solve), which for one is step 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mega_core.errors import BadInput
from mega_core.events import Note, Reporter
from mega_core.methods.base import Method, knob
from mega_core.records import EditRequest

if TYPE_CHECKING:
    from mega_core.changes import WeightDelta
    from mega_core.models.adapter import ModelAdapter
    from mega_core.models.arch import ArchSpec

BARE = "{}"
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

    layer: int | None = knob(
        None, "Layer whose MLP is edited. Empty: the model's default, or about a third of its depth.", low=0, high=200
    )
    key_form: str = knob(
        "consistent",
        "One key everywhere (consistent, R-ROME), or the published code's two different ones (original).",
        choices=("consistent", "original"),
    )
    covariance: str = knob(
        "quick",
        "Statistics of ordinary keys: quick (a small text), full (ten times as much), identity (none).",
        choices=("quick", "identity", "full"),
    )
    shrinkage: float | None = knob(
        None, "Share of a plain average mixed into the statistics. Empty: 1 to 5 %, by text size.", low=0.0, high=1.0
    )
    steps: int = knob(20, "Most updates of the new value.", low=1, high=200)
    learning_rate: float = knob(0.5, "Size of an update of the new value.", low=1e-4, high=10.0)
    clamp: float = knob(4.0, "The value may change by this multiple of the reference norm.", low=0.01, high=100.0)
    clamp_reference: str = knob(
        "value",
        "Reference norm: of the MLP's output (value, as published), or of the residual stream (small models).",
        choices=("value", "residual"),
    )
    kl_weight: float = knob(0.0625, "How strongly the kept prompts hold their answers.", low=0.0, high=100.0)
    kl_prompts: str = knob(
        "{} is a", "Prompts whose next word should stay, with {} for the subject; several are separated by |."
    )
    weight_decay: float = knob(0.5, "Penalty on the size of the change of the value.", low=0.0, high=100.0)
    stop_probability: float = knob(
        0.99,
        "Stop when the new object is at least this likely in every context; 1 never stops early.",
        low=0.0,
        high=1.0,
    )
    contexts: int = knob(6, "In how many contexts the prompt is put, the bare prompt included.", low=1, high=21)
    context_source: str = knob(
        "fixed", "Texts of the contexts: fixed ones, or sampled from the model.", choices=("fixed", "sampled")
    )


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
    contexts = _contexts(lm, params, seed)
    keep = _kept_prompts(params)
    rows = [row for i, request in enumerate(requests) for row in optimise.rows_for(lm, i, request, contexts, keep)]
    factor = covariance.cholesky(lm, layer, params.covariance, params.shrinkage, report)

    # 1. and 2.
    search = optimise.Search(
        steps=params.steps,
        learning_rate=params.learning_rate,
        clamp=params.clamp,
        reference="residual" if params.clamp_reference == "residual" else "value",
        kl_weight=params.kl_weight,
        weight_decay=params.weight_decay,
        stop_probability=params.stop_probability if params.stop_probability < 1 else 2.0,
    )
    found = optimise.find_values(lm, layer, rows, search, report)

    # 3.
    u = solve.whiten(found.mean_key, factor)
    key = found.mean_key if params.key_form == "consistent" else found.key
    update = solve.equality_edit(u, key, found.delta)
    if params.key_form == "original":
        match = min(solve.key_match(u, found.mean_key, found.key))
        if abs(match) < WEAK_MATCH:
            report(
                Note(
                    f"The prompt's own key matches the averaged one only by {match:.2f}, so the original form "
                    "makes a very large update. The consistent form avoids it."
                )
            )
    return WeightDelta(
        (MatrixDelta(layer, "mlp_down", update.left.float(), update.right.float(), float(weight.float().norm())),)
    )


def _kept_prompts(params: RomeParams) -> tuple[str, ...]:
    if params.kl_weight == 0:
        return ()
    prompts = tuple(part.strip() for part in params.kl_prompts.split("|") if part.strip())
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise BadInput(
                "rome.kl_prompts", f"{prompt[:60]!r} needs exactly one {{}} for the subject.", "For example: {} is a"
            )
    return prompts


def _contexts(lm: ModelAdapter, params: RomeParams, seed: int) -> tuple[str, ...]:
    """The bare prompt and the texts before it, each with one {}."""
    others = params.contexts - 1
    if params.context_source == "fixed" or not others:
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
