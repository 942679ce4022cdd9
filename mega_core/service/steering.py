"""A steered run at other strengths: what the model says when its maps are applied more or less, without a new fit.

1. `prepare` fits the change of a finished run once more, in the model's lane, and asks for every prompt at some
   strengths from 0 to twice the run's own: the dial. Fits stay in the memory of this process, the oldest go first.
2. `at` says what the model answers at any strength on the dial. A strength that was asked before costs nothing.

The model is held by a job each time, with the change as a block: it goes back bit for bit, and the pool checks it.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from mega_core.errors import BadInput, StoreError, UnsupportedMethod
from mega_core.events import Reporter, stage
from mega_core.keys import digest as digest_of
from mega_core.methods.base import METHODS
from mega_core.records import EditRequest, Inspection, Report

if TYPE_CHECKING:
    from mega_core.models.adapter import ModelAdapter
    from mega_core.service.core import Core

KEPT_FITS = 8
KEPT_STRENGTHS = 64
"""Of one fit."""
PARAPHRASES, NEIGHBOURS = 2, 3
"""How many are answered at a strength that is asked for; the dial asks all of them."""
TOP_TOKENS = 8
WORDS = 16
"""Tokens of a continuation."""
GRID = 13
LEAST_REACH = 3.0
PLACES = 3
"""Decimals of a strength: what is nearer counts as the same."""


@dataclass(frozen=True, slots=True)
class Said:
    """One prompt at one strength."""

    kind: str
    """edit | paraphrase | neighbourhood."""
    prompt: str
    continuation: str
    prob_new: float
    """Of the whole new object."""
    prob_true: float | None
    """Of the whole original object; None when the run names none."""
    holds: bool
    """The new object is preferred, or for a neighbour is not: the rule of the evidence."""


@dataclass(frozen=True, slots=True)
class Strength:
    """What the model says at one strength."""

    alpha: float
    said: tuple[Said, ...]
    """The edit prompt first."""
    next_tokens: tuple[tuple[str, float], ...]
    """Most likely after the edit prompt, best first."""


@dataclass(frozen=True)
class Dial:
    """A fitted run, ready for any strength from 0 to `reach`."""

    digest: str
    own: float
    """The strength of the run itself."""
    reach: float
    curve: pd.DataFrame
    """A row per strength of the grid: alpha, p_new, p_true (NaN without an original object), paraphrases, neighbours
    (shares of all prompts of that kind that hold; NaN where there are none)."""
    paraphrases: int
    neighbours: int
    note: str = ""
    """What to keep in mind about this fit; "" for nothing."""


@dataclass
class _Fit:
    plain: Mapping[str, Any]
    tensors: Mapping[str, Any]
    """CPU tensors by name, as Steering.pack() gives them."""
    question: Inspection
    dial: Dial
    kept: OrderedDict[float, Strength] = field(default_factory=OrderedDict)


class Steering:
    """Strengths of steered runs."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._lock = threading.Lock()
        self._fits: OrderedDict[str, _Fit] = OrderedDict()

    def can(self, report: Report) -> bool:
        """Whether this run was made by a method whose strength can be turned."""
        name = report.question.method.name
        return name in METHODS and METHODS[name].family == "steering"

    def dial(self, digest: str) -> Dial | None:
        """The run's dial, None while its change isn't fitted here."""
        fit = self._fit(digest)
        return None if fit is None else fit.dial

    def prepare(self, report: Report, owner: str) -> str:
        """Queue the fit of a run; the job's id, its result a Dial. Raises UnsupportedMethod, Busy, and BadInput for
        a run of other weights.
        """
        if not self.can(report):
            raise UnsupportedMethod(
                f"{report.question.method.name} has no strength to turn.", "Choose a run of a method that steers."
            )
        question, digest = report.question, report.digest
        if self._core.digest(question) != digest:
            raise BadInput("run", "was made on other weights than this machine has.", "Run the edit again here.")

        def work(tell: Reporter) -> Dial:
            found = self.dial(digest)
            return found if found is not None else self._fitted(question, digest, tell)

        return self._core.start(
            work, owner=owner, key=digest_of({"steer": digest}), lane=question.model.name,
            method=f"steer {question.method.name}", kind="steer",
        )  # fmt: skip

    def at(self, digest: str, alpha: float, owner: str, patience: float = 0.0) -> Strength | str:
        """What the model says at this strength; while that is being found, the id of the job that finds it.

        Waits up to `patience` seconds. Raises BadInput without a fit or beyond its reach, and whatever the job ended
        with.
        """
        fit = self._fit(digest)
        if fit is None:
            raise BadInput("strength", "the run isn't fitted here any more.", "Prepare the slider again.")
        if not math.isfinite(alpha) or not 0 <= alpha <= fit.dial.reach:
            raise BadInput("strength", f"{alpha:g} is beyond 0 to {fit.dial.reach:g}.", "Choose one in between.")
        alpha = round(float(alpha), PLACES)
        with self._lock:
            if alpha in fit.kept:
                fit.kept.move_to_end(alpha)
                return fit.kept[alpha]
        job = self._core.start(
            lambda tell: self._said(fit, alpha, tell), owner=owner,
            key=digest_of({"strength": digest, "alpha": alpha}), lane=fit.question.model.name, method="strength",
            kind="strength",
        )  # fmt: skip
        if not self._core.jobs.wait(job, patience).over:
            return job
        found: Strength = self._core.jobs.result(job, owner)
        return found

    # Inside ----------------------------------------------------------------------------------------------------------

    def _fit(self, digest: str) -> _Fit | None:
        with self._lock:
            fit = self._fits.get(digest)
            if fit is not None:
                self._fits.move_to_end(digest)
            return fit

    def _fitted(self, question: Inspection, digest: str, tell: Reporter) -> Dial:
        """Fit, ask the grid, keep."""
        method = METHODS[question.method.name]
        if question.method.version != method.version:
            raise BadInput("run", f"was made by another version of {method.title}.", "Run the edit again.")
        with self._core.held(question.model, tell) as lm:
            from mega_core.methods.steering import Steering as Change

            with stage(tell, "edit"):
                change = method.prepare(lm, question.requests, method.read(question.method), question.seed, tell)
            if not isinstance(change, Change) or not change.edits:
                raise StoreError(f"{method.title} gave a change without a strength.", "Choose another method.")
            own = change.edits[0].alpha
            reach = _reach(own, [knob.high for knob in method.knobs() if knob.name == "alpha"])
            alphas = sorted({round(reach * i / (GRID - 1), PLACES) for i in range(GRID)} | {round(own, PLACES)})
            rows = []
            with stage(tell, "strengths", len(alphas)) as step:
                for alpha in alphas:
                    rows.append(_on_the_curve(lm, change.with_alpha(alpha), alpha, question.requests[0]))
                    step()
            plain, tensors = change.pack()
        request = question.requests[0]
        sequential = dict(question.method.params).get("fit") == "sequential"
        dial = Dial(
            digest=digest,
            own=own,
            reach=reach,
            curve=pd.DataFrame(rows),
            paraphrases=len(request.paraphrases),
            neighbours=len(request.neighbours),
            note="These maps were fitted one behind the other, at the run's own strength: far from it they are "
            "guesses." if sequential else "",
        )  # fmt: skip
        cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        with self._lock:
            self._fits[digest] = _Fit(plain, cpu, question, dial)
            while len(self._fits) > KEPT_FITS:
                self._fits.popitem(last=False)
        return dial

    def _said(self, fit: _Fit, alpha: float, tell: Reporter) -> Strength:
        """Apply the kept change at this strength and ask."""
        whole = fit.question.requests[0]
        request = replace(whole, paraphrases=whole.paraphrases[:PARAPHRASES], neighbours=whole.neighbours[:NEIGHBOURS])
        with self._core.held(fit.question.model, tell) as lm:
            from mega_core.evaluation import looks
            from mega_core.methods.steering import Steering as Change

            change = Change.unpack(dict(fit.plain), dict(fit.tensors)).with_alpha(alpha)
            prompts = list(dict.fromkeys((request.prompt, *request.paraphrases, *request.neighbours)))
            with change.applied(lm):
                answers = looks.answers(lm, [request], "after", tell)
                likely = looks.most_likely(lm, request.prompt, TOP_TOKENS)
                length = min(WORDS, self._core.settings.max_new_tokens)
                texts = dict(zip(prompts, lm.generate(prompts, length), strict=True))
        said = tuple(
            Said(str(row["kind"]), str(row["prompt"]), texts[str(row["prompt"])], float(row["p_new"]), row["p_true"],
                 bool(row["holds"]))
            for row in _rows(answers)
        )  # fmt: skip
        found = Strength(alpha, said, likely)
        with self._lock:
            fit.kept[alpha] = found
            while len(fit.kept) > KEPT_STRENGTHS:
                fit.kept.popitem(last=False)
        return found


