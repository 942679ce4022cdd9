"""What a method is: a name, its parameters as a frozen dataclass, and a function (model, requests, params) -> Change.

This module and the top level of every method file stay free of torch, so that forms and help can be
drawn before torch is imported; a method's `prepare` imports the shared maths when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from mega_core.events import Reporter
from mega_core.params import Knob, knob, knobs_of, spelled_out
from mega_core.records import EditRequest, MethodRef
from mega_core.registry import Registry

if TYPE_CHECKING:
    from mega_core.changes import Change
    from mega_core.models.adapter import ModelAdapter
    from mega_core.models.arch import ArchSpec

__all__ = ["METHODS", "Knob", "Method", "knob"]

P = TypeVar("P")


@dataclass(frozen=True)
class Method(Generic[P]):
    """A knowledge-editing or steering method."""

    name: str
    title: str
    summary: str
    """One plain sentence for the picker."""
    family: Literal["weights", "steering", "memory", "prompt"]
    paper: str
    params: type[P]
    """A frozen dataclass; its fields are made with knob()."""
    prepare: Callable[[ModelAdapter, Sequence[EditRequest], P, int, Reporter], Change]
    """(lm, requests, params, seed, report) -> Change. Leaves the model as it found it."""
    needs: Callable[[ArchSpec], str | None]
    """A reason why this architecture can't be edited so, or None."""
    version: int = 1
    """Part of the key; raise it whenever the numbers change."""

    def knobs(self) -> tuple[Knob, ...]:
        """The parameters in the order of the dataclass."""
        return knobs_of(self.params)

    def ref(self, given: Mapping[str, object] | None = None, defaults: Mapping[str, object] | None = None) -> MethodRef:
        """Every parameter spelled out: what was given, else the model's default, else the method's.

        Raises BadInput on an unknown parameter, a wrong kind, or a value out of range.
        """
        return MethodRef(
            self.name, self.version, spelled_out(self.name, self.params, {**(defaults or {}), **(given or {})})
        )

    def read(self, ref: MethodRef) -> P:
        """The params dataclass a MethodRef stands for. Raises BadInput as ref() does."""
        return self.params(**dict(self.ref(dict(ref.params)).params))


METHODS: Registry[Method[Any]] = Registry("method")
