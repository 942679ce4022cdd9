"""What the pages see of `service.sharing`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from hashlib import sha256

from mega_core.records import Report


@dataclass
class FakeSharing:
    """Reads files as the real one does, and keeps what came in memory."""

    held: dict[str, Report] = field(default_factory=dict)
    broken: Exception | None = None

    def take(self, data: bytes, owner: str) -> Report:
        if self.broken is not None:
            raise self.broken
        found = Report.from_json(data)
        report = replace(found, digest=sha256(found.to_bytes()).hexdigest(), origin=found.digest)
        self.held[report.digest] = report
        return report

    def imported(self) -> frozenset[str]:
        return frozenset(self.held)

    def forget(self, digest: str) -> bool:
        return self.held.pop(digest, None) is not None
