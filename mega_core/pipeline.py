"""Look, change, look again: one question against one model, and the tables that come out.

1. before   look at the unedited model, or take its looks from the memo: they don't depend on the method.
2. edit     the method turns the requests into a change, and the change is made true.
3. after    the same looks at the edited model, and signs of damage, which become notes.
4. restore  undo the change and write the receipt: digests of the live parameters before and after, hooks left.

Whatever happens in between (an error, a person who cancels, no memory left), the model is restored first.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from io import BytesIO
from time import perf_counter
from typing import Any, Protocol, runtime_checkable
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import pandas as pd
import torch
import transformers

from mega_core import __version__, alarms, frames
from mega_core.attribution import look_at, read_view
from mega_core.attribution.base import Asked
from mega_core.attribution.weight_change import spectrum
from mega_core.errors import BadInput, FrameError, OutOfMemory, UnsupportedMethod
from mega_core.evaluation import looks, metrics
from mega_core.events import Event, Note, Reporter, silent, stage
from mega_core.keys import digest
from mega_core.methods.base import METHODS, Method
from mega_core.models.adapter import ModelAdapter
from mega_core.records import Inspection, Receipt, Report

STAGES = ("before", "edit", "after", "restore")

Frames = Mapping[str, pd.DataFrame]


@runtime_checkable
class Memo(Protocol):
    """Bytes by key; the store is one."""

    def get(self, key: str) -> bytes | None:
        """What was put under this key, or None."""
        ...

    def put(self, key: str, value: bytes) -> object:
        """Keep it, if there is room."""
        ...


def inspect(plan: Inspection, lm: ModelAdapter, report: Reporter = silent, memo: Memo | None = None) -> Report:
    """Answer a question. The model is bit-identical afterwards, also when this raises.

    `memo` keeps the looks at the unedited model, so that a second method on the same facts starts warm.
    Raises ActionableError (BadInput, UnknownName, UnsupportedMethod, OutOfMemory ...), and Cancelled from the reporter.
    """
    method, params = _fit(plan, lm)
    views = tuple(read_view(text) for text in plan.views)
    log = _Log(report)
    try:
        with ExitStack() as edited:
            with log.stage("before", 2) as step:
                digest_before = lm.live_digest()
                before = _base_looks(views, plan, lm, log.tell, memo, step)
            with log.stage("edit"):
                change = method.prepare(lm, plan.requests, params, plan.seed, log.tell)
                summary, singular = change.summary(), spectrum(change, lm)
                fluent = alarms.perplexity(lm)
                edited.enter_context(change.applied(lm))
            with log.stage("after", 2) as step:
                after = dict(looks.look(lm, plan.requests, "after", log.tell))
                step()
                after |= _merged(look_at(lm, views, plan.requests, "after", log.tell).values())
                step()
                signs = alarms.alarms(lm, change, plan.requests, before=fluent, after=alarms.perplexity(lm))
            with log.stage("restore"):
                edited.close()
                receipt = _receipt(lm, digest_before)
    except (RuntimeError, MemoryError) as error:
        if not _ran_out_of_memory(error):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemory(
            f"The machine ran out of memory on {lm.name} (stage: {log.current}); the model was restored.",
            "Use fewer prompts or a smaller model, or free the device's memory.",
        ) from error
    for sign in signs:
        if sign.raised:
            log.tell(Note(sign.text))
    if not receipt.restored:
        log.tell(Note(f"{lm.name} was not given back as it was: it has to be loaded again."))
    tables = {name: pd.concat([before[name], after[name]], ignore_index=True) for name in before}
    return Report(
        question=plan,
        digest=plan.key(lm.file_digest),
        model_digest=lm.file_digest,
        frames={
            **tables,
            "metrics": metrics.measure(tables["answers"]),
            "tokens": looks.prompt_tokens(lm, plan.requests),
            "weight_change": summary,
            "weight_spectrum": singular,
        },
        receipt=receipt,
        timing=log.seconds,
        notes=tuple(log.notes),
        environment=environment(lm),
    )


def environment(lm: ModelAdapter) -> dict[str, str]:
    """What made the numbers: versions, device, dtype."""
    device = torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else platform.machine()
    return {
        "edit-anatomy": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": f"{lm.device.type} ({device})",
        "dtype": str(lm.dtype).removeprefix("torch."),
    }


class _Log:
    """Times the stages and collects the notes on their way to the reporter."""

    def __init__(self, report: Reporter) -> None:
        self.report = report
        self.current = ""
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []

    def tell(self, event: Event) -> None:
        """Pass an event on; a note that was said before is not said again."""
        if isinstance(event, Note):
            if event.text in self.notes:
                return
            self.notes.append(event.text)
        self.report(event)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """A stage of the pipeline, with its seconds."""
        self.current, start = name, perf_counter()
        with stage(self.tell, name, total) as step:
            yield step
        self.seconds[name] = perf_counter() - start


def _fit(plan: Inspection, lm: ModelAdapter) -> tuple[Method[Any], Any]:
    """The method with its params. Raises when question, code and model don't belong together: the key would lie."""
    method = METHODS[plan.method.name]
    if plan.method.version != method.version:
        raise BadInput(
            "method",
            f"the question asks for version {plan.method.version} of {method.title}, this is {method.version}.",
            "Ask again.",
        )
    if plan.model != lm.ref:
        raise BadInput("model", f"the question is about {plan.model}, but {lm.ref} was lent.", "Ask again.")
    reason = method.needs(lm.spec)
    if reason is not None:
        raise UnsupportedMethod(f"{method.title} can't edit {lm.name}: {reason}.", "Choose another method or model.")
    return method, method.read(plan.method)


