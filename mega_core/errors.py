"""Errors a person can act on: each names the thing, what is wrong with it, and the next step."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ActionableError(Exception):
    """Base of every error that is shown to a person as it stands."""

    code = "error"

    def __init__(self, what: str, next_step: str = "") -> None:
        super().__init__(f"{what} {next_step}".strip())
        self.what = what
        self.next_step = next_step


class BadInput(ActionableError):
    """Something a person typed, uploaded or passed cannot be used. `field` names it."""

    code = "bad_input"

    def __init__(self, field: str, what: str, next_step: str = "") -> None:
        super().__init__(f"{field}: {what}", next_step)
        self.field = field


class UnknownName(ActionableError):
    """A model, method or view that isn't there."""

    code = "unknown_name"

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        close = get_close_matches(name, names, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        super().__init__(f"There is no {kind} named {name[:80]!r}.", f"{hint}Known: {', '.join(names) or 'none'}.")
        self.kind = kind
        self.name = name


class ModelUnavailable(ActionableError):
    """The model is in the catalogue, but its files are not on this machine."""

    code = "model_unavailable"


class UnsupportedModel(ActionableError):
    """The model's architecture, or a part of it, is not one we know how to open."""

    code = "unsupported_model"


class UnsupportedMethod(ActionableError):
    """This method can't work on this model."""

    code = "unsupported_method"


class Busy(ActionableError):
    """The queue is full, or this person already has work in it."""

    code = "busy"


class TimedOut(ActionableError):
    """The work took longer than the operator allows."""

    code = "timed_out"


class OutOfMemory(ActionableError):
    """The machine ran out of memory; the model was restored."""

    code = "out_of_memory"


class DirtyModel(ActionableError):
    """A model came back changed and was dropped; the next job loads it afresh."""

    code = "dirty_model"


class StoreError(ActionableError):
    """A stored thing could not be read or written."""

    code = "store"


class FrameError(ActionableError):
    """A table breaks its contract: a defect of ours, never of the person's."""

    code = "frame"
