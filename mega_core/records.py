"""The plain values that travel: what is asked (EditRequest, Inspection) and what comes back (Report). No torch."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from io import BytesIO
from math import inf, isfinite
from types import MappingProxyType
from typing import Any, NoReturn
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import pandas as pd

from mega_core import frames as tables
from mega_core.errors import ActionableError, BadInput, StoreError
from mega_core.keys import digest

SCHEMA_VERSION = 1
MAX_SUBJECT, MAX_TEMPLATE, MAX_TARGET, MAX_PROMPTS = 128, 512, 64, 32
MAX_REPORT_BYTES = 64 * 2**20
KEPT_REPORT_BYTES = 4 * 2**20
FILE_KIND = "edit-anatomy run"
MAX_FILE_BYTES = 5 * 2**20
"""Of a run as a JSON file from elsewhere."""

Scalar = str | int | float | bool | None


def clean_text(name: str, text: str, limit: int, *, may_be_empty: bool = False, lines: bool = False) -> str:
    """NFC text without outer blanks. Raises BadInput naming the field on wrong type, length, hidden characters.

    `lines` lets line breaks and tabs inside the text pass: CounterFact's paraphrases have them.
    """
    if not isinstance(text, str):
        raise BadInput(name, f"expected text, got {type(text).__name__}.", "Type it as text.")
    if len(text) > 4 * limit:  # before normalising: normal forms of huge strings are slow
        raise BadInput(name, f"{len(text):,} characters, the limit is {limit}.", "Shorten it.")
    plain = text.isprintable()  # then nothing hidden is in it, and it need not be gone through sign by sign
    allowed = "\n\t" if lines else ""
    bad = (
        None
        if plain
        else next((c for c in text if c not in allowed and (unicodedata.category(c) in _HIDDEN or c in _BREAKS)), None)
    )
    if bad is not None:
        raise BadInput(
            name, f"contains the control character U+{ord(bad):04X}.", "Remove it (often a tab or line break)."
        )
    bidi = None if plain else next((c for c in text if unicodedata.bidirectional(c) in _BIDI_CONTROLS), None)
    if bidi is not None:
        raise BadInput(name, f"contains the invisible direction mark U+{ord(bidi):04X}.", "Remove it.")
    clean = unicodedata.normalize("NFC", text).strip()
    if not clean and not may_be_empty:
        raise BadInput(name, "is empty.", "Fill it in.")
    if len(clean) > limit:
        raise BadInput(name, f"{len(clean):,} characters, the limit is {limit}.", "Shorten it.")
    return clean


_HIDDEN, _BREAKS = ("Cc", "Cs", "Cn", "Co"), "\u2028\u2029"
_BIDI_CONTROLS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


def clean_template(template: str, subject: str = "") -> str:
    """A relation prompt with exactly one {}. Raises BadInput, with a mended template when the subject stands in it."""
    clean = clean_text("template", template, MAX_TEMPLATE)
    count = clean.count("{}")
    if count == 1:
        return clean
    if count > 1:
        raise BadInput("template", f"has {count} places {{}} for the subject.", "Keep exactly one {}.")
    if subject and subject in clean:
        mended = clean.replace(subject, "{}", 1)
        raise BadInput("template", "has the subject itself instead of {}.", f'Write it as "{mended}".')
    raise BadInput("template", "has no {} where the subject goes.", 'Write for example "{} is located in the city of".')


@dataclass(frozen=True, slots=True)
class EditRequest:
    """One fact to rewrite: template "The capital of {} is", subject France, Paris -> Rome."""

    subject: str
    """The entity, without its article; at most 128 characters."""
    template: str
    """The relation prompt with exactly one {}; filled with replace(), never str.format."""
    target_new: str
    """The new object, no leading space: the tokens module owns spacing."""
    target_true: str | None = None
    """The object the model says now, if known."""
    paraphrases: tuple[str, ...] = ()
    """Full prompts asking the same; evaluation only: a method must never fit on them."""
    neighbours: tuple[str, ...] = ()
    """Full prompts about other subjects whose answer must not move; evaluation only."""

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "subject", clean_text("subject", self.subject, MAX_SUBJECT))
        if "{}" in self.subject:
            raise BadInput("subject", "contains {}.", "The subject is the name only; {} belongs in the template.")
        set_(self, "template", clean_template(self.template, self.subject))
        set_(self, "target_new", clean_text("target_new", self.target_new, MAX_TARGET))
        if self.target_true is not None:
            set_(
                self, "target_true", clean_text("target_true", self.target_true, MAX_TARGET, may_be_empty=True) or None
            )
        if self.target_true is not None and self.target_true.casefold() == self.target_new.casefold():
            raise BadInput(
                "target_new",
                f"is the same as the original object {self.target_true!r}.",
                "Choose a different new object.",
            )
        for name in ("paraphrases", "neighbours"):
            prompts = tuple(getattr(self, name))
            if len(prompts) > MAX_PROMPTS:
                raise BadInput(name, f"{len(prompts)} prompts, the limit is {MAX_PROMPTS}.", "Leave some out.")
            set_(self, name, tuple(dict.fromkeys(clean_text(name, text, MAX_TEMPLATE, lines=True) for text in prompts)))

    @property
    def prompt(self) -> str:
        """The relation prompt filled with the subject."""
        return self.template.replace("{}", self.subject)

    @property
    def sentence(self) -> str:
        """The new fact as a person would say it, for titles."""
        return f"{self.prompt} {self.target_new}"


@dataclass(frozen=True, slots=True)
class ModelRef:
    """Which model: its catalogue name, the revision and the weights' dtype. The weights' digest joins it in the key."""

    name: str
    revision: str = ""
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class MethodRef:
    """Which method with every parameter spelled out, so that a changed default is another question."""

    name: str
    version: int = 1
    params: tuple[tuple[str, Scalar], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", tuple(sorted((str(k), v) for k, v in self.params)))


@dataclass(frozen=True, slots=True)
class Inspection:
    """A complete question: everything that decides the answer, and nothing else."""

    model: ModelRef
    method: MethodRef
    requests: tuple[EditRequest, ...]
    views: tuple[str, ...] = ("module_scores",)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.requests:
            raise BadInput("requests", "there is no edit.", "Give at least one edit request.")
        object.__setattr__(self, "views", tuple(sorted(set(self.views))))

    def key(self, model_digest: str) -> str:
        """The digest under which the answer is stored; `model_digest` is that of the weight files."""
        return digest({"schema": SCHEMA_VERSION, "question": self, "weights": model_digest})


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof that the base model was given back as it was: digests of the live parameters, hooks left on it."""

    restored: bool
    weights_digest_before: str
    weights_digest_after: str
    hooks_left: int


