"""Multi-hop questions: chains of facts, asked before and after an edit."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mega_core.service.core import Core


class Chains:
    """Multi-hop questions."""

    def __init__(self, core: Core) -> None:
        self._core = core
