"""What the pages see of `service.stacks`."""

from __future__ import annotations


class FakeStacks:
    """Frozen answers."""
