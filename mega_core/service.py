"""What pages and the command line may call. Plain frozen values in and out; torch enters in worker threads only.

A question's way through here:
1. `plan` checks everything a person typed and spells every parameter out: an Inspection, or an error they can act on.
2. `digest` is its key. `cached` answers from the store or the shipped examples without a model.
3. `submit` queues it. A worker thread leases the model and runs the pipeline; only once the model is back and found
   clean does the report enter the store and the notebook.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import re
import struct
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from math import prod
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

import mega_core.methods  # noqa: F401 - fills METHODS
from mega_core import __version__, contrast_study, folders
from mega_core import benchmark as bench
from mega_core.attribution import VIEWS, read_view
from mega_core.datasets import Dataset
from mega_core.datasets import load as load_dataset
from mega_core.embedded import examples as shipped
from mega_core.embedded import facts as known
from mega_core.embedded import measured
from mega_core.embedded.examples import Example
from mega_core.embedded.measured import Measured
from mega_core.errors import (
    ActionableError,
    BadInput,
    Busy,
    ModelUnavailable,
    OutOfMemory,
    StoreError,
    UnsupportedMethod,
    UnsupportedModel,
)
from mega_core.events import Event, Reporter, silent, stage
from mega_core.jobs import CANCELLED, Jobs, JobView, Limits
from mega_core.keys import digest as digest_of
from mega_core.methods.base import METHODS, Knob, Method
from mega_core.models.arch import ArchSpec, spec_of
from mega_core.notebook import Entry, Note, Notebook, NotebookHealth, Run, Verdict
from mega_core.records import (
    MAX_TEMPLATE,
    EditRequest,
    Inspection,
    MethodRef,
    ModelRef,
    Receipt,
    Report,
    Scalar,
    clean_text,
)
from mega_core.regions import saved as saved_regions
from mega_core.settings import ModelEntry, Settings, weights_digest
from mega_core.store import Store, StoreHealth
from mega_core.summary import outcome

if TYPE_CHECKING:
    from mega_core.attribution.contrast import Rules
    from mega_core.benchmark.work import Worker
    from mega_core.contrast_study import Study
    from mega_core.executors import Executor
    from mega_core.mask_study import Evaluation
    from mega_core.masking.detect import Detection
    from mega_core.masking.masks import Mask
    from mega_core.models.adapter import ModelAdapter
    from mega_core.models.pool import ModelPool
    from mega_core.regions import Region
    from mega_core.stack import EditStack
    from mega_core.verify_study import Verification

log = logging.getLogger(__name__)

TOP_TOKENS = 10
ANSWER_TOKENS = 24
KEPT_ANSWERS = 256
KEPT_TIMINGS = 20
BENCHMARKS = "benchmarks"
"""Owner of what runs in the background for everybody."""
LET_PASS = 0.6
"""Seconds between two units of a benchmark while others ask: longer than a waiting job takes to notice."""
MAX_TOGETHER = 128
"""Facts edited together in one question: each is asked before and after, with all its prompts."""

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
    """Mean of earlier runs here, else scaled from the shipped examples, else None."""


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


@dataclass(frozen=True, slots=True)
class StackedEdit:
    """One edit of a saved stack, as lists show it."""

    name: str
    kind: str
    """Of its change: weights, steering, prefix ..."""
    method: MethodRef
    requests: tuple[EditRequest, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Held:
    """Whether one fact of a stack is there with all the others applied."""

    edit: str
    request: EditRequest
    prob: float
    """Of the whole new object after the edit prompt."""
    says_new: bool
    """Whether the greedy continuation is the whole new object."""


@dataclass(frozen=True, slots=True)
class StackCheck:
    """What a saved stack does."""

    held: tuple[Held, ...]
    raised: tuple[str, ...]
    """The signs of damage that passed their limits, one sentence each."""
    signs: tuple[str, ...]
    """All of them."""
    receipt: Receipt


class Pool(Protocol):
    """The part of ModelPool this file uses."""

    def lease(self, ref: ModelRef, report: Reporter = silent, timeout_s: float | None = None) -> Any:
        """A context manager that yields the model."""
        ...

    def loaded(self) -> tuple[tuple[ModelRef, bool], ...]:
        """Models in memory and whether each is in use."""
        ...

    def close(self) -> None:
        """Drop the models."""
        ...


@dataclass(frozen=True, slots=True)
class _Edit:
    """A question on its way to a worker."""

    plan: Inspection
    digest: str
    fresh: bool


@dataclass(frozen=True, slots=True)
class Sweep:
    """A benchmark that was started in the background."""

    name: str
    folder: Path
    plan: bench.Plan
    done: int
    """Measurements there are, of `total`."""
    total: int
    state: str
    """queued | running | done | stopped | failed."""
    started: str
    """When, ISO 8601."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class _Sweep:
    """A benchmark on its way to a worker."""

    setup: bench.Setup
    folder: Path


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt on its way to a worker."""

    entry: ModelEntry
    text: str
    key: str


class Service:
    """One per process; every method may be called from any thread."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        notebook: Notebook,
        make_pool: Callable[[Settings], Pool] | None = None,
    ) -> None:
        self.settings = settings
        self._store = store
        self._notebook = notebook
        limits = Limits(
            queued=settings.max_queue,
            per_owner_queued=max(0, settings.max_queue_per_session - 1),
            timeout_seconds=settings.job_seconds,
        )
        self._jobs: Jobs[_Edit | _Prompt | _Sweep, Report | Answer | Path] = Jobs(self._work, limits)
        self._sweeps: dict[str, str] = {}
        self._make_pool = make_pool or _model_pool
        self._pool_now: Pool | None = None
        self._pool_lock = threading.Lock()
        self._lock = threading.Lock()
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        self._askers: dict[str, set[str]] = {}
        self._timings: dict[tuple[str, str], deque[float]] = {}
        self._warming: set[str] = set()
        self._sizes: dict[str, int] = {}
        self._notices: OrderedDict[str, str] = OrderedDict()

    @classmethod
    def open(cls, settings: Settings | None = None, *, make_pool: Callable[[Settings], Pool] | None = None) -> Service:
        """Store, notebook and queue of these settings (read from the environment by default). Loads no model."""
        settings = settings or Settings.read()
        store = Store.open(settings.cache_dir / "results", int(settings.store_gb * 2**30))
        notebook = Notebook.open(settings.database_url or settings.cache_dir / "notebook.sqlite3")
        return cls(settings, store, notebook, make_pool)

    def close(self) -> None:
        """Stop the worker, drop the models, close the files."""
        self._jobs.close()
        with self._pool_lock:
            if self._pool_now is not None:
                self._pool_now.close()
                self._pool_now = None
        self._notebook.close()
        self._store.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What there is ---------------------------------------------------------------------------------------------------

    def models(self) -> tuple[ModelInfo, ...]:
        """The whole catalogue, those on this machine first."""
        infos = [self._info(entry) for entry in self.settings.models.values()]
        return tuple(sorted(infos, key=lambda info: not info.available))

    def model(self, name: str) -> ModelInfo:
        """One model of the catalogue. Raises UnknownName with the closest known one."""
        return self._info(self.settings.model(name))

    def methods(self, model: str) -> tuple[MethodInfo, ...]:
        """Every method, with this model's defaults and whether it can edit this model."""
        entry = self.settings.model(model)
        return tuple(
            MethodInfo(
                name=method.name,
                title=method.title,
                summary=method.summary,
                family=method.family,
                paper=method.paper,
                unsupported=self._unsupported(method, entry),
                knobs=self._knobs(method, entry),
                seconds_estimate=self.seconds_estimate(entry.name, method.name),
            )
            for method in METHODS
        )

    def views(self) -> tuple[ViewInfo, ...]:
        """Every way of looking inside, in the order of the registry."""
        return tuple(ViewInfo(view.name, view.title, view.summary, view.frames, view.knobs()) for view in VIEWS)

    def seconds_estimate(self, model: str, method: str) -> float | None:
        """What such an edit takes: the mean of earlier runs here, else the shipped examples scaled by parameters."""
        with self._lock:
            seen = self._timings.get((model, method))
            if seen:
                return fmean(seen)
        examples = [example for example in self.examples() if example.method == method]
        same = [example.seconds for example in examples if example.model == model]
        if same:
            return fmean(same)
        target = self._parameters(self.settings.model(model))
        scaled = [
            example.seconds * max(1.0, target / size)
            for example in examples
            if target and example.model in self.settings.models
            and (size := self._parameters(self.settings.model(example.model)))
        ]  # fmt: skip
        return fmean(scaled) if scaled else None

    def facts(self, model: str) -> tuple[dict[str, Any], ...]:
        """The facts an embedded model was trained on; none for other models."""
        if not self.settings.model(model).embedded:
            return ()
        return tuple(known.as_json())

    def examples(self) -> tuple[Example, ...]:
        """The shipped example cards; none when their files can't be read."""
        try:
            return shipped.load()
        except StoreError as error:
            self._notice("examples", str(error))
            return ()

    def suggest(self, model: str, seed: int) -> EditRequest:
        """One random counterfactual edit of a well-known fact; the same seed gives the same edit."""
        self.settings.model(model)
        return next(shipped.candidates(seed, min_neighbours=4))

    # Asking ----------------------------------------------------------------------------------------------------------

    def plan(
        self,
        model: str,
        method: str,
        subject: str,
        template: str,
        target_new: str,
        target_true: str = "",
        paraphrases: Sequence[str] = (),
        neighbours: Sequence[str] = (),
        params: Mapping[str, object] | None = None,
        views: Sequence[str] = ("module_scores",),
        seed: int = 0,
    ) -> Inspection:
        """The complete question. Raises an ActionableError on anything that can't work.

        On an embedded model, a known fact brings its original object, withheld paraphrases and neighbours when none are
        given; they are used for evaluation only.
        """
        entry, chosen = self._asked(model, method, views, seed)
        request = EditRequest(subject, template, target_new, target_true or None, tuple(paraphrases), tuple(neighbours))
        return self._planned(entry, chosen, (request,), params, views, seed)

    def plan_several(
        self,
        model: str,
        method: str,
        requests: Sequence[EditRequest],
        params: Mapping[str, object] | None = None,
        views: Sequence[str] = ("module_scores",),
        seed: int = 0,
    ) -> Inspection:
        """As plan(), for facts that are edited together. Raises BadInput on none, too many, or one prompt twice."""
        entry, chosen = self._asked(model, method, views, seed)
        if len(requests) > MAX_TOGETHER:
            raise BadInput("requests", f"{len(requests):,} edits, the limit is {MAX_TOGETHER}.", "Leave some out.")
        seen: set[str] = set()
        for number, request in enumerate(requests, start=1):
            if request.prompt in seen:
                raise BadInput(
                    "requests", f"number {number} edits {request.prompt[:80]!r} a second time.", "Keep one of the two."
                )
            seen.add(request.prompt)
        return self._planned(entry, chosen, tuple(requests), params, views, seed)

    def digest(self, plan: Inspection) -> str:
        """The key of a question: the run id. Raises ModelUnavailable when the model isn't here."""
        entry = self.settings.model(plan.model.name)
        return plan.key(weights_digest(self.settings.locate(entry), self.settings.cache_dir))

    def cached(self, digest: str) -> Report | None:
        """The report of this run id, from the store or the shipped examples. Never computes; safe with any text."""
        return self._store.get_report(digest) or shipped.find(digest)

    def report(self, digest: str) -> Report:
        """As cached(). Raises BadInput telling what to do when there is none."""
        found = self.cached(digest)
        if found is None:
            raise BadInput(
                "run",
                f"there is no stored result {str(digest)[:12]!r} here.",
                "Run the edit again, or open it where it was made.",
            )
        return found

    def submit(self, plan: Inspection, owner: str, *, fresh: bool = False) -> str:
        """Queue a question; its job id. Raises Busy when the queue is full, or this owner has enough in it.

        The same question asked by several people at a time is computed once; a stored answer is taken unless `fresh`.
        """
        digest = self.digest(plan)
        with self._lock:
            self._askers.setdefault(digest, set()).add(owner)
        try:
            return self._jobs.submit(
                _Edit(plan, digest, fresh),
                owner=owner,
                digest=digest,
                model=plan.model.name,
                method=plan.method.name,
            )
        except Busy:
            self._forget_asker(digest, owner)
            raise

    def ask(self, model: str, prompt: str, owner: str) -> str:
        """Queue a prompt for the unedited model; its job id, for job() and answer()."""
        entry = self.settings.model(model)
        text = clean_text("prompt", prompt, MAX_TEMPLATE)
        key = digest_of({"ask": text, "model": entry.ref(), "weights": self._weights(entry)})
        return self._jobs.submit(_Prompt(entry, text, key), owner=owner, digest=key, model=entry.name, method="ask")

    def answer(self, job_id: str, owner: str | None = None) -> Answer:
        """What ask() found. Raises Busy while the job runs and ActionableError when it failed."""
        found = self._jobs.result(job_id, owner)
        if not isinstance(found, Answer):
            raise BadInput("job", "is an edit, not a prompt.", "Open its report by its run id.")
        return found

    def job(self, job_id: str, owner: str) -> JobView:
        """How a job of this owner stands. Raises UnknownName for anybody else's, or one that is forgotten."""
        return self._jobs.snapshot(job_id, owner)

    def jobs(self, owner: str) -> list[JobView]:
        """The jobs of an owner that are remembered, oldest first."""
        return self._jobs.of_owner(owner)

    def wait(self, job_id: str, timeout: float | None = None) -> JobView:
        """Block until a job is over or the time is up: for scripts, not for pages."""
        return self._jobs.wait(job_id, timeout)

    def cancel(self, job_id: str, owner: str) -> JobView:
        """Stop a job of this owner, waiting or running; others who wait for the same answer still get it."""
        view = self._jobs.cancel(job_id, owner)
        if view.state == CANCELLED:
            self._forget_asker(view.digest, owner)
        return view

    def run(self, plan: Inspection, report: Reporter = silent, *, fresh: bool = False) -> Report:
        """Answer a question here and now: from the store, else computed and stored. `fresh` always computes."""
        digest = self.digest(plan)
        return self._answer(plan, digest, report, fresh=fresh)

    def warm_up(self, model: str) -> None:
        """Import torch and load a model in the background; returns at once."""
        entry = self.settings.model(model)
        with self._lock:
            if entry.name in self._warming:
                return
            self._warming.add(entry.name)
        threading.Thread(target=self._warm, args=(entry,), name=f"warm-up-{entry.name}", daemon=True).start()

    # The notebook ----------------------------------------------------------------------------------------------------

    def runs(self, **filters: Any) -> list[Entry]:
        """Runs that match, newest first; the filters are those of Notebook.runs (text, model, tag, verdict, ...)."""
        return self._notebook.runs(**filters)

    def count_runs(self, **filters: Any) -> int:
        """How many runs the same filters give."""
        return self._notebook.count(**filters)

    def entry(self, digest: str) -> Entry | None:
        """One run with its notes, tags and verdicts, or None."""
        return self._notebook.get(digest)

    def run_choices(self) -> dict[str, tuple[str, ...]]:
        """Models, methods and tags that occur in the history."""
        return self._notebook.choices()

    def note(self, digest: str, text: str, author: str = "") -> Note | None:
        """Write an author's note on a run; an empty text removes it."""
        return self._notebook.set_note(digest, text, author)

    def tags(self, digest: str, tags: Sequence[str]) -> tuple[str, ...]:
        """Replace the tags of a run."""
        return self._notebook.set_tags(digest, tags)

    def verdict(
        self, digest: str, verdict: str, failure: str = "", severity: int = 0, author: str = ""
    ) -> Verdict | None:
        """Write an author's verdict on a run; an empty verdict removes it."""
        return self._notebook.set_verdict(digest, verdict, failure, severity, author)

    def delete_run(self, digest: str, owner: str | None = None) -> bool:
        """Take a run out of an owner's history, or out of everybody's. The stored report stays until it is evicted."""
        return self._notebook.delete_run(digest, owner)

    def visited(self, report: Report, owner: str) -> None:
        """Record in the history that this owner has seen a report: computed, stored or shipped."""
        self._record(report, owner)

    # Operation -------------------------------------------------------------------------------------------------------

    def status(self) -> Status:
        """Everything the status page shows."""
        store = self._store.health()
        notebook = self._notebook.health()
        with self._lock:
            notices = list(self._notices.values())
        if store.notice:
            notices.append(store.notice)
        if notebook.notice:
            notices.append(notebook.notice)
        running, waiting = self._jobs.load()
        pool = self._pool_now
        return Status(
            version=__version__,
            device=self._device(),
            torch_ready=_torch() is not None,
            models_loaded=tuple(ref.name for ref, _ in pool.loaded()) if pool else (),
            running=running,
            waiting=waiting,
            max_waiting=self._jobs.limits.queued,
            store=store,
            notebook=notebook,
            notices=tuple(notices),
        )

    def unload(self) -> None:
        """Drop every model nobody is using, to free its memory; the next question loads it again."""
        if self._pool_now is not None:
            self._pool_now.close()

    def condition(self, model: str) -> Condition:
        """Read a model's parameters now, in the calling thread; waits until nobody holds it."""
        with self._pool().lease(self.settings.model(model).ref()) as lm:
            return Condition(lm.live_digest(), lm.hook_count())

    def clear_results(self) -> int:
        """Forget every stored report and statistic; how many there were. Notes and tags stay."""
        keys = self._store.keys()
        return sum(self._store.delete(key) for key in keys)

    def rebuild_examples(self, model: str, method: str, tries: int, seed: int) -> tuple[Example, ...]:
        """Search random facts for an edit that works, one that leaks and one that fails, and ship them.

        The failure uses the method's published settings instead of this model's: on small models they fail silently.
        Raises BadInput when an outcome never shows.
        """
        entry = self.settings.model(model)
        if not entry.embedded:
            raise BadInput("model", f"{model} does not ship with the project.", "Choose an embedded model.")

        def answer(request: EditRequest, params: Mapping[str, object] | None = None) -> Report:
            plan = self.plan(
                model, method, request.subject, request.template, request.target_new, request.target_true or "",
                request.paraphrases, request.neighbours, params, seed=seed,
            )  # fmt: skip
            return self.run(plan, fresh=True)

        try:
            requests = shipped.candidates(seed, min_neighbours=4)
            chosen = shipped.choose(requests, answer, tries=tries, outcomes=("works", "leaks"))
            own = entry.defaults.get(method, {})
            published = {knob.name: knob.default for knob in METHODS[method].knobs() if knob.name in own}
            same_place = {"layer": own["layer"]} if "layer" in own else {}
            as_published = {**published, **same_place}
            chosen |= shipped.choose(
                requests, lambda request: answer(request, as_published), tries=tries, outcomes=("fails",)
            )
        except LookupError as error:
            raise BadInput("tries", str(error), "Give more tries or another seed.") from error
        return shipped.write(chosen)

    # Stacks and exported models --------------------------------------------------------------------------------------

    def stack_add(self, folder: Path, plan: Inspection, report: Reporter = silent) -> str:
        """Add an edit to the stack saved in a folder, which is made when it isn't there; the edit's name."""
        with folders.alone(folder, "stack"):
            if not folder.exists():
                folders.check_new(folder, "stack")
            with self._held(plan.model, report) as lm:
                from mega_core.stack import EditStack

                there = folder.is_dir() and any(folder.iterdir())
                stack = EditStack.load(folder, lm) if there else EditStack.empty(lm)
                stack = stack.add(lm, plan.method, plan.requests, plan.seed, report)
                stack.save(folder)
            return stack.edits[-1].name

    def stack_edits(self, folder: Path) -> tuple[StackedEdit, ...]:
        """The edits of a saved stack, first added first. Raises BadInput when there is none, or it is damaged."""
        return _stacked(folder)[1]

    def stack_undo(self, folder: Path, name: str) -> tuple[StackedEdit, ...]:
        """Take one edit out of a saved stack; those that stay. Raises UnknownName with the closest name."""
        from mega_core.stack import EditStack, headline

        with folders.alone(folder, "stack"):
            EditStack.load(folder, str(headline(folder).get("model_digest"))).without(name).save(folder)
            return _stacked(folder)[1]

    def stack_check(self, folder: Path, report: Reporter = silent) -> StackCheck:
        """Apply a saved stack, ask for every fact in it, look for signs of damage, and undo it."""
        ref, edits = _stacked(folder)
        with self._held(ref, report) as lm:
            from mega_core.alarms import alarms, perplexity
            from mega_core.evaluation.looks import answers
            from mega_core.stack import EditStack

            stack = EditStack.load(folder, lm)
            digest = lm.live_digest()
            before = perplexity(lm)
            bare = [replace(request, paraphrases=(), neighbours=()) for request in stack.requests]
            with stack.applied(lm):
                after = perplexity(lm)
                said = answers(lm, bare, "after", report) if bare else None
            signs = alarms(lm, stack, stack.requests, before=before, after=after)
            receipt = Receipt(lm.live_digest() == digest and not lm.hook_count(), digest, lm.live_digest(),
                              lm.hook_count())  # fmt: skip
        asked = [(edit.name, request) for edit in edits for request in edit.requests]
        held = []
        if said is not None:
            new = said[said["candidate"] == "new"].set_index("case")
            held = [
                Held(name, request, float(new.loc[case, "prob"]), bool(new.loc[case, "is_greedy"]))
                for case, (name, request) in enumerate(asked)
            ]
        return StackCheck(
            tuple(held),
            tuple(sign.text for sign in signs if sign.raised),
            tuple(sign.text for sign in signs),
            receipt,
        )

    def export(self, plan: Inspection, folder: Path, report: Reporter = silent) -> Path:
        """Write the model with this edit in its weights to a new folder. UnsupportedMethod for other families."""
        folders.check_new(folder, "out")
        method = METHODS[plan.method.name]
        if method.family != "weights":  # told here, before the model is loaded
            from mega_core.export import check_family

            check_family(method.title, method.family)
        with self._held(plan.model, report) as lm:
            from mega_core.stack import EditStack

            stack = EditStack.empty(lm).add(lm, plan.method, plan.requests, plan.seed, report)
            return self._export(lm, stack, folder, report)

    def export_stack(self, stack: Path, folder: Path, report: Reporter = silent) -> Path:
        """Write the model with all edits of a saved stack in its weights to a new folder."""
        folders.check_new(folder, "out")
        ref, edits = _stacked(stack)
        from mega_core.export import check_family

        for edit in edits:
            if edit.method.name in METHODS:
                check_family(edit.name, METHODS[edit.method.name].family)
        with self._held(ref, report) as lm:
            from mega_core.stack import EditStack

            return self._export(lm, EditStack.load(stack, lm), folder, report)

    # Studies ---------------------------------------------------------------------------------------------------------

    def contrast(
        self,
        model: str,
        methods: Sequence[str],
        requests: Sequence[EditRequest],
        *,
        rules: Rules | None = None,
        label: str = "argmax",
        induced: int = contrast_study.INDUCED,
        seed: int = 0,
        report: Reporter = silent,
    ) -> Study:
        """Contrast edits that work with edits that fail, each run an ordinary question: what is stored is reused."""

        def answer(method: str, request: EditRequest, params: Mapping[str, object]) -> Report:
            entry, chosen = self._asked(model, method, contrast_study.VIEWS, 0)
            return self.run(self._planned(entry, chosen, (request,), params, contrast_study.VIEWS, 0))

        return contrast_study.study(
            answer, methods, requests, rules=rules, label=label, induced=induced, seed=seed, report=report
        )

    def weights(self, model: str) -> str:
        """The digest of a model's files. Raises ModelUnavailable when it isn't here."""
        return self._weights(self.settings.model(model))

    def regions(self, model: str) -> dict[str, Region]:
        """Name -> region of this model, of those that were kept; the one that ships goes by the model's name."""
        try:
            weights = self.weights(model)
        except ModelUnavailable:
            return {}
        shipped_one = self.measured(model)
        shipped_regions = {} if shipped_one is None else {model: shipped_one.region}
        return shipped_regions | saved_regions(self.settings.cache_dir / "regions", model, weights)

    def measured(self, model: str) -> Measured | None:
        """The contrast of edits that ships with an embedded model; None for others."""
        entry = self.settings.model(model)
        try:
            return measured.load(entry.name, self._weights(entry)) if entry.embedded else None
        except (ModelUnavailable, StoreError) as error:
            self._notice("measured", str(error))
            return None

    def ship_contrast(self, study: Mapping[str, Any]) -> Path:
        """Keep a study, as plain JSON, as the one that ships. Raises BadInput unless its model is embedded."""
        name = study["region"]["model"]["name"]
        if not self.settings.model(name).embedded:
            raise BadInput("model", f"{name} does not ship with the project.", "Use --out and --json instead.")
        return measured.write(study)

    def keep_region(self, name: str, region: Region) -> None:
        """Keep a region under a name, in the place of one of that name. Raises BadInput on a name that is none."""
        if not re.fullmatch(r"[\w-][\w.-]{0,63}", name):
            raise BadInput("name", f"{name[:40]!r} is no name for a region.", "Use letters, digits, '-', '_' or '.'.")
        region.save(self.settings.cache_dir / "regions" / f"{name}.json")

    def detect(
        self,
        folder: Path,
        reference: str | None = None,
        mask: Path | None = None,
        prompts: Sequence[str] = (),
        report: Reporter = silent,
    ) -> Detection:
        """Look for knowledge edits in a model's folder, against a catalogue model or another folder if one is named."""
        self._pool()  # sets up what the next line imports
        from mega_core.masking.detect import detect_folder

        with _memory_errors():
            return detect_folder(folder, self.settings, reference, mask, prompts, report)

    def verify(
        self,
        plan: Inspection,
        cells: Sequence[str],
        action: str = "ablate",
        state: str = "after",
        *,
        factor: float = 0.0,
        case: int = 0,
        controls: int = 10,
        seed: int = 0,
        report: Reporter = silent,
    ) -> Verification:
        """Change what each of `cells` names (several joined by "+" together) and see what the model says then.

        Actions: ablate, scale by `factor`, patch from the other state, restore an edited matrix. Raises BadInput on a
        cell, an action or a state that can't be.
        """
        with self._held(plan.model, report) as lm:
            from mega_core.verify_study import verify

            return verify(
                plan, lm, cells, action, state, factor=factor, case=case, draws=controls, seed=seed, report=report
            )

    def train_mask(
        self,
        model: str,
        method: str,
        n: int,
        out: Path,
        *,
        layer: int | None = None,
        together: bool = False,
        settings: str = "top",
        pruned: float = 0.10,
        epochs: int | None = None,
        params: Mapping[str, object] | None = None,
        seed: int = 0,
        report: Reporter = silent,
    ) -> Mask:
        """Edit `n` facts, train one mask that undoes the edits, and write it to the file `out`."""
        entry, chosen = self._asked(model, method, (), seed)
        with self._held(entry.ref(), report) as lm:
            from mega_core import mask_study

            plan = mask_study.Plan(chosen.name, n, seed=seed, together=together, given=tuple((params or {}).items()))
            training = mask_study.settings_of(settings, pruned, epochs)
            mask = mask_study.train_mask(lm, plan, entry.defaults.get(method, {}), layer, training, report)
            mask.save(out)
        return mask

    def evaluate_mask(self, mask: Path, n: int = 100, report: Reporter = silent) -> Evaluation:
        """Judge a mask file on edits that it has not seen, beside its controls."""
        self._pool()  # sets up what the next line imports
        from mega_core.masking.masks import Mask

        found = Mask.load(mask)
        entry = self.settings.model(found.model)
        with self._held(entry.ref(), report) as lm:
            from mega_core import mask_study

            return mask_study.evaluate_mask(lm, found, entry.defaults, n, report)

    # Benchmarks ------------------------------------------------------------------------------------------------------

    def benchmark_plan(
        self,
        model: str,
        methods: Sequence[str],
        dataset: str | Path | Dataset,
        *,
        format: str = "auto",
        limit: int | None = None,
        protocols: Sequence[str] = (),
        mode: str = "single",
        every: int = 0,
        seed: int = 0,
        params: Mapping[str, Mapping[str, object]] | None = None,
        control: bool = False,
        apart: bool = False,
    ) -> bench.Setup:
        """What a benchmark would measure, and what it leaves out; loads no model.

        `methods` ("all",): every one, and those that can't edit this model are noted. `control` adds each method's own
        controls. Raises UnknownName, BadInput, UnsupportedMethod for a method that was named, ModelUnavailable.
        """
        entry = self.settings.model(model)
        self._asked(model, next(iter(METHODS)).name, (), seed)  # refuses a seed that is none
        everyone = tuple(methods) == ("all",)
        entrants: list[bench.Entrant] = []
        unsupported: list[tuple[str, str]] = []
        for name in METHODS.names() if everyone else methods:
            method = METHODS[name]
            own = self._entrants(method, entry, (params or {}).get(name, {}), control)
            if reason := self._unsupported(method, entry):
                if not everyone:
                    raise UnsupportedMethod(
                        f"{method.title} can't edit {entry.name}: {reason}", "Choose another method or model."
                    )
                unsupported += [(one.label, reason) for one in own]
            else:
                entrants += own
        if not entrants:
            raise BadInput("methods", "names none that can edit this model.", "For example: rome,memit, or all.")
        if isinstance(dataset, Dataset):
            data = dataset
        else:
            builtin = str(dataset).split(":")[0] == "builtin"
            data = load_dataset(
                dataset, format, limit=_read(limit, apart) if builtin else None, hub_cache=self.settings.hub_cache
            )
        return bench.set_up(
            entry.ref(),
            self._weights(entry),
            entrants,
            data.name,
            data.source,
            data.cases,
            protocols=protocols,
            mode=mode,
            every=every,
            seed=seed,
            limit=limit,
            apart=apart,
            problems=[(one.line, one.record, one.text) for one in data.problems],
            unsupported=unsupported,
        )

    def benchmark(
        self,
        setup: bench.Setup,
        out: Path,
        *,
        executor: Executor | None = None,
        resume: bool = False,
        command: Sequence[str] = (),
        report: Reporter = silent,
    ) -> bench.Results:
        """Measure what is missing in the folder `out`, in this thread or where the executor does it; tables and page.

        Raises BadInput when the folder holds something else, or the same without `resume`; else as the work does, and
        then what is measured is written all the same.
        """
        from mega_core.executors import Local

        executor = executor or Local()

        @contextmanager
        def here(plan: str) -> Iterator[Worker]:
            with self._held(setup.plan.model, report) as lm:
                from mega_core.benchmark.work import Worker

                with Worker.on(lm, setup.plan) as worker:
                    yield worker

        opened = here if executor == Local() else _open_worker()
        return self._measure(setup, out, opened, executor, resume, command, report)

    def _measure(
        self, setup: bench.Setup, out: Path, opened: Any, executor: Executor, resume: bool,
        command: Sequence[str], report: Reporter,
    ) -> bench.Results:  # fmt: skip
        entry = self.settings.model(setup.plan.model.name)
        about = {
            "command": list(command),
            "small_model": entry.embedded,
            "executor": executor.name,
            "versions": _versions(),
        }
        return bench.run(
            setup, out, opened, executor=executor, resume=resume, about=about, report=report, write=_write_page
        )

    def start_benchmark(self, setup: bench.Setup) -> str:
        """Measure in the background, in the cache; its name, for benchmarks(). One that is there is gone on with.

        It has no time limit, outlasts the browser, and lets other questions have the model between two units of work.
        After a restart `resume_benchmark` goes on. Raises Busy while another one runs and one waits.
        """
        from mega_core.benchmark.run import keep_setup

        name = setup.plan.digest[:32]
        folder = self._benchmarks / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        keep_setup(setup, folder)
        job = self._jobs.submit(
            _Sweep(setup, folder),
            owner=BENCHMARKS,
            digest=f"benchmark:{name}",
            model=f"benchmark of {setup.plan.model.name}",  # a lane of its own: it leases the model unit by unit
            method="benchmark",
            timeout_seconds=math.inf,
        )
        with self._lock:
            self._sweeps[name] = job
        return name

    def resume_benchmark(self, name: str) -> str:
        """Go on with one that was stopped. Raises BadInput when there is none of this name, or it is damaged."""
        from mega_core.benchmark.run import kept_setup

        return self.start_benchmark(kept_setup(self._benchmark_folder(name)))

    def stop_benchmark(self, name: str) -> None:
        """Stop it soon; what is measured stays. Harmless on one that doesn't run."""
        with self._lock:
            job = self._sweeps.get(name)
        if job is not None:
            self._jobs.cancel(job, BENCHMARKS)

    def benchmarks(self) -> tuple[Sweep, ...]:
        """Those started here, the newest first: how far each is. Damaged ones are passed over."""
        from mega_core.benchmark.run import glance

        found = []
        for folder in self._benchmarks.iterdir() if self._benchmarks.is_dir() else ():
            try:
                seen = glance(folder)
            except BadInput:
                continue
            with self._lock:
                job = self._sweeps.get(folder.name)
            view = None
            try:
                view = None if job is None else self._jobs.snapshot(job, BENCHMARKS)
            except ActionableError:  # over and forgotten
                with self._lock:
                    self._sweeps.pop(folder.name, None)
            state = "done" if seen.done >= seen.total else "stopped"
            error = ""
            if view is not None and not view.over:
                state = view.state
            elif view is not None and view.error is not None:
                state, error = "failed", f"{view.error.what} {view.error.next_step}".strip()
            found.append(Sweep(folder.name, folder, seen.plan, seen.done, seen.total, state, seen.started, error))
        return tuple(sorted(found, key=lambda one: one.started, reverse=True))

    def benchmark_of(self, name: str) -> bench.Results:
        """What there is of one of benchmarks(). Raises BadInput when there is none of this name."""
        return bench.Results.load(self._benchmark_folder(name))

    @property
    def _benchmarks(self) -> Path:
        return self.settings.cache_dir / "benchmarks"

    def _benchmark_folder(self, name: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{32}", name):
            raise BadInput("benchmark", f"there is none named {name[:40]!r}.", "Choose one of the list.")
        return self._benchmarks / name

    def _sweep(self, sweep: _Sweep, report: Reporter) -> Path:
        """A benchmark in the background: the model is leased unit by unit."""
        from mega_core.benchmark.run import STAGE
        from mega_core.executors import Local

        plan = sweep.setup.plan

        @contextmanager
        def opened(_: str) -> Iterator[Callable[[str], Iterator[str]]]:
            running: list[Any] = []

            def work(unit: str) -> Iterator[str]:
                if self._jobs.load()[0] > 1:
                    time.sleep(LET_PASS)  # somebody else's turn
                with self._held(plan.model, silent) as lm:
                    from mega_core.benchmark.work import Worker

                    with Worker.on(lm, plan, tell) as worker:
                        yield from worker(unit)

            def watched(unit: str) -> Iterator[str]:
                running.append(work(unit))
                yield from running[-1]

            try:
                yield watched
            finally:
                for one in running:
                    one.close()

        last: list[Event] = []

        def tell(event: Event) -> None:
            if getattr(event, "stage", "") == STAGE:
                last[:] = [event]
            if last:
                report(last[0])  # also while a method is at work: that is where a stop is noticed

        there = (sweep.folder / bench.PLAN).is_file()
        self._measure(sweep.setup, sweep.folder, opened, Local(), there, (), tell)
        return sweep.folder

    def benchmark_results(self, folder: Path) -> bench.Results:
        """What a folder of results holds, finished or not. Raises BadInput when it is none."""
        return bench.Results.load(folder)

    # Inside ----------------------------------------------------------------------------------------------------------

    def _asked(self, model: str, method: str, views: Sequence[str], seed: int) -> tuple[ModelEntry, Method[Any]]:
        """The entries of these names. Raises UnknownName, or BadInput on a seed that is none."""
        entry, chosen = self.settings.model(model), METHODS[method]
        names = [read_view(text).view.name for text in views]
        if twice := [name for name in names if names.count(name) > 1]:
            raise BadInput("views", f"{twice[0]} is there twice.", "Ask once, with one set of parameters.")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise BadInput("seed", f"{str(seed)[:20]!r} is not a seed.", "Give a whole number from 0 to 2147483647.")
        return entry, chosen

    def _planned(
        self,
        entry: ModelEntry,
        chosen: Method[Any],
        requests: tuple[EditRequest, ...],
        params: Mapping[str, object] | None,
        views: Sequence[str],
        seed: int,
    ) -> Inspection:
        """The question about these requests. Raises as plan() does."""
        if entry.embedded:
            requests = tuple(_with_known_prompts(request) for request in requests)
        ref = chosen.ref(params, entry.defaults.get(chosen.name))
        if reason := self._unsupported(chosen, entry):
            raise UnsupportedMethod(
                f"{chosen.title} can't edit {entry.name}: {reason}", "Choose another method or model."
            )
        return Inspection(entry.ref(), ref, requests, tuple(read_view(view).text for view in views), seed)

    def _entrants(
        self, method: Method[Any], entry: ModelEntry, given: Mapping[str, object], control: bool
    ) -> list[bench.Entrant]:
        """A method as it takes part in a benchmark: with what was given, and, if wanted, with each of its controls."""
        own = entry.defaults.get(method.name)
        found: list[bench.Entrant] = []
        for extra in ({}, *(bench.controls(method) if control else ())):
            asked = {**given, **extra}
            label = " ".join([method.name, *(f"{name}={value}" for name, value in asked.items())])
            one = bench.Entrant(label, method.ref(asked, own))
            if all(one.method != other.method for other in found):
                found.append(one)
        return found

    @contextmanager
    def _held(self, ref: ModelRef, report: Reporter) -> Iterator[ModelAdapter]:
        """A model for the block, with its memory of statistics; it is checked clean when it goes back."""
        self.settings.model(ref.name)
        with _memory_errors(), self._pool().lease(ref, report) as lm:
            lm.memo = self._store
            yield lm

    def _export(self, lm: ModelAdapter, stack: EditStack, folder: Path, report: Reporter) -> Path:
        from mega_core.alarms import alarms
        from mega_core.export import Made, export

        made = [Made(edit.method, edit.requests, edit.seed) for edit in stack.edits]
        licence = self.settings.model(lm.name).licence
        return export(lm, stack, folder, made, alarms(lm, stack, stack.requests), licence, report)

    def _work(self, question: _Edit | _Prompt | _Sweep, report: Reporter) -> Report | Answer | Path:
        """What a worker thread does with a question."""
        if isinstance(question, _Sweep):
            return self._sweep(question, report)
        if isinstance(question, _Prompt):
            return self._continue(question, report)
        try:
            result = self._answer(question.plan, question.digest, report, fresh=question.fresh)
        finally:
            with self._lock:
                askers = self._askers.pop(question.digest, set())
        for owner in sorted(askers):
            self._record(result, owner)
        return result

    def _forget_asker(self, digest: str, owner: str) -> None:
        with self._lock:
            askers = self._askers.get(digest, set())
            askers.discard(owner)
            if not askers:
                self._askers.pop(digest, None)

    def _answer(self, plan: Inspection, digest: str, report: Reporter, *, fresh: bool = False) -> Report:
        """Step 3 of the head of this file. Runs in a worker thread, or in the caller's for run()."""
        if not fresh and (found := self.cached(digest)) is not None:
            return found
        pool = self._pool()  # first, because it sets up what the next line imports
        from mega_core import pipeline

        with _memory_errors(), pool.lease(plan.model, report) as lm:
            lm.memo = self._store
            result = pipeline.inspect(plan, lm, report, self._store)
        if result.digest != digest:
            raise StoreError("The model's files changed while it was loaded.", "Restart the app, then run it again.")
        # Only here is the model back and proved clean.
        self._store.put_report(result)
        with self._lock:
            key = (plan.model.name, plan.method.name)
            self._timings.setdefault(key, deque(maxlen=KEPT_TIMINGS)).append(sum(result.timing.values()))
        return result

    def _continue(self, asked: _Prompt, report: Reporter) -> Answer:
        with self._lock:
            if asked.key in self._answers:
                return self._answers[asked.key]
        pool = self._pool()
        from mega_core.evaluation.looks import most_likely

        entry, prompt = asked.entry, asked.text
        with _memory_errors(), pool.lease(entry.ref(), report) as lm, stage(report, "ask", total=2) as step:
            tokens = most_likely(lm, prompt, TOP_TOKENS)
            step()
            (text,) = lm.generate([prompt], min(ANSWER_TOKENS, self.settings.max_new_tokens))
            step()
        answer = Answer(entry.name, prompt, text, tokens)
        with self._lock:
            self._answers[asked.key] = answer
            while len(self._answers) > KEPT_ANSWERS:
                self._answers.popitem(last=False)
        return answer

    def _record(self, report: Report, owner: str) -> None:
        """Write a run into the history; a notebook that can't is told in the notices and costs nobody the result."""
        request = report.question.requests[0]
        metrics = report.frames.get("metrics")
        values = {}
        if metrics is not None:
            after = metrics[(metrics["state"] == "after") & (metrics["case"] == 0)]
            values = {f"{row.protocol}.{row.metric}": float(row.value) for row in after.itertuples()}
        try:
            kind = outcome(report).kind
        except ValueError:
            kind = ""
        try:
            self._notebook.add_run(
                Run(
                    digest=report.digest,
                    session=owner,
                    model=report.question.model.name,
                    method=report.question.method.name,
                    subject=request.subject,
                    template=request.template,
                    target_new=request.target_new,
                    target_true=request.target_true,
                    edits=len(report.question.requests),
                    verdict=kind,
                    metrics=values,
                    seconds=float(sum(report.timing.values())),
                    created=datetime.now(UTC),
                )
            )
        except ActionableError as error:
            log.warning("The run %s is not in the history: %s", report.digest[:12], error)
            self._notice("history", str(error))

    def _warm(self, entry: ModelEntry) -> None:
        try:
            with self._pool().lease(entry.ref()):
                pass
        except Exception as error:  # noqa: BLE001 - whoever runs an edit is told; here nobody waits
            log.warning("Could not warm up %s: %s", entry.name, error)
            if not isinstance(error, ActionableError):
                self._notice("warm-up", f"{entry.name} could not be loaded ({type(error).__name__}).")
        finally:
            with self._lock:
                self._warming.discard(entry.name)

    def _pool(self) -> Pool:
        """The models, made on first use: that is when torch is imported."""
        with self._pool_lock:
            if self._pool_now is None:
                self._pool_now = self._make_pool(self.settings)
            return self._pool_now

    def _weights(self, entry: ModelEntry) -> str:
        return weights_digest(self.settings.locate(entry), self.settings.cache_dir)

    def _info(self, entry: ModelEntry) -> ModelInfo:
        missing = entry.missing(self.settings.hub_cache)
        return ModelInfo(
            name=entry.name,
            title=entry.title or entry.name,
            embedded=entry.embedded,
            available=missing is None,
            reason="" if missing is None else missing.what,
            how="" if missing is None else missing.next_step,
            parameters=self._parameters(entry),
            memory_gb=entry.memory_gb,
            licence=entry.licence,
            dtype=entry.dtype,
            device=self._device(),
            architecture=entry.architecture,
        )

    def _parameters(self, entry: ModelEntry) -> int:
        """As the catalogue says, else counted in the headers of the weight files, else 0."""
        if entry.params:
            return entry.params
        if entry.name not in self._sizes:
            try:
                self._sizes[entry.name] = _count_parameters(self.settings.locate(entry))
            except (ActionableError, OSError, ValueError, KeyError):
                return 0
        return self._sizes[entry.name]

    def _device(self) -> str:
        """Where models run. "auto" is decided only once torch is there: asking must not import it."""
        torch = _torch()
        if self.settings.device != "auto" or torch is None:
            return self.settings.device
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"

    def _unsupported(self, method: Method[Any], entry: ModelEntry) -> str | None:
        if not entry.architecture:
            return None  # only loading tells
        try:
            spec: ArchSpec = spec_of(entry.architecture)
        except UnsupportedModel as error:
            return str(error)
        return method.needs(spec)

    def _knobs(self, method: Method[Any], entry: ModelEntry) -> tuple[Knob, ...]:
        """The method's parameters; a model's default that the method can't take is left to plan() to complain about."""
        own: Mapping[str, Scalar] = entry.defaults.get(method.name, {})
        return tuple(replace(knob, default=own.get(knob.name, knob.default)) for knob in method.knobs())

    def _notice(self, about: str, text: str) -> None:
        with self._lock:
            self._notices[about] = text


def _open_worker() -> Any:
    """What other processes import to work on a benchmark."""
    from mega_core.benchmark.work import open_worker

    return open_worker


def _versions() -> dict[str, str]:
    """Of what makes the numbers."""
    names = ("torch", "transformers", "tokenizers", "numpy", "pandas")
    return {"edit-anatomy": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}


def _read(limit: int | None, apart: bool) -> int | None:
    """How many built-in cases are looked at; some of them may be passed over."""
    return limit if limit is None or limit < 1 or not apart else min(4 * limit, 1000)


def _write_page(results: bench.Results) -> None:
    """report.html; what can't be drawn costs nobody the numbers."""
    from mega_core import benchmark_report

    if results.folder is None:
        return
    about = results.about
    left_out: list[tuple[str, ...]] = [(one["label"], one["reason"]) for one in about.get("not_measured", ())]
    left_out += [(one["protocol"], f"{one['cases']} cases", one["reason"]) for one in about.get("left_out", ())]
    left_out += [(label or "every method", f"case {case}", why) for label, case, why in results.refusals]
    problems = [(f"line {one['line']}", one["record"], one["text"]) for one in about.get("problems", ())]
    shown = {
        "date": about.get("started", ""),
        "command": about.get("command", ""),
        "small_model": bool(about.get("small_model")),
        "versions": about.get("versions", {}),
        "device": ", ".join(about.get("devices", ())),
        "executor": about.get("executor", ""),
    }
    try:
        text = benchmark_report.html(
            results.plan, results.summary, results.timing, results.retention, results.answers, left_out, problems,
            shown, alarms=results.alarms,
        )  # fmt: skip
        folders.write_file(results.folder / "report.html", text.encode())
    except Exception as error:  # noqa: BLE001 - see above
        log.exception("The page of %s could not be made: %s", results.folder, error)


def _torch() -> Any:
    """torch once it is imported whole, else None: a worker thread may be in the middle of importing it."""
    module = sys.modules.get("torch")
    return None if module is None or getattr(module.__spec__, "_initializing", False) else module


def _model_pool(settings: Settings) -> ModelPool:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is for its callers, not for people
    import torch

    from mega_core.models.pool import ModelPool

    if "OMP_NUM_THREADS" not in os.environ:
        # One core is left to the threads that draw pages.
        torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))
    return ModelPool(settings)


