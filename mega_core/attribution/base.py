"""What a view is: one way of looking inside the model, from edit requests to tidy frames. No torch until it looks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from mega_core.events import Reporter
from mega_core.records import EditRequest
from mega_core.registry import Registry

if TYPE_CHECKING:
    import pandas as pd

    from mega_core.models.adapter import ModelAdapter

# (lm, requests, state, report) -> frame name -> frame, every row labelled with `state`.
Look = Callable[["ModelAdapter", Sequence[EditRequest], str, Reporter], Mapping[str, "pd.DataFrame"]]


@dataclass(frozen=True)
class View:
    """A way of looking, run once on the unedited and once on the edited model."""

    name: str
    title: str
    frames: tuple[str, ...]
    """The frames it fills (see frames.py)."""
    function: str
    """"package.module:function" of type Look, imported at first use: attribution needs torch, forms don't."""
    version: int = 1

    def look(
        self, lm: ModelAdapter, requests: Sequence[EditRequest], state: str, report: Reporter
    ) -> Mapping[str, pd.DataFrame]:
        """Run it."""
        module, _, name = self.function.partition(":")
        function: Look = getattr(import_module(module), name)
        return function(lm, requests, state, report)


VIEWS: Registry[View] = Registry("view")
