"""Failure review: queues of runs, what reviewers say of them, and how far they agree.

Everybody has a queue of their own runs, the token of which is empty: what is said there are the notes, tags and
verdicts of the run history. A shared queue is made from own runs; whoever has its token may review it under a name of
their own choice, and its labels are kept apart from everything else.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from mega_core.errors import BadInput
from mega_core.notebook import MAX_QUEUE, Entry, Opinion, ReviewLabel, ReviewQueue, Run
from mega_core.summary import Count

if TYPE_CHECKING:
    from mega_core.service.core import Core

SCHEMA = 1
"""Version of the lines that `lines` writes and `Reviews.take_in` reads."""
MAX_IMPORT_BYTES, MAX_IMPORT_LINES = 4 * 2**20, 20_000
ME = "me"
"""The reviewer of one's own queue."""
NONE = "none"
"""The failure type of a judged case without one, where it is counted."""


@dataclass(frozen=True, slots=True)
class Case:
    """One run of a queue with what each reviewer says of it."""

    run: Run
    labels: Mapping[str, ReviewLabel] = field(default_factory=dict)
    """Reviewer -> label."""

    def said(self, reviewer: str) -> Opinion:
        """What this reviewer says; an empty opinion when it is nothing."""
        label = self.labels.get(reviewer)
        return Opinion() if label is None else label.said

    @property
    def prompt(self) -> str:
        """The edit prompt, filled with the subject."""
        return self.run.template.replace("{}", self.run.subject)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two reviewers agree in one respect."""

    n: int
    """Cases that both judged."""
    agreed: int
    share: float | None
    """agreed / n; None without a case."""
    kappa: float | None
    """Cohen's kappa; None where it is not defined."""
    reason: str
    """Why kappa is not defined; empty when it is."""
    table: Mapping[tuple[str, str], int]
    """(first says, second says) -> cases; pairs that don't occur are left out."""
    differ: tuple[str, ...]
    """Digests of the cases they judge differently, in the queue's order."""


class Reviews:
    """Failure review. Every token may be typed by anybody: one that is no queue's raises BadInput."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def create(self, title: str, owner: str, digests: Sequence[str]) -> ReviewQueue:
        """A new queue of this owner's runs under a token nobody can guess. Raises BadInput on none or too many."""
        return self._core.notebook.add_queue(secrets.token_urlsafe(16), title, owner, digests)

    def queue(self, token: str) -> ReviewQueue:
        """The queue of a token."""
        found = self._core.notebook.queue(token)
        if found is None:
            raise BadInput(
                "queue", "there is none at this link.", "Ask for the link again; the queue may have been deleted."
            )
        return found

    def queues(self, owner: str) -> list[ReviewQueue]:
        """The queues that this owner made, newest first."""
        return self._core.notebook.queues(owner)

    def delete(self, token: str, owner: str) -> bool:
        """Delete an own queue with its labels. Whether there was one."""
        return self._core.notebook.delete_queue(token, owner)

    def cases(self, token: str, owner: str) -> tuple[Case, ...]:
        """The cases of a queue in its order; with an empty token this owner's last runs, newest first."""
        notebook = self._core.notebook
        if not token:
            return tuple(_own_case(entry, owner) for entry in notebook.runs(session=owner, limit=MAX_QUEUE))
        self.queue(token)
        labels: dict[str, dict[str, ReviewLabel]] = {}
        for label in notebook.labels(token):
            labels.setdefault(label.digest, {})[label.reviewer] = label
        return tuple(Case(run, labels.get(run.digest, {})) for run in notebook.queue_runs(token))

    def said(self, token: str, owner: str, digest: str, reviewer: str) -> Opinion:
        """What this reviewer says of a case right now."""
        if not token:
            entry = self._core.notebook.get(digest, owner)
            return Opinion() if entry is None else _own_case(entry, owner).said(ME)
        labels = self._core.notebook.labels(token, digest)
        return next((label.said for label in labels if label.reviewer == reviewer), Opinion())

    def label(self, token: str, owner: str, digest: str, reviewer: str, said: Opinion) -> Opinion:
        """Write what a reviewer says of a case; an empty opinion takes the label away. The opinion before, to undo.

        Raises BadInput or UnknownName on an opinion that breaks a rule; nothing is changed then.
        """
        before = self.said(token, owner, digest, reviewer)
        notebook = self._core.notebook
        if token:
            self.queue(token)
            notebook.set_labels(token, [ReviewLabel(digest, reviewer, said, datetime.now(UTC))])
            return before
        if said.note != before.note:
            notebook.set_note(digest, said.note, owner)
        if said.tags != before.tags:
            notebook.set_tags(digest, said.tags, owner)
        if replace(said, note="", tags=()) != replace(before, note="", tags=()):
            notebook.set_verdict(digest, said.verdict, said.failure, said.severity, owner)
        return before

    def take_in(self, token: str, data: bytes) -> tuple[int, int]:
        """Read labels that `lines` wrote, on this or another machine, into a shared queue.

        A label gives way only to one that was written later. (labels written, labels of runs that are not in the
        queue). Raises BadInput on a file that is too large or isn't such a file, naming the line; nothing is written
        then.
        """
        self.queue(token)
        held = {run.digest for run in self._core.notebook.queue_runs(token)}
        labels = read_lines(data)
        known = [label for label in labels if label.digest in held]
        return self._core.notebook.set_labels(token, known, newer=True), len(labels) - len(known)


