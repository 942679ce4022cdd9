"""From the bytes of a file to its records: JSON arrays, JSON Lines and tables, each record with the line it begins in.

1. Text: UTF-8, with or without a byte order mark. Anything else is refused with what it looks like.
2. JSON, record by record: one that can't be read is left out with the reason, and reading goes on after it where its
   brackets still tell where it ends. A file that breaks off keeps the records before that.
3. Tables: commas, tabs or semicolons, quotes as spreadsheets write them.

Limits: 512 MB a file, 200,000 records, 1 MB a record. Numbers that JSON has no notation for (NaN, numbers of thousands
of digits) become NaN or infinity, which no field takes. No standard reader is used on the whole file, so that a
stranger's file costs no more memory than its text and one record.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from mega_core.errors import BadInput

MAX_BYTES, MAX_RECORDS, MAX_RECORD = 512 * 2**20, 200_000, 2**20
_WINDOW = 2**14
_LONGEST_NUMBER, _DEEPEST = 40, 2**20


class Row(NamedTuple):
    """One record of a file as it stands there, or what is wrong with it."""

    line: int
    number: int
    """1 for the first record."""
    value: Any = None
    fault: str = ""
    """Not empty: the record, or the rest of the file, can't be read."""


# 1. Text -------------------------------------------------------------------------------------------------------------

_BINARY = {
    b"PK\x03\x04": "a zip archive (or a spreadsheet)",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"%PDF": "a PDF",
    b"\x80\x04\x95": "a pickle",
}


def text_of(data: bytes) -> str:
    """The file's text. Raises BadInput when it is empty, too large, binary or not UTF-8."""
    if len(data) > MAX_BYTES:
        raise BadInput("dataset", f"is larger than {MAX_BYTES // 2**20} MB.", "Split the file.")
    for start, what in _BINARY.items():
        if data.startswith(start):
            raise BadInput("dataset", f"is {what}, not text.", "Unpack or export it as JSON, JSON Lines or CSV.")
    head = data[:4096]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or head.count(0) > len(head) // 4:
        raise BadInput("dataset", "is not UTF-8; it looks like UTF-16, or it is no text.", "Save it as UTF-8.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInput(
            "dataset", f"line {line:,} is not UTF-8 (byte {error.start:,}).", "Save it as UTF-8; it may be Latin-1."
        ) from None
    if not text or text.isspace():
        raise BadInput("dataset", "is empty.", "Choose a file with at least one record.")
    return text


def rows(text: str) -> Iterator[Row]:
    """Every record, as JSON values or, from a table, as texts by column. Raises BadInput on a broken head."""
    if is_table(text):
        yield from _counted(_table(text))
    else:
        yield from _counted(_json(text))


def is_table(text: str) -> bool:
    """Whether `rows` reads this text as a table."""
    return not text.startswith(("[", "{"), _after_space(text, 0))


def _counted(found: Iterator[Row]) -> Iterator[Row]:
    for row in found:
        if row.number > MAX_RECORDS:
            fault = f"There are more than {MAX_RECORDS:,} records; the rest was left out. Split the file."
            yield Row(row.line, row.number, None, fault)
            return
        yield row


# 2. JSON -------------------------------------------------------------------------------------------------------------

_SPACE = re.compile(r"[ \t\n\r]*+")
_MARKS = re.compile(r'"(?:[^"\\\n]++|\\.)*+"|[\[\]{}]', re.DOTALL)
_END = re.compile(r"[,\]]")
_NEXT = re.compile(r"\n(?=[ \t]*+\{)")
_PAIRS = {"}": "{", "]": "["}
_STOPS = "Nothing after this could be read. Correct the file."


def _json(text: str) -> Iterator[Row]:
    """The records of an array, or of values one after the other (JSON Lines)."""
    at = _after_space(text, 0)
    array = text[at] == "["
    at = _after_space(text, at + array)
    lines = _Lines(text)
    number = 0
    while at < len(text) and not (array and text[at] == "]"):
        number += 1
        line = lines.at(at)
        value, end, fault = _value(text, at, array)
        yield Row(line, number, value, fault)
        if end < 0:
            return
        at = _after_space(text, end)
        if at < len(text) and text[at] == ",":
            at = _after_space(text, at + 1)
        elif array and at < len(text) and text[at] not in "]{":
            yield Row(lines.at(at), number + 1, None, f"Expected a comma or ] after record {number:,}. {_STOPS}")
            return
    if array and at == len(text):
        yield Row(lines.at(at), number + 1, None, f"The file breaks off after {number:,} records. Get it whole.")
    elif array and (rest := _after_space(text, at + 1)) < len(text):
        yield Row(lines.at(rest), number + 1, None, "There is more text after the list; it was not read. Remove it.")


