"""Name -> entry, with an error that helps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from mega_core.errors import UnknownName

T = TypeVar("T")


class Registry(Generic[T]):
    """An ordered table of named entries."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Raises ValueError when the name is taken: two things under one name would share results."""
        if name in self._entries:
            raise ValueError(f"There is already a {self.kind} named {name!r}.")
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> T:
        """Raises UnknownName with the closest known name."""
        if name not in self._entries:
            raise UnknownName(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[T]:
        return iter(self._entries.values())

    def names(self) -> tuple[str, ...]:
        """The names in order of registration."""
        return tuple(self._entries)