# Sets of cases ---------------------------------------------------------------------------------------------------


def matching(
    cases: Sequence[Case],
    reviewer: str,
    *,
    text: str = "",
    model: str = "",
    method: str = "",
    measured: str = "",
    verdict: str = "",
    tag: str = "",
    unreviewed: bool = False,
) -> tuple[Case, ...]:
    """The cases with all that was asked for: every word of `text` in prompt, objects or digest, without regard to
    case; `verdict`, `tag` and `unreviewed` are about this reviewer.
    """
    found = []
    for case in cases:
        run, said = case.run, case.said(reviewer)
        where = "\n".join((case.prompt, run.target_new, run.target_true or "", run.digest)).casefold()
        if (
            all(word in where for word in text.casefold().split())
            and model in ("", run.model)
            and method in ("", run.method)
            and measured in ("", run.verdict)
            and verdict in ("", said.verdict)
            and (not tag or tag in said.tags)
            and not (unreviewed and said.judged)
        ):
            found.append(case)
    return tuple(found)


def progress(cases: Sequence[Case], reviewer: str) -> Count:
    """How many cases this reviewer has judged, of all."""
    return Count(sum(case.said(reviewer).judged for case in cases), len(cases))


def reviewers(cases: Sequence[Case]) -> tuple[str, ...]:
    """Everybody who said something, by name."""
    return tuple(sorted({name for case in cases for name in case.labels}))


def agreement(cases: Sequence[Case], first: str, second: str, what: str) -> Agreement:
    """How far two reviewers agree on `what`, "verdict" or "failure".

    Verdicts are compared on the cases to which both gave one; failure types on the cases that both judged, where "no
    type" is a category of its own. Cohen's kappa = (p_o - p_e) / (1 - p_e): p_o is the share of equal answers, p_e the
    share expected if each kept their own frequencies and answered by chance (Cohen 1960). Not defined without a case,
    and when p_e is 1: both gave one and the same answer throughout.
    """
    table: Counter[tuple[str, str]] = Counter()
    differ = []
    for case in cases:
        one, two = case.said(first), case.said(second)
        if what == "verdict":
            pair = (one.verdict, two.verdict)
        else:
            pair = (one.failure or NONE, two.failure or NONE) if one.judged and two.judged else ("", "")
        if all(pair):
            table[pair] += 1
            if pair[0] != pair[1]:
                differ.append(case.run.digest)
    n = table.total()
    agreed = sum(count for (a, b), count in table.items() if a == b)
    kappa, reason = cohen_kappa(table)
    return Agreement(n, agreed, agreed / n if n else None, kappa, reason, dict(table), tuple(differ))


