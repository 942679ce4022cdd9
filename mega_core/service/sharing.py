"""Runs that leave and come back: files of a whole run, and runs that were imported.

A file from elsewhere is read strictly (records.Report.from_json) and kept apart from the results: in a folder of its
own, under the digest of its content. What it claims to be the answer to is a label, so a forged file can show a wrong
picture under its own address, marked as imported, and can never stand for an answer computed here.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from mega_core.errors import ActionableError, StoreError
from mega_core.folders import write_file
from mega_core.records import MAX_FILE_BYTES, MAX_REPORT_BYTES, Report

if TYPE_CHECKING:
    from mega_core.service.core import Core

log = logging.getLogger(__name__)

MAX_KEPT_BYTES = 256 * 2**20
"""Of all imported runs together; the oldest go first."""
_ID = re.compile(r"[0-9a-f]{64}")


class Imports:
    """Imported runs on disk: a container per run, named by the sha256 of its bytes."""

    def __init__(self, folder: Path, limit: int = MAX_KEPT_BYTES) -> None:
        self.folder = folder
        self.limit = limit

    def put(self, report: Report) -> Report:
        """Keep a run; it comes back under its own id. Raises StoreError when the disk refuses."""
        data = report.to_bytes()
        digest = sha256(data).hexdigest()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_file(self._path(digest), data)
            self._trim(digest)
        except OSError as error:
            raise StoreError(
                f"The run could not be kept ({error.strerror or type(error).__name__}).", "Free some space, try again."
            ) from error
        return _named(report, digest)

    def get(self, digest: str) -> Report | None:
        """The imported run of this id, or None; safe with any text. A file that was changed is none."""
        if not isinstance(digest, str) or not _ID.fullmatch(digest):
            return None
        try:
            handle = os.open(self._path(digest), os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
            with open(handle, "rb") as stream:
                status = os.fstat(stream.fileno())
                if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_REPORT_BYTES:
                    return None
                data = stream.read()
        except OSError:
            return None
        if sha256(data).hexdigest() != digest:
            log.warning("The imported run %s was changed on the disk.", digest[:12])
            return None
        try:
            return _named(Report.from_bytes(data), digest)
        except ActionableError as error:  # kept by another version of the app
            log.warning("The imported run %s can't be read: %s", digest[:12], error)
            return None

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, str) and bool(_ID.fullmatch(digest)) and self._path(digest).is_file()

    def ids(self) -> frozenset[str]:
        """Every run that is kept."""
        return frozenset(path.stem for path in self.folder.glob("*.zip") if _ID.fullmatch(path.stem))

    def drop(self, digest: str) -> bool:
        """Forget a run; True when it was there."""
        if digest not in self:
            return False
        with suppress(OSError):
            self._path(digest).unlink()
        return digest not in self

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}.zip"

    def _trim(self, newest: str) -> None:
        """Delete the oldest until all fit, never the newest."""
        found = []
        for path in self.folder.glob("*.zip"):
            with suppress(OSError):  # gone meanwhile
                status = path.stat()
                found.append((path.stem == newest, status.st_mtime_ns, status.st_size, path))
        size = sum(one[2] for one in found)
        for is_newest, _, own, path in sorted(found):
            if size <= self.limit or is_newest:
                return
            path.unlink(missing_ok=True)
            size -= own


class Sharing:
    """Runs that leave and come back."""

    max_bytes = MAX_FILE_BYTES
    """Of a file that is taken in."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def take(self, data: bytes, owner: str) -> Report:
        """Import a run.json for this owner: it is checked, kept apart from results, and listed in their history.

        Raises BadInput saying what is wrong with the file, StoreError when the disk refuses.
        """
        held = self._core.imports.put(Report.from_json(data))
        self._core.record(held, owner)
        return held

    def imported(self) -> frozenset[str]:
        """The ids of the imported runs that are kept here."""
        return self._core.imports.ids()

    def forget(self, digest: str) -> bool:
        """Delete an imported run that is in nobody's history any more; True when it was deleted."""
        return self._core.notebook.get(digest) is None and self._core.imports.drop(digest)


def _named(report: Report, digest: str) -> Report:
    return replace(report, digest=digest, origin=report.origin or report.digest)
