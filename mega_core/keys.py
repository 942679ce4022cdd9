"""One key per question: canonical JSON of plain values, and its sha256.

The same key never means two things, so whatever cannot be written exactly is refused instead of being turned into text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from hashlib import sha256
from math import isfinite
from typing import Any


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        if not isfinite(value):
            raise TypeError(f"A key cannot hold {value!r}.")
        return {"float": value.hex()}
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__, "fields": {f.name: _plain(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("A key can hold mappings with text keys only.")
        return {"map": {key: _plain(item) for key, item in value.items()}}
    raise TypeError(f"A key cannot hold a {type(value).__name__}: write it as text, numbers, tuples or a dataclass.")


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, dataclasses by type name, floats as hex (exact). Raises TypeError otherwise."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON, 64 hex characters."""
    return sha256(canonical(value).encode()).hexdigest()
