"""Wall time of one edit with metrics and module scores, on a loaded model whose statistics are known."""

from __future__ import annotations

from time import perf_counter

from bench.common import Row, embedded_models, percentile, random_plans, temporary_service


def measure(quick: bool) -> list[Row]:
    """Median and p95 per embedded model, and the seconds per stage of the median run."""
    rows: list[Row] = []
    with temporary_service(max_models=2) as service:
        for model in embedded_models(service):
            plans = random_plans(service, model, 3 if quick else 21, seed=1)
            start = perf_counter()
            service.run(plans[0], fresh=True)
            rows.append(Row("edit", f"{model} first (loads, gathers statistics)", perf_counter() - start, "s"))
            seconds, reports = [], []
            for plan in plans[1:]:
                start = perf_counter()
                reports.append(service.run(plan, fresh=True))
                seconds.append(perf_counter() - start)
            median = percentile(seconds, 50)
            middle = min(range(len(seconds)), key=lambda i: abs(seconds[i] - median))
            parts = ", ".join(f"{name} {value:.2f}" for name, value in reports[middle].timing.items())
            rows.append(Row("edit", f"{model} p50", median, "s", parts))
            rows.append(Row("edit", f"{model} p95", percentile(seconds, 95), "s", f"{len(seconds)} edits"))
    return rows
