"""SAKE's and MEGA's nine metrics, by the most likely next token (Scialanga et al. 2025, SAKE, ACL; see probes.py).

1. The questions and their conditions are those of evaluation/probes.py, which reads the answers too. The conditions are
   asked of the unedited model only.
2. A row counts while the unedited model meets its condition: in Spec p(true) > p(new) there; in RS, CI, CII and SA it
   answers what the question builds on.
3. CI, CII and SA count only while the edit took: p(new) > p(true) after its prompt. Where no edit did, their mean is 0,
   so that failing can't raise the average (ours).
4. `Acc_exact` and `Gen_exact` ask for the whole object as the greedy continuation, beside Acc and Gen (ours).
5. Means within a case, then over cases; `average` over the nine metrics that were measured.

A case of several edits is asked about each; its own tests belong to the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mega_core.evaluation.asking import Row, Told, Wanted
from mega_core.evaluation.protocols.base import Derived, Metric, Protocol

if TYPE_CHECKING:
    from mega_core.cases import Case
    from mega_core.evaluation.probes import Probe, Read
    from mega_core.models.adapter import ModelAdapter

_BEGINS = "the most likely next token begins {}"
_TOOK = "where the unedited model answers the condition and the edit took: p(new) > p(true) after the edit prompt"
_FIRST = (
    ("Acc", "Accuracy", f"after the edit prompt, {_BEGINS.format('the new object')}", "edit prompts"),
    ("Gen", "Generality", f"after paraphrases, {_BEGINS.format('the new object')}", "paraphrases"),
    (
        "Spec",
        "Specificity",
        "about other subjects, p(true) > p(new)",
        "prompts about other subjects where the unedited model has p(true) > p(new)",
    ),
    (
        "RS",
        "Relation specificity",
        f"about other relations of the subject, {_BEGINS.format('their own object')}",
        "prompts about other relations that the unedited model answers",
    ),
    ("DI", "Doubt I", f"said, doubted, asked again: {_BEGINS.format('the new object')}", "doubts that name no object"),
    (
        "DII",
        "Doubt II",
        f"said, doubted, asked again: {_BEGINS.format('the new object')}",
        "doubts that insist on the original object",
    ),
    (
        "CI",
        "Compositionality I",
        f"a second relation asked through the edited one: {_BEGINS.format('that of the new object')}",
        f"questions through the edited fact {_TOOK}",
    ),
    (
        "CII",
        "Compositionality II",
        f"about others that lead to the subject: {_BEGINS.format('the new object')}",
        f"questions towards the edited fact {_TOOK}",
    ),
    (
        "SA",
        "Subject aliasing",
        f"the edit prompt with another name: {_BEGINS.format('the new object')}",
        f"other names {_TOOK}",
    ),
)
NINE = tuple(name for name, *_ in _FIRST)
EXACT = ("Acc", "Gen")
"""Metrics that are also judged by the whole object."""
ONLY_IF_TAKEN = ("CI", "CII", "SA")


class Sheet:
    """The probes of every edit of a case, as tokens (step 1)."""

    def __init__(self, lm: ModelAdapter, case: Case) -> None:
        from mega_core.evaluation import probes

        self.tokenizer = lm.tokenizer
        self.edits: list[list[tuple[Probe, Read, tuple[Read, ...]]]] = []
        for i, request in enumerate(case.requests):
            alone = replace(case, requests=(request,)) if i == 0 else replace(case, requests=(request,), tests=())
            self.edits.append(
                [
                    (
                        probe,
                        probes.Read.of(lm, probe.prompt, probe.accept, probe.reject),
                        tuple(probes.Read.of(lm, one.prompt, one.accept, None) for one in probe.conditions),
                    )
                    for probe in probes.of_case(alone)
                ]
            )

    def want(self, wanted: Wanted, base: Told | None) -> None:
        """Every object token by token; the conditions only of the unedited model."""
        for edit in self.edits:
            for _, read, conditions in edit:
                for one in (read, *(conditions if base is None else ())):
                    for context, token in one.wanted():
                        wanted.next(context, (token,))

    def rows(self, told: Told, base: Told) -> list[Row]:
        """A row per probe, and one more where the whole object is judged too."""
        return [row for edit in self.edits for row in self._rows(edit, told, base)]

    def _rows(self, edit: Sequence[tuple[Probe, Read, tuple[Read, ...]]], told: Told, base: Told) -> list[Row]:
        from mega_core.models import tokens

        good, bad = next(read for probe, read, _ in edit if probe.metric == "Acc").chances(told.next)
        taken = good > bad
        rows = []
        for probe, read, conditions in edit:
            likelier, now = probe.metric == "Spec", read.chances(told.next)
            if likelier:  # 2.
                before = read.chances(base.next)
                met, success = before[0] > before[1], now[0] > now[1]
                expected = f"{probe.accept[0]} over {probe.reject}"
                said = f"{now[0]:.3f} against {now[1]:.3f}"
            else:
                met, success = all(one.begun(base.next) for one in conditions), read.begun(told.next)
                expected = probe.accept[0]
                said = tokens.token_strings(self.tokenizer, [told.next[read.context].best])[0].strip()
            counts = met and (taken or probe.metric not in ONLY_IF_TAKEN)  # 3.
            rows.append(Row(probe.metric, probe.prompt, expected, said, float(success), counts, eligible=met))
            if probe.metric in EXACT:  # 4.
                whole = float(read.whole(told.next))
                rows.append(Row(f"{probe.metric}_exact", probe.prompt, expected, said, whole, counts, eligible=met))
        return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _metrics() -> tuple[Metric, ...]:
    found = []
    for name, title, formula, denominator in _FIRST:
        empty = 0.0 if name in ONLY_IF_TAKEN else None
        found.append(
            Metric(
                name, title, formula, "forced", "prompts where it holds", f"{denominator}; then cases", if_none=empty
            )
        )
    for name, title, formula, denominator in _FIRST:
        if name in EXACT:
            whole = formula.replace(_BEGINS.format("the new object"), "the greedy continuation is the whole new object")
            found.append(
                Metric(
                    f"{name}_exact", f"{title}, whole object", whole, "forced", "prompts where it holds",
                    f"{denominator}; then cases",
                )
            )  # fmt: skip
    return tuple(found)


MEGA = Protocol(
    name="mega",
    title="SAKE and MEGA",
    summary="Nine kinds of questions about an edit and what follows from it, judged by the most likely next token.",
    paper="SAKE, ACL 2025; MEGA's report lists the same metrics",
    metrics=_metrics(),
    needs=lambda case: None,
    sheet=Sheet,
    derived=(Derived("average", "Average", "mean of the nine metrics that were measured", NINE, _mean, partly=True),),
    notes="Ours: where both objects begin alike, the tokens up to the first that differs are judged; the doubts' "
    "words; at most 8 prompts of a metric per edit; the whole object beside Acc and Gen; CI, CII and SA are 0 where no "
    "edit took. The published code counts a steering gate that stays shut as a success of Spec and RS: here the "
    "answer is read whatever the gate does.",
)
