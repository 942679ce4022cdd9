"""One mask that undoes edits it has never seen: does it, and what does it cost?

1. Edits: `mask_study.split`, each fact edited alone by the method with the model's defaults. Their factors are kept in
   the folder `--keep`, so that a second run reads them.
2. One mask at the share that the paper allows (10 %), and the same training at larger shares: RSR against pruned ratio.
3. Each on training edits, held-out facts and held-out relations; at 10 and 30 % beside controls, with editability.
4. How much of an unseen edit lies in the neurons that carry most of the others: what a shared mask can reach.
"""

# ruff: noqa: T201
from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bench.common import Row, Unmeasured, open_model

if TYPE_CHECKING:
    from mega_core.mask_study import Evaluation
    from mega_core.models.adapter import ModelAdapter

TRAIN_EDITS, JUDGED = 400, 100
SHARES = (0.10, 0.20, 0.30, 0.40)
SETUPS: tuple[tuple[str, str, Mapping[str, object]], ...] = (
    ("rome", "rome", {}),
    ("rome, C = I", "rome", {"covariance": "identity"}),
    ("memit", "memit", {}),
)
"""Label, method, what is set otherwise than the model's defaults."""
USUAL = ("rome", "memit")
"""Measured unless others are named."""
WHOLE = (0.10, 0.30)
"""Shares at which controls, editability and over-attention are measured too: the paper's, and what it takes here."""


