"""Layer and module contributions: the coarse level of neuron-level knowledge attribution (Yu, Ananiadou; EMNLP 2024).

At the prompt's last token the residual stream grows module by module. A module's contribution to a candidate w is the
change in log p(w), in nats, that its output v makes when it joins the stream x as it stands just before that module:

    Imp(v | x, w) = log p(w | x + v) - log p(w | x)

1. Run the prompt once and keep, at its last token, the stream before the first block (h^0), after each attention
   (r^l = h^(l-1) + A^l) and after each MLP (h^l = r^l + F^l): 2 L + 1 running states (recording).
2. Freeze the final norm at the last state, so that the way from stream to logits is one affine map (frozen).
3. log p(w | x) = logit_w - log sum_t exp(logit_t) at every running state.
4. Contributions are differences of neighbouring states. Hence they telescope: all of them together are
   log p(w | h^L) - log p(w | h^0), and a layer's contribution is the sum of its two modules'.

In parallel blocks (GPT-J, GPT-NeoX) attention and MLP both read h^(l-1), so the model gives no order: here attention
comes first, then the MLP, which is our choice. A candidate is the first token of " new" or " true" after the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from mega_core import frames
from mega_core.attribution.base import NoParams
from mega_core.attribution.recording import Recording
from mega_core.events import Note, Reporter

MODULES = ("attn", "ffn")


def look(recording: Recording, params: NoParams, state: str, report: Reporter) -> Mapping[str, pd.DataFrame]:
    """The frames `module_scores` and `module_totals` of the edit prompts, for "new" and, where it is known, "true"."""
    for request, ids in zip(recording.requests, recording.candidates, strict=True):
        if ids.get("true") == ids["new"]:
            report(
                Note(
                    f"{request.target_new} and {request.target_true} begin with the same token in this model, "
                    "so the contributions can't tell them apart."
                )
            )
    logprob = recording.lens.log_probs(recording.states, recording.ids()).double().cpu()  # 3.
    scores: list[dict[str, object]] = []
    totals: list[dict[str, object]] = []
    for i, (case, ids) in enumerate(zip(recording.cases, recording.candidates, strict=True)):
        for j, candidate in enumerate(ids):
            path = logprob[:, i, j]
            gains = (path[1:] - path[:-1]).tolist()  # 4.
            key = {"state": state, "case": case, "candidate": candidate}
            scores += [
                {**key, "layer": at // 2, "module": MODULES[at % 2], "contribution": gain}
                for at, gain in enumerate(gains)
            ]
            totals.append({**key, "start": float(path[0]), "end": float(path[-1]), "total": sum(gains)})
    return {
        "module_scores": frames.from_rows(scores, "module_scores"),
        "module_totals": frames.from_rows(totals, "module_totals"),
    }
