"""What masks are measured by for people to look at: plain values only, ready for JSON. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mega_core import mask_study
from mega_core.events import Reporter, silent, stage
from mega_core.masking import evaluate
from mega_core.masking.edits import Edit, bank_of, routed
from mega_core.masking.masks import Mask, Masked
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture
from mega_core.records import EditRequest, MethodRef

ROWS, COLUMNS = 24, 48
"""Most blocks of the mask's picture."""
SAYS_TOKENS = 6
STATES = ("original", "edited", "masked")


def picture(mask: Mask) -> dict[str, Any]:
    """Where the mask cuts: the share of each neuron (column) and of each output (row) that is cut, and of blocks of
    both, sorted so that the most cut come first.
    """
    cut = 1 - mask.keep.numpy().astype(np.float64)
    neurons, outputs = cut.mean(0), cut.mean(1)
    ordered = cut[np.argsort(-outputs, kind="stable")][:, np.argsort(-neurons, kind="stable")]
    parts = [np.array_split(rows, min(COLUMNS, cut.shape[1]), axis=1)
             for rows in np.array_split(ordered, min(ROWS, cut.shape[0]))]  # fmt: skip
    return {
        "neurons": np.round(neurons, 4).tolist(),
        "outputs": np.round(outputs, 4).tolist(),
        "blocks": [[round(float(part.mean()), 4) for part in row] for row in parts],
    }


def judge(
    lm: ModelAdapter,
    mask: Mask,
    defaults: Mapping[str, Mapping[str, object]],
    n: int,
    editable: int,
    report: Reporter = silent,
) -> dict[str, Any]:
    """Everything about a mask: its evaluation against its controls on `n` edits of each set, each edit by itself, and
    what every head says for both objects.
    """
    found = mask_study.evaluate_mask(
        lm, mask, defaults, n, report, train_cases=n, editable=editable
    )  # the edits are kept, so asking for them again is quick
    plan = found.plan
    drawn = mask_study.split(plan.n, plan.judged)
    edits: list[dict[str, Any]] = []
    heads: list[dict[str, Any]] = []
    every = {mask_study.TRAIN: drawn.train[:n], mask_study.FACTS: drawn.facts[:n],
             mask_study.RELATIONS: drawn.relations[:n]}  # fmt: skip
    for name, requests in every.items():
        made = mask_study.edit_all(
            lm, plan.method, defaults.get(plan.method, {}), requests, given=dict(plan.given), seed=plan.seed,
            report=report,
        )  # fmt: skip
        edits += [{"set": name, **row} for row in one_by_one(lm, mask, made, report)]
        if name == mask_study.FACTS:
            heads = by_head(lm, mask, made, report)
    plain: dict[str, Any] = finite({**found.to_json(), "edits": edits, "heads": heads})
    return plain


def one_by_one(lm: ModelAdapter, mask: Mask, edits: Sequence[Edit], report: Reporter = silent) -> list[dict[str, Any]]:
    """Per edit: the margin log P(old) - log P(new) of the unedited, the edited and the masked edited model, nats, and
    what each says first; under the mask, a few words.
    """
    bank, whose = bank_of(edits, lm.device)
    cases = evaluate.cases_of(edits, whose, paraphrases=False)
    states = (
        evaluate.answers(lm, cases, None),
        evaluate.answers(lm, cases, bank),
        evaluate.answers(lm, cases, bank, {mask.layer: mask.matrix().to(lm.device)}),
    )
    rows = []
    with stage(report, "each edit under the mask", len(edits)) as step:
        for i, edit in enumerate(edits):
            with edit.change.applied(lm), Masked(mask).applied(lm):
                (says,) = lm.generate([edit.request.prompt], SAYS_TOKENS)
            margins = [float(state.margin[i]) for state in states]
            rows.append(
                {
                    "subject": edit.request.subject,
                    "prompt": edit.request.prompt,
                    "old": edit.old,
                    "new": edit.request.target_new,
                    "edited_says": str(lm.tokenizer.decode([int(states[1].top[i, 0])])),
                    "masked_says": str(says),
                    **{f"margin_{state}": value for state, value in zip(STATES, margins, strict=True)},
                    "took": margins[0] > 0 > margins[1],
                    "reversed": margins[2] > 0,
                }
            )
            step()
    return rows


def by_head(lm: ModelAdapter, mask: Mask, edits: Sequence[Edit], report: Reporter = silent) -> list[dict[str, Any]]:
    """Over-attention head by head: what each head writes at the last position, times the unembedding of an object's
    first token (logits before the final norm), mean over the edits, in three states.
    """
    bank, whose = bank_of(edits, lm.device)
    cases = evaluate.cases_of(edits, whose, paraphrases=False)
    sites = [Site(layer, "attn_out_in") for layer in range(lm.n_layers)]
    under = {mask.layer: mask.matrix().to(lm.device)}
    starts = range(0, len(cases), evaluate.CASES_AT_ONCE)
    total: dict[tuple[str, str], Tensor] = {}
    with torch.no_grad(), stage(report, "heads", len(STATES) * len(starts)) as step:
        for state in STATES:
            for start in starts:
                part = cases[start : start + evaluate.CASES_AT_ONCE]
                batch = lm.encode([case.prompt for case in part])
                owner = torch.tensor([-1 if state == "original" else case.edit for case in part])
                with routed(lm, bank, owner, under if state == "masked" else {}), capture(lm, sites) as got:
                    lm.forward(batch)
                for candidate in ("old", "new"):
                    firsts = [
                        tokens.target_ids(lm.tokenizer, case.prompt, getattr(case, candidate))[0] for case in part
                    ]
                    rows = lm.head_weight[torch.tensor(firsts, device=lm.head_weight.device)].float()
                    said = torch.stack([_said(lm, site, got[site], batch.last, rows) for site in sites])
                    key = (state, candidate)
                    total[key] = total[key] + said if key in total else said
                step()
    return [
        {"state": state, "layer": layer, "head": head, "candidate": candidate, "mean": value / len(cases)}
        for (state, candidate), sums in total.items()
        for layer, values in enumerate(sums.tolist())
        for head, value in enumerate(values)
    ]


def _said(lm: ModelAdapter, site: Site, mixed: Tensor, last: Tensor, rows: Tensor) -> Tensor:
    """(head): the heads' outputs at the last positions, times each case's unembedding row, summed over cases."""
    out = lm.head_out(site.layer).float()  # (head, head_dim, d_model)
    at = mixed[torch.arange(len(rows)), last.to(mixed.device)].float().unflatten(-1, (lm.n_heads, lm.head_dim))
    return torch.einsum("bhj,hjd,bd->h", at.to(out.device), out, rows.to(out.device)).double().cpu()


def under_mask(
    lm: ModelAdapter, mask: Mask, asked: Sequence[tuple[MethodRef, EditRequest, int]], report: Reporter = silent
) -> list[dict[str, Any]]:
    """As one_by_one(), for edits (method, request, seed) that somebody made. Raises BadInput where the object before
    the edit is not known, or the method writes nothing that a mask can read.
    """
    made = []
    with stage(report, "edits", len(asked)) as step:
        for ref, request, seed in asked:
            bare = replace(request, paraphrases=(), neighbours=())
            made.append(Edit(bare, mask_study.one_edit(lm, ref, [bare], seed), (bare.prompt,)))
            step()
    plain: list[dict[str, Any]] = finite(one_by_one(lm, mask, made, report))
    return plain


def finite(value: Any) -> Any:
    """The same values, with None for numbers that are none."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
