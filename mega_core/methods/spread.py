"""Writing new values through several layers: each takes its share of what is still missing (MEMIT, arXiv 2210.07229).

Given n requests, each with its subject's last token s, the rows it is read in (its bare prompt and the prompt in other
contexts), and its goal z for the stream at `goal_site` at s. For every layer, in the order given:

1. K = [k_1 .. k_n]: the input of the layer's matrix at s, averaged over each request's rows. The bare prompt counts
   `bare_weight` (published: 1/2), the other contexts share the rest equally.
2. R = [r_1 .. r_n]: goal minus present value, z - h, at `goal_site` at s in the bare prompt.
3. D = solve_layer(layer, K, share * R), where the share depends on how many layers of the group remain, this one
   included: 1/m is MEMIT's, 1/sqrt(m) PMET's.
4. W <- W + D, so that the next layer's keys and present values are those of the model edited so far.

At the end, and on the way out of every exception, all matrices are what they were.

Nothing after s is seen at s, so rows are read up to s only. 1. and 2. come from one pass: a bare prompt's ends at the
goal's site, every other row's at the layer's matrix. The head is never run, and rows are read in batches of bounded
size, so that a thousand requests take no more memory than their keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor

from mega_core.changes import MatrixDelta, WeightDelta
from mega_core.errors import BadInput
from mega_core.events import Reporter, silent, stage
from mega_core.methods import optimise, solve
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture

INPUT_OF = {"mlp_down": "mlp_down_in", "attn_out": "attn_out_in"}
ROWS_AT_ONCE = 128
MOST_LAYERS = 5
"""Published ranges have 5 or 6 layers."""

Keys = Float[Tensor, "n width"]
Solve = Callable[[int, Float[Tensor, "n width"], Float[Tensor, "n d_model"]], solve.LowRank]
"""(layer, keys, wanted changes of the values) -> update of the layer's matrix."""


def spread(
    lm: ModelAdapter,
    groups: Sequence[Sequence[int]],
    rows: Sequence[optimise.Row],
    goal: Float[Tensor, "n d_model"],
    goal_site: Site,
    share: Callable[[int], float],
    solve_layer: Solve,
    report: Reporter = silent,
    site: str = "mlp_down",
    bare_weight: float | None = 0.5,
) -> tuple[tuple[MatrixDelta, ...], dict[int, Keys]]:
    """The updates of all layers, in the order written, and the keys per layer; tensors are float32 on the CPU.

    `rows` are those of the search (optimise.rows_for); rows without a target are left out. `share` gets the number of
    layers that remain in the group. `bare_weight` None weighs all rows of a request alike. The model is left as it
    was. Raises BadInput("layers") on a layer that is not there or that lies above the goal, and ActionableError on an
    update that is not finite.
    """
    order = [(layer, share(len(group) - i)) for group in groups for i, layer in enumerate(group)]
    if not order:
        raise BadInput("layers", "there is no layer to write into.", "Name at least one.")
    for layer, _ in order:
        check_layer(layer, lm.n_layers, "layers")
        if layer > goal_site.layer:
            raise BadInput(
                "layers",
                f"layer {layer} lies above layer {goal_site.layer}, where its effect is measured.",
                f"Choose layers up to {goal_site.layer}.",
            )
    batches, weights = _plan(rows, len(goal), bare_weight)
    norms: dict[int, float] = {}
    matrices: list[MatrixDelta] = []
    keys: dict[int, Tensor] = {}
    # no_grad stands outside: the written changes set the mode for their block, so they have to end before it does
    with torch.no_grad(), stage(report, "layers", len(order) * len(batches)) as step, ExitStack() as written:
        for layer, part in order:
            norms.setdefault(layer, float(lm.read_weight(layer, site).float().norm()))
            key, present = _read(lm, Site(layer, INPUT_OF[site]), goal_site, batches, weights, step)  # 1. and 2.
            update = solve_layer(layer, key, part * (goal.float().cpu() - present))  # 3.
            solve.check_finite(f"The update of layer {layer}", update.left, update.right)
            thin = solve.thin(update)
            matrix = MatrixDelta(layer, site, thin.left.float().cpu(), thin.right.float().cpu(), norms[layer])
            written.enter_context(WeightDelta((matrix,)).applied(lm))  # 4.
            matrices.append(matrix)
            keys[layer] = key
    return tuple(matrices), keys


