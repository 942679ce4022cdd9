"""Random counterfactual edits by every method: do they take, spread where they should, and nowhere else?

1. Test edits: `examples.candidates(seed=2)`, one per subject, none about a subject of the development split
   (`candidates(seed=11)`, first 60), on which defaults were tuned.
2. The unedited model is asked once per edit; every method shares these answers.
3. Each method edits one fact at a time with the model's defaults: seconds of `prepare`, then the nine metrics of
   evaluation/probes, ROME's scores, and afterwards a digest of the live model and a count of its hooks. A method that
   refuses an edit is scored as the unedited model.
4. Further rows: methods without their gate and their controls (`--controls`), all edits in one batch (`--batch`; what
   is asked about another edited subject is left out then).
5. What a method gave is kept in `--keep FILE` as soon as it is done, under a fingerprint of model, parameters and
   edits; a run that was stopped goes on from there, and two runs (one per model) may share the file. Delete it after
   changing a method's code without raising its version.
"""

# ruff: noqa: T201
from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, stdev
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

from bench.common import Row, Unmeasured, open_model
from mega_core.embedded import examples
from mega_core.errors import ActionableError, UnknownName
from mega_core.events import silent
from mega_core.keys import digest
from mega_core.records import EditRequest

if TYPE_CHECKING:
    import pandas as pd

    from mega_core.evaluation.probes import Base, Probe, Tally
    from mega_core.methods.base import Method
    from mega_core.models.adapter import ModelAdapter

COUNT = 100
BATCHED = ("rome", "memit", "pmet", "alphaedit", "emmet", "ace", "ft", "mega", "sake", "grace", "wise")
"""Methods that are also measured with all edits at once."""
UNEDITED = "unedited"
ROME_SCORES = ("ES", "PS", "NS")
VERSION = 1
"""Part of the fingerprint; raise it when the numbers are made otherwise."""


@dataclass(frozen=True, slots=True)
class Setup:
    """One row of the table: a method, what is set otherwise than the model's defaults, one edit at a time or all."""

    label: str
    method: Method[Any]
    given: Mapping[str, object]
    batch: bool = False


@dataclass(frozen=True, slots=True)
class Edit:
    """A request with the unedited model's answers."""

    request: EditRequest
    probes: tuple[Probe, ...]
    base: Base
    answers: pd.DataFrame
    several: bool
    """Whether the new object has several tokens."""


def measure(
    quick: bool,
    methods: Sequence[str] = (),
    models: Sequence[str] = (),
    count: int | None = None,
    keep: Path | None = None,
    controls: bool = False,
    batch: bool = False,
) -> list[Row]:
    """Rows "model / setup / what"; see the file's head."""
    from mega_core.settings import Settings

    settings = Settings.read()
    names = list(models) or [entry.name for entry in settings.available() if entry.embedded]
    if not names:
        raise Unmeasured("no embedded model is here")
    kept = Kept(keep)
    rows: list[Row] = []
    for name in names:
        rows += of_model(name, test_split(count or (10 if quick else COUNT)), setups(methods, controls, batch), kept)
        if all(any(row.name == f"{name} / {one} / CI all" for row in rows) for one in ("ace", "pmet")):
            rows.append(two_hop(name, kept.of(f"{name} / ace"), kept.of(f"{name} / pmet")))
    return rows


def of_model(name: str, requests: Sequence[EditRequest], chosen: Sequence[Setup], kept: Kept) -> list[Row]:
    """Steps 2 to 5 on one model: the unedited model's rows, then those of each setup."""
    from mega_core.settings import Settings

    lm = open_model(name)
    edits = _edits(lm, requests)
    rows = summary(f"{name} / {UNEDITED}", [_unedited(edit) for edit in edits])
    for setup in chosen:
        defaults = Settings.read().model(name).defaults.get(setup.method.name, {})
        rows += _setup_rows(lm, name, setup, defaults, edits, kept)
    return rows


def test_split(count: int) -> list[EditRequest]:
    """The edits that are reported on; their subjects differ from each other and from the development split's."""
    return examples.reported(count)