def _reach(own: float, highest: list[float | None]) -> float:
    """How far the dial goes: twice the run's own strength, at least LEAST_REACH, never beyond the method's limit."""
    limit = min((high for high in highest if high is not None), default=math.inf)
    return float(max(own, min(max(LEAST_REACH, math.ceil(2 * own)), limit)))


def _on_the_curve(lm: ModelAdapter, change: Any, alpha: float, request: EditRequest) -> dict[str, float]:
    from mega_core.evaluation import looks

    with change.applied(lm):
        rows = _rows(looks.answers(lm, [request], "after"))
    edit = next(row for row in rows if row["kind"] == "edit")

    def share(kind: str) -> float:
        held = [bool(row["holds"]) for row in rows if row["kind"] == kind]
        return sum(held) / len(held) if held else math.nan

    return {
        "alpha": alpha,
        "p_new": edit["p_new"],
        "p_true": math.nan if edit["p_true"] is None else edit["p_true"],
        "paraphrases": share("paraphrase"),
        "neighbours": share("neighbourhood"),
    }


def _rows(answers: pd.DataFrame) -> list[dict[str, Any]]:
    """One per prompt of the frame `answers` in one state: kind, prompt, p_new, p_true, holds."""
    found = []
    for (kind, prompt), group in answers.groupby(["prompt_kind", "prompt"], sort=False):
        by = group.set_index("candidate")
        true = by.loc["true"] if "true" in by.index else None
        new = by.loc["new"]
        says_new = bool(new["is_top"]) if true is None else bool(new["mean_logprob"] > true["mean_logprob"])
        found.append(
            {
                "kind": kind,
                "prompt": prompt,
                "p_new": float(new["prob"]),
                "p_true": None if true is None else float(true["prob"]),
                "holds": says_new != (kind == "neighbourhood"),
            }
        )
    return found