def cohen_kappa(table: Mapping[tuple[str, str], int]) -> tuple[float | None, str]:
    """Cohen's kappa of (first says, second says) -> cases, or None and why it is not defined."""
    n = sum(table.values())
    if not n:
        return None, "there is no case that both judged"
    first: Counter[str] = Counter()
    second: Counter[str] = Counter()
    for (a, b), count in table.items():
        first[a] += count
        second[b] += count
    by_chance = sum(first[answer] * second[answer] for answer in first)  # of n * n, in whole numbers: exact
    if by_chance == n * n:
        return None, "both gave the same answer every time, which chance alone would also give"
    equal = sum(count for (a, b), count in table.items() if a == b)
    return (n * equal - by_chance) / (n * n - by_chance), ""


# Files -----------------------------------------------------------------------------------------------------------


def rows(cases: Sequence[Case], title: str) -> list[dict[str, Any]]:
    """One row per label, plain values; a case without any has one row with an empty reviewer."""
    made = []
    for case in cases:
        run = case.run
        facts = {
            "schema_version": SCHEMA, "queue": title, "run": run.digest, "model": run.model, "method": run.method,
            "prompt": case.prompt, "target_new": run.target_new, "target_true": run.target_true or "",
            "edits": run.edits, "measured": run.verdict, "run_created": run.created.isoformat(),
        }  # fmt: skip
        labels: list[ReviewLabel | None] = [case.labels[name] for name in sorted(case.labels)]
        for label in labels or [None]:
            said = label.said if label else Opinion()
            made.append(
                {
                    **facts,
                    "reviewer": label.reviewer if label else "",
                    "verdict": said.verdict,
                    "failure": said.failure,
                    "severity": said.severity,
                    "tags": list(said.tags),
                    "note": said.note,
                    "updated": label.updated.isoformat() if label else "",
                }
            )
    return made


def lines(cases: Sequence[Case], title: str) -> bytes:
    """The rows as JSON, one a line. Plain ASCII: some readers would break a line at other signs too."""
    return "".join(json.dumps(row) + "\n" for row in rows(cases, title)).encode()


def read_lines(data: bytes) -> list[ReviewLabel]:
    """The labels in what `lines` wrote; facts of the runs and cases without a label are passed over.

    Raises BadInput naming the line. Whether an opinion keeps the rules is for the notebook to say.
    """
    if len(data) > MAX_IMPORT_BYTES:
        raise BadInput("file", f"{len(data):,} bytes, the limit is {MAX_IMPORT_BYTES:,}.", "Split it.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput("file", "is not UTF-8 text.", "Choose a JSONL file that was exported here.") from error
    written = [line for line in text.split("\n") if line.strip()]
    if len(written) > MAX_IMPORT_LINES:
        raise BadInput("file", f"{len(written):,} lines, the limit is {MAX_IMPORT_LINES:,}.", "Split it.")
    now = datetime.now(UTC)
    found = []
    for number, line in enumerate(written, start=1):
        try:
            row = json.loads(line)
            if row["schema_version"] != SCHEMA:
                raise ValueError("another schema version")
            if not row["reviewer"]:
                continue
            updated = datetime.fromisoformat(row["updated"]).astimezone(UTC)
            said = Opinion(row["verdict"], row["failure"], row["severity"], _texts(row["tags"]), row["note"])
            if not all(isinstance(part, str) for part in (row["run"], row["reviewer"], said.verdict, said.failure)):
                raise TypeError("not text")
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise BadInput(
                "file", f"line {number} is not a label ({type(error).__name__}).", "Export the labels again."
            ) from error
        found.append(ReviewLabel(row["run"], row["reviewer"], said, min(updated, now)))
    return found


def _texts(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("not a list of texts")
    return tuple(values)


def _own_case(entry: Entry, owner: str) -> Case:
    """A run of the history as its owner sees it."""
    verdict = next((v for v in entry.verdicts if v.author == owner), None)
    note = next((n for n in entry.notes if n.author == owner), None)
    said = Opinion(tags=entry.tags, note=note.text if note else "")
    if verdict:
        said = replace(said, verdict=verdict.verdict, failure=verdict.failure, severity=verdict.severity)
    times = [one.updated for one in (verdict, note) if one]
    if said == Opinion():
        return Case(entry.run)
    return Case(entry.run, {ME: ReviewLabel(entry.run.digest, ME, said, max(times, default=entry.run.created))})
