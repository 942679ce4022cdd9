"""Runs that leave and come back: files of a whole run, and runs that were imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mega_core.service.core import Core


class Sharing:
    """Runs that leave and come back."""

    def __init__(self, core: Core) -> None:
        self._core = core
