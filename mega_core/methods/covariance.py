"""The second moment of keys, C = E[k kT] (uncentred), at an MLP's last matrix, from text that the project makes itself.

1. Draw documents from the corpus of the embedded models: facts, everyday prose.
2. One pass over them, stopped at the deepest layer asked for: chunks of keys are multiplied in float32, their products
   summed in float64.
3. Shrink: C <- (1 - rho) C + rho tr(C) / d I. Few tokens leave directions unseen, where C^-1 would explode.
4. Factor once (Cholesky) and keep the factor under a key that names model, layer, text and settings.

5. Where a method wants the directions that ordinary keys don't use (AlphaEdit), take the eigenvectors of C whose
   eigenvalues are small. They are those of the shrunk C, so the factor of step 4 is all it takes.

C describes the unedited model, also when an edit is prepared on top of others: their weights are taken out, and what
stands before prompts or behind modules is left aside, while the texts are read.

"quick" reads 4 tokens per dimension of the key (8,192 at least), "full" 40; "identity" reads none and means C = I.
The published statistics take 100,000 Wikipedia articles; that a few tokens per dimension suffice is the finding of
arXiv 2506.04226.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from mega_core.changes import MatrixDelta, WeightDelta
from mega_core.errors import ActionableError, BadInput
from mega_core.events import Reporter, silent, stage
from mega_core.keys import digest
from mega_core.methods.solve import Projector
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
    return choleskys(lm, [layer], mode, shrinkage, report)[layer]


def choleskys(
    lm: ModelAdapter,
    layers: Sequence[int],
    mode: str = "quick",
    shrinkage: float | None = None,
    report: Reporter = silent,
) -> dict[int, Float[Tensor, "d_mlp d_mlp"] | None]:
    """The same for several layers: those that are not kept yet come from one pass over the texts."""
    if mode == "identity":
        return dict.fromkeys(layers)
    wanted = tokens_for(mode, lm.d_mlp)
    rho = default_shrinkage(wanted, lm.d_mlp) if shrinkage is None else shrinkage
    rows = covariance_texts(lm, wanted)
    memo = _memo(lm)
    text = _digest_of(rows)
    found: dict[int, Tensor | None] = {}
    keys: dict[int, str] = {}
    for layer in dict.fromkeys(layers):
        keys[layer] = "covariance:" + digest(
            {
                "version": VERSION,
                "weights": lm.file_digest,
                "model": lm.ref,
                "layer": layer,
                "text": text,
                "tokens": wanted,
                "mode": mode,
                "shrinkage": rho,
            }
        )
        kept = None if memo is None else memo.get_arrays(keys[layer])
        if kept is not None and kept.get("cholesky", np.empty(0)).shape == (lm.d_mlp, lm.d_mlp):
            found[layer] = torch.from_numpy(kept["cholesky"])
    missing = [layer for layer in keys if layer not in found]
    if missing:
        with _unedited(lm):
            moments = second_moments(lm, missing, rows, report)
        for layer in missing:
            factor = factorise(shrink(moments.pop(layer), rho)).to("cpu", torch.float32)
            found[layer] = factor
            if memo is not None and not lm.changes:  # with other edits taken out the last bits are not the model's own
                memo.put_arrays(keys[layer], {"cholesky": factor.numpy()})
    return {layer: found[layer] for layer in keys}


def null_spaces(
    lm: ModelAdapter,
    layers: Sequence[int],
    mode: str = "quick",
    cut: float = 0.02,
    kind: str = "relative",
    report: Reporter = silent,
) -> dict[int, Projector]:
    """Per layer the projection on the directions that ordinary keys hardly use. Kept in `lm.memo` as a thin basis.

    "relative": the eigenvectors of C of smallest eigenvalue that together hold at most `cut` of its trace.
    "absolute": those with an eigenvalue below `cut`, as AlphaEdit publishes it; the scale of the keys decides then.
    """
    if mode == "identity":
        raise BadInput("covariance", "without statistics no direction is known to be free.", "Choose quick or full.")
    memo = _memo(lm)
    wanted = tokens_for(mode, lm.d_mlp)
    rho = default_shrinkage(wanted, lm.d_mlp)
    text = _digest_of(covariance_texts(lm, wanted))
    found: dict[int, Projector] = {}
    keys: dict[int, str] = {}
    for layer in dict.fromkeys(layers):
        keys[layer] = "nullspace:" + digest(
            {
                "version": VERSION,
                "weights": lm.file_digest,
                "model": lm.ref,
                "layer": layer,
                "text": text,
                "tokens": wanted,
                "mode": mode,
                "cut": cut,
                "kind": kind,
            }
        )
        kept = None if memo is None else memo.get_arrays(keys[layer])
        if kept is not None and kept.get("basis", np.empty(0)).shape[:1] == (lm.d_mlp,) and "complement" in kept:
            found[layer] = Projector(torch.from_numpy(kept["basis"]), bool(kept["complement"].item()))
    missing = [layer for layer in keys if layer not in found]
    factors = choleskys(lm, missing, mode, rho, report) if missing else {}
    with stage(report, "directions to keep", len(missing)) as step:
        for layer in missing:
            factor = factors.pop(layer)
            assert factor is not None  # only "identity" has none
            found[layer] = null_space(factor, rho, cut, kind)
            if memo is not None and not lm.changes:
                arrays = {"basis": found[layer].basis.numpy(), "complement": np.array([found[layer].complement])}
                memo.put_arrays(keys[layer], arrays)
            step()
    return {layer: found[layer] for layer in keys}


def null_space(factor: Float[Tensor, "d d"], rho: float, cut: float, kind: str = "relative") -> Projector:
    """Step 5, from the Cholesky factor of the C that was shrunk by `rho`. Raises BadInput when nothing is free."""
    wide = factor.double()
    values, vectors = torch.linalg.eigh(wide @ wide.T)  # ascending
    values = ((values - rho * values.mean()) / (1 - rho)).clamp_min(0.0)  # of C before it was shrunk
    free = int((values.cumsum(0) <= cut * values.sum()).sum()) if kind == "relative" else int((values < cut).sum())
    if not free:
        raise BadInput("nullspace_cut", "no direction is free at this cut.", "Raise it.")
    complement = free > len(values) // 2
    basis = vectors[:, free:] if complement else vectors[:, :free]
    return Projector(basis.to("cpu", torch.float32).contiguous(), complement)


def _memo(lm: ModelAdapter) -> Memo | None:
    """Where statistics of this model are kept; a model without a digest has no name to keep them under."""
    return getattr(lm, "memo", None) if lm.file_digest else None


@contextmanager
def _unedited(lm: ModelAdapter) -> Iterator[None]:
    """Read as the unedited model inside the block, to the last bits but few: what edits added is subtracted."""
    edits = [change for change in lm.changes if isinstance(change, WeightDelta)]
    negative = tuple(
        replace(m, left=-m.left) if isinstance(m, MatrixDelta) else replace(m, difference=-m.difference)
        for edit in edits
        for m in edit.matrices
    )
    with lm.aside(), WeightDelta(negative).applied(lm):
        yield


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