def setups(methods: Sequence[str] = (), controls: bool = False, batch: bool = False) -> list[Setup]:
    """What to measure, in the order of the table."""
    from mega_core.methods import METHODS

    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise UnknownName("method", unknown[0], METHODS.names())
    chosen = [METHODS[name] for name in methods] or list(METHODS)
    found = []
    for method in chosen:
        found.append(Setup(method.name, method, {}))
        if controls:
            found += [Setup(f"{method.name} ({word})", method, given) for word, given in _controls(method)]
        if batch and method.name in BATCHED:
            found.append(Setup(f"{method.name} (all at once)", method, {}, batch=True))
    return found


def _controls(method: Method[Any]) -> Iterator[tuple[str, dict[str, object]]]:
    """Always on for methods with a gate, and each control that a method offers."""
    knobs = {knob.name: knob for knob in method.knobs()}
    gated = "gate" in knobs and "always" in knobs["gate"].choices
    if gated:
        yield "always on", {"gate": "always"}
    if "control" in knobs:
        for name in knobs["control"].choices:
            if name != knobs["control"].default and not (gated and name == "always_on"):
                yield f"control: {name}", {"control": name}


# Measuring -----------------------------------------------------------------------------------------------------------


def _edits(lm: ModelAdapter, requests: Sequence[EditRequest]) -> list[Edit]:
    from mega_core.evaluation import looks, probes
    from mega_core.models import tokens

    edits = []
    for request in requests:
        asked = probes.probes_of(request)
        several = len(tokens.target_ids(lm.tokenizer, request.prompt, request.target_new)) > 1
        base = probes.baseline(lm, asked)
        edits.append(Edit(request, asked, base, looks.answers(lm, [request], "before"), several))
    return edits


