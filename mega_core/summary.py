"""What a report says in words: did the edit work, did it leak; sentences to be checked against the tables. No torch.

The edit prompt says the new object when the whole of it is the greedy continuation. Paraphrases and neighbours say it
when it is more likely than the original object (mean log-probability per token, as the scores PS and NS count); without
an original object, when it begins the most likely answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from mega_core.records import Report

HOLDS = 0.75
"""Share of paraphrases that must say the new object, and of neighbours that must keep theirs, in a clean edit."""


@dataclass(frozen=True, slots=True)
class Count:
    """n of a total."""

    n: int
    total: int

    @property
    def share(self) -> float | None:
        """n / total, None when there is nothing to count."""
        return self.n / self.total if self.total else None

    def __str__(self) -> str:
        return f"{self.n} of {self.total}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened to the first request of a report."""

    kind: str
    """"works", "leaks", "narrow" (the prompt changed but its paraphrases did not) or "fails"."""
    knew: bool | None
    """Whether the original object was the most likely answer before the edit; None when it isn't known."""
    says_new: bool
    prob_before: float
    """Probability of the whole new object after the edit prompt, before the edit."""
    prob_after: float
    paraphrases: Count
    """Paraphrases that say the new object after the edit."""
    neighbours: Count
    """Neighbour prompts that kept their answer, of those that had it before."""


def outcome(report: Report, case: int = 0) -> Outcome:
    """Read the table `answers`. Raises ValueError when the report has no answers for this case."""
    answers = report.frames.get("answers")
    rows = None if answers is None else answers[answers["case"] == case]
    if rows is None or rows.empty:
        raise ValueError(f"The report has no answers for case {case}.")
    asked = rows[rows["prompt_kind"] == "edit"]
    new = asked[asked["candidate"] == "new"].set_index("state")
    true = asked[(asked["candidate"] == "true") & (asked["state"] == "before")]
    says = _says_new(rows)
    paraphrases = says.get("paraphrase", {})
    neighbours = says.get("neighbourhood", {})
    held = [prompt for prompt, states in neighbours.items() if not states["before"]]
    result_says = bool(new.loc["after", "is_greedy"])
    spread = Count(sum(states["after"] for states in paraphrases.values()), len(paraphrases))
    kept = Count(sum(not neighbours[prompt]["after"] for prompt in held), len(held))
    return Outcome(
        kind=_kind(result_says, spread.share, kept.share),
        knew=None if true.empty else bool(true["is_greedy"].iloc[0]),
        says_new=result_says,
        prob_before=float(new.loc["before", "prob"]),
        prob_after=float(new.loc["after", "prob"]),
        paraphrases=spread,
        neighbours=kept,
    )


def verdict(report: Report, case: int = 0) -> str:
    """The outcome as one or two sentences."""
    found = outcome(report, case)
    request = report.question.requests[case]
    change = f"({percent(found.prob_before)} → {percent(found.prob_after)})"
    if found.says_new:
        first = f"{request.target_new} is now the most likely answer {change}."
    else:
        first = f"The edit did not take: {request.target_new} is not the most likely answer {change}."
    parts = [first]
    if found.paraphrases.total:
        parts.append(f"{found.paraphrases} paraphrases say so.")
    if found.neighbours.total:
        lost = Count(found.neighbours.total - found.neighbours.n, found.neighbours.total)
        parts.append(f"{lost} neighbour prompts changed.")
    return " ".join(parts)


def percent(probability: float) -> str:
    """A probability as a person reads it: "91 %", "0.2 %", "< 0.01 %"."""
    hundredths = 100 * probability
    if hundredths >= 10:
        return f"{hundredths:.0f} %"
    if hundredths >= 0.995:
        return f"{hundredths:.1f} %"
    if hundredths >= 0.01:
        return f"{hundredths:.2g} %"
    return "< 0.01 %" if hundredths > 0 else "0 %"


def _kind(says_new: bool, spread: float | None, kept: float | None) -> str:
    if not says_new:
        return "fails"
    if kept is not None and kept < HOLDS:
        return "leaks"
    if spread is not None and spread < HOLDS:
        return "narrow"
    return "works"


def _says_new(rows: pd.DataFrame) -> dict[str, dict[str, dict[str, bool]]]:
    """prompt kind -> prompt -> state -> whether it says the new object."""
    columns = ("prompt_kind", "prompt", "state", "candidate", "mean_logprob", "is_top")
    new: dict[tuple[str, str, str], tuple[float, bool]] = {}
    true: dict[tuple[str, str, str], float] = {}
    for kind, prompt, state, candidate, logprob, top in zip(*(rows[name].tolist() for name in columns), strict=True):
        if candidate == "new":
            new[str(kind), str(prompt), str(state)] = (logprob, bool(top))
        elif candidate == "true":
            true[str(kind), str(prompt), str(state)] = logprob
    result: dict[str, dict[str, dict[str, bool]]] = {}
    for place, (logprob, top) in new.items():
        kind, prompt, state = place
        yes = logprob > true[place] if place in true else top
        result.setdefault(kind, {}).setdefault(prompt, {})[state] = bool(yes)
    return result
