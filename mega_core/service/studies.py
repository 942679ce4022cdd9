"""Studies of many edits, and of what one place in the network does: contrasts, regions, verification."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mega_core import contrast_study
from mega_core.embedded import measured
from mega_core.embedded.measured import Measured
from mega_core.errors import BadInput, ModelUnavailable, StoreError
from mega_core.events import Reporter, silent
from mega_core.records import EditRequest, Inspection, Report
from mega_core.regions import saved as saved_regions

if TYPE_CHECKING:
    from mega_core.attribution.contrast import Rules
    from mega_core.contrast_study import Study
    from mega_core.regions import Region
    from mega_core.service.core import Core
    from mega_core.verify_study import Verification


class Studies:
    """What many runs have in common, and whether a place does what attribution says of it."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def contrast(
        self,
        model: str,
        methods: Sequence[str],
        requests: Sequence[EditRequest],
        *,
        rules: Rules | None = None,
        label: str = "argmax",
        induced: int = contrast_study.INDUCED,
        seed: int = 0,
        report: Reporter = silent,
    ) -> Study:
        """Contrast edits that work with edits that fail, each run an ordinary question: what is stored is reused."""

        def answer(method: str, request: EditRequest, params: Mapping[str, object]) -> Report:
            entry, chosen = self._core.asked(model, method, contrast_study.VIEWS, 0)
            return self._core.run(self._core.planned(entry, chosen, (request,), params, contrast_study.VIEWS, 0))

        return contrast_study.study(
            answer, methods, requests, rules=rules, label=label, induced=induced, seed=seed, report=report
        )

    def weights(self, model: str) -> str:
        """The digest of a model's files. Raises ModelUnavailable when it isn't here."""
        return self._core.weights(self._core.settings.model(model))

    def regions(self, model: str) -> dict[str, Region]:
        """Name -> region of this model, of those that were kept; the one that ships goes by the model's name."""
        try:
            weights = self.weights(model)
        except ModelUnavailable:
            return {}
        shipped_one = self.measured(model)
        shipped_regions = {} if shipped_one is None else {model: shipped_one.region}
        return shipped_regions | saved_regions(self._core.settings.cache_dir / "regions", model, weights)

    def measured(self, model: str) -> Measured | None:
        """The contrast of edits that ships with an embedded model; None for others."""
        entry = self._core.settings.model(model)
        try:
            return measured.load(entry.name, self._core.weights(entry)) if entry.embedded else None
        except (ModelUnavailable, StoreError) as error:
            self._core.notice("measured", str(error))
            return None

    def ship_contrast(self, study: Mapping[str, Any]) -> Path:
        """Keep a study, as plain JSON, as the one that ships. Raises BadInput unless its model is embedded."""
        name = study["region"]["model"]["name"]
        if not self._core.settings.model(name).embedded:
            raise BadInput("model", f"{name} does not ship with the project.", "Use --out and --json instead.")
        return measured.write(study)

    def keep_region(self, name: str, region: Region) -> None:
        """Keep a region under a name, in the place of one of that name. Raises BadInput on a name that is none."""
        if not re.fullmatch(r"[\w-][\w.-]{0,63}", name):
            raise BadInput("name", f"{name[:40]!r} is no name for a region.", "Use letters, digits, '-', '_' or '.'.")
        region.save(self._core.settings.cache_dir / "regions" / f"{name}.json")

    def verify(
        self,
        plan: Inspection,
        cells: Sequence[str],
        action: str = "ablate",
        state: str = "after",
        *,
        factor: float = 0.0,
        case: int = 0,
        controls: int = 10,
        seed: int = 0,
        report: Reporter = silent,
    ) -> Verification:
        """Change what each of `cells` names (several joined by "+" together) and see what the model says then.

        Actions: ablate, scale by `factor`, patch from the other state, restore an edited matrix. Raises BadInput on a
        cell, an action or a state that can't be.
        """
        with self._core.held(plan.model, report) as lm:
            from mega_core.verify_study import verify

            return verify(
                plan, lm, cells, action, state, factor=factor, case=case, draws=controls, seed=seed, report=report
            )
