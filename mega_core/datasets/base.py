"""What every format shares: the values that loading gives, and typed looks into a record from a file.

A record is data from a stranger: each look checks the type and raises BadInput naming the field as it stands in the
file, so that a person finds it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from mega_core.cases import MAX_ID, Case
from mega_core.errors import BadInput
from mega_core.keys import digest
from mega_core.records import clean_text

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Format:
    """How a dataset's records are written."""

    name: str
    """What `load` and the command line call it."""
    title: str
    summary: str
    """What a record holds, in one sentence."""
    example: str
    """One small record, as it stands in a file."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One record that was left out."""

    line: int
    """Where it begins; the first line is 1."""
    record: str
    """Its id, or its number in the file."""
    text: str
    """What is wrong with it, and the next step."""


@dataclass(frozen=True)
class Dataset:
    """The cases of one file, and what was left out of them."""

    name: str
    format: str
    """A name in FORMATS."""
    cases: tuple[Case, ...]
    problems: tuple[Problem, ...] = ()
    digest: str = ""
    """Of the cases (keys.digest): the same cases give the same digest, wherever they came from."""
    source: str = ""
    """A path, "builtin:..." or the id of a dataset on a hub."""

    def __post_init__(self) -> None:
        if not self.digest:
            object.__setattr__(self, "digest", digest(self.cases))

    def limited(self, n: int, seed: int | None = None) -> Dataset:
        """The first n cases, or n drawn by the seed, in the file's order; all of them when there are no more than n.

        Raises BadInput when n is below 1.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise BadInput("limit", f"{n!r} is not a number of cases.", "Give 1 or more, or leave it out.")
        if n >= len(self.cases):
            return self
        every = range(len(self.cases))
        chosen = every[:n] if seed is None else sorted(random.Random(seed).sample(every, n))
        return replace(self, cases=tuple(self.cases[i] for i in chosen), digest="")


# Typed looks into a record -------------------------------------------------------------------------------------------


def kind(value: object) -> str:
    """The JSON name of a value's type, for messages."""
    names = {bool: "true or false", str: "text", type(None): "null", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def text(record: Record, key: str, inside: str = "") -> str:
    """The text under this key; `inside` is the path of the record itself, for messages."""
    value = _get(record, key, inside)
    if not isinstance(value, str):
        raise BadInput(inside + key, f"is {kind(value)}, not text.", "Write it in quotes.")
    return value


def text_or_none(record: Record, key: str, inside: str = "") -> str | None:
    """The text under this key; None where it is missing, null or blank."""
    if record.get(key) is None:
        return None
    return text(record, key, inside).strip() or None


def texts(record: Record, key: str, inside: str = "", *, optional: bool = False) -> tuple[str, ...]:
    """A list of texts. `optional`: missing and null count as none."""
    if optional and record.get(key) is None:
        return ()
    value = _list(record, key, inside)
    for i, item in enumerate(value):
        if not isinstance(item, str):
            raise BadInput(f"{inside}{key}[{i}]", f"is {kind(item)}, not text.", "Write it in quotes.")
    return tuple(value)


def one_or_more(record: Record, key: str, inside: str = "") -> tuple[str, ...]:
    """A text, or a list of texts, as a tuple; empty when missing, null or blank."""
    value = record.get(key)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    return (value,) if isinstance(value, str) else texts(record, key, inside)


def objects(record: Record, key: str, inside: str = "", *, optional: bool = False) -> tuple[Record, ...]:
    """A list of objects. `optional`: missing and null count as none."""
    if optional and record.get(key) is None:
        return ()
    value = _list(record, key, inside)
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            raise BadInput(f"{inside}{key}[{i}]", f"is {kind(item)}, not an object.", "Write it as {...}.")
    return tuple(value)


def inner(record: Record, key: str, inside: str = "") -> Record:
    """The object under this key."""
    value = _get(record, key, inside)
    if not isinstance(value, dict):
        raise BadInput(inside + key, f"is {kind(value)}, not an object.", "Write it as {...}.")
    return value


def id_of(record: Record, number: int, *keys: str) -> str:
    """The record's own id: text or a whole number under the first of these keys that is there, else its number."""
    for key in keys:
        value = record.get(key)
        if value is None or value == "":
            continue
        if isinstance(value, str):
            return clean_text(key, value, MAX_ID)
        if isinstance(value, float) and isfinite(value) and value.is_integer() and abs(value) < 2**53:
            value = int(value)  # tables written by pandas
        if isinstance(value, bool) or not isinstance(value, int):
            raise BadInput(key, "is no whole number of usual size and no text.", "Number the records 1, 2, 3.")
        return str(value)
    return str(number)


def template_of(prompt: str, subject: str, field: str = "prompt") -> str:
    """A prompt that names its subject as a template: the subject, best as a word of its own, becomes {}.

    Raises BadInput when the subject isn't in the prompt.
    """
    if prompt.count("{}") == 1 and subject not in prompt:
        return prompt
    at = within(subject, prompt)
    if at < 0:
        at = prompt.find(subject)
    if not subject or at < 0:
        raise BadInput(field, f"doesn't name the subject {subject[:60]!r}.", "Put the subject in as it is written.")
    return f"{prompt[:at]}{{}}{prompt[at + len(subject) :]}"


def within(part: str, whole: str) -> int:
    """Where the part stands in the whole as words of its own; -1 where it doesn't."""
    at = whole.find(part) if part else -1
    while at >= 0:
        before, after = whole[at - 1 : at] if at else "", whole[at + len(part) : at + len(part) + 1]
        if not before.isalnum() and not after.isalnum():
            return at
        at = whole.find(part, at + 1)
    return -1


def other_than(new: str, true: tuple[str, ...]) -> str | None:
    """The first true answer, or None where it says the same as the new one."""
    first = true[0].strip() if true else ""
    return first if first and first.casefold() != new.strip().casefold() else None


def _get(record: Record, key: str, inside: str) -> Any:
    if key not in record:
        raise BadInput(inside + key, "is missing.", "Add it, or leave the record out.")
    return record[key]


def _list(record: Record, key: str, inside: str) -> list[Any]:
    value = _get(record, key, inside)
    if not isinstance(value, list):
        raise BadInput(inside + key, f"is {kind(value)}, not a list.", "Write it as [...].")
    return value
