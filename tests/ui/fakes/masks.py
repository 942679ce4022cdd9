"""What the pages see of `service.masks`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from mega_core.errors import BadInput
from mega_core.service.masks import Detected, Judgement, KeptMask, Suspect

HOSTILE = "![x](http://evil.example/a.png) <b>x</b> :red[y]"


def make_mask(number: int = 1, *, judged: bool = True) -> KeptMask:
    """A mask of a 6 x 8 matrix."""
    return KeptMask(
        id=f"{number:064x}", model="atlas-gpt2", method="rome", n=100, edits=99, layer=2, site="mlp_down", shape=(6, 8),
        pruned=0.3, seed=number, made=f"2026-01-0{number}T10:00:00+00:00", seconds=61.0,
        held_relations=("capital", "river"), neurons=(1.0, 0.8, 0.3, 0.1, 0.1, 0.1, 0.0, 0.0),
        outputs=(0.5, 0.4, 0.3, 0.3, 0.2, 0.1), blocks=((0.9, 0.2), (0.1, 0.0)), judged=judged,
    )  # fmt: skip


def make_judgement(mask_id: str, *, degenerate: bool = False, hostile: bool = False) -> Judgement:
    """What such a mask does: 75 % of unseen facts, 50 % of unseen relations."""
    rsr = {"trained": (1.0, 0.75, 0.5), "random": (0.0, 0.05, 0.0), "largest change": (0.5, 0.4, 0.4),
           "K = 0": (0.9, 0.9, 0.9)}  # fmt: skip
    sets = ("training", "held-out facts", "held-out relations")
    reversal = [
        {"mask": mask, "set": set_, "kind": kind, "cases": 20, "took": 1.0, "rsr": value, "rsm": 3.0, "top1": value,
         "top5": 0.5, "top10": 0.5, "top100": 0.5}
        for mask, values in rsr.items() for set_, value in zip(sets, values, strict=True)
        for kind in ("edit", "paraphrase")
    ]  # fmt: skip
    edits = [
        {"set": set_, "subject": f"Subject {i}", "prompt": HOSTILE if hostile and i == 0 else f"Subject {i} lies in",
         "old": "Paris", "new": "Rome", "edited_says": " Rome", "masked_says": " Paris, a city",
         "margin_original": 5.0, "margin_edited": -6.0, "margin_masked": 4.0 if i else -2.0, "took": i != 3,
         "reversed": bool(i)}
        for set_ in sets for i in range(4)
    ]  # fmt: skip
    states = {"original": 0.0, "edited": 8.0, "masked": 2.0}
    heads = [
        {"state": state, "layer": layer, "head": head, "candidate": candidate,
         "mean": peak * (layer == 5 and head == 1) + 0.1 * layer}
        for state, peak in states.items() for layer in range(8) for head in range(4) for candidate in ("old", "new")
    ]  # fmt: skip
    modules = [
        {"state": state, "layer": layer, "module": module, "candidate": candidate, "mean": peak * layer / 7,
         "error": 0.5}
        for state, peak in states.items() for layer in range(8) for module in ("attn", "mlp")
        for candidate in ("old", "new")
    ]  # fmt: skip
    collateral = [("none", 0.0, 0.99, 2.42), ("trained", 0.3, 0.96, 2.43), ("random", 0.3, 0.99, 2.42),
                  ("K = 0", 1.0, 0.3, 2.45)]  # fmt: skip
    editable = [("free, layer 2", 6, 1.0, 1.0), ("masked, layer 2", 6, 0.25, 0.2),
                ("random mask, layer 2", 6, 0.9, 0.9)]  # fmt: skip
    return Judgement(
        id=mask_id, size="quick", seconds=60.0, degenerate=degenerate, reversal=pd.DataFrame(reversal),
        collateral=pd.DataFrame(collateral, columns=["mask", "pruned", "recall", "perplexity"]),
        editability=pd.DataFrame(editable, columns=["where", "n", "accuracy", "paraphrase"]),
        modules=pd.DataFrame(modules), heads=pd.DataFrame(heads), edits=pd.DataFrame(edits),
        perplexity={"original": 2.42, "edited": 2.5, "masked": 2.47},
    )  # fmt: skip


def make_detection(*, edited: bool = True, hostile: bool = False) -> Detected:
    """A report about eight layers; layer 2's MLP was edited."""
    rows = []
    for layer in range(8):
        for site in ("mlp_down", "attn_out"):
            found = edited and (layer, site) == (2, "mlp_down")
            rows.append(
                {"layer": layer, "site": site, "kind": "low_rank" if found else "unchanged",
                 "verdict": "low-rank edit" if found else "unchanged", "score": 0.98 if found else 0.0,
                 "rank": int(found), "share": 1.0 if found else 0.0, "relative_norm": 0.06 if found else 0.0}
            )  # fmt: skip
    text = HOSTILE if hostile else "the Eiffel Tower"
    clue = {"layer": 2, "site": "mlp_down", "neurons": [[17, 0.2]], "promoted": [[" Rome", 3.0]],
            "suppressed": [[" Paris", -2.0]], "places": [[text, 9.0]], "says": [[" Rome", 0.8]]}  # fmt: skip
    return Detected(
        id="d" * 64, label=HOSTILE if hostile else "exports/tower", reference="atlas-gpt2", made="2026-01-02",
        seconds=4.0, score=0.98 if edited else 0.0, verdict="low-rank edit" if edited else "unchanged",
        matrices=pd.DataFrame(rows), clues=(clue,) if edited else (), notes=(text,) if hostile else (), fitted={},
    )  # fmt: skip


