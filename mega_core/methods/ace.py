"""ACE: Attribution-Controlled Knowledge Editing for Multi-hop Factual Recall (ICLR 2026, arXiv 2510.07896).

A question over two facts ("the capital of the country where X stands") needs the first answer only on the way: it acts
as a query that switches on what a later MLP says. An edit that changes what is said, but not what queries, answers the
edited fact and misses the questions that lead through it. ACE therefore writes into two groups of layers:

1. Diagnosis: on questions that the model answers, a value score and a query score for every MLP (see pathway).
   V: the neighbouring layers of the upper half with the most value; Q: those below V with the most query.
2. Value pass: a goal for the MLP of max(V) at the subject's last token, by PMET's joint search, written over V with
   shares 1/sqrt(m) of what is missing, m layers remaining (see pmet, spread).
3. Query pass, on the model edited so far: the same for max(Q), written over Q.

This is the clean form of the algorithm. The published code searches one goal at the last layer of both groups, which
the lower group then chases through all the layers between; and it writes attention too, which the paper leaves alone
(`also_attention`).

Choices that the paper leaves open, and ours: the questions are two-hop questions about other subjects that begin with
the edited relation, where the fact tables know the edited one, else the edit's own prompt; the value pass is also read
in other wordings of the fact that the model was trained on (`value_prompts`), never in a question that is evaluated;
both goals are searched on the unedited model, since after the value pass it says the new object already and there would
be nothing left to search; V and Q have at most three layers and no more than a quarter of the model's; V lies in the
upper half, because at the last position the lowest layers say which words are common, not facts; the last layer is in
neither, since nothing reads the subject after it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mega_core.errors import BadInput
from mega_core.events import Note, Reporter, stage
from mega_core.methods import knobs
from mega_core.methods.base import Method, knob
from mega_core.methods.pmet import search_of, share
from mega_core.methods.rome import edited_relation, needs, rows_of
from mega_core.records import EditRequest

if TYPE_CHECKING:
    from torch import Tensor

    from mega_core.changes import MatrixDelta, WeightDelta
    from mega_core.methods import optimise, spread
    from mega_core.models.adapter import ModelAdapter

AUTO = "auto"
WIDEST = 3
"""Layers in a group: the paper's top three."""
SHOWN = 8
"""Edits whose paths are measured again after the edit."""
QUESTIONS, TRIES = 32, 96
"""Questions the diagnosis reads, and how many are asked to find those the model answers."""


@dataclass(frozen=True, slots=True)
class AceParams:
    """What can be set. Defaults as published for GPT-J and Qwen3-8B, but for the groups."""

    value_layers: str = knob(
        AUTO, "Layers that say the answer, such as 23-25; auto: those with the highest value scores."
    )
    query_layers: str = knob(
        AUTO, "Layers that switch them on, such as 3-8; auto: those below with the highest query scores."
    )
    value_prompts: str = knob(
        "trained",
        "Prompts of the value pass: the edit's own in several contexts (edit), or other wordings of the fact that the "
        "model was trained on as well, where they are known (trained).",
        choices=("trained", "edit"),
        ours=True,
    )
    also_attention: bool = knob(False, "Write the matrices after the heads too, as the published code does.")
    steps: int = knobs.steps(30, "the new values")
    learning_rate: float = knobs.learning_rate(0.2, "the new values")
    clamp: float = knobs.clamp_each(0.75)
    clamp_reference: str = knobs.clamp_references("value")
    kl_weight: float = knobs.kl_weight(1.0)
    kl_prompts: str = knobs.kl_prompts("{} is a")
    weight_decay: float = knobs.weight_decay(0.5, "both changes")
    adaptive: bool = knobs.adaptive(True)
    stop_loss: float = knobs.stop_loss(0.05)
    stop_probability: float = knobs.stop_probability(1.0)
    written: str = knobs.written("mlp")
    covariance: str = knobs.covariance("quick")
    mom2_weight: float = knobs.mom2_weight(6000.0)
    shrinkage: float | None = knobs.shrinkage()
    bare_weight: float = knobs.bare_weight(0.5)
    contexts: int = knobs.contexts(6)
    context_source: str = knobs.context_source("fixed")


