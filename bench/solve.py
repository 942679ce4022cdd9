"""The search for a value and the closed forms against the same written plainly, in the shape of GPT-2 small.

Plain MEMIT solves (lambda C + K KT) X = K by an LU factorisation in float64, plain AlphaEdit its (d, d) system in
float64 and, as published, in float32; the null space comes from an SVD. Ours work from C's cached Cholesky factor and
from a thin basis. Both sides get what is cached between edits (C and P there, the factor and the basis here), and end
with the same pair of factors. Times are the process's CPU time, so that other work on the machine does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from time import process_time
from typing import TYPE_CHECKING

from bench.common import Row
from mega_core.records import EditRequest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Factors = tuple[Tensor, Tensor]

WIDTH, OUT = 3072, 768
EDITS, EARLIER = (1, 100), 100
LAMBDA, L2 = 15_000.0, 10.0
TOKENS_PER_DIMENSION = 4
DECAY = 1.2
"""Eigenvalues of C fall as 1 / i^DECAY: most directions are hardly used, as in a trained model."""
CUT = 0.02
STEPS = 20


def measure(quick: bool) -> list[Row]:
    """Milliseconds each way, their ratio, and how far the updates differ."""
    import torch

    from mega_core.methods import covariance, solve

    width, out, repeats = (768, 192, 2) if quick else (WIDTH, OUT, 3)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    scales = torch.arange(1, width + 1).double().pow(-DECAY / 2) * width**0.5 / 4
    turn = torch.linalg.qr(noise(width, width).double())[0]
    tokens = TOKENS_PER_DIMENSION * width

    def keys_like_text(n: int) -> torch.Tensor:
        return (noise(n, width).double() * scales @ turn.T).float()

    text = keys_like_text(tokens)
    moment = (text.double().T @ text.double()) / tokens
    rho = covariance.default_shrinkage(tokens, width)
    shrunk = covariance.shrink(moment, rho)
    kept_moment = shrunk.float()
    start = process_time()
    factor = covariance.factorise(shrunk).float()
    once = 1000 * (process_time() - start)
    every_key, every_change = keys_like_text(max(EDITS)), noise(max(EDITS), out)
    earlier = keys_like_text(EARLIER)
    shape = f"d_k {width}, d {out}"
    rows = _search(2 if quick else STEPS)
    rows.append(Row("solve", "the Cholesky factor of C, once", once, "ms", shape))

    # The null space: eigenvectors of C with small eigenvalues
    start = process_time()
    projector = covariance.null_space(factor, rho, CUT)
    by_eigh = process_time() - start
    start = process_time()
    torch.linalg.svd(kept_moment, full_matrices=False)
    by_svd = process_time() - start
    start = process_time()
    torch.linalg.eigh(kept_moment)
    same = process_time() - start
    rows += [
        Row("solve", "null space, SVD of C (float32)", by_svd, "s", shape),
        Row("solve", "null space, eigh of C in float32 too", same, "s"),
        Row("solve", "null space, SVD / eigh, both float32", by_svd / same, "x"),
        Row("solve", "null space, ours (eigh, float64)", by_eigh, "s", f"{projector.rank} of {width} directions free"),
        Row("solve", "null space, plain / ours", by_svd / by_eigh, "x"),
    ]
    dense = projector(torch.eye(width, dtype=torch.float64))
    past = earlier.double().T @ earlier.double()

    for n in EDITS:
        keys, changes = every_key[:n], every_change[:n]
        many = f"{n} edits" if n > 1 else "1 edit"

        def plain_soft(keys: Tensor = keys, changes: Tensor = changes) -> Factors:
            wide = keys.double().T  # (in, n)
            return changes.T, torch.linalg.solve(LAMBDA * kept_moment.double() + wide @ wide.T, wide)

        def our_soft(keys: Tensor = keys, changes: Tensor = changes) -> Factors:
            found = solve.soft_edit(keys, changes, factor, LAMBDA)
            return found.left, found.right

        rows += _pair(f"MEMIT, {many}", plain_soft, our_soft, repeats, f"one layer, {shape}; plain: float64 LU")

        def plain_projected(dtype: torch.dtype, keys: Tensor = keys, changes: Tensor = changes) -> Factors:
            basis, wide = dense.to(dtype), keys.to(dtype).T
            system = basis @ (wide @ wide.T + past.to(dtype)) + L2 * torch.eye(width, dtype=dtype)
            transposed = torch.linalg.solve(system, basis @ wide @ changes.to(dtype))  # (in, out)
            return torch.eye(out, dtype=dtype), transposed

        def our_projected(keys: Tensor = keys, changes: Tensor = changes) -> Factors:
            found = solve.projected_edit(keys, changes, projector, earlier, L2)
            return found.left, found.right

        note = f"one layer, {shape}, on {EARLIER} earlier edits; plain: LU in"
        name = f"AlphaEdit, {many}"
        exact, published = partial(plain_projected, torch.float64), partial(plain_projected, torch.float32)
        rows += _pair(name, exact, our_projected, repeats, f"{note} float64")
        rows += _pair(f"{name}, as published", published, our_projected, repeats, f"{note} float32")
    return rows


def _search(steps: int) -> list[Row]:
    """One edit's whole search for a value, without early stop: whole forwards, logits everywhere, against ours."""
    from mega_core.methods import optimise
    from mega_core.methods.rome import BARE, CONTEXTS, default_layer
    from tests.reference.plain_optimise import gpt2_small_shape, plain_search

    lm = gpt2_small_shape()
    request = EditRequest("The Eiffel Tower", "{} is in the city of", "Rome", "Paris")
    texts = optimise.rows_for(lm, 0, request, (BARE, *CONTEXTS[:5]), ("{} is a",))
    layer = default_layer(lm.n_layers)
    search = optimise.Search(steps=steps, stop_probability=2.0)
    start = process_time()
    plain = plain_search(lm, layer, texts, search)
    slow = process_time() - start
    start = process_time()
    found = optimise.find_values(lm, layer, texts, search).delta[0]
    fast = process_time() - start
    note = f"GPT-2 small's shape, layer {layer}, {len(texts)} rows, {steps} steps"
    return [
        Row("solve", "search for a value, plain", slow, "s", note),
        Row("solve", "search for a value, ours", fast, "s"),
        Row("solve", "search for a value, plain / ours", slow / fast, "x"),
        Row("solve", "search for a value, relative difference", float((plain - found).norm() / plain.norm())),
    ]


def _pair(name: str, plain: Callable[[], Factors], ours: Callable[[], Factors], repeats: int, note: str) -> list[Row]:
    slow, wanted = _timed(plain, repeats)
    fast, found = _timed(ours, repeats)
    exact = _product(wanted)
    error = float((_product(found) - exact).norm() / exact.norm())
    return [
        Row("solve", f"{name}, plain", slow, "ms", note),
        Row("solve", f"{name}, ours", fast, "ms"),
        Row("solve", f"{name}, plain / ours", slow / fast, "x"),
        Row("solve", f"{name}, relative difference of the updates", error),
    ]


def _timed(run: Callable[[], Factors], repeats: int) -> tuple[float, Factors]:
    """(median milliseconds of CPU time, result), after a first run that is not counted."""
    found = run()
    times = []
    for _ in range(repeats):
        start = process_time()
        run()
        times.append(1000 * (process_time() - start))
    return median(times), found


def _product(factors: Factors) -> Tensor:
    left, right = factors
    return left.double() @ right.double().T
