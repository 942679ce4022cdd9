"""Verification of cells: prepare an edit, apply it, change what the cells name, restore (see attribution/verify).

1. What can be refused is refused before the edit is prepared.
2. The other state is recorded where a patch needs it, and the unedited matrices are kept where they may be put back.
3. The cells are changed in the state that is asked about. For the unedited model an edit is prepared only to patch
   from it.
4. Receipt: digests of the live parameters before and after, hooks left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import Tensor

from mega_core import frames
from mega_core.attribution import verify as verifying
from mega_core.errors import BadInput, UnsupportedMethod
from mega_core.events import Event, Note, Reporter, silent, stage
from mega_core.methods.base import METHODS, Method
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.records import EditRequest, Inspection, Receipt

STATES = ("before", "after")


@dataclass(frozen=True)
class Verification:
    """What came out."""

    question: Inspection
    table: pd.DataFrame
    """The frame `verified`."""
    tokens: tuple[str, ...]
    """Of the prompt: what a cell's position counts."""
    receipt: Receipt
    notes: tuple[str, ...] = ()


def verify(
    plan: Inspection,
    lm: ModelAdapter,
    cells: Sequence[str],
    action: str = "ablate",
    state: str = "after",
    *,
    factor: float = 0.0,
    case: int = 0,
    draws: int = verifying.DRAWS,
    seed: int = 0,
    report: Reporter = silent,
) -> Verification:
    """Each of `cells` is a cell or several joined by "+", on the prompt of the plan's request number `case`.

    The model is bit-identical afterwards, also when this raises. Raises BadInput on what can't be, and whatever the
    method raises.
    """
    method, params = _fit(plan, lm)
    request, sets = _asked(plan, lm, cells, action, state, factor, case, draws)
    patched = action == "patch"
    notes: list[str] = []

    def tell(event: Event) -> None:
        if isinstance(event, Note) and event.text not in notes:
            notes.append(event.text)
        report(event)

    def verified(**more: Any) -> pd.DataFrame:
        return verifying.verify(
            lm, request, sets, action, state=state, case=case, factor=factor, draws=draws, seed=seed, report=tell,
            **more,
        )  # fmt: skip

    digest = lm.live_digest()
    if state == "before" and not patched:
        table = verified()
    else:
        other = verifying.see(lm, request, sets) if patched and state == "after" else None
        with stage(tell, "edit"):
            change = method.prepare(lm, plan.requests, params, plan.seed, tell)
        kept = _originals(lm, sets, change.summary()) if action == "restore" else None
        with change.applied(lm):
            if state == "after":
                table = verified(other=other, originals=kept)
            else:
                other = verifying.see(lm, request, sets)
        if state == "before":
            table = verified(other=other)
    after, hooks = lm.live_digest(), lm.hook_count()
    shown = tokens.token_strings(lm.tokenizer, tokens.prompt_ids(lm.tokenizer, request.prompt))
    receipt = Receipt(after == digest and hooks == 0, digest, after, hooks)
    return Verification(plan, frames.check(table, "verified"), tuple(shown), receipt, tuple(notes))


def _fit(plan: Inspection, lm: ModelAdapter) -> tuple[Method[Any], Any]:
    method = METHODS[plan.method.name]
    if plan.method.version != method.version or plan.model != lm.ref:
        raise BadInput("question", "it is about another model or another version of the method.", "Ask again.")
    if reason := method.needs(lm.spec):
        raise UnsupportedMethod(f"{method.title} can't edit {lm.name}: {reason}.", "Choose another method or model.")
    return method, method.read(plan.method)


def _asked(
    plan: Inspection,
    lm: ModelAdapter,
    cells: Sequence[str],
    action: str,
    state: str,
    factor: float,
    case: int,
    draws: int,
) -> tuple[EditRequest, list[verifying.Cells]]:
    """Step 1."""
    if state not in STATES:
        raise BadInput("state", f"there is no {state[:20]!r}.", f"Choose one of: {', '.join(STATES)}.")
    if not 0 <= case < len(plan.requests):
        raise BadInput("case", f"there is no fact {case}.", f"Choose one of 0 to {len(plan.requests) - 1}.")
    if not 0 <= draws <= 100:
        raise BadInput("controls", f"{draws} is out of range.", "Allowed: 0 to 100.")
    if action == "restore" and state == "before":
        raise BadInput("state", "before the edit there is nothing to restore.", "Choose after.")
    request = plan.requests[case]
    sets = [verifying.read_cells(text) for text in cells]
    verifying.check(lm, request, sets, action, factor)
    return request, sets


def _originals(
    lm: ModelAdapter, sets: Sequence[verifying.Cells], changed: pd.DataFrame
) -> dict[tuple[int, str], Tensor]:
    """The unedited matrices that the cells name. Raises BadInput on one that the edit leaves alone."""
    rows = changed[changed["kind"] == "weights"]
    edited = set(zip(rows["layer"].tolist(), rows["site"].tolist(), strict=True))
    asked = {(cell.layer, str(cell.site)) for cells in sets for cell in cells}
    for layer, site in sorted(asked - edited):
        known = ", ".join(f"matrix:{layer}.{site}" for layer, site in sorted(edited))
        raise BadInput(
            "cell",
            f"matrix:{layer}.{site} is not changed by this edit.",
            f"Changed: {known}." if known else "It changes no matrix: name another kind of cell.",
        )
    return {at: lm.weight(*at).detach().clone() for at in asked}