@dataclass(frozen=True)
class Report:
    """The answer: tidy frames (see frames.py), receipt, seconds per stage. Immutable; made once per question."""

    question: Inspection
    digest: str
    model_digest: str
    frames: Mapping[str, pd.DataFrame]
    receipt: Receipt
    timing: Mapping[str, float]
    """Stage -> seconds."""
    notes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    """Versions of the libraries and the device that made the numbers."""
    origin: str = ""
    """For an imported run the digest that its file claims; its own `digest` then names the file's content, so that it
    is never taken for an answer found here. Empty otherwise.
    """

    def __post_init__(self) -> None:
        checked = {name: tables.check(frame, name) for name, frame in sorted(self.frames.items())}
        object.__setattr__(self, "frames", MappingProxyType(checked))
        object.__setattr__(self, "timing", MappingProxyType(dict(self.timing)))
        object.__setattr__(self, "environment", MappingProxyType(dict(self.environment)))

    def header(self) -> dict[str, Any]:
        """Everything but the frames, as plain JSON. An imported run leaves under the digest it came with."""
        return {
            "schema_version": SCHEMA_VERSION,
            "question": as_plain(self.question),
            "digest": self.origin or self.digest,
            "model_digest": self.model_digest,
            "receipt": as_plain(self.receipt),
            "timing": dict(self.timing),
            "notes": list(self.notes),
            "environment": dict(self.environment),
        }

    def to_json(self) -> dict[str, Any]:
        """The whole report as plain JSON: the header, `frames` (name -> rows) and `generations`."""
        rows = {name: _cells(frame).to_dict(orient="records") for name, frame in self.frames.items()}
        return {**self.header(), "generations": rows.get("generations", []), "frames": rows}

    def to_file(self, labels: Mapping[str, Any] | None = None) -> bytes:
        """The whole run as a JSON file that from_json() reads: the header, `labels` for whoever reads it without this
        program, and `frames` (name -> columns and rows).
        """
        rows = {
            name: {"columns": list(frame.columns), "rows": _cells(frame).to_numpy(dtype=object).tolist()}
            for name, frame in self.frames.items()
        }
        plain = {"kind": FILE_KIND, **self.header(), "labels": dict(labels or {}), "frames": rows}
        return json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Report:
        """Read what to_file() or to_json() gave, from anybody: every field is checked, nothing of it is believed but
        that it is a well-formed report. Raises BadInput saying where it is not.
        """
        return _report_from_file(data)

    def to_bytes(self) -> bytes:
        """One container: a zip of report.json and a Parquet file per frame. The same report gives the same bytes."""
        buffer = BytesIO()
        with ZipFile(buffer, "w", ZIP_STORED) as box:
            box.writestr(ZipInfo("report.json"), json.dumps(self.header(), sort_keys=True, allow_nan=False))
            for name, frame in self.frames.items():
                box.writestr(ZipInfo(f"{name}.parquet"), tables.to_parquet(frame))
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Report:
        """Read what to_bytes wrote: the same bytes in a row are read once, since pages ask for a run at every redraw.

        Raises StoreError on damage, another schema, or a container too large.
        """
        return _kept_from_bytes(data) if len(data) <= KEPT_REPORT_BYTES else _from_bytes(data)


