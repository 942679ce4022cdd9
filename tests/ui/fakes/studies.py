"""What the pages see of `service.studies`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mega_core.embedded.measured import Measured
from mega_core.records import Inspection
from mega_core.regions import Region
from mega_core.service import contrasted
from mega_core.service.contrasted import Contrasted
from mega_core.service.studies import OwnRuns


class FakeStudies:
    """Frozen answers."""

    def __init__(self, shipped: Measured) -> None:
        self._shipped = shipped
        self.made: dict[str, Contrasted] = {}
        self.started: list[dict[str, Any]] = []
        self.mine: tuple[OwnRuns, ...] = ()
        self.kept: dict[str, Region] = {}
        self.refusal: Exception | None = None

    def measured(self, model: str) -> Measured | None:
        return self._shipped if model == "atlas-gpt2" else None

    def shipped(self, model: str) -> Contrasted | None:
        found = self.measured(model)
        return None if found is None else contrasted.of_measured(found)

    def contrasted(self, name: str) -> Contrasted | None:
        return self.made.get(name)

    def studies(self, model: str, owner: str) -> list[dict[str, Any]]:
        return [
            {"id": one.id, "source": one.source, "made": one.made, "methods": tuple(one.region.counts),
             "edits": one.region.edits, "layers": one.region.layers}
            for one in self.made.values() if one.region.model == model
        ]  # fmt: skip

    def start_contrast(
        self, model: str, methods: Sequence[str], edits: int, owner: str, **asked: Any
    ) -> tuple[str, str | None]:
        if self.refusal is not None:
            raise self.refusal
        self.started.append({"model": model, "methods": tuple(methods), "edits": edits, **asked})
        return "5" * 32, None if "5" * 32 in self.made else "j" * 32

    def own_runs(self, model: str, owner: str) -> tuple[OwnRuns, ...]:
        return self.mine

    def start_contrast_of_mine(
        self, model: str, editors: Sequence[str], owner: str, **asked: Any
    ) -> tuple[str, str | None]:
        self.started.append({"model": model, "editors": tuple(editors), **asked})
        return "6" * 32, "j" * 32

    def keep_region(self, name: str, region: Region) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.kept[name] = region

    def start_verify(
        self, plan: Inspection, cells: Sequence[str], action: str = "ablate", state: str = "after", **asked: Any
    ) -> str:
        if self.refusal is not None:
            raise self.refusal
        self.started.append({"plan": plan, "cells": list(cells), "action": action, "state": state, **asked})
        return "v" * 32
