"""What a view is: one way of looking inside the model, from recorded edit prompts to tidy frames. No torch until it
looks.

A question names views as text: "neurons", or with parameters "neurons?top=50&tail=0". read_view() understands it and
gives its one canonical form, so that the key of a question doesn't depend on how somebody wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mega_core.errors import BadInput
from mega_core.events import Reporter, stage
from mega_core.params import Knob, knobs_of, spelled_out
from mega_core.records import EditRequest, Scalar
from mega_core.registry import Registry

if TYPE_CHECKING:
    import pandas as pd

    from mega_core.attribution.recording import Recording
    from mega_core.models.adapter import ModelAdapter

Frames = Mapping[str, "pd.DataFrame"]
# (recording, params, state, report) -> frame name -> frame, every row labelled with `state`.
Look = Callable[["Recording", Any, str, Reporter], Frames]


@dataclass(frozen=True, slots=True)
class NoParams:
    """Of a view without parameters."""


@dataclass(frozen=True)
class View:
    """A way of looking, run once on the unedited and once on the edited model."""

    name: str
    title: str
    summary: str
    """One plain sentence: what it measures."""
    frames: tuple[str, ...]
    """The frames it fills (see frames.py)."""
    function: str
    """"package.module:function" of type Look, imported at first use: attribution needs torch, forms don't."""
    reads: tuple[str, ...] = ()
    """Parts of hooks.PARTS that it reads, at every layer and position; the stream at the last token is always there."""
    params: type = NoParams
    """A frozen dataclass; its fields are made with params.knob()."""
    version: int = 1
    """Part of the key of what is kept of it; raise it whenever the numbers change."""

    def knobs(self) -> tuple[Knob, ...]:
        """The parameters in the order of the dataclass."""
        return knobs_of(self.params)

    def look(self, recording: Recording, params: Any, state: str, report: Reporter) -> Frames:
        """Run it on one recording."""
        module, _, name = self.function.partition(":")
        function: Look = getattr(import_module(module), name)
        return function(recording, params, state, report)


VIEWS: Registry[View] = Registry("view")


@dataclass(frozen=True, slots=True)
class Asked:
    """A view with its parameters."""

    view: View
    params: tuple[tuple[str, Scalar], ...]
    """Every one spelled out."""

    @property
    def text(self) -> str:
        """The canonical form: what differs from the defaults, sorted by name."""
        defaults = {knob.name: knob.default for knob in self.view.knobs()}
        told = sorted((name, value) for name, value in self.params if value != defaults[name])
        return "?".join(
            [self.view.name, *(["&".join(f"{name}={_said(value)}" for name, value in told)] if told else [])]
        )


def read_view(text: str) -> Asked:
    """The view of "name" or "name?key=value&key=value".

    Raises UnknownName with the closest name, or BadInput on a parameter it hasn't or a value it can't take.
    """
    name, _, rest = text.strip().partition("?")
    view = VIEWS[name]
    given: dict[str, object] = {}
    for pair in rest.split("&") if rest else ():
        key, equals, value = pair.partition("=")
        if not equals or key in given:
            raise BadInput(f"view {name}", f"{pair[:40]!r} is not name=value.", f"For example: {name}?top=20.")
        given[key] = value
    return Asked(view, spelled_out(name, view.params, given))


def look_at(
    lm: ModelAdapter, asked: Sequence[Asked], requests: Sequence[EditRequest], state: str, report: Reporter
) -> dict[str, dict[str, pd.DataFrame]]:
    """Canonical text of each view -> its frames. The prompts run once for all of them, in groups.

    Raises ActionableError when the model's numbers are not finite.
    """
    import pandas as pd
    import torch

    from mega_core.attribution.recording import groups, record
    from mega_core.errors import ActionableError

    reads = tuple(dict.fromkeys(part for one in asked for part in one.view.reads))
    together = list(groups(lm, requests, reads)) if asked else []
    found: dict[str, list[Frames]] = {one.text: [] for one in asked}
    with stage(report, "views", total=len(together) * len(asked)) as step, torch.no_grad():
        for cases in together:
            recording = record(lm, [requests[case] for case in cases], reads, cases)
            if not torch.isfinite(recording.states).all():
                raise ActionableError(
                    f"{lm.name} ({state} the edit) gives numbers that are not finite.",
                    "Use a weaker edit, or load the model as float32.",
                )
            for one in asked:
                found[one.text].append(one.view.look(recording, one.view.params(**dict(one.params)), state, report))
                step()
    return {
        text: {name: pd.concat([part[name] for part in parts], ignore_index=True) for name in parts[0]}
        for text, parts in found.items()
    }


def _said(value: Scalar) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
