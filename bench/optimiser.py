"""One step of the value optimisation, ours against a plain one, on random weights in the shape of GPT-2 small."""

from __future__ import annotations

from bench.common import Row


def measure(quick: bool) -> list[Row]:
    """Milliseconds of a forward and backward pass each way, their ratio, and how far the gradients differ."""
    from tests.reference.plain_optimise import compare_steps, gpt2_small_shape

    found = compare_steps(gpt2_small_shape(), repeats=2 if quick else 9)
    note = "22 rows of 20 tokens, subject at 12, layer 4 of 12"
    return [
        Row("optimiser", "plain reference, one step", found["plain_ms"], "ms", note),
        Row("optimiser", "ours, one step", found["fast_ms"], "ms"),
        Row("optimiser", "reading the prefix, once per search", found["read_ms"], "ms"),
        Row("optimiser", "plain / ours", found["speedup"], "x"),
        Row("optimiser", "relative difference of the gradients", found["gradient_error"]),
    ]
