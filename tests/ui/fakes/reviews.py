"""What the pages see of `service.reviews`: cases in memory, one shared queue."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from mega_core.errors import BadInput
from mega_core.notebook import Opinion, ReviewLabel, ReviewQueue, Run
from mega_core.service.reviews import Case, read_lines

if TYPE_CHECKING:
    from mega_core.records import Report

NOON = datetime(2025, 3, 1, 12, tzinfo=UTC)
TOKEN = "a-token-nobody-guesses"


def run_of(report: Report, verdict: str = "works") -> Run:
    """The line of the history that a report gives."""
    request = report.question.requests[0]
    return Run(
        report.digest, "o" * 32, report.question.model.name, report.question.method.name, request.subject,
        request.template, request.target_new, request.target_true, verdict=verdict, created=NOON,
    )  # fmt: skip


@dataclass
class FakeReviews:
    """Answers like Reviews. Fill `held`, token -> cases; an empty token is the own queue."""

    held: dict[str, list[Case]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    broken: Exception | None = None

    def create(self, title: str, owner: str, digests: list[str]) -> ReviewQueue:
        if not title:
            raise BadInput("title", "is empty.", "Fill it in.")
        self.held[TOKEN] = [Case(case.run) for case in self.held[""] if case.run.digest in digests]
        self.titles[TOKEN], self.owners[TOKEN] = title, owner
        return self.queue(TOKEN)

    def queue(self, token: str) -> ReviewQueue:
        if token not in self.titles:
            raise BadInput("queue", "there is none at this link.", "Ask for the link again.")
        return ReviewQueue(token, self.titles[token], self.owners[token], NOON, len(self.held[token]))

    def queues(self, owner: str) -> list[ReviewQueue]:
        return [self.queue(token) for token in self.titles if self.owners[token] == owner]

    def delete(self, token: str, owner: str) -> bool:
        del self.titles[token], self.owners[token], self.held[token]
        return True

    def cases(self, token: str, owner: str) -> tuple[Case, ...]:
        return tuple(self.held.get(token, ()))

    def said(self, token: str, owner: str, digest: str, reviewer: str) -> Opinion:
        return next(case.said(reviewer) for case in self.held[token] if case.run.digest == digest)

    def label(self, token: str, owner: str, digest: str, reviewer: str, said: Opinion) -> Opinion:
        if self.broken is not None:
            raise self.broken
        before = self.said(token, owner, digest, reviewer)
        label = ReviewLabel(digest, reviewer, said, NOON)
        self.held[token] = [
            replace(case, labels={**case.labels, reviewer: label}) if case.run.digest == digest else case
            for case in self.held[token]
        ]
        return before

    def take_in(self, token: str, data: bytes) -> tuple[int, int]:
        return len(read_lines(data)), 0