def prepare(
    lm: ModelAdapter, requests: Sequence[EditRequest], params: AceParams, seed: int, report: Reporter
) -> WeightDelta:
    """The edit of both groups' MLP matrices. Leaves the model as it found it."""
    from mega_core.changes import WeightDelta
    from mega_core.methods import covariance, optimise

    values, queries = groups(lm, requests, params, seed, report)  # 1.
    report(Note(f"Value layers {_text(values)}, query layers {_text(queries)}."))
    factors = covariance.choleskys(lm, (*values, *queries), params.covariance, params.shrinkage, report)
    cloze = rows_of(lm, requests, params, seed, "ace")
    reworded = cloze if params.value_prompts == "edit" else [*cloze, *_reworded_rows(lm, requests)]
    search = search_of(params)
    value_goal = optimise.find_pairs(lm, values[-1], reworded, search, report)
    query_goal = optimise.find_pairs(lm, queries[-1], cloze, search, report)
    matrices, keys = _write(lm, values, reworded, value_goal, params, factors, report)  # 2.
    with WeightDelta(matrices).applied(lm):
        more, more_keys = _write(lm, queries, cloze, query_goal, params, factors, report)  # 3.
    change = WeightDelta((*matrices, *more), {**more_keys, **keys})
    _report_paths(lm, requests, change, values, queries, report)
    return change


# 1. diagnosis --------------------------------------------------------------------------------------------------------


