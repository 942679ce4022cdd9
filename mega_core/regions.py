"""Region files: the layers that a contrast of edits pointed at, small enough to pass on, checked when they are read.

A file is JSON, written whole or not at all. It names the model it was measured on by name and by its weights' digest,
so that it can't be used on another one. Methods take layers as text; `text` gives it, with a remark in brackets that
says who measured them: a question then holds layers, never a file's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mega_core.errors import BadInput, StoreError
from mega_core.folders import write_file

SCHEMA_VERSION = 1
MAX_BYTES = 2**20
SUFFIX = ".json"
PLACES: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("mega", "region"): "layers",
        ("ace", "value_layers"): "value_layers",
        ("ace", "query_layers"): "query_layers",
    }
)
"""(method, parameter) that takes a region file -> the field of the region it is given."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")


@dataclass(frozen=True, slots=True)
class Lever:
    """One layer's leverage: the editors' mean, in standard deviations from the lowest layer."""

    layer: int
    leverage: float
    low: float
    high: float
    """Of 95 % of the draws of edits."""
    smoothed: float
    chosen: float
    """Share of the draws whose region has this layer."""


@dataclass(frozen=True, slots=True)
class Count:
    """What came of one editor's edits."""

    success: int
    failure: int
    left_out: int
    failures: str
    """Where failures come from: natural, "induced: ...", or too few."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One part of the published pattern, tested on one editor."""

    text: str
    holds: str
    """"yes", "no", or "unclear" where the interval has zero inside."""
    value: float
    """In nats; above zero speaks for it."""
    low: float
    high: float


