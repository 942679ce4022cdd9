"""The logit lens: what the model would say if the stream at some place were the last (nostalgebraist 2020; Geva et al.
2022, arXiv 2203.14680, read MLP updates in the same way).

1. The stream before the first block, after each attention and after each MLP: 2 L + 1 states at every position asked.
2. The final norm on each state, then the unembedding. `norm` "own" is the model's own final norm: it divides every
   state by that state's own size. "frozen" divides all states at a position by the size of the last one there
   (see frozen.py), so that the steps between them are those of `module_scores`. The last state is the same in both.
3. log p, p and rank (1 = most likely) of each candidate's first token.
4. Crossing, at the prompt's last token: the first of the 2 L + 1 places where the new object is likelier than the true
   one, whether there is any (layer -1 without), whether it is likelier at all later places too; and, ours, the place
   from which on it is likelier to the end (layer -1 where it ends behind). Early leads are mostly chance: in the
   embedding, say, two objects that nothing was written for yet.

At the last token the last state's distribution is the model's own answer. Early states aren't written to be read like
this: the lens shows what is there in terms of the output, not all that is there. Ours: a frozen scale at other
positions comes from that position's own last state; a lead at the start counts as a crossing like any other.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mega_core import frames
from mega_core.attribution import frozen
from mega_core.attribution.frozen import FrozenLens
from mega_core.attribution.recording import Recording
from mega_core.attribution.settings import LensParams
from mega_core.events import Note, Reporter
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter

NEVER = (-1, "")
"""Layer and site of a crossing that does not happen."""


def look(recording: Recording, params: LensParams, state: str, report: Reporter) -> Mapping[str, pd.DataFrame]:
    """The frames `lens` and `lens_crossing` of the edit prompts; without a true object there is no crossing."""
    lm = recording.lm
    names = places(lm.n_layers)
    wanted = [_positions(recording, i, params.positions) for i in range(len(recording.requests))]
    at = [(i, position) for i, listed in enumerate(wanted) for position in listed]
    last = [(i, recording.length(i) - 1) for i in range(len(recording.requests))]
    run = list(dict.fromkeys([*at, *last]))  # the crossing needs the last token, asked or not
    ids = recording.ids()[[i for i, _ in run]]
    logprob, rank = read(lm, states_at(recording, run), ids, params.norm)
    row_of = {place: row for row, place in enumerate(run)}

    tables: list[pd.DataFrame] = []
    crossings: list[dict[str, object]] = []
    rows = recording.batch.rows()
    for i, (case, known) in enumerate(zip(recording.cases, recording.candidates, strict=True)):
        labels = tokens.token_strings(lm.tokenizer, rows[i])
        for position in wanted[i]:
            for j, candidate in enumerate(known):
                row = row_of[i, position]
                tables.append(
                    pd.DataFrame(
                        {
                            "state": state,
                            "case": case,
                            "layer": [layer for layer, _ in names],
                            "site": [site for _, site in names],
                            "position": position,
                            "candidate": candidate,
                            "token": labels[position],
                            "logprob": logprob[:, row, j],
                            "prob": np.exp(logprob[:, row, j]),
                            "rank": rank[:, row, j],
                        }
                    )
                )
        if "true" in known:
            if known["new"] == known["true"]:
                report(
                    Note(
                        f"{recording.requests[i].target_new} and {recording.requests[i].target_true} begin with the "
                        "same token in this model, so neither can overtake the other."
                    )
                )
            path = logprob[:, row_of[last[i]]]
            crossings.append({"state": state, "case": case, **crossing(path[:, 0] - path[:, 1], names)})
    return {
        "lens": frames.check(pd.concat(tables, ignore_index=True), "lens"),
        "lens_crossing": frames.from_rows(crossings, "lens_crossing"),
    }


def places(n_layers: int) -> list[tuple[int, str]]:
    """Layer and site of the 2 L + 1 states, in the order of computation."""
    between = [(layer, site) for layer in range(n_layers) for site in ("resid_mid", "block_out")]
    return [(0, "block_in"), *between]


# 1.
def states_at(recording: Recording, where: list[tuple[int, int]]) -> Float[Tensor, "state row d_model"]:
    """The stream at chosen (prompt, position) pairs of the recording."""
    home = recording.states.device
    prompts, positions = (torch.tensor(column) for column in zip(*where, strict=True))

    def pick(layer: int, site: str) -> Float[Tensor, "row d_model"]:
        value = recording.part(layer, site)
        return value[prompts.to(value.device), positions.to(value.device)].to(home)

    return torch.stack([pick(layer, site) for layer, site in places(recording.lm.n_layers)])


# 2. and 3.
def read(
    lm: ModelAdapter,
    states: Float[Tensor, "state row d_model"],
    ids: Int[Tensor, "row candidate"],
    norm: str = "own",
) -> tuple[np.ndarray, np.ndarray]:
    """log p (nats) and rank (1 = most likely) of each row's candidates at each of its states: [state, row, candidate].

    Logits exist for a slice of the vocabulary at a time, at most frozen.LOGITS_AT_ONCE of them.
    """
    if norm == "own":  # every state is the last one of a row of its own
        flat = states.flatten(0, 1)
        normed = FrozenLens.of(lm, flat).state(flat)
    else:
        normed = FrozenLens.of(lm, states[-1]).state(states).flatten(0, 1)
    weight, bias = lm.head_weight, lm.head_bias
    ids = ids.to(weight.device).repeat(len(states), 1)  # (n, candidate)
    picked = torch.einsum("nd,ncd->nc", normed, weight[ids].to(normed))
    if bias is not None:
        picked = picked + bias[ids].to(normed)
    total = normed.new_full((len(normed),), -torch.inf)
    ahead = torch.zeros_like(ids)
    width = max(1, frozen.LOGITS_AT_ONCE // len(normed))
    for start in range(0, lm.vocab_size, width):
        logits = normed @ weight[start : start + width].to(normed).T  # (n, slice)
        if bias is not None:
            logits += bias[start : start + width].to(normed)
        total = torch.logaddexp(total, logits.logsumexp(-1))
        for j in range(ids.shape[1]):  # one by one: together they would hold (n, candidate, slice)
            here = ids[:, j] - start
            own = (here >= 0) & (here < logits.shape[1])
            more = (logits > picked[:, j, None]).sum(-1)
            # A product of other shape may round otherwise, and a token must not come before itself.
            itself = logits.gather(1, here.clamp(0, logits.shape[1] - 1)[:, None])[:, 0] > picked[:, j]
            ahead[:, j] += more - (own & itself).long()
    shape = (len(states), -1, ids.shape[1])
    logprob = picked.double() - total.double()[:, None]
    return logprob.view(shape).cpu().numpy(), (ahead + 1).view(shape).cpu().numpy()


# 4.
def crossing(lead: np.ndarray, names: list[tuple[int, str]]) -> dict[str, object]:
    """First and lasting crossing from log p(new) - log p(true) at each place: the values of `lens_crossing`."""
    ahead = lead > 0
    overtakes, ends_ahead = bool(ahead.any()), bool(ahead[-1])
    first = int(ahead.argmax())
    lasting = len(ahead) - int((~ahead[::-1]).argmax()) if not ahead.all() else 0
    layer, site = names[first] if overtakes else NEVER
    lasting_layer, lasting_site = names[lasting] if ends_ahead else NEVER
    return {
        "layer": layer,
        "site": site,
        "overtakes": overtakes,
        "stays": ends_ahead and lasting == first,
        "lasting_layer": lasting_layer,
        "lasting_site": lasting_site,
    }


def _positions(recording: Recording, i: int, which: str) -> list[int]:
    end, subject = recording.length(i) - 1, recording.spans[i][1] - 1
    listed = {"last": [end], "subject": [subject], "last subject": [subject, end], "all": list(range(end + 1))}
    return sorted(set(listed[which]))