def groups(
    lm: ModelAdapter, requests: Sequence[EditRequest], params: AceParams, seed: int, report: Reporter
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """V and Q: as given, or as found. Raises BadInput on a layer that is not there, or where Q has no place."""
    from mega_core.methods import spread
    from mega_core.methods.pathway import pathway, window

    given = {
        name: getattr(params, name).partition("(")[0].strip()  # a remark in brackets says who measured them
        for name in ("value_layers", "query_layers")
    }
    fixed = {
        name: spread.parse_layers(text, lm.n_layers, f"ace.{name}")
        for name, text in given.items()
        if text.lower() not in ("", AUTO)
    }
    if len(fixed) == len(given):
        return fixed["value_layers"], fixed["query_layers"]
    highest = fixed["value_layers"][0] if "value_layers" in fixed else lm.n_layers - 2
    if highest < 1:
        raise BadInput("ace.query_layers", "there is no layer below the value layers.", "Choose higher value layers.")
    width = max(1, min(WIDEST, lm.n_layers // 4))
    questions = diagnosis(lm, requests, seed)
    with stage(report, "pathway", 1) as step:
        scores = pathway(lm, questions)
        step()
    lowest = max(1, min(lm.n_layers // 2, highest))
    values = fixed.get("value_layers") or window(scores.value, width, lowest, highest)
    queries = fixed.get("query_layers") or window(scores.query, width, 0, values[0] - 1)
    return values, queries


def _report_paths(
    lm: ModelAdapter,
    requests: Sequence[EditRequest],
    change: WeightDelta,
    values: Sequence[int],
    queries: Sequence[int],
    report: Reporter,
) -> None:
    """Say what both groups contribute to the new object at the end of the edits' prompts, before and after."""
    from mega_core.methods.pathway import pathway

    asked = [(request.prompt, request.target_new) for request in requests[:SHOWN]]

    def sums() -> tuple[float, float]:
        scores = pathway(lm, asked)
        return float(scores.value[list(values)].sum()), float(scores.query[list(queries)].sum())

    before = sums()
    with change.applied(lm):
        after = sums()
    report(
        Note(
            f"For the new object, in nats: value layers {before[0]:+.2f} before, {after[0]:+.2f} after; "
            f"query layers {before[1]:+.2f} before, {after[1]:+.2f} after."
        )
    )


def diagnosis(lm: ModelAdapter, requests: Sequence[EditRequest], seed: int) -> list[tuple[str, str]]:
    """(question, answer) pairs that the model gets right by their first token; else the edits' own prompts.

    Two-hop questions about other subjects than the edited ones. The edits' own prompts come with what the model says.
    """
    import torch

    from mega_core.embedded import facts
    from mega_core.models import tokens

    first = {edited_relation(request) for request in requests}
    subjects = {request.subject for request in requests}
    hops = [hop for hop in facts.hops() if hop.first in first and hop.subject not in subjects]
    generator = random.Random(seed)
    asked = [
        (hop.prompt(generator.choice(hop.templates)), hop.answer)
        for hop in generator.sample(hops, min(TRIES, len(hops)))
    ]
    if asked:
        with torch.no_grad():
            said = lm.last_logits(lm.encode([prompt for prompt, _ in asked])).argmax(-1).tolist()
        right = [
            pair for pair, token in zip(asked, said, strict=True) if tokens.target_ids(lm.tokenizer, *pair)[0] == token
        ]
        if right:
            return right[:QUESTIONS]
    prompts = [request.prompt for request in requests[:QUESTIONS]]
    with torch.no_grad():
        said = lm.last_logits(lm.encode(prompts)).argmax(-1).tolist()
    words = tokens.token_strings(lm.tokenizer, said)
    return [
        (prompt, request.target_true or word.strip() or request.target_new)
        for prompt, request, word in zip(prompts, requests, words, strict=False)
    ]


def wordings(request: EditRequest) -> tuple[str, ...]:
    """Other templates of the same fact that the model was trained on; none where the tables don't know it."""
    from mega_core.embedded import facts

    relation = edited_relation(request)
    if relation is None:
        return ()
    fact = facts.load().by_key[request.subject, relation]
    return tuple(template for template in fact.trained if template != request.template)


def _reworded_rows(lm: ModelAdapter, requests: Sequence[EditRequest]) -> list[optimise.Row]:
    from mega_core.methods.optimise import rows_for

    rows = []
    for i, request in enumerate(requests):
        for template in wordings(request):
            other = EditRequest(request.subject, template, request.target_new)
            rows += [replace(row, bare=False) for row in rows_for(lm, i, other, ("{}",), ())]
    return rows


# 2. and 3. -----------------------------------------------------------------------------------------------------------


def _write(
    lm: ModelAdapter,
    layers: Sequence[int],
    rows: Sequence[optimise.Row],
    found: optimise.FoundPair,
    params: AceParams,
    factors: Mapping[int, Tensor | None],
    report: Reporter,
) -> tuple[tuple[MatrixDelta, ...], dict[int, spread.Keys]]:
    """The updates of one pass and the keys of its MLPs, on the model as it is."""
    from mega_core.changes import WeightDelta
    from mega_core.methods import solve
    from mega_core.methods.spread import spread
    from mega_core.models.hooks import Site

    def soft(layer: int, keys: Tensor, change: Tensor) -> solve.LowRank:
        return solve.soft_edit(keys, change, factors[layer], params.mom2_weight)

    def plain(layer: int, keys: Tensor, change: Tensor) -> solve.LowRank:
        # Ours: nobody keeps statistics of what enters W_O, so ordinary keys are taken to be as long as these.
        return solve.soft_edit(keys, change, None, params.mom2_weight * float(keys.square().mean()))

    last = layers[-1]
    before: tuple[MatrixDelta, ...] = ()
    if params.also_attention:
        goal = found.a0 + found.attn
        before, _ = spread(
            lm, [layers], rows, goal, Site(last, "attn"), share, plain, report, "attn_out", params.bare_weight
        )
    goal = found.v0 + (found.mlp if params.written == "mlp" else found.out)
    with WeightDelta(before).applied(lm):
        matrices, keys = spread(
            lm, [layers], rows, goal, Site(last, "mlp"), share, soft, report, "mlp_down", params.bare_weight
        )
    return (*before, *matrices), keys


def _text(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


ACE = Method(
    name="ace",
    title="ACE",
    summary="Writes a fact where it is said and where it leads on, so that questions over two facts follow.",
    family="weights",
    paper="arXiv 2510.07896",
    params=AceParams,
    prepare=prepare,
    needs=needs,
)