@dataclass(frozen=True)
class Region:
    """What a region file says."""

    model: str
    weights: str
    """The digest of the model's files."""
    n_layers: int
    methods: tuple[str, ...]
    edits: int
    seed: int
    basis: str
    """The statistic that leverage was read from: D, K or C."""
    counts: Mapping[str, Count]
    """Editor -> what came of its edits."""
    layers: tuple[int, ...]
    value_layers: tuple[int, ...]
    query_layers: tuple[int, ...]
    leverage: tuple[Lever, ...]
    rules: Mapping[str, Any] = field(default_factory=dict)
    """How layers were chosen, by name."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of what made the numbers."""

    def __post_init__(self) -> None:
        for name in ("counts", "rules", "versions"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        if not _NAME.fullmatch(self.model):
            raise ValueError("the model has no name")
        if not re.fullmatch(r"[0-9a-f]{8,64}", self.weights):
            raise ValueError("the weights have no digest")
        if not self.methods or not all(_NAME.fullmatch(name) for name in self.methods):
            raise ValueError("the methods have no names")
        for name in ("layers", "value_layers", "query_layers"):
            listed = getattr(self, name)
            if not listed or list(listed) != sorted(set(listed)) or not 0 <= listed[0] <= listed[-1] < self.n_layers:
                raise ValueError(f"{name} are not layers of this model")

    @property
    def remark(self) -> str:
        """Who measured it, in a few words."""
        return f"measured: {', '.join(self.methods)}"

    def text(self, part: str = "layers") -> str:
        """One of its lists of layers as a method takes it: "4-6 (measured: rome, memit)"."""
        return f"{layers_text(getattr(self, part))} ({self.remark})"

    def check(self, model: str, weights: str, where: str = "region") -> Region:
        """Itself. Raises BadInput when it was measured on another model, naming both."""
        if self.model != model:
            raise BadInput(
                where,
                f"was measured on {self.model}, not on {model}.",
                f"Measure it there: python -m mega_core contrast --model {model}.",
            )
        if self.weights != weights:
            raise BadInput(
                where,
                f"was measured on other weights of {model} ({self.weights[:12]}, here {weights[:12]}).",
                f"Measure it again: python -m mega_core contrast --model {model}.",
            )
        return self

    def as_plain(self) -> dict[str, Any]:
        """The file's JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "region",
            "model": {"name": self.model, "weights": self.weights},
            "n_layers": self.n_layers,
            "methods": list(self.methods),
            "edits": self.edits,
            "seed": self.seed,
            "basis": self.basis,
            "counts": {name: _plain(count) for name, count in self.counts.items()},
            "layers": list(self.layers),
            "value_layers": list(self.value_layers),
            "query_layers": list(self.query_layers),
            "leverage": [_plain(lever) for lever in self.leverage],
            "rules": dict(self.rules),
            "versions": dict(self.versions),
        }

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises StoreError when the disk refuses."""
        data = json.dumps(self.as_plain(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, data.encode())
        except OSError as error:
            raise StoreError(
                f"{path} could not be written ({error.strerror or type(error).__name__}).", "Choose another place."
            ) from error

    @classmethod
    def load(cls, path: Path) -> Region:
        """Read what save() wrote. Raises BadInput naming the file and what is wrong with it."""
        try:
            with path.open("rb") as stream:
                data = stream.read(MAX_BYTES + 1)
        except OSError as error:
            raise BadInput(str(path), f"can't be read ({error.strerror}).", "Correct the name.") from error
        if len(data) > MAX_BYTES:
            raise BadInput(str(path), "is too large for a region file.", _AGAIN)
        try:
            plain = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadInput(str(path), "is not JSON.", _AGAIN) from error
        return cls.of_plain(plain, str(path))

    @classmethod
    def of_plain(cls, plain: object, where: str = "region") -> Region:
        """What as_plain() gave. Raises BadInput naming `where` and what is wrong."""
        if not isinstance(plain, dict) or plain.get("kind") != "region":
            raise BadInput(where, "is not a region file.", _AGAIN)
        if plain.get("schema_version") != SCHEMA_VERSION:
            version = str(plain.get("schema_version"))[:20]
            raise BadInput(where, f"has schema {version}; this reads {SCHEMA_VERSION}.", _AGAIN)
        try:
            return _read(plain)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)[:80]
            raise BadInput(where, f"is damaged ({why}).", _AGAIN) from error


_AGAIN = "Make one with: python -m mega_core contrast."


def layers_text(layers: Sequence[int]) -> str:
    """Layers as people write them: "4-6", "2,4-6"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def names_file(method: str, param: str, value: object) -> bool:
    """Whether this parameter's value is the name of a region file instead of layers."""
    return (method, param) in PLACES and isinstance(value, str) and value.strip().lower().endswith(SUFFIX)


def saved(folder: Path, model: str, weights: str) -> dict[str, Region]:
    """Name -> region of this model, of the files in a folder; others and damaged ones are passed over."""
    found = {}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            found[path.stem] = Region.load(path).check(model, weights)
        except BadInput:
            continue
    return found


def _read(plain: Mapping[str, Any]) -> Region:
    return Region(
        model=_text(plain["model"]["name"]),
        weights=_text(plain["model"]["weights"]),
        n_layers=_whole(plain["n_layers"]),
        methods=tuple(_text(name) for name in plain["methods"]),
        edits=_whole(plain["edits"]),
        seed=_whole(plain["seed"]),
        basis=_text(plain["basis"]),
        counts={
            name: Count(
                _whole(count["success"]), _whole(count["failure"]), _whole(count["left_out"]), _text(count["failures"])
            )
            for name, count in plain["counts"].items()
        },
        layers=tuple(_whole(layer) for layer in plain["layers"]),
        value_layers=tuple(_whole(layer) for layer in plain["value_layers"]),
        query_layers=tuple(_whole(layer) for layer in plain["query_layers"]),
        leverage=tuple(
            Lever(_whole(one["layer"]), *(float(one[f.name]) for f in fields(Lever)[1:])) for one in plain["leverage"]
        ),
        rules=plain["rules"],
        versions={_text(name): _text(version) for name, version in plain["versions"].items()},
    )


def _plain(record: Any) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in fields(record)}


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{str(value)[:20]!r} is not a whole number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:20]!r} is not text")
    return value
