"""What the pages see of `service.steering`."""

from __future__ import annotations


class FakeSteering:
    """Frozen answers."""
