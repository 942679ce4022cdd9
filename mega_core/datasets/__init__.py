"""Datasets of edits in the formats they come in, as cases (cases.py). No torch; nothing is downloaded unless asked for.

1. `load` takes a path, "builtin" or the id of a dataset in the local hub cache; `read` takes the bytes of an upload.
2. `sniff` tells the format by the keys of the first records.
3. Every record is checked. One that can't be used becomes a Problem with its line, its id and the next step; nothing is
   left out silently. A file without any usable record is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from mega_core.cases import MAX_ID, Case
from mega_core.datasets import builtin, counterfact, easyedit, files, hub, mquake, ripple, table, zsre
from mega_core.datasets.base import Dataset, Format, Problem, Record, id_of, kind
from mega_core.errors import ActionableError, BadInput
from mega_core.registry import Registry

__all__ = ["FORMATS", "Dataset", "Format", "Problem", "load", "read", "sniff"]


class _Reader(NamedTuple):
    fits: Callable[[Record], bool]
    case: Callable[[Record, int], Case]


_MODULES = (counterfact, easyedit, zsre, ripple, mquake, table)
"""Where a record fits several, the first of them."""
_READERS = {module.FORMAT.name: _Reader(module.fits, module.case) for module in _MODULES}
FORMATS: Registry[Format] = Registry("dataset format")
for _format in (*(module.FORMAT for module in _MODULES), builtin.FORMAT):
    FORMATS.add(_format.name, _format)

LOOKED_AT = 50
"""Records by which a format is told."""


def load(
    what: str | Path,
    format: str = "auto",
    *,
    seed: int = 0,
    limit: int | None = None,
    download: bool = False,
    hub_cache: Path | None = None,
) -> Dataset:
    """A dataset by path, "builtin", "builtin:SEED", or an id of the local hub cache ("owner/name", "owner/name:file").

    `limit` keeps the first cases; with a `seed` above 0 it draws as many. The network is asked only with `download`.
    Raises BadInput or UnknownName.
    """
    named = str(what)
    if isinstance(what, str) and named.split(":")[0] == "builtin" and format in ("auto", "builtin"):
        which = named.partition(":")[2] or "reported"
        if seed and limit is not None:
            return _builtin(which, None, f"builtin:{which}").limited(limit, seed)
        return _builtin(which, limit, f"builtin:{which}")
    path = _path(named)
    if path is None and named in _READERS:
        raise BadInput("dataset", f"there is no file {named!r}; it is a format: give the file as well.", _give(named))
    path = path or hub.find(named, download=download, cache=hub_cache)
    data = _bytes(path)
    found = replace(read(data, path.name, format), source=named)
    return found if limit is None else found.limited(limit, seed or None)


def read(data: bytes, name: str, format: str = "auto") -> Dataset:
    """The dataset in these bytes; `name` is what the file is called. Raises BadInput or UnknownName."""
    if format not in ("auto", *_READERS):
        FORMATS[format]  # raises UnknownName with the closest one
        raise BadInput("format", f"{format} is no format of files.", f"Known: auto, {', '.join(_READERS)}.")
    text = files.text_of(data)
    chosen = _format_of(text, format)
    reader = _READERS[chosen]
    cases: list[Case] = []
    problems: list[Problem] = []
    taken: Counter[str] = Counter()
    for row in files.rows(text):
        case, fault = None, row.fault
        if not fault and not isinstance(row.value, dict):
            fault = f"The record is {kind(row.value)}, not an object. Write it as {{...}}."
        if not fault:
            try:
                case = reader.case(row.value, row.number)
            except ActionableError as error:
                fault = str(error)
            except RecursionError:
                fault = "The record is nested too deeply. Leave it out."
        if case is None:
            problems.append(Problem(row.line, _id(row), fault))
            continue
        taken[case.id] += 1
        if taken[case.id] > 1:
            case = replace(case, id=_another(case.id, taken))
        cases.append(case)
    if not cases:
        first = f" Line {problems[0].line:,}: {problems[0].text}" if problems else ""
        raise BadInput("dataset", f"{name[:80]} has no record that can be used.{first}", _ask(chosen))
    return Dataset(Path(name).stem or name, chosen, tuple(cases), tuple(problems), source=name)


def sniff(data: bytes) -> str | None:
    """The name of the format that most of the first records have, or None."""
    try:
        rows = islice(files.rows(files.text_of(data)), LOOKED_AT)
        return _sniffed([row.value for row in rows if isinstance(row.value, dict)])
    except ActionableError:
        return None


# How -----------------------------------------------------------------------------------------------------------------


def _sniffed(records: Sequence[Record]) -> str | None:
    votes = Counter(
        next((name for name, reader in _READERS.items() if reader.fits(record)), None) for record in records
    )
    del votes[None]
    return votes.most_common(1)[0][0] if votes else None


def _format_of(text: str, asked: str) -> str:
    head = list(islice(files.rows(text), LOOKED_AT))
    records = [row.value for row in head if isinstance(row.value, dict)]
    looks_like = _sniffed(records)
    if asked == "auto" and looks_like is None:
        raise BadInput("dataset", f"is in no known format; {_strange(head)}", _expected(text))
    if asked != "auto" and looks_like not in (None, asked) and not any(map(_READERS[asked].fits, records)):
        title = FORMATS[str(looks_like)].title
        raise BadInput(
            "format",
            f"the file looks like {title} ({looks_like}), not {FORMATS[asked].title} ({asked}).",
            f"Choose the format {looks_like}, or auto.",
        )
    return str(looks_like) if asked == "auto" else asked


def _strange(head: list[files.Row]) -> str:
    """What is in a file instead of records."""
    for row in head:
        if isinstance(row.value, dict):
            keys = ", ".join(repr(str(key)[:30]) for key in list(row.value)[:8])
            return f"its first record has the keys {keys}." if keys else "its first record is empty."
        if row.fault:
            return f"line {row.line:,}: {row.fault}"
    return f"its first record is {kind(head[0].value)}." if head else "it has no record."


def _expected(text: str) -> str:
    known = ", ".join(_READERS)
    if files.is_table(text):
        return table.NEEDED
    return f"Records stand in a list at the top of the file, or one a line. Formats: {known}; see docs/datasets.md."


def _give(format: str) -> str:
    return f"For example: --dataset FILE --format {format}."


def _builtin(which: str, limit: int | None, source: str) -> Dataset:
    return Dataset(source, "builtin", builtin.cases(which, limit), source=source)


def _path(named: str) -> Path | None:
    try:
        path = Path(named).expanduser()
        if path.is_dir():
            raise BadInput("dataset", f"{named[:200]!r} is a folder.", "Name the file in it.")
        return path if path.is_file() else None
    except (OSError, ValueError, RuntimeError):
        return None


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(files.MAX_BYTES + 1)
    except OSError as error:
        raise BadInput("dataset", f"{path.name[:80]!r} can't be read ({error.strerror}).", "Check the file.") from None


def _id(row: files.Row) -> str:
    try:
        return id_of(row.value, row.number, "case_id", "id") if isinstance(row.value, dict) else str(row.number)
    except ActionableError:
        return str(row.number)


def _another(name: str, taken: Counter[str]) -> str:
    """An id that is taken, numbered."""
    while True:
        end = f" ({taken[name]})"
        other = name[: MAX_ID - len(end)] + end
        if not taken[other]:
            taken[other] += 1
            return other
        taken[name] += 1


def _ask(format: str) -> str:
    return f"It was read as {FORMATS[format].title}; choose another format or correct the file."
