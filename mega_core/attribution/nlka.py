"""Layer and module contributions: the coarse level of neuron-level knowledge attribution (Yu, Ananiadou; EMNLP 2024).

At the prompt's last token the residual stream grows module by module. A module's contribution to a candidate w is the
change in log p(w), in nats, that its output v makes when it joins the stream x as it stands just before that module:

    Imp(v | x, w) = log p(w | x + v) - log p(w | x)

1. Run the prompt once and keep, at its last token, the stream before the first block (h^0), after each attention
   (r^l = h^(l-1) + A^l) and after each MLP (h^l = r^l + F^l): 2 L + 1 running states.
2. Freeze the final norm: the mean square (LayerNorm: variance) of the last state h^L serves every state, so that the
   way from stream to logits is one affine map. A LayerNorm's beta and the head's bias are constants of the state; with
   them the last state gives the model's own distribution.
3. log p(w | x) = logit_w - log sum_t exp(logit_t), summed over slices of the vocabulary: [state, vocab] is never held.
4. Contributions are differences of neighbouring states. Hence they telescope: all of them together are
   log p(w | h^L) - log p(w | h^0), and a layer's contribution is the sum of its two modules'.

In parallel blocks (GPT-J, GPT-NeoX) attention and MLP both read h^(l-1), so the model gives no order: here attention
comes first, then the MLP, which is our choice. A candidate is the first token of " new" or " true" after the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mega_core import frames
from mega_core.errors import ActionableError
from mega_core.events import Note, Reporter, silent, stage
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture
from mega_core.models.tokens import TokenBatch
from mega_core.records import EditRequest

MODULES = ("attn", "ffn")
CAPTURE_BYTES = 2**28
"""Activations kept from one forward, at most (a single prompt always runs)."""
LOGITS_AT_ONCE = 2**24
"""How many logits a slice of the vocabulary may have, over all states and prompts."""


def look(
    lm: ModelAdapter, requests: Sequence[EditRequest], state: str, report: Reporter = silent
) -> Mapping[str, pd.DataFrame]:
    """The frames `module_scores` and `module_totals` of the edit prompts, for "new" and, where it is known, "true"."""
    rows = [tokens.prompt_ids(lm.tokenizer, request.prompt) for request in requests]
    wanted = [_candidates(lm, request) for request in requests]
    for request, ids in zip(requests, wanted, strict=True):
        if ids.get("true") == ids["new"]:
            report(
                Note(
                    f"{request.target_new} and {request.target_true} begin with the same token in this model, "
                    "so the contributions can't tell them apart."
                )
            )
    groups = list(_groups(lm, [len(row) for row in rows]))
    scores: list[dict[str, object]] = []
    totals: list[dict[str, object]] = []
    with stage(report, "module_scores", total=len(groups)) as step, torch.no_grad():
        for cases in groups:
            batch = tokens.pack(lm.tokenizer, [rows[case] for case in cases], lm.device)
            pairs = torch.tensor([[wanted[case]["new"], wanted[case].get("true", 0)] for case in cases])
            logprob = log_probs(lm, frozen_norm(lm, running_states(lm, batch)), pairs).double().cpu()
            if not torch.isfinite(logprob).all():
                raise ActionableError(
                    f"{lm.name} ({state} the edit) gives numbers that are not finite.",
                    "Use a weaker edit, or load the model as float32.",
                )
            for i, case in enumerate(cases):
                for j, candidate in enumerate(wanted[case]):
                    path = logprob[:, i, j]
                    gains = (path[1:] - path[:-1]).tolist()  # 4.
                    key = {"state": state, "case": case, "candidate": candidate}
                    scores += [
                        {**key, "layer": at // 2, "module": MODULES[at % 2], "contribution": gain}
                        for at, gain in enumerate(gains)
                    ]
                    totals.append({**key, "start": float(path[0]), "end": float(path[-1]), "total": sum(gains)})
            step()
    return {
        "module_scores": frames.from_rows(scores, "module_scores"),
        "module_totals": frames.from_rows(totals, "module_totals"),
    }


def running_states(lm: ModelAdapter, batch: TokenBatch) -> Float[Tensor, "state batch d_model"]:
    """Step 1: the stream at each row's last token, before the first block and after each module, as float32."""
    parts = [Site(layer, part) for layer in range(lm.n_layers) for part in ("resid_mid", "block_out")]
    sites = [Site(0, "block_in"), *parts]
    with capture(lm, sites) as got:
        lm.forward(batch)
    rows = torch.arange(len(batch), device=batch.ids.device)
    home = lm.head_weight.device
    states = []
    for site in sites:
        value = got.pop(site)  # (batch, pos, d_model); popped, so that its other positions are freed at once
        states.append(value[rows.to(value.device), batch.last.to(value.device)].to(home, torch.float32))
    return torch.stack(states)


def frozen_norm(lm: ModelAdapter, states: Float[Tensor, "state batch d_model"]) -> Float[Tensor, "state batch d_model"]:
    """Step 2: the final norm with the last state's scale, the same affine map for every state."""
    norm: Any = lm.final_norm
    eps: float = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    if lm.spec.norm == "layernorm":
        states = states - states.mean(-1, keepdim=True)
    scale = (states[-1].square().mean(-1, keepdim=True) + eps).rsqrt()  # (batch, 1)
    normed = states * scale * norm.weight.detach().to(states)
    beta = getattr(norm, "bias", None)
    if beta is not None:
        normed = normed + beta.detach().to(states)
    return normed


def log_probs(
    lm: ModelAdapter, normed: Float[Tensor, "state batch d_model"], ids: Int[Tensor, "batch candidate"]
) -> Float[Tensor, "state batch candidate"]:
    """Step 3: log p of each row's candidates at every running state."""
    weight, bias = lm.head_weight, lm.head_bias
    width = max(1, LOGITS_AT_ONCE // (normed.shape[0] * normed.shape[1]))
    partition = normed.new_full(normed.shape[:2], -torch.inf)  # (state, batch)
    for start in range(0, lm.vocab_size, width):
        logits = normed @ weight[start : start + width].to(normed).T  # (state, batch, slice)
        if bias is not None:
            logits += bias[start : start + width].to(normed)
        partition = torch.logaddexp(partition, logits.logsumexp(-1))
    ids = ids.to(weight.device)
    picked = torch.einsum("sbd,bcd->sbc", normed, weight[ids].to(normed))
    if bias is not None:
        picked = picked + bias[ids].to(normed)
    return picked - partition[..., None]


def _candidates(lm: ModelAdapter, request: EditRequest) -> dict[str, int]:
    """Candidate -> the first token of it after the prompt."""
    targets = {"new": request.target_new, "true": request.target_true}
    return {
        name: tokens.target_ids(lm.tokenizer, request.prompt, target)[0] for name, target in targets.items() if target
    }


def _groups(lm: ModelAdapter, lengths: Sequence[int]) -> Iterator[list[int]]:
    """Cases that run together, so that what is captured stays within CAPTURE_BYTES."""
    per_token = (2 * lm.n_layers + 1) * lm.d_model * lm.head_weight.element_size()
    group: list[int] = []
    for case, length in enumerate(lengths):
        widest = max([length, *(lengths[other] for other in group)])
        if group and widest * (len(group) + 1) * per_token > CAPTURE_BYTES:
            yield group
            group = []
        group.append(case)
    if group:
        yield group
