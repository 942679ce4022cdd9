"""What a mask does to edits, and to the model (arXiv 2605.28839, section on metrics).

Per case (one prompt about one edit), teacher-forced over whole objects, in nats, not divided by length:
    RSM        sum log p(o tokens) - sum log p(o* tokens) under the masked edited model
    RSR        share of cases with RSM > 0
    top-k      share of the k likeliest next tokens that are among the unedited model's k likeliest too (k = 1: the same
               token comes first)
Cases count only where the unedited model prefers o and the edited one o* (ours): an edit that never took can't be
reversed. How many took stands beside it.

Because a mask that destroys the model scores high in RSR, three more figures belong to it:
    recall     share of known facts whose object's first token the *unedited* model still gives first under the mask
    language   perplexity of a fixed text under the mask (measured by the caller)
    K = 0      the same figures with the whole matrix removed. Where that reverses the edits and the unedited model's
               recall and language survive it, the matrix does nothing but carry edits: the layer is degenerate, and
               reversing edits there shows nothing (ours).

Over-attention: at the last position, per layer l and module with output v, the product v . W_U[w] without norm, for the
old and the new object in the unedited, the edited and the masked edited model: means and standard errors over cases.
The published figures leave out the first and the last layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mega_core.events import Reporter, silent, stage
from mega_core.masking.edits import Bank, Edit, Masks, routed
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture

TOP = (1, 5, 10, 100)
CASES_AT_ONCE = 64
RECALL_KEPT, LANGUAGE_KEPT, REVERSED = 0.9, 2.0, 0.5
"""A layer is degenerate when K = 0 leaves at least this share of recall and less than this many times the perplexity,
and reverses at least this share of the edits."""


class Case(NamedTuple):
    """One prompt about one edit."""

    edit: int
    """Its place in the bank."""
    kind: str
    """"edit" or "paraphrase"."""
    prompt: str
    old: str
    new: str


@dataclass(frozen=True)
class Answers:
    """What one state of the model says to some cases."""

    old: Float[Tensor, " case"]
    """Sum of log p over the old object's tokens, nats."""
    new: Float[Tensor, " case"]
    top: Int[Tensor, "case 100"]
    """The likeliest next tokens, likeliest first."""

    @property
    def margin(self) -> Float[Tensor, " case"]:
        """RSM of each case."""
        return self.old - self.new


@dataclass(frozen=True, slots=True)
class Scores:
    """The figures of one mask on one set of cases."""

    cases: int
    """That count."""
    took: float
    """Share of all cases in which the unedited model prefers o and the edited one o*."""
    rsr: float
    rsm: float
    """Mean, nats."""
    top1: float
    top5: float
    top10: float
    top100: float


def cases_of(edits: Sequence[Edit], whose: Sequence[int], paraphrases: bool = True) -> list[Case]:
    """The edit prompts and, where wanted, the paraphrases that nothing was fitted on; `whose` as bank_of gives it."""
    found = []
    for i, edit in zip(whose, edits, strict=True):
        request = edit.request
        found.append(Case(i, "edit", request.prompt, edit.old, request.target_new))
        if paraphrases:
            found += [Case(i, "paraphrase", text, edit.old, request.target_new) for text in request.paraphrases]
    return found


def answers(
    lm: ModelAdapter,
    cases: Sequence[Case],
    bank: Bank | None,
    masks: Masks | None = None,
    restore: bool = False,
    report: Reporter = silent,
) -> Answers:
    """Ask every case of the model with its edit (`bank` None: unedited), under the masks. Nothing is written."""
    empty = Bank(())
    old, new, top = (
        torch.zeros(len(cases)),
        torch.zeros(len(cases)),
        torch.zeros(len(cases), max(TOP), dtype=torch.long),
    )
    width = min(max(TOP), lm.vocab_size)
    order = sorted(range(len(cases)), key=lambda i: len(cases[i].prompt))
    parts = [order[start : start + CASES_AT_ONCE] for start in range(0, len(order), CASES_AT_ONCE)]
    with torch.no_grad(), stage(report, "asking", len(parts)) as step:
        for part in parts:
            rows = [
                tokens.with_target(lm.tokenizer, cases[i].prompt, word)
                for i in part
                for word in (cases[i].old, cases[i].new)
            ]
            owner = torch.tensor([cases[i].edit if bank is not None else -1 for i in part for _ in range(2)])
            batch = tokens.pack(lm.tokenizer, [row.ids for row in rows], lm.device, [row.target_start for row in rows])
            reads = [(r, row.target_start - 1 + t) for r, row in enumerate(rows) for t in range(len(row.target))]
            at = torch.tensor(reads, device=lm.device)
            with routed(lm, empty if bank is None else bank, owner, masks, restore):
                logs = lm.logits_at(batch, at[:, 0], at[:, 1]).float().log_softmax(-1).cpu()  # (read, vocab)
            wanted = torch.tensor([token for row in rows for token in row.target])
            said = logs.gather(1, wanted[:, None])[:, 0].double()
            whole = said.new_zeros(len(rows)).index_add(0, at[:, 0].cpu(), said).float()
            first = torch.tensor([i for i, (r, p) in enumerate(reads) if p == rows[r].target_start - 1])
            likely = logs[first[::2]].topk(width, dim=1).indices
            old[part], new[part] = whole[::2], whole[1::2]
            top[torch.tensor(part)[:, None], torch.arange(width)] = likely
            step()
    return Answers(old, new, top)


def took(unedited: Answers, edited: Answers) -> Bool[Tensor, " case"]:
    """Where there is something to reverse."""
    return (unedited.margin > 0) & (edited.margin < 0)


