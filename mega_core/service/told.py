"""What the service says of itself, its models, methods and views: plain values for pages and the command line."""

from __future__ import annotations

from dataclasses import dataclass

from mega_core.methods.base import Knob
from mega_core.notebook import NotebookHealth
from mega_core.store import StoreHealth

PROMISES = (
    "The base model is bit-identical after every run; each report shows the digests that prove it.",
    "Nobody sees another session's unfinished work.",
    "A result is stored whole or not at all.",
    "No code from models, stored results or links is executed.",
    "The pages make no request to another host; the text you type stays on this machine.",
    "The same question, seed and device give the same numbers.",
)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One model of the catalogue as forms show it."""

    name: str
    title: str
    embedded: bool
    available: bool
    reason: str
    """Why it isn't available; empty when it is."""
    how: str
    """What to do to make it available; empty when it is."""
    parameters: int
    """0 when unknown."""
    memory_gb: float
    licence: str
    dtype: str
    device: str
    architecture: str


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """One method as the picker shows it for a model."""

    name: str
    title: str
    summary: str
    family: str
    paper: str
    unsupported: str | None
    """Why it can't edit this model, or None."""
    knobs: tuple[Knob, ...]
    """Its parameters, each with this model's default."""
    seconds_estimate: float | None
    """Mean of earlier runs here, else as measured on the embedded models or scaled from that, else None."""


@dataclass(frozen=True, slots=True)
class ViewInfo:
    """One way of looking inside, as forms show it."""

    name: str
    title: str
    summary: str
    frames: tuple[str, ...]
    knobs: tuple[Knob, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says after a prompt, unedited."""

    model: str
    prompt: str
    continuation: str
    tokens: tuple[tuple[str, float], ...]
    """The most likely next tokens with their probabilities, best first."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A model as it is now, to hold against an earlier reading."""

    digest: str
    """Of the live parameters."""
    hooks: int


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU's memory, all programs together."""

    name: str
    used: int
    total: int


@dataclass(frozen=True, slots=True)
class Status:
    """How the app is doing."""

    version: str
    device: str
    torch_ready: bool
    models_loaded: tuple[str, ...]
    running: int
    """Questions being worked on."""
    waiting: int
    max_waiting: int
    store: StoreHealth
    notebook: NotebookHealth
    notices: tuple[str, ...]
    """What works only in part, one sentence each; empty when all is well."""
    promises: tuple[str, ...] = PROMISES
    per_session: int = 0
    """Questions that one browser session may have waiting or running."""
    job_seconds: float = 0.0
    """A question is stopped after this long."""
    memory_bytes: int = 0
    """That this process holds; 0 when not known."""
    gpus: tuple[Gpu, ...] = ()
    """Those in use."""
    store_limit: int = 0
    """Bytes that the store may hold."""
