"""What the pages see of `service.sharing`."""

from __future__ import annotations


class FakeSharing:
    """Frozen answers."""