def parse_layers(text: str, n_layers: int, field: str = "layers") -> tuple[int, ...]:
    """Layers from text such as "3-5,7": ascending, each once. Raises BadInput on the field, naming what is wrong."""
    found: set[int] = set()
    for piece in (part.strip() for part in text.split(",")):
        first, dash, last = piece.partition("-")
        try:
            low, high = int(first), int(last if dash else first)
        except ValueError:
            raise BadInput(
                field, f"{piece[:40]!r} is no layer.", 'Write layers and ranges such as "3-5" or "2,4-6".'
            ) from None
        for layer in (low, high):
            check_layer(layer, n_layers, field)
        if low > high:
            raise BadInput(field, f"the range {piece} runs backwards.", f"Write {high}-{low}.")
        found.update(range(low, high + 1))
    return tuple(sorted(found))


def check_layer(layer: int, n_layers: int, field: str = "layers") -> None:
    """Raise BadInput on the field when the model has no such layer."""
    if not 0 <= layer < n_layers:
        raise BadInput(field, f"there is no layer {layer}.", f"Choose from 0 to {n_layers - 1}.")


def default_layers(n_layers: int) -> tuple[int, ...]:
    """Ours: up to five layers that end at a third of the depth (published: 13-17 of 48, 3-8 of 28, 4-8 of 32)."""
    last = min(n_layers - 1, round(n_layers / 3))
    count = min(MOST_LAYERS, max(2, n_layers // 6), last + 1)
    return tuple(range(last - count + 1, last + 1))


_Batch = tuple[list[int], list[optimise.Row]]
"""Rows read together, all bare or none, and where each stands in the list of all."""


def _plan(
    rows: Sequence[optimise.Row], n: int, bare_weight: float | None
) -> tuple[list[_Batch], Float[Tensor, " row"]]:
    """Batches of rows of about the same length, and each row's weight in its request's mean key."""
    texts = [row for row in rows if row.target]
    bare = {row.request for row in texts if row.bare}
    if bare != set(range(n)) or {row.request for row in texts} != bare:
        raise ValueError(f"{n} goals need the bare prompts of requests 0 to {n - 1} among the rows")
    counts = [[0, 0] for _ in range(n)]  # per request: rows in other contexts, bare rows
    for row in texts:
        counts[row.request][row.bare] += 1
    weights = []
    for row in texts:
        others, bares = counts[row.request]
        if bare_weight is None or not others:
            weights.append(1 / (others + bares))
        else:
            weights.append(bare_weight / bares if row.bare else (1 - bare_weight) / others)
    batches: list[_Batch] = []
    for kind in (True, False):
        order = sorted((i for i, row in enumerate(texts) if row.bare is kind), key=lambda i: texts[i].subject)
        for start in range(0, len(order), ROWS_AT_ONCE):
            picked = order[start : start + ROWS_AT_ONCE]
            batches.append((picked, [texts[i] for i in picked]))
    return batches, torch.tensor(weights)


def _read(
    lm: ModelAdapter,
    key_site: Site,
    goal_site: Site,
    batches: Sequence[_Batch],
    weights: Float[Tensor, " row"],
    step: Callable[[], None],
) -> tuple[Float[Tensor, "n width"], Float[Tensor, "n d_model"]]:
    """Each request's mean key and its present value, of the model as it is now."""
    n = 1 + max(row.request for _, rows in batches for row in rows)
    keys: Tensor | None = None
    present: Tensor | None = None
    for places, rows in batches:
        batch = tokens.pack(lm.tokenizer, [row.ids[: row.subject + 1] for row in rows], lm.device)
        sites = [key_site, goal_site] if rows[0].bare else [key_site]
        with lm.aside(), torch.no_grad(), capture(lm, sites) as got:  # as the search read them
            lm.forward(batch)
        owner = torch.tensor([row.request for row in rows])
        each = torch.arange(len(rows))
        at = batch.last.cpu()
        found = got[key_site][each, at].float().cpu() * weights[places, None]  # (row, width)
        keys = found.new_zeros(n, found.shape[1]) if keys is None else keys
        keys.index_add_(0, owner, found)
        if rows[0].bare:
            value = got[goal_site][each, at].float().cpu()  # (row, d_model)
            present = value.new_zeros(n, value.shape[1]) if present is None else present
            present[owner] = value
        step()
    assert keys is not None
    assert present is not None
    return keys, present