def _from_bytes(data: bytes) -> Report:
    try:
        with ZipFile(BytesIO(data)) as box:
            if sum(entry.file_size for entry in box.infolist()) > MAX_REPORT_BYTES:
                raise StoreError("The stored report is larger than a report can be.", "Run the edit again.")
            header = json.loads(box.read("report.json"))
            if header["schema_version"] != SCHEMA_VERSION:
                raise StoreError(f"The stored report has schema {header['schema_version']}.", "Run the edit again.")
            names = [entry.removesuffix(".parquet") for entry in box.namelist() if entry.endswith(".parquet")]
            frames = {name: tables.from_parquet(box.read(f"{name}.parquet"), name) for name in names}
        return Report(
            question=inspection_from_plain(header["question"]),
            digest=header["digest"],
            model_digest=header["model_digest"],
            frames=frames,
            receipt=Receipt(**header["receipt"]),
            timing=header["timing"],
            notes=tuple(header["notes"]),
            environment=header["environment"],
        )
    except (BadZipFile, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"The stored report can't be read ({type(error).__name__}).", "Run the edit again.") from error


_kept_from_bytes = lru_cache(maxsize=8)(_from_bytes)


def as_plain(record: Any) -> Any:
    """A record as plain JSON values, for people and other programs (keys.canonical is the exact form)."""
    if hasattr(record, "__dataclass_fields__"):
        return {f.name: as_plain(getattr(record, f.name)) for f in fields(record)}
    if isinstance(record, Mapping):
        return {str(k): as_plain(v) for k, v in dict(record).items()}
    if isinstance(record, tuple | list):
        return [as_plain(item) for item in record]
    return record


def inspection_from_plain(plain: Mapping[str, Any]) -> Inspection:
    """The Inspection that as_plain wrote. Raises KeyError, TypeError or BadInput on anything else."""
    method = plain["method"]
    return Inspection(
        model=ModelRef(**plain["model"]),
        method=MethodRef(method["name"], method["version"], tuple((k, v) for k, v in method["params"])),
        requests=tuple(request_from_plain(request) for request in plain["requests"]),
        views=tuple(plain["views"]),
        seed=plain["seed"],
    )


