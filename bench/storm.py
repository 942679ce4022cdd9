"""Many jobs, some cancelled, some broken at every stage: the model must come back bit-identical, without a hook.

1. One quiet run records every event: each is a place where work can be stopped or broken, in every stage.
2. Then come jobs of three kinds: left alone, cancelled (from outside or at an event), and broken by an error.
3. After every single job the live parameters are digested and the hooks counted.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from unittest.mock import patch

from bench.common import Row, embedded_models, random_plans, temporary_service
from mega_core.errors import ActionableError
from mega_core.events import Advanced, Cancelled, Event, Finished, Note, Reporter, Started
from mega_core.records import Inspection
from mega_core.service import Condition, Service
from mega_core.store import Store


class Broken(RuntimeError):
    """The failure that is injected."""


@dataclass(frozen=True, slots=True)
class Storm:
    """What became of the jobs."""

    done: int
    cancelled: int
    failed: int
    stages: tuple[str, ...]
    """Where jobs were stopped or broken."""
    unclean: tuple[str, ...]
    """Jobs after which the model was not as before; empty is the promise."""
    slowest_cancel: float
    """Seconds from cancel() until the job was over."""


def storm(service: Service, plans: Sequence[Inspection], jobs: int, seed: int = 0) -> Storm:
    """Run the jobs one after another on one model and check after each."""
    generator = random.Random(seed)
    model = plans[0].model.name
    places, usual = _places(service, plans[0])
    base = service.condition(model)
    outcomes: Counter[str] = Counter()
    hit: Counter[str] = Counter()
    unclean: list[str] = []
    slowest = 0.0
    for number in range(jobs):
        plan = replace(generator.choice(plans), seed=number + 1)  # another question, so nothing is stored
        kind = ("quiet", "cancel", "cancel at", "break at", "break at", "break saving")[number % 6]
        if kind in ("cancel at", "break at"):
            at = number % len(places)
            if places[at].startswith("load"):
                service.unload()
            error = Cancelled() if kind == "cancel at" else generator.choice((Broken(), MemoryError()))
            hit[places[at]] += 1
            outcomes[_run(service, plan, _trip(places[at], generator.randint(1, 3), error))] += 1
        elif kind == "break saving":
            with patch.object(Store, "put_report", side_effect=Broken()):
                outcomes[_run(service, plan, lambda event: None)] += 1
            hit["save"] += 1
        else:
            owner = f"storm-{number}"
            job = service.submit(plan, owner, fresh=True)
            if kind == "cancel":
                time.sleep(generator.random() * usual)
                start = time.perf_counter()
                service.cancel(job, owner)
                slowest = max(slowest, time.perf_counter() - start)
            outcomes[service.wait(job, 600).state] += 1
        now = service.condition(model)  # waits for work that is still being stopped
        if now != base or now.hooks:
            unclean.append(f"{number} ({kind}): {_difference(base, now)}")
    return Storm(
        done=outcomes["done"],
        cancelled=outcomes["cancelled"],
        failed=outcomes["failed"],
        stages=tuple(sorted(hit)),
        unclean=tuple(unclean),
        slowest_cancel=slowest,
    )


def measure(quick: bool) -> list[Row]:
    """200 jobs on each embedded model."""
    rows: list[Row] = []
    with temporary_service() as service:
        for model in embedded_models(service):
            found = storm(service, random_plans(service, model, 5, seed=4), 20 if quick else 200)
            jobs = found.done + found.cancelled + found.failed
            note = (
                f"{found.done} done, {found.cancelled} cancelled, {found.failed} failed, at: {', '.join(found.stages)}"
            )
            rows.append(
                Row("storm", f"{model} model identical and 0 hooks", jobs - len(found.unclean), f"of {jobs}", note)
            )
            rows.append(Row("storm", f"{model} slowest cancel", 1000 * found.slowest_cancel, "ms"))
    return rows


def _places(service: Service, plan: Inspection) -> tuple[list[str], float]:
    """The stages an answer goes through, loading included, and how long it takes once loaded."""
    seen: dict[str, None] = {}

    def record(event: Event) -> None:
        if not isinstance(event, Note):
            seen.setdefault(event.stage)

    service.unload()
    service.run(plan, record, fresh=True)
    start = time.perf_counter()
    service.run(plan, fresh=True)
    return list(seen), time.perf_counter() - start


def _trip(stage: str, at: int, error: Exception) -> Reporter:
    """A reporter that raises at the `at`-th event of a stage, or at its end."""
    seen = 0

    def report(event: Event) -> None:
        nonlocal seen
        if isinstance(event, Started | Advanced | Finished) and event.stage == stage:
            seen += 1
            if seen == at or isinstance(event, Finished):
                raise error

    return report


def _run(service: Service, plan: Inspection, report: Reporter) -> str:
    with suppress(ActionableError, Broken, MemoryError):
        try:
            service.run(plan, report, fresh=True)
        except Cancelled:
            return "cancelled"
        return "done"
    return "failed"


def _difference(base: Condition, now: Condition) -> str:
    parts = ["other weights"] if now.digest != base.digest else []
    return ", ".join(parts + ([f"{now.hooks} hooks"] if now.hooks else []))
