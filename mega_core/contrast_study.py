"""A contrast study: which edits, by which editors, and from their reports to a region (see attribution/contrast).

1. Edits: random counterfactuals of known facts, one per subject, none about a subject of the reported split; or edits
   that are given.
2. Runs: every edit by every editor, each an ordinary question with the view `module_scores`, so that what is stored
   answers at once, and a study that was stopped goes on where it was.
3. A run counts if the model knew the old object (its first token came first), and old and new object begin differently:
   contributions are those of first tokens. The others are counted as left out.
4. Success: the new object's first token comes first after the edit prompt. Also kept: whether it is likelier than the
   old one's.
5. Where an editor has too few failures, some are induced on the first edits: the editor made worse in the ways of
   `ways_to_fail`, the mildest first, until enough of them fail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from mega_core import frames, regions
from mega_core.attribution import contrast
from mega_core.embedded import examples
from mega_core.errors import ActionableError, BadInput
from mega_core.events import Note, Reporter, silent, stage
from mega_core.methods.base import METHODS
from mega_core.records import EditRequest, Report

REPORTED = 100
"""Edits of the reported split whose subjects are left alone."""
MOST = 1000
VIEWS = ("module_scores",)
INDUCED = 60
"""Edits on which failures are induced."""
KNEW_OTHER, ALIKE, NO_TRUE, REFUSED = "not known before", "begin alike", "no old object", "refused"

Ask = Callable[[str, EditRequest, Mapping[str, object]], Report]
"""(method, request, parameters) -> its report with the view module_scores, stored or computed."""


@dataclass(frozen=True)
class Study:
    """What a study found."""

    region: regions.Region
    frames: Mapping[str, pd.DataFrame]
    """contrast_runs, contrast, contrast_sums and leverage."""
    verdicts: Mapping[str, tuple[contrast.Claim, ...]]
    """Editor -> the parts of the published pattern."""
    left_out: Mapping[str, Mapping[str, int]]
    """Editor -> reason -> how many edits don't count."""

    @property
    def in_words(self) -> str:
        """Whether the published pattern holds."""
        return contrast.in_words(self.verdicts)


@dataclass
class _Found:
    """Rows on their way to frames."""

    runs: list[dict[str, object]] = field(default_factory=list)
    scores: list[pd.DataFrame] = field(default_factory=list)
    left_out: dict[str, Counter[str]] = field(default_factory=dict)
    last: Report | None = None


def study(
    ask: Ask,
    methods: Sequence[str],
    requests: Sequence[EditRequest],
    *,
    rules: contrast.Rules | None = None,
    label: str = "argmax",
    induced: int = INDUCED,
    seed: int = 0,
    report: Reporter = silent,
) -> Study:
    """Steps 2 to 5. `seed` is that of the draws and of the edits, for the record.

    Raises UnknownName or BadInput on methods that are none or come twice, ActionableError where nothing succeeded.
    """
    for name in methods:
        METHODS[name]
    if not methods or len(set(methods)) < len(methods):
        raise BadInput("methods", "names one twice, or none.", "For example: rome,memit,ft_m,ike.")
    if not requests:
        raise BadInput("edits", "there are none.", "Give at least one.")
    found = _Found()
    for name in methods:
        _by_one(ask, name, requests, induced, found, report)
    return _concluded(found, methods, len(requests), rules or contrast.Rules(), label, seed)


def of_reports(
    reports: Sequence[tuple[str, int, Report]], *, rules: contrast.Rules | None = None, label: str = "argmax"
) -> Study:
    """Steps 3 and 4 of runs that are there: (editor, number of the edit, report), each pair once. Nothing is induced.

    Raises ActionableError where nothing counts, or nothing succeeded.
    """
    found = _Found()
    for method, number, answer in reports:
        _keep(answer, method, number, "", found, found.left_out.setdefault(method, Counter()))
    edits = len({number for _, number, _ in reports})
    return _concluded(found, tuple(found.left_out), edits, rules or contrast.Rules(), label, 0)


