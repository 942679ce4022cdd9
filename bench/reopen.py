"""Opening a stored result: store lookup, authentication, reading the tables."""

from __future__ import annotations

from time import perf_counter

from bench.common import Row, embedded_models, percentile, random_plans, temporary_service
from mega_core.service import Service


def measure(quick: bool) -> list[Row]:
    """p50 and p95 of reading one report from the store, with its size."""
    with temporary_service() as service:
        model = embedded_models(service)[0]
        (plan,) = random_plans(service, model, 1, seed=3)
        report = service.run(plan, fresh=True)
        times = []
        for _ in range(20 if quick else 200):
            start = perf_counter()
            service.report(report.digest)
            times.append(1000 * (perf_counter() - start))
        start = perf_counter()
        with Service.open(service.settings) as second:
            second.report(report.digest)
        cold = 1000 * (perf_counter() - start)
        size = f"{len(report.to_bytes()) / 1024:.0f} kB"
    return [
        Row("reopen", "stored result p50", percentile(times, 50), "ms", size),
        Row("reopen", "stored result p95", percentile(times, 95), "ms", f"{len(times)} reads"),
        Row("reopen", "opening the service and a stored result", cold, "ms"),
    ]
