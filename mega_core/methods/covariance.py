"""The second moment of keys, C = E[k kT] (uncentred), at an MLP's last matrix, from text that the project makes itself.

1. Draw documents from the corpus of the embedded models: facts, everyday prose.
2. One pass over them, stopped at the deepest layer asked for: chunks of keys are multiplied in float32, their products
   summed in float64.
3. Shrink: C <- (1 - rho) C + rho tr(C) / d I. Few tokens leave directions unseen, where C^-1 would explode.
4. Factor once (Cholesky) and keep the factor under a key that names model, layer, text and settings.

"quick" reads 4 tokens per dimension of the key (8,192 at least), "full" 40; "identity" reads none and means C = I.
The published statistics take 100,000 Wikipedia articles; that a few tokens per dimension suffice is the finding of
arXiv 2506.04226.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from mega_core.errors import ActionableError
from mega_core.events import Reporter, silent, stage
from mega_core.keys import digest
from mega_core.models import tokens as tokenizing
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture

MODES = ("quick", "identity", "full")
TOKENS_PER_DIMENSION = {"quick": 4, "full": 40}
LEAST_TOKENS = 8192
"""Small models read these in a second."""
ROW_TOKENS = 256
LONG_CONTEXT = 512
"""From this many positions on a row holds several documents, as in the text such models learned from. Many of them
treat a row's first token as a place to rest attention on; a document a row would make one key in thirty such a one."""
ROWS_AT_ONCE = 16
CHUNK = 512
"""Keys whose products are summed in float32 before they join the float64 sum."""
SEED = 20_202
VERSION = 1
"""Part of the key; raise it whenever the numbers change."""


class Memo(Protocol):
    """Named arrays by key; the store is one."""

    def get_arrays(self, key: str) -> dict[str, NDArray[Any]] | None:
        """What was put under this key, or None."""
        ...

    def put_arrays(self, key: str, arrays: Mapping[str, NDArray[Any]]) -> object:
        """Keep it, if there is room."""
        ...


class Memory:
    """A Memo for one process."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, NDArray[Any]]] = {}

    def get_arrays(self, key: str) -> dict[str, NDArray[Any]] | None:
        """What was put under this key, or None."""
        return self._kept.get(key)

    def put_arrays(self, key: str, arrays: Mapping[str, NDArray[Any]]) -> bool:
        """Keep it until the process ends."""
        self._kept[key] = dict(arrays)
        return True


def cholesky(
    lm: ModelAdapter,
    layer: int,
    mode: str = "quick",
    shrinkage: float | None = None,
    report: Reporter = silent,
) -> Float[Tensor, "d_mlp d_mlp"] | None:
    """The lower Cholesky factor of the shrunk second moment at this layer's mlp_down, float32 on the CPU.

    None for "identity". `shrinkage` None takes `default_shrinkage`. Kept in `lm.memo` where the model has one.
    """
    if mode == "identity":
        return None
    wanted = tokens_for(mode, lm.d_mlp)
    rho = default_shrinkage(wanted, lm.d_mlp) if shrinkage is None else shrinkage
    rows = covariance_texts(lm, wanted)
    memo: Memo | None = getattr(lm, "memo", None) if lm.file_digest else None
    key = "covariance:" + digest(
        {
            "version": VERSION,
            "weights": lm.file_digest,
            "model": lm.ref,
            "layer": layer,
            "text": _digest_of(rows),
            "tokens": wanted,
            "mode": mode,
            "shrinkage": rho,
        }
    )
    kept = None if memo is None else memo.get_arrays(key)
    if kept is not None and kept.get("cholesky", np.empty(0)).shape == (lm.d_mlp, lm.d_mlp):
        return torch.from_numpy(kept["cholesky"])
    moment = second_moments(lm, [layer], rows, report)[layer]
    factor = factorise(shrink(moment, rho)).to("cpu", torch.float32)
    if memo is not None:
        memo.put_arrays(key, {"cholesky": factor.numpy()})
    return factor


def tokens_for(mode: str, width: int) -> int:
    """How many tokens a mode reads for keys of this width."""
    return max(LEAST_TOKENS, TOKENS_PER_DIMENSION[mode] * width)


def default_shrinkage(tokens: int, width: int) -> float:
    """Ours: a tenth of d / tokens, between 1 % and 5 %; the estimate's own error falls as d / tokens."""
    return min(0.05, max(0.01, 0.1 * width / tokens))


def shrink(moment: Float[Tensor, "d d"], rho: float) -> Float[Tensor, "d d"]:
    """(1 - rho) C + rho tr(C) / d I: the trace stays."""
    width = len(moment)
    shrunk = (1 - rho) * moment
    shrunk.diagonal().add_(rho * moment.diagonal().sum() / width)
    return shrunk


def factorise(moment: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The lower Cholesky factor. Raises ActionableError when the matrix is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(moment)
    if int(info) != 0 or not bool(torch.isfinite(factor).all()):
        raise ActionableError(
            "The keys' second moment can't be inverted.", "Raise the shrinkage, or set the covariance to identity."
        )
    return factor


def second_moments(
    lm: ModelAdapter, layers: Iterable[int], rows: Sequence[Sequence[int]], report: Reporter = silent
) -> dict[int, Float[Tensor, "d_mlp d_mlp"]]:
    """E[k kT] of the input of mlp_down at every token of `rows`, per layer, in float64: one pass for all layers."""
    sites = {layer: Site(layer, "mlp_down_in") for layer in dict.fromkeys(layers)}
    sums: dict[int, Tensor] = {}
    count = 0
    starts = range(0, len(rows), ROWS_AT_ONCE)
    with stage(report, "key statistics", len(starts)) as step, torch.no_grad():
        for start in starts:
            batch = tokenizing.pack(lm.tokenizer, rows[start : start + ROWS_AT_ONCE], lm.device)
            with capture(lm, sites.values()) as got:
                lm.forward(batch)
            count += int(batch.mask.sum())
            for layer, site in sites.items():
                keys = got[site][batch.mask.to(got[site].device)].float()  # (token, d_mlp)
                for chunk in keys.split(CHUNK):
                    product = (chunk.T @ chunk).double()
                    sums[layer] = sums[layer].add_(product) if layer in sums else product
            step()
    return {layer: total / count for layer, total in sums.items()}


def covariance_texts(lm: ModelAdapter, tokens: int) -> list[tuple[int, ...]]:
    """Rows of token ids, at least `tokens` of them in all, the same on every call."""
    from mega_core.embedded.corpus import Corpus

    corpus = Corpus(SEED)
    length = min(ROW_TOKENS, lm.max_positions)
    together = 8 if lm.max_positions >= LONG_CONTEXT else 1
    rows: list[tuple[int, ...]] = []
    left = tokens
    while left > 0:
        texts = [" ".join(corpus.draw(1.0).text for _ in range(together)) for _ in range(64)]
        for ids in lm.tokenizer(texts)["input_ids"]:
            if left > 0 and ids:
                rows.append(tuple(ids[:length]))
                left -= len(rows[-1])
    return rows


def _digest_of(rows: Sequence[Sequence[int]]) -> str:
    """Of the ids as the model reads them, so that the tokenizer is in it."""
    found = hashlib.sha256()
    for row in rows:
        found.update(np.asarray([len(row), *row], dtype="<i8").tobytes())
    return found.hexdigest()
