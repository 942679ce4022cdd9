"""One Mask: training and judging a mask that undoes edits, and looking for edits in a model's folder.

Masks that pages train are kept in cache_dir/masks: `<id>.mask` (see masking.masks), `<id>.json` (what it is, with its
picture) and, once judged, `<id>.judged.json`. Reports of the detector are kept in cache_dir/detections as `<id>.json`.
An id is the digest of the question, so the same question is answered once. Whoever has an id can open it; they hold
no text of a person's.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mega_core.errors import ActionableError, BadInput, StoreError
from mega_core.events import Reporter, silent
from mega_core.folders import write_file
from mega_core.keys import digest
from mega_core.methods.base import METHODS
from mega_core.records import as_plain
from mega_core.service.core import memory_errors

if TYPE_CHECKING:
    from mega_core.mask_study import Evaluation
    from mega_core.masking.detect import Detection
    from mega_core.masking.masks import Mask
    from mega_core.service.core import Core

log = logging.getLogger(__name__)

KIND, OWN, DETECT = "mask", "mask_own", "detect"
"""Kinds of jobs."""
METHOD_NAMES = ("rome", "memit")
"""Editors whose changes a mask can read."""
FEWEST, MOST = 10, 200
"""Edits that pages train on."""
PRUNED = (0.05, 0.5)
"""Least and greatest share that pages cut."""
TIMES = 4
"""A mask may take so many times as long as an edit may."""
KEPT_VERSION = 1
MOST_BYTES = 64 * 2**20
MOST_OWN = 40
"""Runs of a person that are looked through for edits to try under a mask."""
MOST_FOLDERS, DEPTH = 200, 4
"""Model folders that are offered, and how deep below an allowed folder they are looked for."""
SIZES = {"quick": (20, 6), "full": (100, 30)}
"""Size -> edits of each set, and facts edited under the mask."""
_ID = re.compile(r"[0-9a-f]{64}")
_SECONDS_EACH = {"rome": 0.55, "memit": 1.2}
"""Of one edit and its part in the training, on an embedded model and one core; until masks were trained here."""
_SECONDS_ONCE = 8.0


@dataclass(frozen=True, slots=True)
class KeptMask:
    """A mask that was trained here, as pages show it."""

    id: str
    model: str
    method: str
    n: int
    edits: int
    """That it was trained on: those of `n` that the method did not refuse."""
    layer: int
    site: str
    shape: tuple[int, int]
    """(out, in)."""
    pruned: float
    """Share of the weights that it removes."""
    seed: int
    made: str
    """ISO 8601."""
    seconds: float
    held_relations: tuple[str, ...]
    """Relations that it has not seen."""
    neurons: tuple[float, ...]
    """Share of each neuron's weights that is cut."""
    outputs: tuple[float, ...]
    """Share of each output's weights that is cut."""
    blocks: tuple[tuple[float, ...], ...]
    """Share cut by block of outputs and neurons, the most cut first."""
    judged: bool


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a mask does, as tables."""

    id: str
    size: str
    seconds: float
    degenerate: bool
    """Removing the whole matrix reverses the edits at no price, so reversing them shows nothing."""
    reversal: pd.DataFrame
    """mask, set, kind, cases, took, rsr, rsm, top1, top5, top10, top100."""
    collateral: pd.DataFrame
    """mask, pruned, recall, perplexity: of the unedited model under it."""
    editability: pd.DataFrame
    """where, n, accuracy, paraphrase."""
    modules: pd.DataFrame
    """state, layer, module, candidate, mean, error: logits."""
    heads: pd.DataFrame
    """state, layer, head, candidate, mean: logits."""
    edits: pd.DataFrame
    """set, subject, prompt, old, new, edited_says, masked_says, margin_original, margin_edited, margin_masked, took,
    reversed."""
    perplexity: Mapping[str, float | None]
    """original, edited, masked."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A model folder that the operator allows to be searched."""

    id: str
    label: str
    """Its place below the allowed folder; never an absolute path."""
    folder: Path


@dataclass(frozen=True, slots=True)
class Detected:
    """A report of the detector, as pages show it."""

    id: str
    label: str
    reference: str
    """A catalogue model; empty when there was none."""
    made: str
    seconds: float
    score: float
    verdict: str
    matrices: pd.DataFrame
    """layer, site, kind, verdict, score, rank, share, relative_norm."""
    clues: tuple[Mapping[str, Any], ...]
    """Of each suspected matrix: layer, site, neurons, promoted, suppressed, places, says."""
    notes: tuple[str, ...]
    fitted: Mapping[str, Any]
    """What the score's coefficients were made on."""


