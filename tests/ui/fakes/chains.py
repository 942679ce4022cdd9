"""What the pages see of `service.chains`."""

from __future__ import annotations


class FakeChains:
    """Frozen answers."""
