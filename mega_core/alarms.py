"""Signs that an edit has damaged the model, as values: each with its limit and a sentence.

    relative norm   |D| / |W| of every edited matrix: edits that wreck a model are long (arXiv 2402.09656)
    key match       how far the change lands alike on the prompt alone and in other contexts; where it doesn't, the
                    published form of ROME divides by almost nothing (R-ROME, arXiv 2403.07175)
    perplexity      of a short fixed text, after against before: one edit can end a model's command of language
    finite          numbers that are infinite or missing, in the change and in what the edited model says

All limits are ours. One line for a caller: `raised = [a.text for a in alarms(lm, change, requests) if a.raised]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import exp, isfinite, log
from typing import Protocol, cast

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mega_core.changes import Change, MatrixDelta, WeightDelta
from mega_core.errors import BadInput
from mega_core.methods.rome import BARE, CONTEXTS
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture
from mega_core.records import EditRequest

RELATIVE_NORM = 5.0
"""Edits of the embedded models that work reach 3.2 (their MLPs write little into a long residual stream)."""
KEY_MATCH = 0.2
"""As in rome.py; single edits of the embedded models lie between 0.78 and 1."""
PERPLEXITY_RATIO = 1.1
"""Edits of the embedded models that work stay between 0.99 and 1.01, stacks of 24 too; settings chosen to do damage
(layer 0, nothing kept) gave 1.06 to 40."""
MATCHED_CONTEXTS = 5
MATCHED_REQUESTS = 16
ROWS_AT_ONCE = 4
LONGEST_ROW = 48
_HUGE = 1e12
"""Stands for a ratio of perplexities that is infinite or missing: JSON has no such numbers."""

TEXT = (
    "My aunt lost a letter on the way to the theatre. She was surprised and began to sing.",
    "It was a cold day and my brother stayed in the kitchen. The people at the farm were friendly.",
    "Because my grandmother was surprised, nobody wanted to leave the bakery. The girl was tired about the news.",
    "Because the boy was curious, nobody wanted to leave the garden. He opened the door and saw a dog.",
    "The lake was full of people that day. She was tired and began to sing. The dog was hungry again.",
    "In the evening, the cat of the doctor ran away. The duck slept under the warm tree.",
    "I went to the bakery because I needed a camera. He put the clock on the table in the garage.",
    "Our neighbour lost a ball on the way to the harbour. He asked my uncle for some tea.",
    "It was a foggy day and the driver stayed in the garden. The honey tasted very good.",
    "The lake was full of people that day. It was cloudy outside, but the living room was warm.",
    "Every day, the old man met the gardener in front of the market. The squirrel slept under the broken tree.",
    "It was a rainy day, so the baker took a walk to the market. He opened the door and saw a cat.",
)
"""Everyday English of our own, from sentences that the embedded models never saw (see embedded.prose) but can read, as
every larger model can; it says nothing about the facts that are edited."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """One sign."""

    name: str
    """"relative_norm", "key_match", "perplexity" or "finite"."""
    value: float
    """What was measured; always a finite number."""
    limit: float
    raised: bool
    text: str
    """One sentence for the person."""


class Applicable(Protocol):
    """A change, a Chain or a stack of them."""

    def applied(self, lm: ModelAdapter) -> AbstractContextManager[None]:
        """Make it true inside the block."""
        ...

    def summary(self) -> pd.DataFrame:
        """The frame `weight_change`."""
        ...


def alarms(
    lm: ModelAdapter,
    change: Applicable,
    requests: Sequence[EditRequest] = (),
    *,
    before: float | None = None,
    after: float | None = None,
) -> tuple[Alarm, ...]:
    """Every sign there is for this change; works for Chains and stacks as well. Leaves the model as it found it.

    `before` and `after` are perplexities (see perplexity()) that the caller knows already; what is missing is measured,
    the first on the model as it is now, the second under the change.
    """
    before = perplexity(lm) if before is None else before
    if after is None:
        with change.applied(lm):
            after = perplexity(lm)
    wrong = _wrong_numbers(change)
    found = [_finite(wrong, after)]
    summary = None if wrong else change.summary()  # of wrong numbers there is no norm and no direction to speak of
    if summary is not None:
        found += _norms(summary)
    match = None if wrong else key_match(lm, change, requests)
    if match is not None:
        raised = match < KEY_MATCH
        text = f"The change lands alike on the prompt alone and in other contexts to {match:.2f} (1 is fully)."
        found.append(Alarm("key_match", match, KEY_MATCH, raised, _judged(text, raised, "it may not generalise")))
    found.append(_perplexities(before, after, only_prompts=summary is not None and set(summary["kind"]) == {"prompt"}))
    return tuple(found)


def perplexity(lm: ModelAdapter) -> float:
    """exp of the mean negative log-likelihood of TEXT per token, as the model is now; infinite where that overflows.

    Reads a few rows at a time and keeps no logits.
    """
    rows = [tokens.prompt_ids(lm.tokenizer, text)[: min(LONGEST_ROW, lm.max_positions)] for text in TEXT]
    total, count = 0.0, 0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        batch = tokens.pack(lm.tokenizer, part, lm.device)
        row, at = torch.tensor([(i, t) for i, ids in enumerate(part) for t in range(len(ids) - 1)]).T
        wanted = torch.tensor([token for ids in part for token in ids[1:]])
        with torch.no_grad():
            logits = lm.logits_at(batch, row, at).float()  # (n, vocab)
            said = logits.gather(-1, wanted.to(logits.device)[:, None])[:, 0] - logits.logsumexp(-1)
        total -= float(said.double().sum())
        count += len(wanted)
    mean = total / count
    return exp(mean) if isfinite(mean) and mean < 700 else float("inf")


def key_match(lm: ModelAdapter, change: Applicable, requests: Sequence[EditRequest]) -> float | None:
    """The lowest share, over the requests, to which a low-rank change lands alike on the prompt and in contexts.

    With D the change at the lowest edited MLP, k the key of the bare prompt and k' its mean over contexts:
    (D k . D k') / max(|D k|, |D k'|)^2. Keys below the lowest edited layer don't depend on the edit. None for changes
    of another kind. The first sixteen requests count.
    """
    low = [m for m in _matrices(change) if isinstance(m, MatrixDelta) and m.site == "mlp_down"]
    if not low or not requests:
        return None
    layer = min(matrix.layer for matrix in low)
    here = [matrix for matrix in low if matrix.layer == layer]
    found = []
    for request in requests[:MATCHED_REQUESTS]:
        try:
            keys = _keys(lm, layer, request)  # (context, d_mlp)
        except BadInput:  # too long for the model in a context
            continue
        bare, mean = (
            torch.stack([m.left.double() @ (m.right.double().T @ key) for m in here]).sum(0)
            for key in (keys[0], keys.mean(0))
        )
        longer = max(float(bare @ bare), float(mean @ mean))
        found.append(float(bare @ mean) / longer if longer else 1.0)
    finite = [value if isfinite(value) else 0.0 for value in found]
    return min(finite) if finite else None


def _keys(lm: ModelAdapter, layer: int, request: EditRequest) -> Float[Tensor, "context d_mlp"]:
    templates = [context.replace("{}", request.template) for context in (BARE, *CONTEXTS[:MATCHED_CONTEXTS])]
    batch = lm.encode([template.replace("{}", request.subject) for template in templates])
    at = torch.tensor([tokens.subject_last(lm.tokenizer, template, request.subject) for template in templates])
    site = Site(layer, "mlp_down_in")
    with torch.no_grad(), lm.aside(), capture(lm, [site]) as got:
        lm.forward(batch)
    return got[site][torch.arange(len(at)), at.to(got[site].device)].double().cpu()


def _matrices(change: Applicable) -> list[object]:
    return [matrix for part in parts_of(change) if isinstance(part, WeightDelta) for matrix in part.matrices]


def parts_of(change: Applicable) -> Sequence[Change]:
    """The changes of a Chain or a stack; any other one alone."""
    return change.parts() if hasattr(change, "parts") else (cast(Change, change),)


def _wrong_numbers(change: Applicable) -> int:
    """How many numbers of the change are infinite or missing."""
    return sum(int((~torch.isfinite(t)).sum()) for part in parts_of(change) for t in part.pack()[1].values())


def _finite(wrong: int, after: float) -> Alarm:
    speechless = not isfinite(after)
    count = wrong + speechless
    if wrong:
        text = f"{wrong:,} numbers of the change are infinite or missing."
    else:
        text = "What the edited model says is infinite or missing." if speechless else "All numbers are finite."
    return Alarm("finite", float(count), 0.0, count > 0, text)


def _norms(summary: pd.DataFrame) -> list[Alarm]:
    found = []
    for row in summary.itertuples():
        if row.kind != "weights":
            continue
        share = float(row.relative_norm) if isfinite(row.relative_norm) else _HUGE
        raised = share > RELATIVE_NORM
        text = f"The matrix {row.site} of layer {row.layer} changed by {share:.3g} of its norm."
        found.append(
            Alarm("relative_norm", share, RELATIVE_NORM, raised, _judged(text, raised, "far more than an edit needs"))
        )
    return found


def _perplexities(before: float, after: float, only_prompts: bool) -> Alarm:
    known = isfinite(before) and isfinite(after) and before > 0
    ratio = exp(min(log(after) - log(before), log(_HUGE))) if known and after > 0 else _HUGE
    # Behind a stated fact any other text is less expected; the model itself is as it was.
    raised = ratio > PERPLEXITY_RATIO and not only_prompts
    text = f"Perplexity of a fixed text: {_plain(before)} before, {_plain(after)} after."
    return Alarm("perplexity", ratio, PERPLEXITY_RATIO, raised, _judged(text, raised, "the model lost language"))


def _judged(text: str, raised: bool, why: str) -> str:
    return f"{text[:-1]}: {why}." if raised else text


def _plain(value: float) -> str:
    return f"{value:.3g}" if isfinite(value) else "not a number"