def request_from_plain(plain: Mapping[str, Any]) -> EditRequest:
    """The EditRequest that as_plain wrote. Raises KeyError, TypeError or BadInput on anything else."""
    prompts = {name: tuple(plain[name]) for name in ("paraphrases", "neighbours")}
    return EditRequest(**{**plain, **prompts})


# Files of a run from elsewhere ---------------------------------------------------------------------------------------

MAX_CELL, MAX_NOTES, MAX_LABEL = 20_000, 200, 500
_HEX = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,99}")
_INFINITE = {"Infinity": inf, "-Infinity": -inf}
"""How a number without bound is written: JSON has none."""
_WORDS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "state": frozenset({"before", "after"}),
        "candidate": frozenset({"new", "true"}),
        "prompt_kind": frozenset({"edit", "paraphrase", "neighbourhood"}),
    }
)
"""Text columns that stand for one of a few things, in whatever table."""
_RANGES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"layer": (-1, 1023), "head": (-1, 1023), "position": (-1, 100_000)}
)
_FIELDS = (
    "schema_version", "question", "digest", "model_digest", "receipt", "timing", "notes", "environment", "frames",
)  # fmt: skip
_BESIDE = ("kind", "labels", "generations")
"""Fields that may be there and say nothing new: they are not read."""