def _with_known_prompts(request: EditRequest) -> EditRequest:
    """A request about a known fact, filled with what the tables know and the person left out; any other as it is."""
    world = known.load()
    fact = next(
        (
            f
            for f in world.by_subject.get(request.subject, ())
            if request.template in (*f.trained, *f.templates_held_out)
        ),
        None,
    )
    if fact is None:
        return request
    full = shipped.request_of(fact, request.target_new, request.template) if fact.object != request.target_new else None
    if full is None or request.target_true not in (None, fact.object):
        return request
    return replace(
        request,
        target_true=fact.object,
        paraphrases=request.paraphrases or full.paraphrases,
        neighbours=request.neighbours or full.neighbours,
    )


def _stacked(folder: Path) -> tuple[ModelRef, tuple[StackedEdit, ...]]:
    """The model and the edits of a saved stack, from its JSON alone."""
    from mega_core.stack import EditStack, headline, kind_of

    stack = EditStack.load(folder, str(headline(folder).get("model_digest")))
    return stack.model, tuple(
        StackedEdit(edit.name, kind_of(edit.change), edit.method, edit.requests, edit.seed) for edit in stack.edits
    )


def _count_parameters(folder: Path) -> int:
    """The numbers in a folder's safetensors files, from their headers alone."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > 100 * 2**20:
                raise ValueError(f"{file.name} has no such header")
            header = json.loads(stream.read(length))
        total += sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return total


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Turn running out of memory, as Python and torch each say it, into an error that helps."""
    try:
        yield
    except Exception as error:
        out = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not out and not (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)):
            raise
        raise OutOfMemory(
            "There was not enough memory for this edit; the model was restored.",
            "Choose a smaller model, fewer prompts, or close other programs.",
        ) from error
