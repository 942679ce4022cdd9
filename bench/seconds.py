"""What one edit takes by every method on every embedded model, written to the table that the method cards show.

Counted is the processor's time in one thread: on a machine that does nothing else it is the time on the clock, and what
else the machine does meanwhile hardly changes it.
"""

from __future__ import annotations

import os
from statistics import median
from time import process_time

from bench.common import Row, embedded_models, machine, plan_of, random_plans, temporary_service
from mega_core.embedded import seconds as shipped


def measure(quick: bool) -> list[Row]:
    """The median of three runs on different facts, after one that loads the model and gathers its statistics."""
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"  # so that the service leaves it at that
    torch.set_num_threads(1)
    rows: list[Row] = []
    table: dict[str, dict[str, float]] = {}
    runs = 1 if quick else 3
    with temporary_service(max_models=2) as service:
        for model in embedded_models(service):
            requests = [plan.requests[0] for plan in random_plans(service, model, 1 + runs, seed=1)]
            for method in service.methods(model):
                if method.unsupported is not None:
                    continue
                took = []
                for request in requests:
                    plan = plan_of(service, model, request, method.name)
                    start = process_time()
                    service.run(plan, fresh=True)
                    took.append(process_time() - start)
                took = took[1:]
                table.setdefault(model, {})[method.name] = median(took)
                spread = f"{min(took):.2f} to {max(took):.2f}, {runs} runs"
                rows.append(Row("seconds", f"{model} {method.name}", median(took), "s", spread))
    if not quick:
        shipped.write(table, machine(), runs)
    return rows
