"""Failure review: queues of runs, what reviewers say of them, and how far they agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mega_core.service.core import Core


class Reviews:
    """Failure review."""

    def __init__(self, core: Core) -> None:
        self._core = core
