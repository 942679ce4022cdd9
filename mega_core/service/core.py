"""What every part of the service stands on: settings, store, notebook, queue, models, and how a question is answered.

A question's way through here:
1. `planned` spells everything out that a person left open, or refuses with an error they can act on.
2. `cached` answers from the store, the imported runs or the shipped examples without a model.
3. `start` queues work of any sort; a worker thread does it. `answer` leases the model and runs the pipeline; only once
   the model is back and found clean does the report enter the store and the notebook.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from mega_core.attribution import read_view
from mega_core.embedded import examples as shipped
from mega_core.embedded import facts as known
from mega_core.errors import ActionableError, BadInput, OutOfMemory, StoreError, UnsupportedMethod, UnsupportedModel
from mega_core.events import Reporter, silent
from mega_core.jobs import Jobs, Limits
from mega_core.methods.base import METHODS, Method
from mega_core.models.arch import ArchSpec, spec_of
from mega_core.notebook import Notebook, Run
from mega_core.records import EditRequest, Inspection, ModelRef, Report
from mega_core.service.sharing import Imports
from mega_core.settings import ModelEntry, Settings, weights_digest
from mega_core.store import Store
from mega_core.summary import outcome

if TYPE_CHECKING:
    from mega_core.models.adapter import ModelAdapter
    from mega_core.models.pool import ModelPool

log = logging.getLogger(__name__)

KEPT_TIMINGS = 20

Work = Callable[[Reporter], Any]
"""What a worker thread does. Calls the reporter often: that is where it can be stopped."""


class Pool(Protocol):
    """The part of ModelPool that the service uses."""

    def lease(self, ref: ModelRef, report: Reporter = silent, timeout_s: float | None = None) -> Any:
        """A context manager that yields the model."""
        ...

    def loaded(self) -> tuple[tuple[ModelRef, bool], ...]:
        """Models in memory and whether each is in use."""
        ...

    def close(self) -> None:
        """Drop the models."""
        ...


class Core:
    """One per process; every method may be called from any thread."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        notebook: Notebook,
        make_pool: Callable[[Settings], Pool] | None = None,
    ) -> None:
        self.settings = settings
        self.store = store
        self.notebook = notebook
        self.imports = Imports(settings.cache_dir / "imports")
        limits = Limits(
            queued=settings.max_queue,
            per_owner_queued=max(0, settings.max_queue_per_session - 1),
            timeout_seconds=settings.job_seconds,
        )
        self.jobs: Jobs[Work, Any] = Jobs(lambda work, report: work(report), limits)
        self.timings: dict[tuple[str, str], deque[float]] = {}
        """(model, method) -> seconds of the last runs here."""
        self._make_pool = make_pool or _model_pool
        self.pool_now: Pool | None = None
        self._pool_lock = threading.Lock()
        self._lock = threading.Lock()
        self._notices: OrderedDict[str, str] = OrderedDict()

    def close(self) -> None:
        """Stop the worker, drop the models, close the files."""
        self.jobs.close()
        with self._pool_lock:
            if self.pool_now is not None:
                self.pool_now.close()
                self.pool_now = None
        self.notebook.close()
        self.store.close()

    def start(
        self,
        work: Work,
        *,
        owner: str,
        key: str,
        lane: str,
        method: str,
        kind: str,
        timeout_seconds: float | None = None,
    ) -> str:
        """Queue work and return its job's id. Raises Busy when the queue is full, or this owner has enough in it.

        Work of one `key` is done once, for everybody who asks. A `lane` does one piece of work at a time: a model's
        name for work that holds the model throughout. `method` names what takes about as long, `kind` is for whoever
        shows the job. Without `timeout_seconds` the limit is that of the settings.
        """
        return self.jobs.submit(
            work, owner=owner, digest=key, model=lane, method=method, kind=kind, timeout_seconds=timeout_seconds
        )

    # Models ----------------------------------------------------------------------------------------------------------

    def pool(self) -> Pool:
        """The models, made on first use: that is when torch is imported."""
        with self._pool_lock:
            if self.pool_now is None:
                self.pool_now = self._make_pool(self.settings)
            return self.pool_now

    @contextmanager
    def held(self, ref: ModelRef, report: Reporter) -> Iterator[ModelAdapter]:
        """A model for the block, with its memory of statistics; it is checked clean when it goes back."""
        self.settings.model(ref.name)
        with memory_errors(), self.pool().lease(ref, report) as lm:
            lm.memo = self.store
            yield lm

    def weights(self, entry: ModelEntry) -> str:
        """The digest of a model's files. Raises ModelUnavailable when it isn't here."""
        return weights_digest(self.settings.locate(entry), self.settings.cache_dir)

    # Questions -------------------------------------------------------------------------------------------------------

    def asked(self, model: str, method: str, views: Sequence[str], seed: int) -> tuple[ModelEntry, Method[Any]]:
        """The entries of these names. Raises UnknownName, or BadInput on a seed that is none."""
        entry, chosen = self.settings.model(model), METHODS[method]
        names = [read_view(text).view.name for text in views]
        if twice := [name for name in names if names.count(name) > 1]:
            raise BadInput("views", f"{twice[0]} is there twice.", "Ask once, with one set of parameters.")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise BadInput("seed", f"{str(seed)[:20]!r} is not a seed.", "Give a whole number from 0 to 2147483647.")
        return entry, chosen

    def planned(
        self,
        entry: ModelEntry,
        chosen: Method[Any],
        requests: tuple[EditRequest, ...],
        params: Mapping[str, object] | None,
        views: Sequence[str],
        seed: int,
    ) -> Inspection:
        """The question about these requests, every parameter spelled out. Raises an ActionableError on what can't be.

        On an embedded model, a known fact brings its original object, withheld paraphrases and neighbours when none
        are given; they are used for evaluation only.
        """
        if entry.embedded:
            requests = tuple(_with_known_prompts(request) for request in requests)
        ref = chosen.ref(params, entry.defaults.get(chosen.name))
        if reason := self.unsupported(chosen, entry):
            raise UnsupportedMethod(
                f"{chosen.title} can't edit {entry.name}: {reason}", "Choose another method or model."
            )
        return Inspection(entry.ref(), ref, requests, tuple(read_view(view).text for view in views), seed)

    def unsupported(self, method: Method[Any], entry: ModelEntry) -> str | None:
        """Why a method can't edit a model, or None."""
        if not entry.architecture:
            return None  # only loading tells
        try:
            spec: ArchSpec = spec_of(entry.architecture)
        except UnsupportedModel as error:
            return str(error)
        return method.needs(spec)

    def digest(self, plan: Inspection) -> str:
        """The key of a question: the run id. Raises ModelUnavailable when the model isn't here."""
        return plan.key(self.weights(self.settings.model(plan.model.name)))

    def cached(self, digest: str) -> Report | None:
        """The report of this run id: computed here, shipped, or imported. Never computes; safe with any text."""
        return self._found(digest) or self.imports.get(digest)

    def _found(self, digest: str) -> Report | None:
        """As cached(), without what was imported: only this may answer a question."""
        return self.store.get_report(digest) or shipped.find(digest)

    def run(self, plan: Inspection, report: Reporter = silent, *, fresh: bool = False) -> Report:
        """Answer a question here and now: from the store, else computed and stored. `fresh` always computes."""
        return self.answer(plan, self.digest(plan), report, fresh=fresh)

    def answer(self, plan: Inspection, digest: str, report: Reporter, *, fresh: bool = False) -> Report:
        """Step 3 of the head of this file, in this thread."""
        if not fresh and (found := self._found(digest)) is not None:
            return found
        pool = self.pool()  # first, because it sets up what the next line imports
        from mega_core import pipeline

        with memory_errors(), pool.lease(plan.model, report) as lm:
            lm.memo = self.store
            result = pipeline.inspect(plan, lm, report, self.store)
        if result.digest != digest:
            raise StoreError("The model's files changed while it was loaded.", "Restart the app, then run it again.")
        # Only here is the model back and proved clean.
        self.store.put_report(result)
        with self._lock:
            key = (plan.model.name, plan.method.name)
            self.timings.setdefault(key, deque(maxlen=KEPT_TIMINGS)).append(sum(result.timing.values()))
        return result

    def record(self, report: Report, owner: str) -> None:
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
            self.notebook.add_run(
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
            self.notice("history", str(error))

    # Notices ---------------------------------------------------------------------------------------------------------

    def notice(self, about: str, text: str) -> None:
        """Keep a sentence for the status page: something works only in part. One per subject."""
        with self._lock:
            self._notices[about] = text

    def notices(self) -> tuple[str, ...]:
        """What works only in part, one sentence each."""
        with self._lock:
            own = list(self._notices.values())
        told = (self.store.health().notice, self.notebook.health().notice)
        return (*own, *(one for one in told if one))


def torch_if_there() -> Any:
    """torch once it is imported whole, else None: a worker thread may be in the middle of importing it."""
    module = sys.modules.get("torch")
    return None if module is None or getattr(module.__spec__, "_initializing", False) else module


@contextmanager
def memory_errors() -> Iterator[None]:
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