def _base_looks(
    views: Sequence[Asked],
    plan: Inspection,
    lm: ModelAdapter,
    report: Reporter,
    memo: Memo | None,
    step: Callable[[], None],
) -> dict[str, pd.DataFrame]:
    """Every look at the unedited model: from the memo what it has, the rest made and kept."""
    # Without the files' digest two models would share a key. The environment is part of it: a difference of two states
    # must not be a difference of two machines.
    about = {"requests": plan.requests, "model": lm.ref, "weights": lm.file_digest, "environment": environment(lm)}

    def key(look: str, version: int) -> str:
        return f"look:{digest({**about, 'look': look, 'version': version})}"

    def kept(look: str, version: int) -> dict[str, pd.DataFrame] | None:
        data = memo.get(key(look, version)) if memo is not None and lm.file_digest else None
        return None if data is None else _unpack(data)

    def keep(look: str, version: int, found: Frames) -> None:
        if memo is not None and lm.file_digest:
            memo.put(key(look, version), _pack(found))

    tables = kept("evaluation", looks.VERSION)
    if tables is None:
        tables = dict(looks.look(lm, plan.requests, "before", report))
        keep("evaluation", looks.VERSION, tables)
    step()
    known = {one.text: kept(one.text, one.view.version) for one in views}
    missing = [one for one in views if known[one.text] is None]
    for one, found in zip(missing, look_at(lm, missing, plan.requests, "before", report).values(), strict=True):
        keep(one.text, one.view.version, found)
        known[one.text] = found
    step()
    return tables | _merged(found for found in known.values() if found is not None)


def _merged(parts: Iterable[Frames]) -> dict[str, pd.DataFrame]:
    """All frames by name; those that several views fill (neuron_tokens) one below the other."""
    merged: dict[str, pd.DataFrame] = {}
    for part in parts:
        for name, frame in part.items():
            merged[name] = pd.concat([merged[name], frame], ignore_index=True) if name in merged else frame
    return merged


def _receipt(lm: ModelAdapter, digest_before: str) -> Receipt:
    digest_after, hooks = lm.live_digest(), lm.hook_count()
    return Receipt(digest_after == digest_before and hooks == 0, digest_before, digest_after, hooks)


def _ran_out_of_memory(error: BaseException) -> bool:
    """Only accelerators have an error type for it; on the CPU it is a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _pack(found: Frames) -> bytes:
    buffer = BytesIO()
    with ZipFile(buffer, "w", ZIP_STORED) as box:
        for name, frame in sorted(found.items()):
            box.writestr(ZipInfo(name), frames.to_parquet(frame))
    return buffer.getvalue()


def _unpack(data: bytes) -> dict[str, pd.DataFrame] | None:
    """What _pack wrote, None when it is damaged or of another contract: then it is made again."""
    try:
        with ZipFile(BytesIO(data)) as box:
            return {name: frames.from_parquet(box.read(name), name) for name in box.namelist()}
    except (BadZipFile, FrameError, KeyError, ValueError):
        return None
