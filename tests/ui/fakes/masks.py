"""What the pages see of `service.masks`."""

from __future__ import annotations


class FakeMasks:
    """Frozen answers."""
