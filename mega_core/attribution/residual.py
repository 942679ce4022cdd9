"""Direct contributions to the residual stream (One Mask to Rule Them All, arXiv 2605.28839): who writes towards an
object, without any norm.

1. At the prompt's last token t, each layer's attention writes A^l_t and its MLP F^l_t to the stream (recording).
2. Their dot products with the candidate's row of the unembedding matrix, in units of logits before the final norm:
       c_attn^l(w) = A^l_t . W_U[w],      c_mlp^l(w) = F^l_t . W_U[w]
3. `cumulative`: the sum over the modules of the same kind up to and including that layer, as in the paper's panel.

The paper draws layers 1 to L - 2; here are all, and the stream before the first block as module "embedding" at layer
-1 (ours). So the rows of a candidate add up to h^L_t . W_U[w], the last state before the final norm.

What steering adds to an attention output belongs to that attention, and what a memory writes in an MLP's place to that
MLP. In parallel blocks (GPT-J, GPT-NeoX) the order of the two doesn't matter here. These numbers grow with the stream
and are no log-probabilities; `module_scores` are.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch

from mega_core import frames
from mega_core.attribution.base import NoParams
from mega_core.attribution.recording import Recording
from mega_core.events import Reporter

EMBEDDING = "embedding"
MODULES = ("attn", "ffn")


def look(recording: Recording, params: NoParams, state: str, report: Reporter) -> Mapping[str, pd.DataFrame]:
    """The frame `residual` of the edit prompts, for "new" and, where it is known, "true"."""
    states = recording.states.double()  # 1.
    written = torch.cat((states[:1], states[1:] - states[:-1]))  # (1 + 2 L, batch, d_model)
    weight = recording.lm.head_weight
    rows = weight[recording.ids().to(weight.device)].double()  # (batch, candidate, d_model)
    dots = torch.einsum("sbd,bcd->sbc", written, rows).cpu()  # 2.
    summed = torch.empty_like(dots)  # 3.
    summed[0] = dots[0]
    summed[1::2], summed[2::2] = dots[1::2].cumsum(0), dots[2::2].cumsum(0)
    layers = [-1, *(layer for layer in range(recording.lm.n_layers) for _ in MODULES)]
    modules = [EMBEDDING, *(MODULES * recording.lm.n_layers)]
    tables = [
        pd.DataFrame(
            {
                "state": state,
                "case": case,
                "layer": layers,
                "module": modules,
                "candidate": candidate,
                "dot": dots[:, i, j].numpy(),
                "cumulative": summed[:, i, j].numpy(),
            }
        )
        for i, (case, known) in enumerate(zip(recording.cases, recording.candidates, strict=True))
        for j, candidate in enumerate(known)
    ]
    return {"residual": frames.check(pd.concat(tables, ignore_index=True), "residual")}