def _value(text: str, at: int, array: bool) -> tuple[Any, int, str]:
    """(value, end, fault) of the value that begins here; end is -1 where it can't be told."""
    fault = ""
    for size in (_WINDOW, MAX_RECORD):
        window = text[at : at + size]
        try:
            value, length = _DECODER.raw_decode(window)
        except RecursionError:
            fault = "The record is nested too deeply. Leave it out."
            break
        except json.JSONDecodeError as error:
            fault = f"The record is not JSON: {error.msg}. Correct it."
            if error.pos < len(window) - 16 and "Unterminated" not in error.msg:
                break  # not because the window ends
        except ValueError:
            fault = "The record is not JSON. Correct it."
        else:
            if length < len(window) or at + length == len(text):  # a number at the window's end may go on
                return value, at + length, ""
    limit = len(text) if array else _before_next_line(text, at)
    end, whole = _closing(text, at, limit, array)
    if whole:
        large = "The record is larger than 1 MB. Shorten it or leave it out."
        return None, end, large if end - at > MAX_RECORD else fault
    if limit < len(text):
        return None, limit, fault
    if end == len(text) and text[at] in "{[":
        return None, -1, f"The file breaks off inside this record, or it is never closed. {_STOPS}"
    return None, -1, f"{fault} {_STOPS}"


def _closing(text: str, at: int, limit: int, array: bool) -> tuple[int, bool]:
    """Where the value that begins here is closed, by its brackets alone, and whether it is."""
    if text[at] not in "{[":
        stop = _END.search(text, at, limit)
        return (stop.start(), True) if array and stop else (limit, False)
    waiting: list[str] = []
    for found in _MARKS.finditer(text, at, limit):
        mark = found.group()
        if mark in ("{", "["):
            waiting.append(mark)
            if len(waiting) > _DEEPEST:
                break
        elif mark in _PAIRS:
            if waiting.pop() != _PAIRS[mark]:
                return found.end(), False
            if not waiting:
                return found.end(), True
    return limit, False


def _before_next_line(text: str, at: int) -> int:
    """Where the next line that begins like a record begins; the end of the text when there is none."""
    found = _NEXT.search(text, at)
    return found.end() if found else len(text)


def _after_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_NUMBER else float("inf")


_DECODER = json.JSONDecoder(parse_int=_whole)


class _Lines:
    """Line numbers of growing positions."""

    def __init__(self, text: str) -> None:
        self._text, self._at, self._line = text, 0, 1

    def at(self, position: int) -> int:
        self._line += self._text.count("\n", self._at, position)
        self._at = position
        return self._line


# 3. Tables -----------------------------------------------------------------------------------------------------------


def _table(text: str) -> Iterator[Row]:
    start = _after_space(text, 0)
    head = text[start : start + 2**16].partition("\n")[0]
    delimiter = max(",\t;", key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    number = 0
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if not columns:
                raise BadInput(
                    "dataset", f"its first line is no row of column names ({error}).", "Correct it."
                ) from None
            number += 1
            until = f" to {reader.line_num:,}" if reader.line_num > line else ""
            yield Row(line, number, None, f"Line {line:,}{until} can't be read: {error}. Look for an open quote.")
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if not columns:
            columns = [re.sub(r"[ -]+", "_", cell.strip().casefold()) for cell in cells]
            named = [name for name in columns if name]
            if len(set(named)) < len(named):
                raise BadInput("dataset", "two columns have the same name.", "Rename one in the first line.")
            continue
        while len(cells) > len(columns) and not cells[-1].strip():
            cells.pop()
        number += 1
        if sum(map(len, cells)) > MAX_RECORD:
            yield Row(line, number, None, "The row is larger than 1 MB. Shorten it or leave it out.")
        elif len(cells) > len(columns):
            fault = f"The row has {len(cells)} cells, the first line {len(columns)}. Quote cells that hold a separator."
            yield Row(line, number, None, fault)
        else:
            yield Row(line, number, {name: cell for name, cell in zip(columns, cells, strict=False) if name})