def _setup_rows(
    lm: ModelAdapter,
    model: str,
    setup: Setup,
    defaults: Mapping[str, object],
    edits: Sequence[Edit],
    kept: Kept,
) -> list[Row]:
    """Rows of one setup; one that can't be measured gives a row that says why."""
    name = f"{model} / {setup.label}"
    reason = setup.method.needs(lm.spec)
    if reason is not None:
        return [Row("quality", f"{name} / skipped", 0, "", reason)]
    ref = setup.method.ref(setup.given, defaults)
    requests = [edit.request for edit in edits]
    about = {"version": VERSION, "weights": lm.file_digest, "method": ref, "requests": requests, "batch": setup.batch}
    mark = digest(about)
    found = kept.get(name, mark)
    if found is None:
        start = perf_counter()
        try:
            found = (_in_one if setup.batch else _one_by_one)(lm, setup, setup.method.read(ref), edits, name)
        except Exception as error:  # noqa: BLE001 - the other methods still count
            traceback.print_exc()
            return [Row("quality", f"{name} / failed", 0, "", f"{type(error).__name__}: {error}")]
        kept.put(name, mark, found)
        print(f"  {name}: {perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return summary(name, found)


def _one_by_one(lm: ModelAdapter, setup: Setup, params: Any, edits: Sequence[Edit], name: str) -> list[dict[str, Any]]:
    whole = lm.live_digest()
    found = []
    for number, edit in enumerate(edits, start=1):
        start, used = perf_counter(), process_time()
        try:
            change = setup.method.prepare(lm, [edit.request], params, 0, silent)
            seconds, work = perf_counter() - start, process_time() - used
            with change.applied(lm):
                record = _scored(lm, edit, edit.base)
        except ActionableError as error:
            seconds, work = perf_counter() - start, process_time() - used
            record = _unedited(edit) | {"refused": str(error)}
        clean = lm.live_digest() == whole and lm.hook_count() == 0 and not lm.changes and lm.prefix is None
        found.append(record | {"seconds": seconds, "cpu": work, "clean": clean})
        if number % 20 == 0:
            print(f"  {name}: {number} of {len(edits)}", file=sys.stderr, flush=True)
    return found


def _in_one(lm: ModelAdapter, setup: Setup, params: Any, edits: Sequence[Edit], name: str) -> list[dict[str, Any]]:
    """All edits true together; each is then judged on its own, on prompts that name no other edited subject."""
    whole = lm.live_digest()
    start, used = perf_counter(), process_time()
    change = setup.method.prepare(lm, [edit.request for edit in edits], params, 0, silent)
    seconds, work = (perf_counter() - start) / len(edits), (process_time() - used) / len(edits)
    subjects = [edit.request.subject for edit in edits]
    found = []
    with change.applied(lm):
        for edit in edits:
            others = [subject for subject in subjects if subject != edit.request.subject]
            counts = tuple(
                good and not any(other in probe.prompt for other in others)
                for good, probe in zip(edit.base.counts, edit.probes, strict=True)
            )
            near = tuple(text for text in edit.request.neighbours if not any(other in text for other in others))
            alone = replace(edit, request=replace(edit.request, neighbours=near))
            found.append(_scored(lm, alone, replace(edit.base, counts=counts)))
    clean = lm.live_digest() == whole and lm.hook_count() == 0 and not lm.changes and lm.prefix is None
    return [record | {"seconds": seconds, "cpu": work, "clean": clean} for record in found]


def _scored(lm: ModelAdapter, edit: Edit, base: Base) -> dict[str, Any]:
    """One edit's figures under the change that is applied."""
    from mega_core.evaluation import looks, probes

    tallies = probes.tally(probes.ask(lm, edit.probes), base)
    return _record(edit, tallies, looks.answers(lm, [edit.request], "after"))


def _unedited(edit: Edit) -> dict[str, Any]:
    from mega_core.evaluation import probes

    record = _record(edit, probes.tally(edit.base.answers, edit.base), edit.answers)
    return record | {"seconds": 0.0, "cpu": 0.0, "clean": True}


def _record(edit: Edit, tallies: Mapping[str, Tally], answers: pd.DataFrame) -> dict[str, Any]:
    from mega_core.evaluation import metrics

    frame = metrics.measure(answers)
    rome = {str(row.metric): float(row.value) for row in frame.itertuples() if row.metric in ROME_SCORES}
    return {
        "subject": edit.request.subject,
        "several": edit.several,
        "scores": {metric: list(tally) for metric, tally in tallies.items()},
        "rome": rome,
    }


# Keeping -------------------------------------------------------------------------------------------------------------


class Kept:
    """What is measured already, in one JSON file; None keeps nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        if self._path is None or not self._path.exists():
            return {}
        known: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
        return known

    def get(self, name: str, mark: str) -> list[dict[str, Any]] | None:
        """The records under this name, unless they answer another question."""
        entry = self._known.get(name)
        return entry["records"] if entry is not None and entry["mark"] == mark else None

    def of(self, name: str) -> list[dict[str, Any]]:
        """The records under this name. Raises KeyError where there are none."""
        records: list[dict[str, Any]] = self._known[name]["records"]
        return records

    def put(self, name: str, mark: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Keep them now, whole or not at all."""
        self._known |= self._read()
        self._known[name] = {"mark": mark, "records": list(records)}
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self._path.with_name(f".{self._path.name}.{os.getpid()}")
            fresh.write_text(json.dumps(self._known, separators=(",", ":")), encoding="utf-8")
            os.replace(fresh, self._path)


# Telling -------------------------------------------------------------------------------------------------------------


def summary(name: str, records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The figures of one setup: in percent, each edit's own share first."""
    from mega_core.evaluation import probes

    scores = [{metric: probes.Tally(*tally) for metric, tally in record["scores"].items()} for record in records]
    counted = {metric: sum(edit[metric].n for edit in scores if metric in edit) for metric in probes.METRICS}
    rows = [
        Row("quality", f"{name} / {metric}", 100 * value, "%", f"{counted[metric]} prompts")
        for metric, value in probes.means(scores).items()
    ]
    rows.append(Row("quality", f"{name} / average", 100 * probes.average(scores), "%", f"{len(records)} edits"))
    rows.append(
        Row("quality", f"{name} / exact Acc", 100 * probes.means(scores, exact=True)["Acc"], "%", "whole object")
    )
    for metric in ROME_SCORES:
        own = [record["rome"][metric] for record in records if metric in record["rome"]]
        if own:
            rows.append(Row("quality", f"{name} / {metric}", 100 * fmean(own), "%", "ROME's protocol"))
    hops = [tally.successes / tally.n if tally.n else 0.0 for edit in scores if (tally := edit.get("CI")) is not None]
    if hops:
        rows.append(
            Row("quality", f"{name} / CI all", 100 * fmean(hops), "%", f"{len(hops)} edits, failed ones count as wrong")
        )
    several = [edit for edit, record in zip(scores, records, strict=True) if record["several"]]
    if several:
        for what, exact in (("Acc", False), ("exact Acc", True)):
            value = 100 * probes.means(several, exact=exact)["Acc"]
            rows.append(Row("quality", f"{name} / {what}, several tokens", value, "%", f"{len(several)} edits"))
    if not name.endswith(f" / {UNEDITED}"):
        seconds = [float(record["seconds"]) for record in records]
        refused = [record["refused"] for record in records if "refused" in record]
        clean = sum(bool(record["clean"]) for record in records)
        note = f"the first, with statistics, {seconds[0]:.2f} s"
        note += f"; refused {len(refused)}: {refused[0]}" if refused else ""
        rows.append(Row("quality", f"{name} / seconds", median(seconds), "s", note))
        work = median(float(record["cpu"]) for record in records)
        rows.append(Row("quality", f"{name} / CPU seconds", work, "s", "of the process: what an idle core would take"))
        rows.append(Row("quality", f"{name} / clean", clean, f"of {len(records)}", "digest identical, 0 hooks"))
    return rows


def two_hop(model: str, ace: Sequence[Mapping[str, Any]], pmet: Sequence[Mapping[str, Any]]) -> Row:
    """ACE against PMET on the same edits: mean difference of the two-hop shares, failed edits as wrong."""
    shares = [
        [tally[0] / tally[1] if tally[1] else 0.0 for record in records if (tally := record["scores"].get("CI"))]
        for records in (ace, pmet)
    ]
    differences = [100 * (mine - other) for mine, other in zip(*shares, strict=True)]
    error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    note = f"points, standard error {error:.1f}, {len(differences)} edits with two-hop questions"
    return Row("quality", f"{model} / ace / CI all, above pmet", fmean(differences), "points", note)


COLUMNS = ("Acc", "Gen", "Spec", "RS", "DI", "DII", "CI", "CII", "SA", "average")
MORE = (
    "exact Acc",
    "Acc, several tokens",
    "exact Acc, several tokens",
    "ES",
    "PS",
    "NS",
    "CI all",
    "seconds",
    "CPU seconds",
    "clean",
)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as tables: per model the nine metrics with their average, then everything else."""
    split = [(row.name.split(" / "), row) for row in rows]
    text: list[str] = []
    for model in dict.fromkeys(parts[0] for parts, _ in split):
        cells = {(parts[1], parts[2]): row for parts, row in split if parts[0] == model}
        labels = list(dict.fromkeys(label for label, _ in cells))
        base = cells[UNEDITED, "average"].note if (UNEDITED, "average") in cells else ""
        measured = [label for label in labels if (label, "average") in cells]
        for title, columns in (("The nine metrics", COLUMNS), ("Other protocols, time, promises", MORE)):
            text += [f"**{model}**, {base}. {title}, %." if columns is COLUMNS else f"**{model}**. {title}.", ""]
            text += ["| setup | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
            if columns is COLUMNS:
                most = [
                    _prompts(cells[label, column] for label in measured if (label, column) in cells)
                    for column in COLUMNS
                ]
                text.append("| prompts | " + " | ".join(most) + " |")
            for label in measured:
                if not (columns is MORE and label == UNEDITED):
                    shown = (_cell(cells.get((label, column)), column) for column in columns)
                    text.append(f"| {label} | " + " | ".join(shown) + " |")
            text.append("")
        versus = cells.get(("ace", "CI all, above pmet"))
        if versus is not None:
            text += [f"Two-hop questions (CI all), ACE above PMET: {versus.value:+.1f} {versus.note}.", ""]
        absent = [(parts[1], row) for parts, row in split if parts[0] == model and parts[2] in ("skipped", "failed")]
        text += [f"Not measured: {label} ({row.note})." for label, row in absent]
        text += [""] * bool(absent)
    return "\n".join(text)


def _prompts(rows: Iterable[Row]) -> str:
    """The most prompts that counted for any setup; CI, CII and SA have fewer where edits fail."""
    counts = [int(number) for row in rows for number, what in [row.note.split(" ", 1)] if what == "prompts"]
    return str(max(counts)) if counts else ""


def _cell(row: Row | None, column: str) -> str:
    if row is None:
        return ""
    if column.endswith("seconds"):
        return f"{row.value:.2f}"
    return f"{row.value:.0f} {row.unit}" if column == "clean" else f"{row.value:.1f}"
