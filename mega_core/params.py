"""Parameters of methods and views: fields of a frozen dataclass made with knob(), so that forms, help, the command line
and the key of a question all come from one place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from mega_core.errors import BadInput
from mega_core.records import Scalar


@dataclass(frozen=True, slots=True)
class Knob:
    """One parameter as forms and the command line see it."""

    name: str
    kind: type
    """int, float, bool or str."""
    default: Scalar
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False
    """True when None is a value too (it then means "the model's default")."""
    ours: bool = False
    """Whether the default is our choice, because the paper leaves it open or its value doesn't fit."""

    def parse(self, value: object, owner: str) -> Scalar:
        """The value as this knob's kind, from text or plain. Raises BadInput naming owner, parameter and range."""
        field = f"{owner}.{self.name}"
        unset = value is None or (isinstance(value, str) and value.strip().lower() in ("", "none", "auto"))
        if self.optional and unset:
            return None
        if value is None:
            raise BadInput(field, "needs a value.", self._allowed())
        parsed = self._read(value, field)
        if self.choices and parsed not in self.choices:
            raise BadInput(field, f"{parsed!r} is not one of its choices.", self._allowed())
        if isinstance(parsed, int | float) and not isinstance(parsed, bool):
            if isinstance(parsed, float) and not isfinite(parsed):
                raise BadInput(field, f"{parsed} is not a number it can work with.", self._allowed())
            if (self.low is not None and parsed < self.low) or (self.high is not None and parsed > self.high):
                raise BadInput(field, f"{parsed:g} is out of range.", self._allowed())
        return parsed

    def _read(self, value: object, field: str) -> Scalar:
        wrong = BadInput(field, f"{str(value)[:40]!r} is not {_ARTICLE[self.kind]}.", self._allowed())
        if self.kind is bool:
            if isinstance(value, bool):
                return value
            if isinstance(value, str) and value.lower() in ("true", "false", "1", "0", "yes", "no"):
                return value.lower() in ("true", "1", "yes")
            raise wrong
        if self.kind is str:
            if isinstance(value, str):
                return value
            raise wrong
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise wrong
        try:
            number = float(value)
        except ValueError:
            raise wrong from None
        if self.kind is float:
            return number
        if not isfinite(number) or number != int(number):
            raise wrong
        return int(number)

    def _allowed(self) -> str:
        if self.choices:
            return f"Choose one of: {', '.join(self.choices)}."
        if self.low is not None or self.high is not None:
            low = "-∞" if self.low is None else f"{self.low:g}"
            high = "∞" if self.high is None else f"{self.high:g}"
            return f"Allowed: {low} to {high}" + (", or none for the model's default." if self.optional else ".")
        return f"Give {_ARTICLE[self.kind]}."


_ARTICLE = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def knob(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] = (),
    ours: bool = False,
) -> Any:
    """A field of a params dataclass, with what a form needs to draw it; `ours` marks a default of our own."""
    return dataclasses.field(
        default=default, metadata={"help": help, "low": low, "high": high, "choices": tuple(choices), "ours": ours}
    )


def knobs_of(params: type) -> tuple[Knob, ...]:
    """The parameters in the order of the dataclass."""
    return _knobs_of(params)


@cache
def _knobs_of(params: type) -> tuple[Knob, ...]:
    """Kept: reading the hints of every method takes ten milliseconds, and each page of a form asks for them."""
    hints = get_type_hints(params)
    return tuple(_knob(f, hints[f.name]) for f in dataclasses.fields(params))


def spelled_out(owner: str, params: type, asked: Mapping[str, object]) -> tuple[tuple[str, Scalar], ...]:
    """Every parameter with its value: what was asked, else the default.

    Raises BadInput, naming `owner`, on an unknown parameter, a wrong kind, or a value out of range.
    """
    knobs = {k.name: k for k in knobs_of(params)}
    unknown = [name for name in asked if name not in knobs]
    if unknown:
        known = f"Known: {', '.join(knobs)}." if knobs else "It has none."
        raise BadInput(f"{owner}.{unknown[0][:40]}", "there is no such parameter.", known)
    return tuple((k.name, k.parse(asked.get(k.name, k.default), owner)) for k in knobs.values())


def _knob(field: dataclasses.Field[Any], hint: Any) -> Knob:
    options = [option for option in get_args(hint) if option is not type(None)]
    optional = len(options) < len(get_args(hint)) and get_origin(hint) is not Literal
    kind = options[0] if optional else hint
    meta = field.metadata
    default = cast(Scalar, field.default)
    return Knob(
        field.name, kind, default, meta["help"], meta["low"], meta["high"], meta["choices"], optional, meta["ours"]
    )