def _concluded(
    found: _Found, methods: Sequence[str], edits: int, rules: contrast.Rules, label: str, seed: int
) -> Study:
    """From rows to curves, region and verdicts."""
    if found.last is None or not found.runs:
        reasons = Counter(reason for each in found.left_out.values() for reason in each.elements())
        said = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        raise ActionableError(f"No edit counts ({said}).", "Choose facts that the model knows.")
    runs = frames.from_rows(found.runs, "contrast_runs")
    scores = frames.check(pd.concat(found.scores), "run_scores")
    curves = contrast.contrast(runs, scores, rules, label=label, seed=seed)
    counts = {name: _count(runs, curves.frames["contrast"], found, name, label) for name in methods}
    measured = tuple(name for name in methods if name in set(curves.frames["leverage"]["editor"]))
    return Study(
        region=regions.Region(
            model=found.last.question.model.name,
            weights=found.last.model_digest,
            n_layers=curves.n_layers,
            methods=measured,
            edits=edits,
            seed=seed,
            basis=rules.basis,
            counts=counts,
            layers=curves.layers,
            value_layers=curves.value_layers,
            query_layers=curves.query_layers,
            leverage=_levers(curves.frames["leverage"]),
            rules={**_spelled(rules, curves.n_layers), "success": label},
            versions={**found.last.environment, "numpy": np.__version__},
        ),
        frames={"contrast_runs": runs, **curves.frames},
        verdicts={name: contrast.verdict(curves.frames["contrast_sums"], name) for name in methods},
        left_out={name: dict(reasons) for name, reasons in found.left_out.items()},
    )


def draw(count: int, seed: int) -> tuple[EditRequest, ...]:
    """Step 1. Raises BadInput on a count out of range."""
    if not 1 <= count <= MOST:
        raise BadInput("n", f"{count} edits.", f"Give 1 to {MOST}.")
    taken = {request.subject for request in examples.reported(REPORTED)}
    chosen: list[EditRequest] = []
    for request in examples.candidates(seed, min_neighbours=1):
        if len(chosen) == count:
            break
        if request.subject not in taken:
            taken.add(request.subject)
            chosen.append(request)
    return tuple(chosen)


def ways_to_fail(method: str) -> tuple[Mapping[str, object], ...]:
    """Step 5, ours: parameters that make an editor fail, the mildest first; none where we know no such way.

    What searches or trains is stopped after 3, 2 or 1 steps. IKE states the new fact in a wrapper that the embedded
    models were not trained on, and if they obey it all the same, behind four demonstrations, which they can't follow.
    """
    if method == "ike":
        return ({"wrapper": "new fact, prompt"}, {"k": 4})
    if any(knob.name == "steps" for knob in METHODS[method].knobs()):
        return ({"steps": 3}, {"steps": 2}, {"steps": 1})
    return ()


# Runs ----------------------------------------------------------------------------------------------------------------


def _by_one(
    ask: Ask, method: str, requests: Sequence[EditRequest], induced: int, found: _Found, report: Reporter
) -> None:
    """Every edit by one editor, then failures of it if they are needed."""
    counted = found.left_out.setdefault(method, Counter())
    failed = _runs(ask, method, requests, {}, found, counted, report)
    mine = sum(run["editor"] == method for run in found.runs)
    text = f"{method}: {mine - failed} of {mine} succeeded"
    if counted:
        text += f", left out {', '.join(f'{count} {reason}' for reason, count in counted.most_common())}"
    if failed < contrast.FEWEST_FAILURES and induced and mine:
        for params in ways_to_fail(method):
            worse = _Found()
            enough = _runs(ask, method, requests[:induced], params, worse, Counter(), report)
            if enough >= contrast.FEWEST_FAILURES:
                found.runs += worse.runs
                found.scores += worse.scores
                text += f"; {enough} failures induced by {_way(params)}"
                break
    report(Note(f"{text}."))