REVERSAL = ("mask", "set", "kind", "cases", "took", "rsr", "rsm", "top1", "top5", "top10", "top100")
COLLATERAL = ("mask", "pruned", "recall", "perplexity")
EDITABILITY = ("where", "n", "accuracy", "paraphrase")
MODULES = ("state", "layer", "module", "candidate", "mean", "error")
HEADS = ("state", "layer", "head", "candidate", "mean")
EDITS = ("set", "subject", "prompt", "old", "new", "edited_says", "masked_says", "margin_original", "margin_edited",
         "margin_masked", "took", "reversed")  # fmt: skip
MATRICES = ("layer", "site", "kind", "verdict", "score", "rank", "share", "relative_norm")


class Masks:
    """Masks over edited weights, and the detector."""

    def __init__(self, core: Core) -> None:
        self._core = core

    # Here and now ----------------------------------------------------------------------------------------------------

    def train(
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
        entry, chosen = self._core.asked(model, method, (), seed)
        with self._core.held(entry.ref(), report) as lm:
            from mega_core import mask_study

            plan = mask_study.Plan(chosen.name, n, seed=seed, together=together, given=tuple((params or {}).items()))
            training = mask_study.settings_of(settings, pruned, epochs)
            mask = mask_study.train_mask(lm, plan, entry.defaults.get(method, {}), layer, training, report)
            mask.save(out)
        return mask

    def evaluate(self, mask: Path, n: int = 100, report: Reporter = silent) -> Evaluation:
        """Judge a mask file on edits that it has not seen, beside its controls."""
        self._core.pool()  # sets up what the next line imports
        from mega_core.masking.masks import Mask

        found = Mask.load(mask)
        entry = self._core.settings.model(found.model)
        with self._core.held(entry.ref(), report) as lm:
            from mega_core import mask_study

            return mask_study.evaluate_mask(lm, found, entry.defaults, n, report)

    def detect(
        self,
        folder: Path,
        reference: str | None = None,
        mask: Path | None = None,
        prompts: Sequence[str] = (),
        report: Reporter = silent,
    ) -> Detection:
        """Look for knowledge edits in a model's folder, against a catalogue model or another folder if one is named."""
        self._core.pool()  # sets up what the next line imports
        from mega_core.masking.detect import detect_folder

        with memory_errors():
            return detect_folder(folder, self._core.settings, reference, mask, prompts, report)

    # Masks that are kept ---------------------------------------------------------------------------------------------

    def editors(self, model: str) -> tuple[str, ...]:
        """Methods whose edits of this model a mask can be trained on."""
        entry = self._core.settings.model(model)
        return tuple(name for name in METHOD_NAMES if self._core.unsupported(METHODS[name], entry) is None)

    def layers(self, model: str, method: str) -> tuple[int, ...]:
        """Where this method writes in this model by default: the layers a mask can lie on."""
        entry = self._core.settings.model(model)
        params = dict(METHODS[method].ref(None, entry.defaults.get(method)).params)
        found: set[int] = set()
        for low, high in re.findall(r"(\d+)(?:-(\d+))?", str(params.get("layers", params.get("layer", "")))):
            found |= set(range(int(low), int(high or low) + 1))
        return tuple(sorted(found))

    def seconds_estimate(self, model: str, method: str, n: int) -> float | None:
        """What training takes: by masks trained here with this method, else a rule for embedded models, else None."""
        same = [one for one in self.listed() if (one.model, one.method) == (model, method) and one.edits]
        if same:
            each = sorted((one.seconds - _SECONDS_ONCE) / one.edits for one in same)[len(same) // 2]
            return _SECONDS_ONCE + n * max(each, 0.05)
        known = self._core.settings.model(model).embedded and method in _SECONDS_EACH
        return _SECONDS_ONCE + n * _SECONDS_EACH[method] if known else None

    def mask_id(self, model: str, method: str, n: int, *, layer: int | None, pruned: float, seed: int) -> str:
        """The id that such a mask has. Raises an ActionableError on what can't be trained."""
        entry, chosen = self._core.asked(model, method, (), seed)
        if chosen.name not in self.editors(model):
            raise BadInput("method", f"{chosen.title} writes nothing that a mask can read.", "Choose ROME or MEMIT.")
        if not FEWEST <= n <= MOST:
            raise BadInput("n", f"{n} edits.", f"Choose {FEWEST} to {MOST}.")
        if not PRUNED[0] <= pruned <= PRUNED[1]:
            raise BadInput("pruned", f"{pruned:.0%}.", f"Choose {PRUNED[0]:.0%} to {PRUNED[1]:.0%}.")
        return digest(
            {
                "mask": KEPT_VERSION,
                "weights": self._core.weights(entry),
                "model": entry.ref(),
                "method": chosen.ref(None, entry.defaults.get(chosen.name)),
                "n": n,
                "layer": layer,
                "pruned": round(pruned, 4),
                "seed": seed,
            }
        )

    def start_training(
        self, model: str, method: str, n: int, owner: str, *, layer: int | None, pruned: float, seed: int
    ) -> str:
        """Queue a training; its job's id, and the job's result is the mask's id. Raises as mask_id(), or Busy."""
        mask_id = self.mask_id(model, method, n, layer=layer, pruned=pruned, seed=seed)

        def work(report: Reporter) -> str:
            started = time.monotonic()
            path = self._path("masks", f"{mask_id}.mask")
            with _keeping():
                path.parent.mkdir(parents=True, exist_ok=True)
            mask = self.train(model, method, n, path, layer=layer, pruned=pruned, seed=seed, report=report)
            from mega_core.service.mask_work import picture

            plain = {
                "version": KEPT_VERSION,
                "model": mask.model,
                "method": method,
                "n": n,
                "edits": mask.trained["edits"],
                "layer": mask.layer,
                "site": mask.site,
                "shape": list(mask.keep.shape),
                "pruned": mask.pruned,
                "seed": seed,
                "made": _now(),
                "seconds": time.monotonic() - started,
                "held_relations": mask.trained["held_relations"],
                **picture(mask),
            }
            self._write("masks", f"{mask_id}.json", plain)
            return mask_id

        return self._start(work, owner, mask_id, model, f"mask {method} {n}", KIND)

    def start_judging(self, mask_id: str, owner: str, size: str = "quick") -> str:
        """Queue the judging of a kept mask; its job's id, and the job's result is the mask's id. Raises BadInput when
        there is no such mask, or Busy.
        """
        if size not in SIZES:
            raise BadInput("size", f"{size[:20]!r} is not one of its choices.", f"Choose {' or '.join(SIZES)}.")
        kept = self.kept(mask_id)
        if kept is None:
            raise BadInput("mask", "it is not kept here.", "Train it again.")
        n, editable = SIZES[size]

        def work(report: Reporter) -> str:
            started = time.monotonic()
            self._core.pool()  # sets up what the next lines import
            from mega_core.masking.masks import Mask
            from mega_core.service import mask_work

            mask = Mask.load(self._path("masks", f"{mask_id}.mask"))
            entry = self._core.settings.model(kept.model)
            with self._core.held(entry.ref(), report) as lm:
                found = mask_work.judge(lm, mask, entry.defaults, n, editable, report)
            plain = {**found, "version": KEPT_VERSION, "size": size, "seconds": time.monotonic() - started}
            self._write("masks", f"{mask_id}.judged.json", plain)
            return mask_id

        return self._start(
            work, owner, digest({"judge": mask_id, "size": size}), kept.model, f"judge {kept.method} {size}", KIND
        )

    def own(self, kept: KeptMask, owner: str) -> tuple[str, ...]:
        """Run ids of this owner's edits that can be tried under a mask while they are stored, newest first: one fact
        with a known original object, edited in the mask's model by a method that a mask can read.
        """
        runs = self._core.notebook.runs(session=owner, model=kept.model, limit=MOST_OWN)
        return tuple(
            entry.run.digest
            for entry in runs
            if entry.run.method in METHOD_NAMES and entry.run.edits == 1 and entry.run.target_true
        )

    def start_own(self, mask_id: str, owner: str) -> str:
        """Queue own() edits under a kept mask; its job's id, and the job's result is a table with the columns of
        Judgement.edits but for `set`. Nothing of it is kept. Raises BadInput when there is nothing to try, or Busy.
        """
        kept = self.kept(mask_id)
        stored = () if kept is None else tuple(filter(None, map(self._core.cached, self.own(kept, owner))))
        if kept is None or not stored:
            raise BadInput("mask", "there is no edit of yours that it could be tried on.", "Make one with ROME.")
        questions = [report.question for report in stored]

        def work(report: Reporter) -> pd.DataFrame:
            self._core.pool()  # sets up what the next lines import
            from mega_core.masking.masks import Mask
            from mega_core.service import mask_work

            mask = Mask.load(self._path("masks", f"{mask_id}.mask"))
            entry = self._core.settings.model(kept.model)
            asked = [(question.method, question.requests[0], question.seed) for question in questions]
            with self._core.held(entry.ref(), report) as lm:
                mask.check(lm)
                return _table(mask_work.under_mask(lm, mask, asked, report), EDITS[1:])

        key = digest({"own": mask_id, "runs": [report.digest for report in stored]})
        return self._start(work, owner, key, kept.model, f"own edits {len(questions)}", OWN)

    def listed(self) -> tuple[KeptMask, ...]:
        """Every kept mask, newest first."""
        found = []
        with suppress(OSError):
            for file in self._path("masks").glob("*.json"):
                kept = self.kept(file.name.removesuffix(".json"))
                if kept is not None:
                    found.append(kept)
        return tuple(sorted(found, key=lambda one: one.made, reverse=True))

    def kept(self, mask_id: str) -> KeptMask | None:
        """A mask by its id, or None; safe with any text."""
        plain = self._read("masks", mask_id, ".json")
        if plain is None or not self._path("masks", f"{mask_id}.mask").is_file():
            return None
        try:
            out, into = plain["shape"]
            return KeptMask(
                id=mask_id,
                model=str(plain["model"]),
                method=str(plain["method"]),
                n=int(plain["n"]),
                edits=int(plain["edits"]),
                layer=int(plain["layer"]),
                site=str(plain["site"]),
                shape=(int(out), int(into)),
                pruned=float(plain["pruned"]),
                seed=int(plain["seed"]),
                made=str(plain["made"]),
                seconds=float(plain["seconds"]),
                held_relations=tuple(map(str, plain["held_relations"])),
                neurons=tuple(map(float, plain["neurons"])),
                outputs=tuple(map(float, plain["outputs"])),
                blocks=tuple(tuple(map(float, row)) for row in plain["blocks"]),
                judged=self._path("masks", f"{mask_id}.judged.json").is_file(),
            )
        except (KeyError, TypeError, ValueError) as error:
            log.warning("The kept mask %s can't be read: %s", mask_id[:12], error)
            return None

    def judgement(self, mask_id: str) -> Judgement | None:
        """What a kept mask does, or None while it has not been judged; safe with any text."""
        plain = self._read("masks", mask_id, ".judged.json")
        if plain is None:
            return None
        try:
            rows = [{**row, **row["scores"]} for row in plain["rows"]]
            return Judgement(
                id=mask_id,
                size=str(plain["size"]),
                seconds=float(plain["seconds"]),
                degenerate=bool(plain["degenerate"]),
                reversal=_table(rows, REVERSAL),
                collateral=_table(plain["collateral"], COLLATERAL),
                editability=_table(plain["editability"], EDITABILITY),
                modules=_table(plain["over_attention"], MODULES),
                heads=_table(plain["heads"], HEADS),
                edits=_table(plain["edits"], EDITS),
                perplexity={str(name): value for name, value in plain["perplexity"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            log.warning("The judgement of the mask %s can't be read: %s", mask_id[:12], error)
            return None

    def file(self, mask_id: str) -> bytes:
        """The mask's own file, for the commands. Raises BadInput when there is none."""
        try:
            if _ID.fullmatch(mask_id):
                return self._path("masks", f"{mask_id}.mask").read_bytes()
        except OSError:
            pass
        raise BadInput("mask", "it is not kept here.", "Train it again.")

    # The detector ----------------------------------------------------------------------------------------------------

    def suspects(self) -> tuple[Suspect, ...]:
        """The model folders in or below those that the operator allows (MEGA_DETECT_DIRS), by label.

        No link is followed out of an allowed folder, neither a folder nor a file.
        """
        found: dict[Path, str] = {}
        labels: set[str] = set()
        for given in self._core.settings.detect_dirs:
            try:
                root = given.resolve(strict=True)
            except OSError:
                continue
            for folder in _model_folders(root):
                if len(found) >= MOST_FOLDERS or folder in found:
                    continue
                label = root.name if folder == root else f"{root.name}/{folder.relative_to(root)}"
                known = label
                for number in range(2, MOST_FOLDERS + 2):
                    if known not in labels:
                        break
                    known = f"{label} ({number})"
                labels.add(known)
                found[folder] = known
        made = [Suspect(digest(str(folder)), label, folder) for folder, label in found.items()]
        return tuple(sorted(made, key=lambda one: one.label))

    def start_detecting(self, suspect_id: str, reference: str, owner: str) -> str:
        """Queue a search of one of suspects(), against a catalogue model or with "" for none; its job's id, and the
        job's result is the report's id. Raises BadInput on a folder that isn't among them, UnknownName, or Busy.
        """
        suspect = next((one for one in self.suspects() if one.id == suspect_id), None)
        if suspect is None:
            raise BadInput("folder", "it is not one of those the operator allows.", "Choose one of the list.")
        against = self._core.settings.model(reference).name if reference else None
        stats = [
            [file.name, (seen := file.stat()).st_size, seen.st_mtime_ns] for file in sorted(_files(suspect.folder))
        ]
        report_id = digest(
            {"detect": KEPT_VERSION, "folder": str(suspect.folder), "files": stats, "reference": reference}
        )

        def work(report: Reporter) -> str:
            started = time.monotonic()
            try:
                found = self.detect(suspect.folder, against, report=report)
            except ActionableError as error:  # its words may hold the path
                error.what = error.what.replace(str(suspect.folder), suspect.label)
                raise
            plain = {
                **as_plain(found),
                "version": KEPT_VERSION,
                "label": suspect.label,
                "model": suspect.label,
                "made": _now(),
                "seconds": time.monotonic() - started,
            }
            self._write("detections", f"{report_id}.json", plain)
            return report_id

        lane = against or "detector"
        return self._start(work, owner, report_id, lane, f"detect {suspect.id[:8]}", DETECT)

    def detection(self, report_id: str) -> Detected | None:
        """A report by its id, or None; safe with any text."""
        plain = self._read("detections", report_id, ".json")
        if plain is None:
            return None
        try:
            clues = tuple(
                {name: one[name] for name in ("layer", "site", "neurons", "promoted", "suppressed", "places", "says")}
                for one in plain["findings"]
                if one["kind"] == "low_rank" and one["neurons"]
            )
            return Detected(
                id=report_id,
                label=str(plain["label"]),
                reference=str(plain["reference"]),
                made=str(plain["made"]),
                seconds=float(plain["seconds"]),
                score=float(plain["score"]),
                verdict=str(plain["verdict"]),
                matrices=_table(plain["findings"], MATRICES),
                clues=clues,
                notes=tuple(map(str, plain["notes"])),
                fitted=dict(plain["detector"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            log.warning("The detector's report %s can't be read: %s", report_id[:12], error)
            return None

    def detections(self) -> tuple[Detected, ...]:
        """Every kept report, newest first."""
        found = []
        with suppress(OSError):
            for file in self._path("detections").glob("*.json"):
                one = self.detection(file.stem)
                if one is not None:
                    found.append(one)
        return tuple(sorted(found, key=lambda one: one.made, reverse=True))

    # Files and jobs --------------------------------------------------------------------------------------------------

    def _start(self, work: Any, owner: str, key: str, lane: str, method: str, kind: str) -> str:
        limit = TIMES * self._core.settings.job_seconds
        return self._core.start(work, owner=owner, key=key, lane=lane, method=method, kind=kind, timeout_seconds=limit)

    def _path(self, *parts: str) -> Path:
        return self._core.settings.cache_dir.joinpath(*parts)

    def _write(self, folder: str, name: str, plain: Mapping[str, Any]) -> None:
        from mega_core.service.mask_work import finite

        text = json.dumps(finite(dict(plain)), ensure_ascii=False, allow_nan=False)
        with _keeping():
            self._path(folder).mkdir(parents=True, exist_ok=True)
            write_file(self._path(folder, name), text.encode())

    def _read(self, folder: str, known: str, ending: str) -> dict[str, Any] | None:
        """A kept file as a mapping; None when there is none of this id or version, or it is damaged."""
        if not isinstance(known, str) or not _ID.fullmatch(known):
            return None
        file = self._path(folder, f"{known}{ending}")
        try:
            if file.stat().st_size > MOST_BYTES:
                return None
            plain = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        good = isinstance(plain, dict) and plain.get("version") == KEPT_VERSION
        return plain if good else None


@contextmanager
def _keeping() -> Iterator[None]:
    """Turn a disk's refusal into an error that helps."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"The result could not be kept ({error.strerror or type(error).__name__}).", "Free some space."
        ) from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """The columns of some rows; numbers that are none become missing. Raises KeyError when one lacks a column."""
    return pd.DataFrame({name: [row[name] for row in rows] for name in columns})


def _model_folders(root: Path) -> Iterator[Path]:
    """Folders with config.json and *.safetensors at or below a resolved root, none of it by a link that leads out."""
    for place, below, files in os.walk(root, followlinks=False):
        folder = Path(place)
        depth = len(folder.relative_to(root).parts)
        below[:] = sorted(name for name in below if not name.startswith(".")) if depth < DEPTH else []
        model = "config.json" in files and any(name.endswith(".safetensors") for name in files)
        if model and all(file.resolve().is_relative_to(root) for file in _files(folder)):
            yield folder


def _files(folder: Path) -> list[Path]:
    """What lies in a folder and is not a folder."""
    return [file for file in folder.iterdir() if not file.is_dir()]
