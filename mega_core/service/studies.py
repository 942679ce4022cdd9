"""Studies of many edits, and of what one place in the network does: contrasts, regions, verification."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mega_core import contrast_study
from mega_core.embedded import measured
from mega_core.embedded.measured import Measured
from mega_core.errors import BadInput, ModelUnavailable, StoreError, UnsupportedMethod
from mega_core.events import Event, Note, Reporter, silent, stage
from mega_core.keys import digest as digest_of
from mega_core.methods.base import METHODS
from mega_core.notebook import MAX_PAGE, Run
from mega_core.records import EditRequest, Inspection, Report
from mega_core.regions import saved as saved_regions
from mega_core.service import contrasted
from mega_core.service.contrasted import Contrasted

if TYPE_CHECKING:
    from mega_core.attribution.contrast import Rules
    from mega_core.contrast_study import Study
    from mega_core.regions import Region
    from mega_core.service.core import Core
    from mega_core.verify_study import Verification

FEWEST_EDITS, MOST_EDITS, MOST_EDITORS = 5, 200, 4
"""Of a study that a page may ask for."""
FEWEST_MINE = 10
"""Runs of one editor that worked, for a study of a person's own runs; as many that failed for C and K."""
LET_PASS = 0.6
"""Seconds between two questions of a study while others ask: longer than a waiting job takes to notice."""