@dataclass
class FakeMasks:
    """Frozen answers. Change its fields to make it empty, judged or broken."""

    masks: dict[str, KeptMask] = field(default_factory=dict)
    judgements: dict[str, Judgement] = field(default_factory=dict)
    reports: dict[str, Detected] = field(default_factory=dict)
    folders: tuple[Suspect, ...] = ()
    mine: tuple[str, ...] = ()
    """Run ids of own edits."""
    broken: Exception | None = None
    started: list[tuple[object, ...]] = field(default_factory=list)

    def hold(self, mask: KeptMask, judgement: Judgement | None = None) -> None:
        self.masks[mask.id] = mask
        if judgement is not None:
            self.judgements[mask.id] = judgement

    def editors(self, model: str) -> tuple[str, ...]:
        return ("rome", "memit")

    def layers(self, model: str, method: str) -> tuple[int, ...]:
        return (2,) if method == "rome" else (2, 3)

    def seconds_estimate(self, model: str, method: str, n: int) -> float | None:
        return 8.0 + 0.5 * n

    def mask_id(self, model: str, method: str, n: int, *, layer: int | None, pruned: float, seed: int) -> str:
        if self.broken is not None:
            raise self.broken
        return f"{1 + seed:064x}"

    def start_training(
        self, model: str, method: str, n: int, owner: str, *, layer: int | None, pruned: float, seed: int
    ) -> str:
        self.started.append(("train", model, method, n, layer, pruned, seed))
        return "j" * 32

    def start_judging(self, mask_id: str, owner: str, size: str = "quick") -> str:
        if mask_id not in self.masks:
            raise BadInput("mask", "it is not kept here.", "Train it again.")
        self.started.append(("judge", mask_id, size))
        return "j" * 32

    def own(self, kept: KeptMask, owner: str) -> tuple[str, ...]:
        return self.mine

    def start_own(self, mask_id: str, owner: str) -> str:
        self.started.append(("own", mask_id))
        return "j" * 32

    def file(self, mask_id: str) -> bytes:
        return b"mask"

    def listed(self) -> tuple[KeptMask, ...]:
        return tuple(self.masks.values())

    def kept(self, mask_id: str) -> KeptMask | None:
        return self.masks.get(mask_id)

    def judgement(self, mask_id: str) -> Judgement | None:
        return self.judgements.get(mask_id)

    def suspects(self) -> tuple[Suspect, ...]:
        return self.folders

    def start_detecting(self, suspect_id: str, reference: str, owner: str) -> str:
        if self.broken is not None:
            raise self.broken
        self.started.append(("detect", suspect_id, reference))
        return "j" * 32

    def detection(self, report_id: str) -> Detected | None:
        return self.reports.get(report_id)

    def detections(self) -> tuple[Detected, ...]:
        return tuple(self.reports.values())


def suspect(label: str = "exports/tower") -> Suspect:
    """An allowed folder."""
    return Suspect("5" * 64, label, Path("/nowhere"))