def scores(unedited: Answers, edited: Answers, masked: Answers, among: Bool[Tensor, " case"] | None = None) -> Scores:
    """The figures over the cases that took, of those `among`."""
    every = torch.ones_like(unedited.old, dtype=torch.bool) if among is None else among
    counted = took(unedited, edited) & every
    n = int(counted.sum())
    if not n:
        nan = float("nan")
        return Scores(0, 0.0, nan, nan, nan, nan, nan, nan)
    margin = masked.margin[counted].double()
    tops = [overlap(unedited.top[counted], masked.top[counted], k) for k in TOP]
    return Scores(n, n / int(every.sum()), float((margin > 0).double().mean()), float(margin.mean()), *tops)


def overlap(one: Int[Tensor, "case 100"], other: Int[Tensor, "case 100"], k: int) -> float:
    """Mean share of the k likeliest tokens that two states have in common."""
    shared = (one[:, :k, None] == other[:, None, :k]).any(-1)
    return float(shared.double().mean())


def recall(lm: ModelAdapter, known: Sequence[tuple[str, str]]) -> float:
    """Share of (prompt, object) pairs whose object's first token the model, as it is now, gives first."""
    right = 0
    order = sorted(known, key=lambda pair: len(pair[0]))
    for start in range(0, len(order), 4 * CASES_AT_ONCE):
        part = order[start : start + 4 * CASES_AT_ONCE]
        wanted = torch.tensor([tokens.target_ids(lm.tokenizer, prompt, word)[0] for prompt, word in part])
        with torch.no_grad():
            best = lm.last_logits(lm.encode([prompt for prompt, _ in part])).argmax(-1).cpu()
        right += int((best == wanted).sum())
    return right / len(order) if order else float("nan")


def degenerate(reversal: float, recall_kept: float, language_ratio: float) -> bool:
    """Whether K = 0 reverses the edits at no price: `recall_kept` and `language_ratio` are against the whole matrix."""
    return reversal >= REVERSED and recall_kept >= RECALL_KEPT and language_ratio < LANGUAGE_KEPT


# How much of an edit a shared mask can reach --------------------------------------------------------------------------


def parts_of_edits(bank: Bank, layer: int, keys: Float[Tensor, "edit in"]) -> Float[Tensor, "edit in"]:
    """What share of its edit each input carries at the edit's own key: r_j k_j / r . k, for edits of rank one.

    Of a higher rank the part that writes most counts.
    """
    left, right = bank.left[layer].cpu(), bank.right[layer].cpu()  # (edit, rank, .)
    dots = torch.einsum("eri,ei->er", right, keys)
    first = (dots.abs() * left.norm(dim=-1)).argmax(1)
    each = torch.arange(len(right))
    return right[each, first] * keys / dots[each, first][:, None]


def carried(seen: Float[Tensor, "edit in"], unseen: Float[Tensor, "edit in"], share: float) -> tuple[float, float]:
    """The part of the edits at the share of inputs that carries most on average over the seen ones: of the seen edits,
    and of the unseen ones. Whole columns pruned there would remove so much of an unseen edit (ours)."""
    count = max(1, round(share * seen.shape[1]))
    best = seen.mean(0).topk(count).indices
    return float(seen[:, best].sum(1).mean()), float(unseen[:, best].sum(1).mean())


# Over-attention ------------------------------------------------------------------------------------------------------


class Share(NamedTuple):
    """What one module of one layer says for one object, in one state."""

    state: str
    """"original", "edited" or "masked"."""
    layer: int
    module: str
    """"attn" or "mlp"."""
    candidate: str
    """"old" or "new"."""
    mean: float
    """v . W_U[w], logits before the final norm."""
    error: float
    """Standard error over cases."""


def over_attention(
    lm: ModelAdapter, cases: Sequence[Case], bank: Bank, masks: Masks, report: Reporter = silent
) -> list[Share]:
    """Direct contributions to the old and the new object's first token, layer by layer, in three states."""
    states: dict[str, tuple[bool, Masks]] = {"original": (False, {}), "edited": (True, {}), "masked": (True, masks)}
    values: dict[tuple[str, int, str, str], list[float]] = {}
    sites = [Site(layer, part) for layer in range(lm.n_layers) for part in ("attn", "mlp")]
    starts = range(0, len(cases), CASES_AT_ONCE)
    with torch.no_grad(), stage(report, "contributions", len(states) * len(starts)) as step:
        for state, (edited, under) in states.items():
            for start in starts:
                part = cases[start : start + CASES_AT_ONCE]
                batch = lm.encode([case.prompt for case in part])
                owner = torch.tensor([case.edit if edited else -1 for case in part])
                with routed(lm, bank, owner, under), capture(lm, sites) as got:
                    lm.forward(batch)
                for candidate in ("old", "new"):
                    words = [case.old if candidate == "old" else case.new for case in part]
                    firsts = [
                        tokens.target_ids(lm.tokenizer, case.prompt, word)[0]
                        for case, word in zip(part, words, strict=True)
                    ]
                    rows = lm.head_weight[torch.tensor(firsts, device=lm.head_weight.device)].float()
                    for site in sites:
                        last = got[site][torch.arange(len(part)), batch.last.to(got[site].device)].float()
                        found = (last.to(rows.device) * rows).sum(-1).tolist()
                        values.setdefault((state, site.layer, site.part, candidate), []).extend(found)
                step()
    return [
        Share(*key, fmean(listed), stdev(listed) / len(listed) ** 0.5 if len(listed) > 1 else float("nan"))
        for key, listed in values.items()
    ]