@dataclass(frozen=True, slots=True)
class OwnRuns:
    """One editor's runs in a person's history, of edits whose original object is named."""

    editor: str
    worked: int
    """The new object is the most likely answer."""
    failed: int


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
        tick: Reporter = silent,
    ) -> Study:
        """Contrast edits that work with edits that fail, each run an ordinary question: what is stored is reused.

        `report` hears of the study, `tick` of every step inside its questions.
        """

        def answer(method: str, request: EditRequest, params: Mapping[str, object]) -> Report:
            entry, chosen = self._core.asked(model, method, contrast_study.VIEWS, 0)
            plan = self._core.planned(entry, chosen, (request,), params, contrast_study.VIEWS, 0)
            digest = self._core.digest(plan)
            if (found := self._core.cached(digest)) is not None:
                return found
            if self._core.jobs.load()[0] > 1:
                time.sleep(LET_PASS)  # somebody else's turn
            return self._core.answer(plan, digest, tick)

        return contrast_study.study(
            answer, methods, requests, rules=rules, label=label, induced=induced, seed=seed, report=report
        )

    def start_contrast(
        self,
        model: str,
        methods: Sequence[str],
        edits: int,
        owner: str,
        *,
        label: str = "argmax",
        basis: str = "D",
        induced: int = contrast_study.INDUCED,
        seed: int = 0,
    ) -> tuple[str, str | None]:
        """Queue a contrast of random facts: its id, for contrasted(), and the job that makes it; None when it is there.

        It has a lane of its own and leases the model question by question, so others are answered between two of its
        edits; what is stored is reused, so one that was stopped goes on. Raises BadInput, UnknownName,
        UnsupportedMethod, ModelUnavailable and Busy.
        """
        from mega_core.attribution.contrast import LABELS, Rules

        if not FEWEST_EDITS <= edits <= MOST_EDITS:
            raise BadInput("edits", f"{edits} edits.", f"Give {FEWEST_EDITS} to {MOST_EDITS}.")
        if not 1 <= len(methods) <= MOST_EDITORS or len(set(methods)) < len(methods):
            raise BadInput("methods", f"{len(methods)} chosen.", f"Choose 1 to {MOST_EDITORS} different ones.")
        if label not in LABELS:
            raise BadInput("label", f"there is no {label[:20]!r}.", f"Choose one of: {', '.join(LABELS)}.")
        if not 0 <= induced <= MOST_EDITS:
            raise BadInput("induced", f"{induced} edits.", f"Give 0 to {MOST_EDITS}.")
        rules = Rules(basis=basis)
        for name in methods:
            entry, chosen = self._core.asked(model, name, contrast_study.VIEWS, seed)
            if reason := self._core.unsupported(chosen, entry):
                raise UnsupportedMethod(
                    f"{chosen.title} can't edit {entry.name}: {reason}", "Choose another method or model."
                )
        requests = contrast_study.draw(edits, seed)
        asked = {
            "model": model, "weights": self.weights(model), "methods": list(methods), "edits": edits,
            "label": label, "rules": {k: v for k, v in asdict(rules).items() if v is not None},
            "induced": min(induced, edits), "seed": seed,
        }  # fmt: skip
        refs = [METHODS[name].ref(None, self._core.settings.model(model).defaults.get(name)) for name in methods]
        name = digest_of({"contrast": asked, "requests": requests, "editors": refs})[:32]
        if self.contrasted(name) is not None:
            return name, None

        def work(report: Reporter) -> str:
            last: list[Event] = []

            def tell(event: Event) -> None:
                if not isinstance(event, Note):
                    last[:] = [event]
                report(event)

            def tick(_: Event) -> None:
                if last:
                    report(last[0])  # inside a question too: that is where a stop is noticed

            found = self.contrast(
                model, methods, requests, rules=rules, label=label, induced=min(induced, edits), seed=seed,
                report=tell, tick=tick,
            )  # fmt: skip
            contrasted.keep(found, name, contrasted.DRAWN, asked, self._folder)
            return name

        job = self._core.start(
            work,
            owner=owner,
            key=f"contrast:{name}",
            lane=f"study of {model}",
            method=f"contrast of {edits} by {','.join(methods)}",
            kind="contrast",
            timeout_seconds=edits * len(methods) * self._core.settings.job_seconds,
        )
        return name, job

    def start_contrast_of_mine(
        self, model: str, editors: Sequence[str], owner: str, *, label: str = "argmax"
    ) -> tuple[str, str | None]:
        """As start_contrast(), of the runs of these editors in a person's history; the newest of each edit counts.

        Raises BadInput where an editor has too few that worked.
        """
        counts = {one.editor: one for one in self.own_runs(model, owner)}
        for name in editors:
            worked = counts[name].worked if name in counts else 0
            if worked < FEWEST_MINE:
                raise BadInput("editors", f"{name} has {worked} runs that worked.", f"It takes {FEWEST_MINE}.")
        if not editors:
            raise BadInput("editors", "none is chosen.", "Choose at least one.")
        runs = [run for run in self._own(model, owner) if run.method in editors]
        asked = {
            "model": model, "runs": [run.digest for run in runs], "label": label,
            "owner": digest_of({"owner": owner})[:16],
        }  # fmt: skip
        name = digest_of({"contrast of runs": asked})[:32]
        if self.contrasted(name) is not None:
            return name, None

        def work(report: Reporter) -> str:
            numbers: dict[tuple[str, str], int] = {}
            reports: list[tuple[str, int, Report]] = []
            with stage(report, "Read the runs", len(runs)) as step:
                for run in runs:
                    answer = self._core.cached(run.digest)
                    if answer is not None and "module_scores" in answer.frames:
                        edit = (answer.question.requests[0].prompt, answer.question.requests[0].target_new)
                        reports.append((run.method, numbers.setdefault(edit, len(numbers)), answer))
                    step()
            found = contrast_study.of_reports(reports, label=label)
            contrasted.keep(found, name, contrasted.MINE, {**asked, "runs": len(reports)}, self._folder)
            return name

        job = self._core.start(
            work, owner=owner, key=f"contrast:{name}", lane=f"study of {model}", method="contrast of runs",
            kind="contrast",
        )  # fmt: skip
        return name, job

    def own_runs(self, model: str, owner: str) -> tuple[OwnRuns, ...]:
        """How many runs of each editor a person's history has that a contrast could take, by their outcome."""
        counts: dict[str, list[int]] = {}
        for run in self._own(model, owner):
            counts.setdefault(run.method, [0, 0])[run.verdict == "fails"] += 1
        return tuple(OwnRuns(editor, worked, failed) for editor, (worked, failed) in sorted(counts.items()))

    def _own(self, model: str, owner: str) -> list[Run]:
        """A person's runs of single edits with an original object, the newest of each editor and edit."""
        found: dict[tuple[str, str, str, str], Run] = {}
        for entry in self._core.notebook.runs(session=owner, model=model, limit=MAX_PAGE):
            run = entry.run
            if run.model == model and run.edits == 1 and run.target_true and run.verdict:
                found.setdefault((run.method, run.subject, run.template, run.target_new), run)
        return list(found.values())

    def contrasted(self, name: str) -> Contrasted | None:
        """A study that was made here, by its id; None when there is none. Never computes; safe with any text.

        Raises StoreError on a damaged one.
        """
        return contrasted.load(name, self._folder)

    def shipped(self, model: str) -> Contrasted | None:
        """The study that ships with an embedded model, in the form of those made here."""
        found = self.measured(model)
        return None if found is None else contrasted.of_measured(found)

    def studies(self, model: str, owner: str) -> list[dict[str, Any]]:
        """The studies of a model that were made here, newest first; those of runs only for the person whose they are.

        Each has id, source, made (ISO 8601), methods, edits and layers.
        """
        mine = digest_of({"owner": owner})[:16]
        return [
            {key: value for key, value in row.items() if key != "owner"}
            for row in contrasted.listed(self._folder, model)
            if row["owner"] in ("", mine)
        ]

    @property
    def _folder(self) -> Path:
        return self._core.settings.cache_dir / "studies"

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

    def start_verify(
        self,
        plan: Inspection,
        cells: Sequence[str],
        action: str = "ablate",
        state: str = "after",
        *,
        owner: str,
        factor: float = 0.0,
        case: int = 0,
        controls: int = 10,
        seed: int = 0,
    ) -> str:
        """Queue verify(); the id of a job of kind "verify", whose result is a Verification. Raises Busy."""
        asked = {
            "verify": self._core.digest(plan), "cells": list(cells), "action": action, "state": state,
            "factor": factor, "case": case, "controls": controls, "seed": seed,
        }  # fmt: skip
        return self._core.start(
            lambda report: self.verify(
                plan, cells, action, state, factor=factor, case=case, controls=controls, seed=seed, report=report
            ),
            owner=owner,
            key=digest_of(asked),
            lane=plan.model.name,
            method=f"verify {plan.method.name}",
            kind="verify",
        )
