"""MEGA at another strength: what a steered model says when its maps are applied more or less, without a new fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mega_core.service.core import Core


class Steering:
    """MEGA at another strength."""

    def __init__(self, core: Core) -> None:
        self._core = core
