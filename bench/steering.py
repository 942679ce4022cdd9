"""What steering and memory methods cost: seconds to fit an edit, and their hooks' share of generating a text.

Shares are of the process's CPU time, so that other work on the machine does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import perf_counter, process_time
from unittest.mock import patch

from bench.common import Row, Unmeasured, open_model, percentile
from bench.quality import test_split
from mega_core.errors import ActionableError
from mega_core.events import silent

FAMILIES = ("steering", "memory", "prompt")
NEW_TOKENS = 24
REPEATS = 5
"""Generations each way per edit, in turn, so that a busy machine slows both alike."""


def measure(quick: bool, methods: Sequence[str] = (), models: Sequence[str] = ()) -> list[Row]:
    """Per model and method: the fit's p50 and p95, and the share of generation, gate included."""
    from mega_core.methods import METHODS
    from mega_core.settings import Settings

    settings = Settings.read()
    names = list(models) or [entry.name for entry in settings.available() if entry.embedded]
    if not names:
        raise Unmeasured("no embedded model is here")
    requests = test_split(3 if quick else 21)
    chosen = [METHODS[name] for name in methods] or [m for m in METHODS if m.family in FAMILIES]
    rows: list[Row] = []
    for name in names:
        lm = open_model(name)
        for method in chosen:
            reason = method.needs(lm.spec)
            if reason is not None:
                rows.append(Row("steering", f"{name} / {method.name} / skipped", 0, "", reason))
                continue
            params = method.read(method.ref({}, settings.model(name).defaults.get(method.name, {})))
            fits, work, plain, steered = [], [], [], []
            for number, request in enumerate(requests):
                start, used = perf_counter(), process_time()
                try:
                    change = method.prepare(lm, [request], params, 0, silent)
                except ActionableError:
                    continue
                if number:  # the first one warms caches
                    fits.append(perf_counter() - start)
                    work.append(process_time() - used)
                # An edited model ends its text elsewhere: no end counts, so that both make as many tokens.
                with patch.object(lm, "_end_ids", return_value=frozenset()):
                    for _ in range(REPEATS):
                        start = process_time()
                        lm.generate([request.prompt], NEW_TOKENS)
                        plain.append(process_time() - start)
                        with change.applied(lm):
                            start = process_time()
                            lm.generate([request.prompt], NEW_TOKENS)
                            steered.append(process_time() - start)
            if not fits:
                rows.append(Row("steering", f"{name} / {method.name} / failed", 0, "", "it refused every edit"))
                continue
            before, after = median(plain), median(steered)
            label = f"{name} / {method.name}"
            note = (
                f"{NEW_TOKENS} tokens: {1000 * before:.0f} ms of CPU plain, {1000 * after:.0f} ms edited, gate included"
            )
            rows += [
                Row(
                    "steering",
                    f"{label} / fit p50",
                    percentile(fits, 50),
                    "s",
                    f"{len(fits)} edits, CPU time {median(work):.2f} s",
                ),
                Row("steering", f"{label} / fit p95", percentile(fits, 95), "s"),
                Row("steering", f"{label} / share of generation", 100 * (after - before) / after, "%", note),
            ]
    return rows
