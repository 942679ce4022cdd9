"""What the pages see of `service.reviews`."""

from __future__ import annotations


class FakeReviews:
    """Frozen answers."""
