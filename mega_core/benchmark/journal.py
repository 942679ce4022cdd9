"""The lines that are measured, in a file that only grows: `cases.jsonl`, one JSON object a line, one writer.

1. A line is written whole; what a killed process leaves of one is cut off when the file is opened again.
2. A line whose key is there is not written twice. One that says the model was not clean takes back what its key had.
3. The disk is waited for once a second and at the end: a killed process loses no line, a power cut a second's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from types import TracebackType

from mega_core.benchmark.plan import MOST_LINE_BYTES, Line
from mega_core.errors import StoreError

NAME = "cases.jsonl"
SYNC_SECONDS = 1.0


class Journal:
    """Open for appending; a context manager."""

    def __init__(self, folder: Path) -> None:
        """Raises StoreError when the file can't be opened or cut."""
        self.path = folder / NAME
        self.keys: set[str] = set()
        """Of the lines that count."""
        try:
            whole = 0
            for line, end in _lines(self.path):
                whole = end
                if line is not None:
                    self._know(line)
            self._file = self.path.open("ab")
            if self._file.tell() > whole:  # 1.
                self._file.truncate(whole)
        except OSError as error:
            raise _failed(self.path, error) from error
        self._synced = monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def add(self, text: str) -> Line | None:
        """Write a line, or None where its key is there (step 2). Raises ValueError on text that is no line."""
        line = Line.read(text)
        if line.clean and line.key in self.keys:
            return None
        try:
            self._file.write(f"{text}\n".encode())
            self._file.flush()
            if monotonic() - self._synced > SYNC_SECONDS:  # 3.
                self._sync()
        except OSError as error:
            raise _failed(self.path, error) from error
        self._know(line)
        return line

    def close(self) -> None:
        """Write everything through to the disk."""
        if not self._file.closed:
            try:
                self._sync()
            finally:
                self._file.close()

    def _know(self, line: Line) -> None:
        if line.clean:
            self.keys.add(line.key)
        else:
            self.keys.discard(line.key)

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced = monotonic()


def read(folder: Path) -> dict[str, Line]:
    """Key -> line, of those that count. Lines that are damaged are passed over: they are measured again."""
    found: dict[str, Line] = {}
    for line, _ in _lines(folder / NAME):
        if line is None:
            continue
        if line.clean:
            found.setdefault(line.key, line)
        else:
            found.pop(line.key, None)
    return found


def _lines(path: Path) -> Iterator[tuple[Line | None, int]]:
    """Each whole line, None for one that can't be read, with the place where it ends."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        while data := file.readline(2 * MOST_LINE_BYTES):
            if not data.endswith(b"\n"):
                return
            end += len(data)
            try:
                yield Line.read(data.decode()), end
            except ValueError:
                yield None, end


def _failed(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{path} could not be written ({error.strerror or type(error).__name__}).",
        "Free some space, then go on with --resume.",
    )
