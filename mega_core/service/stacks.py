"""Edits made one after the other, kept in a folder, and models written out with edits in their weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mega_core import folders
from mega_core.events import Reporter, silent
from mega_core.methods.base import METHODS
from mega_core.records import EditRequest, Inspection, MethodRef, ModelRef, Receipt

if TYPE_CHECKING:
    from mega_core.models.adapter import ModelAdapter
    from mega_core.service.core import Core
    from mega_core.stack import EditStack


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

    def _export(self, lm: ModelAdapter, stack: EditStack, folder: Path, report: Reporter) -> Path:
        from mega_core.alarms import alarms
        from mega_core.export import Made, export

        made = [Made(edit.method, edit.requests, edit.seed) for edit in stack.edits]
        licence = self._core.settings.model(lm.name).licence
        return export(lm, stack, folder, made, alarms(lm, stack, stack.requests), licence, report)


def _stacked(folder: Path) -> tuple[ModelRef, tuple[StackedEdit, ...]]:
    """The model and the edits of a saved stack, from its JSON alone."""
    from mega_core.stack import EditStack, headline, kind_of

    stack = EditStack.load(folder, str(headline(folder).get("model_digest")))
    return stack.model, tuple(
        StackedEdit(edit.name, kind_of(edit.change), edit.method, edit.requests, edit.seed) for edit in stack.edits
    )