class Folder:
    """A Memo on the disk; None keeps arrays until the process ends."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._kept: dict[str, dict[str, NDArray[Any]]] = {}

    def get_arrays(self, key: str) -> dict[str, NDArray[Any]] | None:
        """The arrays under this key, or None."""
        file = self._file(key)
        if key not in self._kept and file is not None and file.exists():
            with np.load(file, allow_pickle=False) as box:
                self._kept[key] = {name: box[name] for name in box.files}
        return self._kept.get(key)

    def put_arrays(self, key: str, arrays: Mapping[str, NDArray[Any]]) -> bool:
        """Keep them."""
        self._kept[key] = dict(arrays)
        file = self._file(key)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            fresh = file.with_suffix(".making.npz")
            np.savez(fresh, **arrays)  # type: ignore[arg-type]  # the stubs want one type for all names
            fresh.replace(file)
        return True

    def _file(self, key: str) -> Path | None:
        return None if self._path is None else self._path / f"{sha256(key.encode()).hexdigest()[:32]}.npz"


def measure(
    quick: bool,
    models: Sequence[str] = (),
    methods: Sequence[str] = (),
    count: int | None = None,
    keep: Path | None = None,
) -> list[Row]:
    """Rows "model / setup / mask / set / what"; `count` is how many edits to train on, `methods` picks setups."""
    from mega_core.settings import Settings

    settings = Settings.read()
    names = list(models) or [entry.name for entry in settings.available() if entry.embedded][:1]
    if not names:
        raise Unmeasured("no embedded model is here")
    rows: list[Row] = []
    for name in names:
        lm = open_model(name)
        lm.memo = Folder(keep)
        for label, method, given in SETUPS:
            if label in (methods or USUAL):
                rows += of_setup(lm, label, method, given, count or (30 if quick else TRAIN_EDITS), quick)
    return rows


def of_setup(lm: ModelAdapter, label: str, method: str, given: Mapping[str, object], n: int, quick: bool) -> list[Row]:
    """The masks of one kind of edit."""
    from mega_core import mask_study as study
    from mega_core.events import silent
    from mega_core.masking import train
    from mega_core.settings import Settings

    defaults = Settings.read().model(lm.name).defaults
    judged = 10 if quick else JUDGED
    plan = study.Plan(method, n, judged, given=tuple(given.items()))
    start = perf_counter()
    own = defaults.get(method, {})
    edits = study.edit_all(lm, method, own, study.split(n, judged).train, given=given)
    layer = study.layer_of(lm, edits, None)
    ready = train.prepare(lm, layer, edits)
    told(f"{lm.name} / {label}: {len(edits)} edits", start)
    rows: list[Row] = []
    held = study.edit_all(lm, method, own, study.split(n, judged).facts, given=given)
    for share in SHARES:
        far = study.reach(lm, layer, edits[: 4 * judged], held, share)
        note = f"of training edits {100 * far.seen:.0f} %; half are reversed once {100 * far.needed:.0f} % is gone"
        rows.append(Row("mask", f"{lm.name} / {label} / reach / columns / {share:g}", 100 * far.unseen, "%", note))
    for share in SHARES[:1] if quick else SHARES:
        params = replace(train.TOP, s_max=share, epochs=2 if quick else train.TOP.epochs)
        start = perf_counter()
        mask = study.train_mask(lm, plan, own, layer, params, silent, edits, ready)
        seconds = perf_counter() - start
        told(f"{lm.name} / {label} at {share:g}: trained", start)
        whole = share in WHOLE
        found = study.evaluate_mask(
            lm, mask, defaults, judged, train_cases=judged, editable=(2 if quick else 30) if whole else 0, full=whole
        )
        told(f"{lm.name} / {label} at {share:g}: judged", start)
        rows += rows_of(f"{lm.name} / {label}", share, found, seconds, whole)
    return rows


def rows_of(name: str, share: float, found: Evaluation, seconds: float, whole: bool) -> list[Row]:
    """One evaluation as rows; what has no number gives none. `whole`: controls, editability and over-attention too."""
    rows: list[Row] = []
    at = f"{100 * share:.0f} %"

    def add(what: str, value: float, unit: str = "%", note: str = "") -> None:
        if isfinite(value):
            rows.append(Row("mask", f"{name} / {what}", value, unit, note))

    def label(mask: str) -> str:
        return mask if mask in ("K = 0", "none") else f"{mask}, {at}"

    for judged in found.rows:
        if judged.mask == "trained" or whole:
            place = f"{label(judged.mask)} / {judged.set}, {judged.kind}"
            one, note = judged.scores, f"{judged.scores.cases} prompts, took {100 * judged.scores.took:.0f} %"
            for what in ("rsr", "top1", "top5", "top10", "top100"):
                add(f"{place} / {what}", 100 * getattr(one, what), "%", note)
            add(f"{place} / rsm", one.rsm, "nats", note)
    for lost in found.collateral:
        if lost.mask == "trained" or whole:
            add(f"{label(lost.mask)} / unedited / pruned", 100 * lost.pruned)
            add(f"{label(lost.mask)} / unedited / recall", 100 * lost.recall)
            add(f"{label(lost.mask)} / unedited / perplexity", lost.perplexity, "")
    add(f"{label('trained')} / training / seconds", seconds, "s")
    add(f"{label('trained')} / edits / perplexity", found.language["masked"], "",
        f"edited {found.language['edited']:.3g}")  # fmt: skip
    for one_edit in found.editability:
        place = f"{one_edit.where}" if one_edit.where.startswith("free") else f"{one_edit.where}, {at}"
        add(f"editability / {place} / Acc", 100 * one_edit.accuracy, "%", f"{one_edit.n} edits")
        add(f"editability / {place} / paraphrase", 100 * one_edit.paraphrase)
    for piece in found.shares:
        state = f"{piece.state}, {at}" if piece.state == "masked" else piece.state
        add(f"over-attention / {state}: {piece.candidate} / {piece.module} {piece.layer}", piece.mean, "logits",
            f"standard error {piece.error:.2f}")  # fmt: skip
    add("layer / matters / layer", found.mask.layer, "", "degenerate" if found.degenerate else "not degenerate")
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """Per setup the masks, the editability, the over-attention, and how much of an edit a mask can reach."""
    cells: dict[str, dict[tuple[str, str, str], Row]] = {}
    for row in rows:
        model, label, one, two, three = row.name.split(" / ")
        cells.setdefault(f"{model} / {label}", {})[one, two, three] = row
    text: list[str] = []
    for name, found in cells.items():
        model, label = name.split(" / ")
        layer = found["layer", "matters", "layer"]
        text += [
            f"**{model}**, {label} edits, mask at layer {layer.value:.0f} ({layer.note}). RSR / top-1 overlap, %, of",
            "edits that took; recall and perplexity are the unedited model's under the mask.",
            "",
            "| mask | training | held-out facts | paraphrases | held-out relations | recall, % | perplexity |",
            "|---|" + "---:|" * 6,
        ]
        masks = dict.fromkeys(one for one, two, _ in found if two == "unedited" or ", edit" in two)
        for mask in sorted(masks, key=lambda mask: not mask.startswith("trained")):
            sets = ("training, edit", "held-out facts, edit", "held-out facts, paraphrase", "held-out relations, edit")
            figures = [_pair(found.get((mask, one, "rsr")), found.get((mask, one, "top1"))) for one in sets]
            more = [found.get((mask, "unedited", what)) for what in ("recall", "perplexity")]
            figures += ["" if row is None else f"{row.value:,.4g}" for row in more]
            text.append(f"| {mask} | {' | '.join(figures)} |")
        text += ["", "| ROME afterwards | Acc, % | paraphrases, % |", "|---|---:|---:|"]
        for where in dict.fromkeys(two for one, two, _ in found if one == "editability"):
            shares = [found.get(("editability", where, what)) for what in ("Acc", "paraphrase")]
            text.append(
                f"| {where} | " + " | ".join("" if row is None else f"{row.value:.0f}" for row in shares) + " |"
            )
        text += ["", *_attention(found), ""]
        for (one, _, part), row in found.items():
            if one == "reach":
                text.append(
                    f"The {100 * float(part):.0f} % of neurons that carry most carry {row.value:.0f} % of an unseen "
                    f"edit ({row.note})."
                )
        text.append("")
    return "\n".join(text)


def _pair(rsr: Row | None, top: Row | None) -> str:
    return "" if rsr is None or top is None else f"{rsr.value:.0f} / {top.value:.0f}"


def _attention(found: Mapping[tuple[str, str, str], Row]) -> list[str]:
    """Direct contributions at the last position, summed over layers."""
    lines = ["| all layers, logits | attention: old | attention: new | MLPs: old | MLPs: new |", "|---|" + "---:|" * 4]
    states = dict.fromkeys(two.partition(":")[0] for one, two, _ in found if one == "over-attention")
    for state in states:
        sums = [
            sum(
                row.value
                for (one, two, place), row in found.items()
                if one == "over-attention" and two == f"{state}: {candidate}" and place.startswith(module)
            )
            for module in ("attn", "mlp")
            for candidate in ("old", "new")
        ]
        lines.append(f"| {state} | " + " | ".join(f"{value:.1f}" for value in sums) + " |")
    return lines


def told(what: str, start: float) -> None:
    """Progress on the error stream."""
    print(f"  {what}, {perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