def _runs(
    ask: Ask,
    method: str,
    requests: Sequence[EditRequest],
    params: Mapping[str, object],
    found: _Found,
    left_out: Counter[str],
    report: Reporter,
) -> int:
    """Ask, and keep what counts; how many failed."""
    way, failed = _way(params), 0
    title = METHODS[method].title
    with stage(report, f"{title} ({way})" if way else title, len(requests)) as step:
        for number, request in enumerate(requests):
            try:
                answer = ask(method, request, params)
            except ActionableError as error:
                if type(error) not in (ActionableError, BadInput):  # what is wrong with more than this edit
                    raise
                if not left_out[REFUSED]:
                    report(Note(f"{method} refused an edit: {error}"))
                left_out[REFUSED] += 1
                step()
                continue
            failed += _keep(answer, method, number, way, found, left_out)
            step()
    return failed


def _keep(answer: Report, method: str, number: int, way: str, found: _Found, left_out: Counter[str]) -> bool:
    """Add a report's rows, or count why it is left out; whether it is a failure that counts."""
    found.last = answer
    run = _run(answer)
    if isinstance(run, str):
        left_out[run] += 1
        return False
    key = {"editor": method, "edit": number, "induced": way}
    found.runs.append({**key, **run})
    scores = answer.frames["module_scores"]
    found.scores.append(scores[scores["case"] == 0].drop(columns="case").assign(**key))
    return not run["success"]


def _run(answer: Report) -> dict[str, Any] | str:
    """Steps 3 and 4: what is kept of a report's first edit, or why it is left out."""
    said = answer.frames["answers"]
    said = said[(said["case"] == 0) & (said["prompt_kind"] == "edit")].set_index(["state", "candidate"])
    if ("after", "true") not in said.index:
        return NO_TRUE
    if said.loc[("before", "new"), "token"] == said.loc[("before", "true"), "token"]:
        return ALIKE
    if not said.loc[("before", "true"), "is_top"]:
        return KNEW_OTHER
    new, true = said.loc[("after", "new")], said.loc[("after", "true")]
    return {
        "success": bool(new["is_top"]),
        "likelier": bool(new["first_prob"] > true["first_prob"]),
        "prob_new": float(new["first_prob"]),
        "prob_true": float(true["first_prob"]),
    }


def _way(params: Mapping[str, object]) -> str:
    """How failures are induced, as rows are labelled: "steps 2"."""
    return ", ".join(f"{name} {value}" for name, value in params.items())


# What the file says --------------------------------------------------------------------------------------------------


def _count(runs: pd.DataFrame, table: pd.DataFrame, found: _Found, method: str, label: str) -> regions.Count:
    mine = runs[(runs["editor"] == method) & (runs["induced"] == "")]
    good = int(mine[contrast.LABELS[label]].sum())
    used = table.loc[(table["editor"] == method) & (table["statistic"] == "K"), "failures"]
    return regions.Count(
        success=good,
        failure=len(mine) - good,
        left_out=found.left_out[method].total(),
        failures=str(used.iloc[0]) if len(used) else "too few",
    )


def _levers(table: pd.DataFrame) -> tuple[regions.Lever, ...]:
    mean = table[(table["editor"] == contrast.ALL) & (table["module"] == "attn")]
    return tuple(
        regions.Lever(int(row.layer), float(row.leverage), float(row.low), float(row.high), float(row.smoothed),
                      float(row.chosen))
        for row in mean.itertuples()
    )  # fmt: skip


def _spelled(rules: contrast.Rules, n_layers: int) -> dict[str, Any]:
    """The rules with what they come to on this model."""
    eligible = rules.eligible(n_layers)
    own = {"from_layer": eligible[0], "to_layer": eligible[-1], "at_most": rules.most(n_layers)}
    return {**{name: value for name, value in asdict(rules).items() if value is not None}, **own}
