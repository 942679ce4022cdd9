"""The plain values that travel: what is asked (EditRequest, Inspection) and what comes back (Report). No torch."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from io import BytesIO
from types import MappingProxyType
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import pandas as pd

from mega_core import frames as tables
from mega_core.errors import BadInput, StoreError
from mega_core.keys import digest

SCHEMA_VERSION = 1
MAX_SUBJECT, MAX_TEMPLATE, MAX_TARGET, MAX_PROMPTS = 128, 512, 64, 32
MAX_REPORT_BYTES = 64 * 2**20

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

    def __post_init__(self) -> None:
        checked = {name: tables.check(frame, name) for name, frame in sorted(self.frames.items())}
        object.__setattr__(self, "frames", MappingProxyType(checked))
        object.__setattr__(self, "timing", MappingProxyType(dict(self.timing)))
        object.__setattr__(self, "environment", MappingProxyType(dict(self.environment)))

    def header(self) -> dict[str, Any]:
        """Everything but the frames, as plain JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "question": as_plain(self.question),
            "digest": self.digest,
            "model_digest": self.model_digest,
            "receipt": as_plain(self.receipt),
            "timing": dict(self.timing),
            "notes": list(self.notes),
            "environment": dict(self.environment),
        }

    def to_json(self) -> dict[str, Any]:
        """The whole report as plain JSON: the header, `frames` (name -> rows) and `generations`."""
        rows = {name: frame.to_dict(orient="records") for name, frame in self.frames.items()}
        return {**self.header(), "generations": rows.get("generations", []), "frames": rows}

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
        """Read what to_bytes wrote. Raises StoreError on damage, another schema, or a container too large."""
        try:
            with ZipFile(BytesIO(data)) as box:
                if sum(entry.file_size for entry in box.infolist()) > MAX_REPORT_BYTES:
                    raise StoreError("The stored report is larger than a report can be.", "Run the edit again.")
                header = json.loads(box.read("report.json"))
                if header["schema_version"] != SCHEMA_VERSION:
                    raise StoreError(f"The stored report has schema {header['schema_version']}.", "Run the edit again.")
                names = [entry.removesuffix(".parquet") for entry in box.namelist() if entry.endswith(".parquet")]
                frames = {name: tables.from_parquet(box.read(f"{name}.parquet"), name) for name in names}
            return cls(
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
            raise StoreError(
                f"The stored report can't be read ({type(error).__name__}).", "Run the edit again."
            ) from error


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
