"""What pages and the command line may call. Plain frozen values in and out; torch enters in worker threads only.

`Service` asks single questions, keeps the history and says how the app is; its parts do the rest, each in a file:
`stacks`, `studies`, `masks`, `benchmarks`, `chains`, `reviews`, `sharing`, `steering`, `comparisons`, `checks`. All of
them stand on `core`.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from statistics import fmean
from typing import Any

import mega_core.methods  # noqa: F401 - fills METHODS
from mega_core import __version__
from mega_core.attribution import VIEWS
from mega_core.embedded import examples as shipped
from mega_core.embedded import facts as known
from mega_core.embedded import seconds as measured_seconds
from mega_core.embedded.examples import Example
from mega_core.errors import ActionableError, BadInput, Busy, StoreError, TimedOut
from mega_core.events import Cancelled, Reporter, silent, stage
from mega_core.events import Note as EventNote
from mega_core.jobs import CANCELLED, JobView
from mega_core.keys import digest as digest_of
from mega_core.methods.base import METHODS, Knob, Method
from mega_core.notebook import Entry, Note, Notebook, Verdict
from mega_core.records import MAX_TEMPLATE, EditRequest, Inspection, Report, Scalar, clean_text
from mega_core.service.benchmarks import Benchmarks, Sweep
from mega_core.service.chains import Chains
from mega_core.service.checks import Checks
from mega_core.service.comparisons import Comparisons
from mega_core.service.core import Core, Pool, torch_if_there
from mega_core.service.masks import Masks
from mega_core.service.reviews import Reviews
from mega_core.service.sharing import Sharing
from mega_core.service.stacks import Held, StackCheck, StackedEdit, Stacks
from mega_core.service.steering import Steering
from mega_core.service.studies import Studies
from mega_core.service.told import PROMISES, Answer, Condition, Gpu, MethodInfo, ModelInfo, Status, ViewInfo
from mega_core.settings import ModelEntry, Settings
from mega_core.store import Store

__all__ = [
    "PROMISES",
    "Answer",
    "Condition",
    "Example",
    "Held",
    "MethodInfo",
    "ModelInfo",
    "Service",
    "StackCheck",
    "StackedEdit",
    "Status",
    "Sweep",
    "ViewInfo",
]

log = logging.getLogger(__name__)

TOP_TOKENS = 10
ANSWER_TOKENS = 24
KEPT_ANSWERS = 256
MAX_TOGETHER = 128
"""Facts edited together in one question: each is asked before and after, with all its prompts."""
MAX_COMPARED = 6
"""Methods beside each other in one comparison."""


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
        self.core = Core(settings, store, notebook, make_pool)
        self.stacks = Stacks(self.core)
        self.studies = Studies(self.core)
        self.masks = Masks(self.core)
        self.benchmarks = Benchmarks(self.core)
        self.chains = Chains(self.core)
        self.reviews = Reviews(self.core)
        self.sharing = Sharing(self.core)
        self.steering = Steering(self.core)
        self.comparisons = Comparisons(self.core)
        self.checks = Checks(self.core)
        self._lock = threading.Lock()
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        self._askers: dict[str, set[str]] = {}
        self._warming: set[str] = set()
        self._sizes: dict[str, int] = {}

    @classmethod
    def open(cls, settings: Settings | None = None, *, make_pool: Callable[[Settings], Pool] | None = None) -> Service:
        """Store, notebook and queue of these settings (read from the environment by default). Loads no model."""
        settings = settings or Settings.read()
        store = Store.open(settings.cache_dir / "results", int(settings.store_gb * 2**30))
        notebook = Notebook.open(settings.database_url or settings.cache_dir / "notebook.sqlite3")
        return cls(settings, store, notebook, make_pool)

    def close(self) -> None:
        """Stop the worker, drop the models, close the files."""
        self.core.close()

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
                unsupported=self.core.unsupported(method, entry),
                knobs=self._knobs(method, entry),
                seconds_estimate=self.seconds_estimate(entry.name, method.name),
            )
            for method in METHODS
        )

    def views(self) -> tuple[ViewInfo, ...]:
        """Every way of looking inside, in the order of the registry."""
        return tuple(ViewInfo(view.name, view.title, view.summary, view.frames, view.knobs()) for view in VIEWS)

    def seconds_estimate(self, model: str, method: str) -> float | None:
        """What such an edit takes: the mean of earlier runs here, else as measured on the embedded models, for other
        models scaled by parameters.
        """
        seen = self.core.timings.get((model, method))
        if seen:
            return fmean(tuple(seen))
        table = measured_seconds.load()
        known_here = table.get(model, {}).get(method)
        if known_here is not None:
            return known_here
        target = self._parameters(self.settings.model(model))
        scaled = [
            seconds[method] * max(1.0, target / size)
            for name, seconds in table.items()
            if target and method in seconds and name in self.settings.models
            and (size := self._parameters(self.settings.models[name]))
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
            self.core.notice("examples", str(error))
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
        entry, chosen = self.core.asked(model, method, views, seed)
        request = EditRequest(subject, template, target_new, target_true or None, tuple(paraphrases), tuple(neighbours))
        return self.core.planned(entry, chosen, (request,), params, views, seed)

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
        entry, chosen = self.core.asked(model, method, views, seed)
        if len(requests) > MAX_TOGETHER:
            raise BadInput("requests", f"{len(requests):,} edits, the limit is {MAX_TOGETHER}.", "Leave some out.")
        seen: set[str] = set()
        for number, request in enumerate(requests, start=1):
            if request.prompt in seen:
                raise BadInput(
                    "requests", f"number {number} edits {request.prompt[:80]!r} a second time.", "Keep one of the two."
                )
            seen.add(request.prompt)
        return self.core.planned(entry, chosen, tuple(requests), params, views, seed)

    def digest(self, plan: Inspection) -> str:
        """The key of a question: the run id. Raises ModelUnavailable when the model isn't here."""
        return self.core.digest(plan)

    def cached(self, digest: str) -> Report | None:
        """The report of this run id, from the store or the shipped examples. Never computes; safe with any text."""
        return self.core.cached(digest)

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

    def submit(self, plan: Inspection, owner: str, *, fresh: bool = False, kind: str = "edit") -> str:
        """Queue a question; its job id. Raises Busy when the queue is full, or this owner has enough in it.

        The same question asked by several people at a time is computed once; a stored answer is taken unless `fresh`.
        `kind` is for whoever shows the job.
        """
        digest = self.digest(plan)
        with self._lock:
            self._askers.setdefault(digest, set()).add(owner)

        def work(report: Reporter) -> Report:
            try:
                result = self.core.answer(plan, digest, report, fresh=fresh)
            finally:
                with self._lock:
                    askers = self._askers.pop(digest, set())
            for asker in sorted(askers):
                self.core.record(result, asker)
            return result

        try:
            return self.core.start(
                work, owner=owner, key=digest, lane=plan.model.name, method=plan.method.name, kind=kind
            )
        except Busy:
            self._forget_asker(digest, owner)
            raise

    def submit_several(self, plans: Sequence[Inspection], owner: str) -> str:
        """Queue up to MAX_COMPARED questions about one model as one job, answered one after the other.

        Each answer is there, under its own digest(), as soon as it is found; one that can't be found is told in the
        job's notes and costs the others nothing. The result is {digest: "" or why there is no answer}. Raises BadInput
        on none, too many or two models, Busy as submit().
        """
        if not 1 <= len(plans) <= MAX_COMPARED:
            raise BadInput("methods", f"{len(plans)} chosen.", f"Choose 1 to {MAX_COMPARED}.")
        if len({plan.model for plan in plans}) > 1:
            raise BadInput("methods", "are to be tried on more than one model.", "Choose one model.")
        digests = [self.digest(plan) for plan in plans]

        def work(report: Reporter) -> dict[str, str]:
            found: dict[str, str] = {}
            with stage(report, "methods", len(plans)) as step:
                for plan, digest in zip(plans, digests, strict=True):
                    try:
                        self.core.record(self.core.answer(plan, digest, report), owner)
                        found[digest] = ""
                    except (TimedOut, Cancelled):
                        raise
                    except ActionableError as error:
                        found[digest] = f"{error.what} {error.next_step}"
                        report(EventNote(f"{plan.method.name}: {found[digest]}"))
                    except Exception as error:
                        number = secrets.token_hex(4)
                        log.error("%s failed in a comparison, error id %s", plan.method.name, number, exc_info=error)
                        found[digest] = f"Something went wrong inside. Look for error id {number} in the server's log."
                        report(EventNote(f"{plan.method.name}: {found[digest]}"))
                    step()
            return found

        return self.core.start(
            work,
            owner=owner,
            key=digest_of({"several": digests}),
            lane=plans[0].model.name,
            method=",".join(plan.method.name for plan in plans),
            kind="compare",
            timeout_seconds=len(plans) * self.settings.job_seconds,
        )

    def ask(self, model: str, prompt: str, owner: str) -> str:
        """Queue a prompt for the unedited model; its job id, for job() and answer()."""
        entry = self.settings.model(model)
        text = clean_text("prompt", prompt, MAX_TEMPLATE)
        key = digest_of({"ask": text, "model": entry.ref(), "weights": self.core.weights(entry)})
        return self.core.start(
            lambda report: self._continue(entry, text, key, report),
            owner=owner, key=key, lane=entry.name, method="ask", kind="ask",
        )  # fmt: skip

    def answer(self, job_id: str, owner: str | None = None) -> Answer:
        """What ask() found. Raises Busy while the job runs and ActionableError when it failed."""
        found = self.result(job_id, owner)
        if not isinstance(found, Answer):
            raise BadInput("job", "is an edit, not a prompt.", "Open its report by its run id.")
        return found

    def result(self, job_id: str, owner: str | None = None) -> Any:
        """What a job found. Raises Busy while it runs, ActionableError when there is nothing to be had."""
        return self.core.jobs.result(job_id, owner)

    def job(self, job_id: str, owner: str) -> JobView:
        """How a job of this owner stands. Raises UnknownName for anybody else's, or one that is forgotten."""
        return self.core.jobs.snapshot(job_id, owner)

    def jobs(self, owner: str) -> list[JobView]:
        """The jobs of an owner that are remembered, oldest first."""
        return self.core.jobs.of_owner(owner)

    def wait(self, job_id: str, timeout: float | None = None) -> JobView:
        """Block until a job is over or the time is up: for scripts, not for pages."""
        return self.core.jobs.wait(job_id, timeout)

    def cancel(self, job_id: str, owner: str) -> JobView:
        """Stop a job of this owner, waiting or running; others who wait for the same answer still get it."""
        view = self.core.jobs.cancel(job_id, owner)
        if view.state == CANCELLED:
            self._forget_asker(view.digest, owner)
        return view

    def run(self, plan: Inspection, report: Reporter = silent, *, fresh: bool = False) -> Report:
        """Answer a question here and now: from the store, else computed and stored. `fresh` always computes."""
        return self.core.run(plan, report, fresh=fresh)

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
        return self.core.notebook.runs(**filters)

    def count_runs(self, **filters: Any) -> int:
        """How many runs the same filters give."""
        return self.core.notebook.count(**filters)

    def entry(self, digest: str) -> Entry | None:
        """One run with its notes, tags and verdicts, or None."""
        return self.core.notebook.get(digest)

    def run_choices(self, owner: str) -> dict[str, tuple[str, ...]]:
        """Models, methods and tags that occur in an owner's history."""
        return self.core.notebook.choices(owner)

    def note(self, digest: str, text: str, author: str = "") -> Note | None:
        """Write an author's note on a run; an empty text removes it."""
        return self.core.notebook.set_note(digest, text, author)

    def tags(self, digest: str, tags: Sequence[str], author: str = "") -> tuple[str, ...]:
        """Replace an author's tags of a run."""
        return self.core.notebook.set_tags(digest, tags, author)

    def verdict(
        self, digest: str, verdict: str, failure: str = "", severity: int = 0, author: str = ""
    ) -> Verdict | None:
        """Write an author's verdict on a run; an empty verdict removes it."""
        return self.core.notebook.set_verdict(digest, verdict, failure, severity, author)

    def delete_run(self, digest: str, owner: str | None = None) -> bool:
        """Take a run out of an owner's history, or out of everybody's. The stored report stays until it is evicted."""
        return self.core.notebook.delete_run(digest, owner)

    def visited(self, report: Report, owner: str) -> None:
        """Record in the history that this owner has seen a report: computed, stored or shipped."""
        self.core.record(report, owner)

    # Operation -------------------------------------------------------------------------------------------------------

    def status(self) -> Status:
        """Everything the status page shows."""
        running, waiting = self.core.jobs.load()
        pool = self.core.pool_now
        return Status(
            version=__version__,
            device=self._device(),
            torch_ready=torch_if_there() is not None,
            models_loaded=tuple(ref.name for ref, _ in pool.loaded()) if pool else (),
            running=running,
            waiting=waiting,
            max_waiting=self.core.jobs.limits.queued,
            store=self.core.store.health(),
            notebook=self.core.notebook.health(),
            notices=self.core.notices(),
            per_session=self.settings.max_queue_per_session,
            job_seconds=self.settings.job_seconds,
            memory_bytes=_resident_bytes(),
            gpus=self._gpus(),
            store_limit=self.core.store.size_limit,
        )

    def unload(self) -> None:
        """Drop every model nobody is using, to free its memory; the next question loads it again."""
        if self.core.pool_now is not None:
            self.core.pool_now.close()

    def condition(self, model: str) -> Condition:
        """Read a model's parameters now, in the calling thread; waits until nobody holds it."""
        with self.core.pool().lease(self.settings.model(model).ref()) as lm:
            return Condition(lm.live_digest(), lm.hook_count())

    def clear_results(self) -> int:
        """Forget every stored report and statistic; how many there were. Notes and tags stay."""
        keys = self.core.store.keys()
        return sum(self.core.store.delete(key) for key in keys)

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

    def _forget_asker(self, digest: str, owner: str) -> None:
        with self._lock:
            askers = self._askers.get(digest, set())
            askers.discard(owner)
            if not askers:
                self._askers.pop(digest, None)

    def _continue(self, entry: ModelEntry, prompt: str, key: str, report: Reporter) -> Answer:
        with self._lock:
            if key in self._answers:
                return self._answers[key]
        self.core.pool()  # sets up what the next line imports
        from mega_core.evaluation.looks import most_likely

        with self.core.held(entry.ref(), report) as lm, stage(report, "ask", total=2) as step:
            tokens = most_likely(lm, prompt, TOP_TOKENS)
            step()
            (text,) = lm.generate([prompt], min(ANSWER_TOKENS, self.settings.max_new_tokens))
            step()
        answer = Answer(entry.name, prompt, text, tokens)
        with self._lock:
            self._answers[key] = answer
            while len(self._answers) > KEPT_ANSWERS:
                self._answers.popitem(last=False)
        return answer

    def _warm(self, entry: ModelEntry) -> None:
        try:
            with self.core.pool().lease(entry.ref()):
                pass
        except Exception as error:  # noqa: BLE001 - whoever runs an edit is told; here nobody waits
            log.warning("Could not warm up %s: %s", entry.name, error)
            if not isinstance(error, ActionableError):
                self.core.notice("warm-up", f"{entry.name} could not be loaded ({type(error).__name__}).")
        finally:
            with self._lock:
                self._warming.discard(entry.name)

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
        torch = torch_if_there()
        if self.settings.device != "auto" or torch is None:
            return self.settings.device
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"

    def _gpus(self) -> tuple[Gpu, ...]:
        """Memory of each GPU, once torch and CUDA are in use; asking must not start them."""
        torch = torch_if_there()
        if torch is None or not torch.cuda.is_initialized():
            return ()
        found = []
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            found.append(Gpu(torch.cuda.get_device_name(number), total - free, total))
        return tuple(found)

    def _knobs(self, method: Method[Any], entry: ModelEntry) -> tuple[Knob, ...]:
        """The method's parameters; a model's default that the method can't take is left to plan() to complain about."""
        own: Mapping[str, Scalar] = entry.defaults.get(method.name, {})
        return tuple(replace(knob, default=own[knob.name]) if knob.name in own else knob for knob in method.knobs())


def _resident_bytes() -> int:
    """Memory that this process holds now; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


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
