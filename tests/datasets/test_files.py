"""Files as strangers send them: whatever is wrong, what can be read is read, and what is lost is named."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from mega_core import datasets
from mega_core.datasets import files
from mega_core.errors import ActionableError, BadInput
from tests.datasets.samples import COUNTS, DATA, FILE_FORMATS, as_file, records

RECORD = '{"subject": "Orrin", "template": "{} is in", "target_new": "Tarn"}'
LOSES_MORE = ("Nothing after this", "breaks off", " to ", "the rest was left out", "was not read")
"""Words of a problem that stands for more than one record."""


def read(text: str | bytes, format: str = "auto") -> datasets.Dataset:
    return datasets.read(text if isinstance(text, bytes) else text.encode(), "x", format)


def problems(text: str) -> tuple[int, list[tuple[int, str, str]]]:
    """(number of cases, problems)."""
    found = read(text)
    return len(found.cases), [(problem.line, problem.record, problem.text) for problem in found.problems]


# By hand -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cases", "line", "record", "words"),
    [
        (f"[{RECORD},\n{RECORD},\n{RECORD[:20]}", 2, 3, "3", "breaks off inside"),
        (f"[{RECORD},\n{RECORD},\n", 2, 3, "3", "breaks off after 2 records"),
        (f"[{RECORD},\n{RECORD}", 2, 2, "3", "breaks off after 2 records"),
        (f"[{RECORD},\n{RECORD}]\nmore", 2, 3, "3", "more text after the list"),
        (f"{RECORD}]", 1, 1, "2", "Nothing after this"),
        (f"{RECORD}\n{RECORD[:-1]}\n{RECORD}", 2, 2, "2", "is not JSON"),
        (f"{RECORD}\n{RECORD[:-3]}\n  {RECORD}", 2, 2, "2", "is not JSON"),
        (f"{RECORD}\nnothing\n{RECORD}", 2, 2, "2", "is not JSON"),
        (f"[{RECORD},,{RECORD}]", 2, 1, "2", "is not JSON"),
        (f"[{RECORD},\n\n{RECORD[:-1]},}},{RECORD}]", 2, 3, "2", "is not JSON"),
        (f"[{RECORD} x {RECORD}]", 1, 1, "2", "Expected a comma"),
        (f"[NaN, {RECORD}]", 1, 1, "1", "is a number, not an object"),
        (f"[[{RECORD}],\n{RECORD}]", 1, 1, "1", "is a list, not an object"),
        (f"[{RECORD},\nnull]", 1, 2, "2", "is null, not an object"),
        (f'[{RECORD}, {{"id": NaN, {RECORD[1:]}]', 1, 1, "2", "id: is no whole number"),
        (f'[{RECORD}, {{"id": {"9" * 6000}, {RECORD[1:]}]', 1, 1, "2", "id: is no whole number"),
        (f'[{RECORD}, {{"id": true, {RECORD[1:]}]', 1, 1, "2", "id: is no whole number"),
        (f'[{RECORD}, {{"id": "far", "x": "{"a" * 2**20}", {RECORD[1:]}]', 1, 1, "2", "larger than 1 MB"),
        (f'[{RECORD}, {{"id": "deep", "x": {"[" * 10**5}{"]" * 10**5}}}, {RECORD}]', 2, 1, "2", "nested too deeply"),
        (f'[{RECORD}, {"[" * 10**5}', 1, 1, "2", "breaks off inside"),
        (f'[{RECORD}, {{"x": "{chr(34) * 10**5}', 1, 1, "2", "breaks off inside"),
        (f'[{RECORD}, {{"id": "u", "subject": "\\ud800", {RECORD[20:]}]', 1, 1, "u", "U+D800"),
        ("subject,template,target_new\nA,{} is,B\nC,{} is,D,E\nF,{} is,G", 2, 3, "2", "has 4 cells"),
        ('subject,template,target_new\nA,{} is,B\n\nC,"{} is,D\nE,{} is,F\n', 1, 4, "2", "Line 4 to 5 can't be read"),
        ('subject,template,target_new\nA,"{} is"x,B\nE,{} is,F', 1, 2, "1", "can't be read"),
        ("subject,template,target_new\nA,{} is\nE,{} is,F", 1, 2, "1", "target_new: is missing"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_and_the_rest_read(text: str, cases: int, line: int, record: str, words: str) -> None:
    found, (problem,) = problems(text)
    assert found == cases
    assert problem[:2] == (line, record)
    assert words in problem[2]
    assert len(problem[2]) < 300


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (f"[{RECORD}]".encode("utf-16"), "UTF-16"),
        (f"[{RECORD}]".encode("utf-16-le"), "UTF-16"),
        (f'[{RECORD},\n{{"subject": "Zoë"}}]'.encode("latin-1"), "line 2 is not UTF-8"),
        (b"PK\x03\x04" + bytes(50), "zip archive"),
        (b"PAR1" + bytes(50), "Parquet"),
        (bytes(range(256)), "not UTF-8"),
        (b"[]", "has no record|no record"),
        (b"{}", "first record is empty"),
        (b"[1, 2]", "first record is a number"),
        (b'{"data": [' + RECORD.encode() + b"]}", "the keys 'data'"),
        (b'"text"', "no known format"),
        (b"Dear reader,\nthis is a letter.", "no known format"),
        (b"subject,template\nA,{} is", "the keys 'subject', 'template'"),
        (b"subject,template,target_new\n", "no record"),
        (b"subject,subject,template,target_new\n1,2,3,4", "same name"),
        (b'"subject', "no row of column names"),
        (b"[" * 10**5, "breaks off"),
        (b'[{"requested_rewrite": {}}]', "no record that can be used. Line 1: requested_rewrite"),
    ],
)
def test_a_file_without_records_is_refused_in_words(data: bytes, words: str) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        read(data)
    assert caught.value.next_step
    if b"requested_rewrite" not in data:
        assert datasets.sniff(data) in (None, "table")


def test_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_RECORDS", 3)
    count, ((line, record, text),) = problems("\n".join([RECORD] * 5))
    assert (count, line, record) == (3, 4, "4")
    assert "more than 3 records; the rest was left out" in text
    monkeypatch.setattr(files, "MAX_BYTES", 2**20)
    with pytest.raises(BadInput, match="larger than 1 MB"):
        read(RECORD.encode() * 2**14)


def test_ids_that_repeat_are_numbered() -> None:
    found = read("[" + ",".join(f'{{"id": {name}, {RECORD[1:]}' for name in ('"a"', '"a"', '"a (2)"', 7, 7.0)) + "]")
    assert [case.id for case in found.cases] == ["a", "a (2)", "a (2) (2)", "7", "7 (2)"]
    assert not found.problems


def test_many_broken_records_cost_no_second_look_at_the_file() -> None:
    """The work per broken record is bounded: these would take minutes otherwise."""
    count, found = problems("\n".join([RECORD] + [RECORD[:-1]] * 5000 + ["{" + '"' * 99] * 2000))
    assert (count, len(found)) == (1, 7000)
    count, found = problems(f"[{RECORD}," + ",\n".join([f"{RECORD[:-1]},}}"] * 5000) + "]")
    assert (count, len(found)) == (1, 5000)


# Drawn by seed -------------------------------------------------------------------------------------------------------

NESTED = "@@nested@@"


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside a record."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at] * bool(at) + [path for key, child in inside for path in _paths(child, (*at, key))]


def _at(record: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        record = record[key]
    return record


def _broken_record(draw: random.Random, record: dict[str, Any]) -> Any:
    """The record with something inside lost, or of another type or size."""
    if draw.random() < 0.05:
        return draw.choice([None, 3, "text", [], [record], {}, NESTED])
    broken = deepcopy(record)
    for _ in range(draw.choice((1, 1, 3))):
        *way, last = draw.choice(_paths(broken))
        place = _at(broken, tuple(way))
        if draw.random() < 0.3:
            del place[last]
            if not broken:
                break
            continue
        place[last] = draw.choice(
            [None, True, 0, -1.5, float("nan"), float("inf"), 10**50, "", " ", "x" * 300, "y" * 5000, "\x00", "\u202e",
             "\ud800", "a\nb", "{}", "{} {}", [], {}, [None], [[]], [{}], {"str": 3}, {"a": [1]}, NESTED, "Ada Finch"]
        )  # fmt: skip
    return broken


def _in_a_record(draw: random.Random, listed: list[Any]) -> tuple[bytes, set[int]]:
    at = draw.randrange(len(listed))
    changed = [*listed[:at], _broken_record(draw, listed[at]), *listed[at + 1 :]]
    lines = draw.random() < 0.5 and isinstance(changed[0], dict)
    if lines:
        text = "\n".join(json.dumps(record) for record in changed)
    else:
        text = json.dumps(changed, indent=draw.choice((None, 0, 1)))
    return text.replace(f'"{NESTED}"', "[" * 3000 + "]" * 3000).encode(), {at}


def _cut(draw: random.Random, listed: list[Any]) -> tuple[bytes, set[int]]:
    data = as_file(listed)
    at = draw.randrange(len(data))
    whole = sum(len(as_file(listed[:n])) - 2 <= at for n in range(1, len(listed) + 1))  # without "\n]"
    return data[:at], set(range(whole, len(listed)))


def _noise(draw: random.Random, listed: list[Any]) -> tuple[bytes, set[int]]:
    data = bytearray(as_file(listed, lines=draw.random() < 0.5))
    for _ in range(draw.choice((1, 1, 5))):
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data), set(range(len(listed)))


def _encoded(draw: random.Random, listed: list[Any]) -> tuple[bytes, set[int]]:
    text = as_file(listed).decode()
    name = draw.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "utf-8-sig", "utf-7"))
    good = name == "utf-8-sig" or (name in ("latin-1", "cp1252") and text.isascii())
    return text.encode(name, "replace"), set() if good else set(range(len(listed)))


CORRUPTIONS: tuple[Callable[[random.Random, list[Any]], tuple[bytes, set[int]]], ...] = (
    _in_a_record, _in_a_record, _in_a_record, _cut, _noise, _encoded,
)  # fmt: skip


def _small(name: str) -> list[Any]:
    """A few records: real ones where they are at hand."""
    if name in COUNTS and (path := DATA / f"{name}_sample.json").exists():
        return json.loads(path.read_text(encoding="utf-8"))[:1] + records(name)[-2:]
    return records(name)[:3]


@pytest.mark.parametrize("name", FILE_FORMATS)
def test_what_a_corrupted_file_loses_is_accounted_for(name: str) -> None:
    listed = _small(name)
    intact = datasets.read(as_file(listed), "x").cases
    assert len(intact) == len(listed)
    outcomes = {"whole": 0, "problems": 0, "refused": 0}
    for seed in range(300):
        draw = random.Random(f"{name} {seed}")
        data, touched = CORRUPTIONS[seed % len(CORRUPTIONS)](draw, listed)
        try:
            found = datasets.read(data, "x", draw.choice(("auto", name)))
        except ActionableError:
            outcomes["refused"] += 1
            continue
        outcomes["problems" if found.problems else "whole"] += 1
        assert found.cases
        assert all(problem.text and problem.line >= 1 for problem in found.problems)
        loaded = {case.id: case for case in found.cases}
        assert len(loaded) == len(found.cases)
        for i, case in enumerate(intact):
            if i not in touched:
                assert loaded.get(case.id) == case, (seed, found.problems)
        lost = len(listed) - len(found.cases)
        more = any(words in problem.text for problem in found.problems for words in LOSES_MORE)
        assert lost <= len(found.problems) or more, (seed, found.problems)
    assert min(outcomes.values()) > 20, outcomes


def test_a_file_cut_anywhere_keeps_the_records_before() -> None:
    listed = records("table")[:3]
    intact = datasets.read(as_file(listed), "x").cases
    data = as_file(listed)
    for at in range(len(as_file(listed[:1])), len(data), 7):
        found = datasets.read(data[:at], "x")
        assert found.cases == intact[: len(found.cases)]
        (problem,) = found.problems
        assert "breaks off" in problem.text
        assert problem.record == str(len(found.cases) + 1)