def _cells(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with every number that JSON can't hold as text."""
    floats = [
        column for column in frame.columns if frame[column].dtype.kind == "f" and (frame[column].abs() == inf).any()
    ]
    if not floats:
        return frame
    words = {value: word for word, value in _INFINITE.items()}
    return frame.assign(**{c: [words.get(v, v) for v in frame[c].astype(object)] for c in floats})


def _report_from_file(data: bytes) -> Report:
    if len(data) > MAX_FILE_BYTES:
        _refuse("it", f"has {len(data):,} bytes, the limit is {MAX_FILE_BYTES:,}", "Leave out views, or open it there.")
    try:
        plain = json.loads(data.decode("utf-8-sig"), parse_constant=_no_constant, object_pairs_hook=_once)
    except (UnicodeDecodeError, ValueError, RecursionError):  # also: a number with thousands of digits
        _refuse("it", "is not JSON text", "Choose a run.json exported by this app.")
    if not isinstance(plain, dict) or not {"schema_version", "question", "frames"} <= set(plain):
        _refuse("it", "is not an exported run", "Choose a run.json exported by this app.")
    version = plain["schema_version"]
    if type(version) is not int or version != SCHEMA_VERSION:
        _refuse(
            "it", f"has schema version {str(version)[:20]}, this app reads {SCHEMA_VERSION}", "Export it again, there."
        )
    _members("it", plain, _FIELDS, _BESIDE)
    question = _question(plain["question"])
    receipt = _members("receipt", plain["receipt"], tuple(f.name for f in fields(Receipt)))
    if type(receipt["restored"]) is not bool:
        _refuse("receipt.restored", "is neither true nor false")
    timing = _mapping("timing", plain["timing"], MAX_NOTES)
    environment = _mapping("environment", plain["environment"], MAX_NOTES)
    named = _mapping("frames", plain["frames"], len(tables.CONTRACTS))
    frames = {name: _frame(name, held, question) for name, held in named.items()}
    _check_answers(frames.get("answers"), question)
    return Report(
        question=question,
        digest=_digest("digest", plain["digest"]),
        model_digest=_digest("model_digest", plain["model_digest"]),
        frames=frames,
        receipt=Receipt(
            receipt["restored"],
            _digest("receipt.weights_digest_before", receipt["weights_digest_before"]),
            _digest("receipt.weights_digest_after", receipt["weights_digest_after"]),
            _whole("receipt.hooks_left", receipt["hooks_left"], 0, 10**6),
        ),
        timing={name: _seconds(f"timing.{name}", value) for name, value in timing.items()},
        notes=tuple(
            _text("notes", note, MAX_LABEL * 4, empty=True) for note in _list("notes", plain["notes"], MAX_NOTES)
        ),
        environment={
            name: _text(f"environment.{name}", value, MAX_LABEL, empty=True) for name, value in environment.items()
        },
    )


def _question(plain: Any) -> Inspection:
    _members("question", plain, tuple(f.name for f in fields(Inspection)))
    model = _members("question.model", plain["model"], tuple(f.name for f in fields(ModelRef)))
    method = _members("question.method", plain["method"], tuple(f.name for f in fields(MethodRef)))
    params = []
    for pair in _list("question.method.params", method["params"], MAX_NOTES):
        name, value = _list("question.method.params", pair, 2, 2)
        where = f"question.method.params.{_text('question.method.params', name, MAX_LABEL)}"
        params.append((name, _scalar(where, value)))
    if len({name for name, _ in params}) < len(params):
        _refuse("question.method.params", "names one parameter twice")
    views = [_text("question.views", view, MAX_LABEL) for view in _list("question.views", plain["views"], 64)]
    return Inspection(
        model=ModelRef(
            _name("question.model.name", model["name"]),
            _text("question.model.revision", model["revision"], MAX_LABEL, empty=True),
            _name("question.model.dtype", model["dtype"]),
        ),
        method=MethodRef(
            _name("question.method.name", method["name"]),
            _whole("question.method.version", method["version"], 0, 10**6),
            tuple(params),
        ),
        requests=tuple(_request(one) for one in _list("question.requests", plain["requests"], 1000, 1)),
        views=tuple(views),
        seed=_whole("question.seed", plain["seed"], 0, 2**31 - 1),
    )


def _request(plain: Any) -> EditRequest:
    _members("question.requests", plain, tuple(f.name for f in fields(EditRequest)))
    for name in ("paraphrases", "neighbours"):
        _list(f"question.requests.{name}", plain[name], MAX_PROMPTS)
    return request_from_plain(plain)


def _frame(name: str, held: Any, question: Inspection) -> pd.DataFrame:
    """A frame from rows as mappings, or from columns and rows as lists."""
    if name not in tables.CONTRACTS:
        _refuse("frames", f"has the unknown table {name[:40]!r}")
    kinds, where = tables.CONTRACTS[name].columns, f"frames.{name}"
    columns: dict[str, Sequence[Any]]
    if isinstance(held, list):
        for row in held:
            _members(where, row, tuple(kinds))
        columns = {column: [row[column] for row in held] for column in kinds}
    else:
        _members(where, held, ("columns", "rows"))
        names = [_text(where, column, MAX_LABEL) for column in _list(where, held["columns"], len(kinds))]
        if sorted(names) != sorted(kinds):
            _refuse(where, f"must have the columns {', '.join(kinds)}")
        rows = [_list(where, row, len(kinds), len(kinds)) for row in _list(where, held["rows"])]
        columns = dict(zip(names, zip(*rows, strict=True), strict=True)) if rows else dict.fromkeys(names, ())
    made = {}
    for column, kind in kinds.items():
        at = f"{where}.{column}"
        values = _COLUMNS[kind](at, columns[column])
        made[column] = pd.Series(values, dtype=tables.DTYPES[kind])
        if column in _WORDS and (strange := set(values) - _WORDS[column]):
            _refuse(at, f"has the unknown value {sorted(strange)[0][:40]!r}")
        low, high = (0, len(question.requests) - 1) if column == "case" else _RANGES.get(column, (None, None))
        if (
            kind == "int"
            and low is not None
            and high is not None
            and values
            and not low <= min(values) <= max(values) <= high
        ):
            _refuse(at, f"has a number outside {low} to {high}")
    try:
        return tables.check(pd.DataFrame(made), name)
    except ActionableError as error:
        raise BadInput("file", f"{where} breaks its rules: {error.what}", _NEXT) from error


def _check_answers(answers: pd.DataFrame | None, question: Inspection) -> None:
    """What every reader of a report counts on: the first request is answered, before and after, for each object."""
    where = "frames.answers"
    if answers is None or not (answers["case"] == 0).any():
        _refuse(where, "has no answers to the first edit")
    for case, rows in answers.groupby("case"):
        asked = set(rows.loc[rows["prompt_kind"] == "edit", "prompt"])
        if asked != {question.requests[int(case)].prompt}:
            _refuse(where, f"does not answer the prompt of edit {int(case) + 1}, or answers another one")
        objects = set(rows["candidate"])
        whole = 2 * len(objects) * len(rows.groupby(["prompt_kind", "prompt"]))
        if "new" not in objects or len(rows) != whole:
            _refuse(where, f"lacks an answer of edit {int(case) + 1}: each prompt needs every object before and after")


_NEXT = "Export the run again where it was made."


def _refuse(where: str, what: str, next_step: str = _NEXT) -> NoReturn:
    raise BadInput("file", f"{where} {what}.", next_step)


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _members(where: str, plain: Any, needed: Iterable[str], beside: Iterable[str] = ()) -> dict[str, Any]:
    """The mapping itself, with exactly these fields."""
    if not isinstance(plain, dict):
        _refuse(where, "is not an object with named fields")
    for name in needed:
        if name not in plain:
            _refuse(where, f"lacks the field {name!r}")
    known = {*needed, *beside}
    for name in plain:
        if name not in known:
            _refuse(where, f"has the unknown field {name[:40]!r}")
    return plain


def _mapping(where: str, plain: Any, most: int) -> dict[str, Any]:
    if not isinstance(plain, dict) or len(plain) > most:
        _refuse(where, f"is not an object of at most {most} fields")
    for name in plain:
        _text(where, name, MAX_LABEL)
    return plain


def _list(where: str, plain: Any, most: int | None = None, least: int = 0) -> list[Any]:
    if not isinstance(plain, list) or len(plain) < least or (most is not None and len(plain) > most):
        _refuse(where, f"is not a list of {least} to {most} items" if most is not None else "is not a list")
    return plain


def _text(where: str, value: Any, limit: int, *, empty: bool = False) -> str:
    if not isinstance(value, str) or len(value) > limit or not (value or empty):
        _refuse(where, f"has something that is not a text of {0 if empty else 1} to {limit:,} characters")
    if not _encodable(value):
        _refuse(where, "has a text with half a character in it")
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def _name(where: str, value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        _refuse(where, "is not a name")
    return value


def _digest(where: str, value: Any) -> str:
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        _refuse(where, "is not a digest of 64 hex characters")
    return value


def _whole(where: str, value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        _refuse(where, f"is not a whole number from {low} to {high}")
    return value


def _seconds(where: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 10**9:
        _refuse(where[:80], "is not a number of seconds")
    return float(value)


def _scalar(where: str, value: Any) -> Scalar:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(where, value, MAX_CELL, empty=True)
    if isinstance(value, float) and isfinite(value):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    _refuse(where[:120], "is neither a text nor a number")


def _int_column(where: str, values: Sequence[Any]) -> list[int]:
    if not all(type(value) is int and -(2**63) <= value < 2**63 for value in values):
        _refuse(where, "has a value that is not a whole number")
    return list(values)


def _float_column(where: str, values: Sequence[Any]) -> list[float]:
    found = []
    for value in values:
        if isinstance(value, str) and value in _INFINITE:
            found.append(_INFINITE[value])
        elif (type(value) is float and isfinite(value)) or (type(value) is int and abs(value) <= 2**53):
            found.append(float(value))
        else:
            _refuse(where, "has a value that is not a number")
    return found


def _bool_column(where: str, values: Sequence[Any]) -> list[bool]:
    if not all(type(value) is bool for value in values):
        _refuse(where, "has a value that is neither true nor false")
    return list(values)


def _text_column(where: str, values: Sequence[Any]) -> list[str]:
    return [_text(where, value, MAX_CELL, empty=True) for value in values]


_COLUMNS: Mapping[str, Callable[[str, Sequence[Any]], list[Any]]] = MappingProxyType(
    {"int": _int_column, "float": _float_column, "bool": _bool_column, "text": _text_column}
)
