"""Edits made one after the other, kept in a folder, and models written out with edits in their weights.

The first half works here and now on a folder that is named, as the command line does. The second half is for pages:
each person has one stack per model, in a folder that only their name leads to, and whatever needs a model or reads
tensors is a job in the model's lane. Two windows of one person thus take turns, and each job reads the stack anew.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import ZIP_STORED, ZipFile

from mega_core import folders
from mega_core.errors import ActionableError, BadInput
from mega_core.events import Reporter, silent, stage
from mega_core.keys import digest as digest_of
from mega_core.methods.base import METHODS
from mega_core.records import EditRequest, Inspection, MethodRef, ModelRef, Receipt

if TYPE_CHECKING:
    from mega_core.models.adapter import ModelAdapter
    from mega_core.service.core import Core, Work
    from mega_core.stack import EditStack

MAX_STACKED = 20
"""Edits in a stack that is made from a page."""
MAX_PACKED_BYTES = 256 * 2**20
HEADER = "stack.json"


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


class Stacks:
    """Saved stacks of edits and exported models."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def add(self, folder: Path, plan: Inspection, report: Reporter = silent) -> str:
        """Add an edit to the stack saved in a folder, which is made when it isn't there; the edit's name."""
        with folders.alone(folder, "stack"):
            if not folder.exists():
                folders.check_new(folder, "stack")
            with self._core.held(plan.model, report) as lm:
                from mega_core.stack import EditStack

                there = folder.is_dir() and any(folder.iterdir())
                stack = EditStack.load(folder, lm) if there else EditStack.empty(lm)
                stack = stack.add(lm, plan.method, plan.requests, plan.seed, report)
                stack.save(folder)
            return stack.edits[-1].name

    def edits(self, folder: Path) -> tuple[StackedEdit, ...]:
        """The edits of a saved stack, first added first. Raises BadInput when there is none, or it is damaged."""
        return _stacked(folder)[1]

    def undo(self, folder: Path, name: str) -> tuple[StackedEdit, ...]:
        """Take one edit out of a saved stack; those that stay. Raises UnknownName with the closest name."""
        from mega_core.stack import EditStack, headline

        with folders.alone(folder, "stack"):
            EditStack.load(folder, str(headline(folder).get("model_digest"))).without(name).save(folder)
            return _stacked(folder)[1]

    def check(self, folder: Path, report: Reporter = silent) -> StackCheck:
        """Apply a saved stack, ask for every fact in it, look for signs of damage, and undo it."""
        ref, edits = _stacked(folder)
        with self._core.held(ref, report) as lm:
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
        with self._core.held(plan.model, report) as lm:
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
        with self._core.held(ref, report) as lm:
            from mega_core.stack import EditStack

            return self._export(lm, EditStack.load(stack, lm), folder, report)

    # A person's stacks, for pages -------------------------------------------------------------------------------------

    def mine(self, model: str, owner: str) -> tuple[StackedEdit, ...]:
        """The edits of this person's stack of a model, first added first; none when there is no stack.

        Read from its JSON alone, unchecked and without torch: to show, not to apply. Raises BadInput on a damaged one.
        """
        path = self.folder(model, owner) / HEADER
        if not path.is_file():
            return ()
        try:
            rows = json.loads(path.read_bytes())["edits"]
            return tuple(
                StackedEdit(
                    str(row["name"]),
                    str(row["kind"]),
                    MethodRef(
                        str(row["method"]["name"]),
                        int(row["method"]["version"]),
                        tuple(row["method"]["params"].items()),
                    ),
                    tuple(
                        EditRequest(
                            **{**r, "paraphrases": tuple(r["paraphrases"]), "neighbours": tuple(r["neighbours"])}
                        )
                        for r in row["requests"]
                    ),
                    int(row["seed"]),
                )
                for row in rows
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ActionableError) as error:
            raise BadInput("stack", "your stack can't be read.", "Remove it and start a new one.") from error

    def folder(self, model: str, owner: str) -> Path:
        """Where this person's stack of a model lies. Raises UnknownName for a model that isn't in the catalogue."""
        entry = self._core.settings.model(model)
        person = sha256(f"stacks of {owner}".encode()).hexdigest()[:32]
        return self._core.settings.cache_dir / "stacks" / person / entry.name

    def start_add(self, plan: Inspection, owner: str) -> str:
        """Queue adding an edit to this person's stack; the job's id, its result the edit's name.

        Raises BadInput when the stack is full or holds this very edit, Busy as every job.
        """
        folder = self.folder(plan.model.name, owner)
        self._check_room(plan, owner)

        def work(report: Reporter) -> str:
            self._check_room(plan, owner)  # another window may have been quicker
            folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with stage(report, "edit"):
                return self.add(folder, plan, report)

        return self._start(work, plan.model.name, owner, {"add": plan}, plan.method.name)

    def start_undo(self, model: str, name: str, owner: str) -> str:
        """Queue taking one edit out of this person's stack; the job's id, its result the edits that stay."""
        folder = self.folder(model, owner)

        def work(report: Reporter) -> tuple[StackedEdit, ...]:
            self._core.pool()  # sets up what undo() imports
            with stage(report, "undo"):
                return self.undo(folder, name)

        return self._start(work, model, owner, {"undo": name}, "undo")

    def start_check(self, model: str, owner: str) -> str:
        """Queue check() of this person's stack; the job's id, its result a StackCheck."""
        folder = self.folder(model, owner)

        def work(report: Reporter) -> StackCheck:
            self._core.pool()  # sets up what check() imports
            with stage(report, "check"):
                return self.check(folder, report)

        return self._start(work, model, owner, {"check": len(self.mine(model, owner))}, "check")

    def start_removal(self, model: str, owner: str) -> str:
        """Queue the removal of this person's whole stack, whatever state it is in; the job's id, its result None."""
        folder = self.folder(model, owner)

        def work(report: Reporter) -> None:
            with stage(report, "undo"), folders.alone(folder, "stack"):
                shutil.rmtree(folder, ignore_errors=True)

        return self._start(work, model, owner, {"remove": True}, "undo")

    def packed(self, model: str, owner: str) -> bytes:
        """This person's stack as a zip, for `python -m mega_core stack`. Raises BadInput on none, or a huge one."""
        files = sorted(path for path in self.folder(model, owner).glob("*") if path.is_file())
        if not files:
            raise BadInput("stack", "there is none.", "Add an edit first.")
        if sum(path.stat().st_size for path in files) > MAX_PACKED_BYTES:
            raise BadInput("stack", f"has more than {MAX_PACKED_BYTES // 2**20} MB.", "Undo some edits, or copy it.")
        buffer = BytesIO()
        with ZipFile(buffer, "w", ZIP_STORED) as box:
            for path in files:
                box.writestr(path.name, path.read_bytes())
        return buffer.getvalue()

    def _check_room(self, plan: Inspection, owner: str) -> None:
        there = self.mine(plan.model.name, owner)
        if len(there) >= MAX_STACKED:
            raise BadInput("stack", f"has {MAX_STACKED} edits already, the most there can be.", "Undo one first.")
        if any(holds(edit, plan) for edit in there):
            raise BadInput("stack", "this very edit is in it already.", "Undo it there to add it anew.")

    def _start(self, work: Work, model: str, owner: str, what: dict[str, object], method: str) -> str:
        key = digest_of({"stack": str(self.folder(model, owner)), **what})
        return self._core.start(work, owner=owner, key=key, lane=model, method=f"stack {method}", kind="stack")

    def _export(self, lm: ModelAdapter, stack: EditStack, folder: Path, report: Reporter) -> Path:
        from mega_core.alarms import alarms
        from mega_core.export import Made, export

        made = [Made(edit.method, edit.requests, edit.seed) for edit in stack.edits]
        licence = self._core.settings.model(lm.name).licence
        return export(lm, stack, folder, made, alarms(lm, stack, stack.requests), licence, report)


def holds(edit: StackedEdit, plan: Inspection) -> bool:
    """Whether a stacked edit answers this question: the same facts by the same method, parameters and seed."""
    return (edit.method, edit.requests, edit.seed) == (plan.method, plan.requests, plan.seed)


def _stacked(folder: Path) -> tuple[ModelRef, tuple[StackedEdit, ...]]:
    """The model and the edits of a saved stack, from its JSON alone."""
    from mega_core.stack import EditStack, headline, kind_of

    stack = EditStack.load(folder, str(headline(folder).get("model_digest")))
    return stack.model, tuple(
        StackedEdit(edit.name, kind_of(edit.change), edit.method, edit.requests, edit.seed) for edit in stack.edits
    )
