"""What the pages see of `service.benchmarks`."""

from __future__ import annotations


class FakeBenchmarks:
    """Frozen answers."""
