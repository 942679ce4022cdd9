"""Are edits found in a model's weights? AUC of the detector, with and without a reference.

1. Per embedded model: variants (`mega_core.detect_study`) by edits of the development split, to fit on, and by edits of
   the test split of `bench.quality`, whose subjects are others, to judge on.
2. Held-out subjects: the detector that ships (`mega_core/masking/detector.json`) on the test variants.
3. Held-out model: fitted anew on the other model's development variants, judged on this one's test variants.
4. What a finding tells: whether the edited subject is the name that the edit answers to most, among all subjects the
   tables know, and whether the new object is what it makes the model say.
5. How small an edit may be: ROME edits shrunk to a part of their length. Such edits don't work; they stand for edits
   that are small against a large model's matrix.

`--keep FILE` keeps the features of each model and split beside that file (FILE.MODEL.SPLIT.json) and goes on from
there; delete them after changing features or variants. `python -m bench.detect --keep FILE` fits the detector on the
development variants of both models and writes detector.json.
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from bench.common import Row, Unmeasured, open_model
from mega_core.embedded import examples, facts
from mega_core.embedded.examples import DEV_COUNT, DEV_SEED, reported
from mega_core.records import EditRequest

if TYPE_CHECKING:
    from mega_core.detect_study import Area, Sample
    from mega_core.masking.detect import Detector

SPLITS = {"development": (1, 5, 3), "test": (2, 10, 6)}
"""Split -> (seed of the variants, ROME edits by themselves, unedited variants of each kind)."""
MODES = {"reference": "with a reference", "alone": "without"}
TOLD = 20
"""Edits whose subject and object are looked for."""


def measure(quick: bool, models: Sequence[str] = (), keep: Path | None = None) -> list[Row]:
    """Rows "model / how / what"; see the file's head."""
    from mega_core import detect_study
    from mega_core.masking.detect import read_detector

    names = list(models) or _embedded()
    shipped = read_detector()
    rows: list[Row] = []
    for name in names:
        test = samples(name, "test", quick, keep)
        rows += _counts(name, test)
        for mode, words in MODES.items():
            rows += _judged(f"{name} / {words}, other subjects", test, shipped.scorers[mode], mode)
            for other in _embedded():
                if other != name:
                    fitted = detect_study.fit(samples(other, "development", quick, keep), mode)
                    rows += _judged(f"{name} / {words}, fitted on {other}", test, fitted, mode)
        rows += told(name, 4 if quick else TOLD)
        rows += weakened(name, 4 if quick else TOLD)
    return rows


def _embedded() -> list[str]:
    from mega_core.settings import Settings

    names = [entry.name for entry in Settings.read().available() if entry.embedded]
    if not names:
        raise Unmeasured("no embedded model is here")
    return names


def requests_of(split: str) -> list[EditRequest]:
    """The facts that are edited, one per subject."""
    if split == "test":
        return reported(60)
    drawn = islice(examples.candidates(DEV_SEED, min_neighbours=1), DEV_COUNT)
    return list({request.subject: request for request in drawn}.values())


def samples(name: str, split: str, quick: bool, keep: Path | None) -> list[Sample]:
    """Every matrix of every variant of a model, from the file where it is kept."""
    from mega_core import detect_study
    from mega_core.settings import Settings

    path = None if keep is None else keep.with_name(f"{keep.name}.{name}.{split}.json")
    if path is not None and path.exists():
        return [detect_study.Sample(**one) for one in json.loads(path.read_text(encoding="utf-8"))]
    seed, *counts = SPLITS[split]
    lm = open_model(name)
    start = perf_counter()
    plan = detect_study.Plan(1, 1) if quick else detect_study.Plan(*counts)
    found = detect_study.collect(lm, requests_of(split), Settings.read().model(name).defaults, plan, seed, _progress())
    print(f"  {name}, {split}: {perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(one) for one in found]), encoding="utf-8")
    return found


def _progress():  # type: ignore[no-untyped-def]
    from mega_core.events import Advanced

    def tell(event: object) -> None:
        if isinstance(event, Advanced) and event.stage == "variants" and event.done % 10 == 0:
            print(f"  variant {event.done}", file=sys.stderr, flush=True)

    return tell


# Rows ----------------------------------------------------------------------------------------------------------------


def _counts(name: str, found: Sequence[Sample]) -> list[Row]:
    variants = {one.variant: one for one in found}
    edited = sum(one.edited for one in variants.values())
    return [
        Row("detect", f"{name} / variants / edited", edited, "models"),
        Row("detect", f"{name} / variants / unedited", sum(_plain(one) for one in variants.values()), "models"),
    ]


def _plain(one: Sample) -> bool:
    from mega_core.detect_study import FINE_TUNED

    return not one.edited and one.label not in FINE_TUNED


def _judged(where: str, test: Sequence[Sample], scorer: object, mode: str) -> list[Row]:
    from mega_core import detect_study

    found = detect_study.judge(test, scorer, mode)  # type: ignore[arg-type]
    rows = [
        Row("detect", f"{where} / {label} / {what}", area.value, "AUC", _interval(area))
        for what, areas in (("matrices", found.matrices), ("models", found.models))
        for label, area in areas.items()
    ]
    rows.append(Row("detect", f"{where} / unedited / false alarms", found.false_alarms, "% of models", ""))
    for label, shares in found.called.items():
        note = ", ".join(f"{kind} {share:.0f} %" for kind, share in sorted(shares.items(), key=lambda pair: -pair[1]))
        rows.append(Row("detect", f"{where} / {label} / called low-rank", shares.get("low_rank", 0.0), "%", note))
    return rows


def _interval(area: Area) -> str:
    return f"{area.low:.3f} to {area.high:.3f}, {area.positives} against {area.negatives}"


def told(name: str, count: int) -> list[Row]:
    """Step 4, on ROME edits at the model's default layer, whose keys an edit there doesn't change."""
    import torch

    from mega_core.detect_study import prepare
    from mega_core.masking import detect
    from mega_core.models import tokens
    from mega_core.models.hooks import Site, capture
    from mega_core.settings import Settings

    lm = open_model(name)
    defaults = Settings.read().model(name).defaults.get("rome", {})
    layer = int(str(defaults["layer"]))
    names = sorted(facts.load().by_subject)
    keys, owner = [], []
    for start in range(0, len(names), 64):
        rows = [tokens.prompt_ids(lm.tokenizer, subject) for subject in names[start : start + 64]]
        batch = tokens.pack(lm.tokenizer, rows, lm.device)
        site = Site(layer, "mlp_down_in")
        with torch.no_grad(), capture(lm, [site]) as got:
            lm.forward(batch)
        keys.append(got[site][batch.mask].double())
        owner += [start + int(row) for row in batch.mask.nonzero()[:, 0]]
    every = torch.cat(keys)  # (token of a name, d_mlp)
    place = (layer, "mlp_down")
    moment = detect.moments(lm, [place], detect.ordinary_rows(lm, detect.tokens_for(lm.d_mlp)))[place]
    length = (every * torch.linalg.solve(moment.second, every.T).T).sum(1).sqrt()  # sqrt(k C^-1 k)
    before = lm.read_weight(*place).double()
    hits: dict[tuple[str, str], list[bool]] = {}
    for request in reported(count):
        change = prepare(lm, "rome", [request], defaults)
        update = change.matrices[0].update(lm.device).double()
        target = str(lm.tokenizer.decode([tokens.target_ids(lm.tokenizer, request.prompt, request.target_new)[0]]))
        parts = {"reference": detect.spectrum(update), "alone": detect.standing_out(before + update, moment).part}
        for mode, part in parts.items():
            answer = every @ part.right[:, 0]
            best = int((answer.abs() / length).argmax())
            found = names[owner[best]]
            prompts = [fact.prompt(fact.templates_edit[0]) for fact in facts.load().by_subject[found]]
            rows = [tokens.prompt_ids(lm.tokenizer, prompt) for prompt in prompts]
            with change.applied(lm):
                says = detect.said(lm, place, part, 1, rows, [len(row) - 1 for row in rows])
            promoted = detect.told(lm, part, 1, float(answer[best])).promoted
            hits.setdefault((mode, "subject"), []).append(found == request.subject)
            hits.setdefault((mode, "object"), []).append(says[0][0] == target)
            hits.setdefault((mode, "promoted"), []).append(target in [token for token, _ in promoted])
    what = {
        "subject": f"the edited subject is, of {len(names):,} names, the one whose key lies nearest to a ROME edit's",
        "object": "asked about that name, what the edit makes the model say most is the new object",
        "promoted": f"the new object is among the {detect.SHOWN} tokens that the edit promotes through the unembedding",
    }
    return [
        Row("detect", f"{name} / {MODES[mode]} / told / {key}", 100 * sum(right) / len(right), "%", what[key])
        for (mode, key), right in hits.items()
    ]


def weakened(name: str, count: int) -> list[Row]:
    """Step 5: ROME edits shrunk to a part of their length, in a model saved as bfloat16."""
    import torch

    from mega_core.detect_study import prepare
    from mega_core.masking import detect
    from mega_core.settings import Settings

    lm, scorers = open_model(name), detect.read_detector().scorers
    defaults = Settings.read().model(name).defaults.get("rome", {})
    own = {place: weight.float() for place, weight in detect.matrices(lm).items() if place[1] == "mlp_down"}
    moments = detect.moments(lm, list(own), detect.ordinary_rows(lm, detect.tokens_for(lm.d_mlp)))
    base = {place: detect.standing_out(weight, moments[place]) for place, weight in own.items()}
    found: dict[tuple[str, float], list[bool]] = {}
    lengths: dict[float, list[float]] = {}
    for request in reported(count):
        (matrix,) = prepare(lm, "rome", [request], defaults).matrices
        place, before = (matrix.layer, matrix.site), own[matrix.layer, matrix.site]
        for part in PARTS:
            edited = (before + part * matrix.update(lm.device)).to(torch.bfloat16).float()
            difference = edited.double() - before.double()
            lengths.setdefault(part, []).append(part * matrix.norm() / matrix.base_norm)
            alone = detect.own_features({**base, place: detect.standing_out(edited, moments[place])})[place]
            against = detect.difference_features(difference, before, detect.spectrum(difference))
            for mode, features in (("alone", alone), ("reference", against)):
                chances = scorers[mode](features)
                found.setdefault((mode, part), []).append(max(chances, key=lambda k: chances[k]) == "low_rank")
    return [
        Row(
            "detect",
            f"{name} / {MODES[mode]} / weakened / {part:g}",
            100 * sum(called) / len(called),
            "% called low-rank",
            f"length {median(lengths[part]):.2g} of the matrix's",
        )
        for (mode, part), called in found.items()
    ]


PARTS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)


# Telling -------------------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row]) -> str:
    """Per model a table of areas, then what FT and unedited models are called, and what a finding tells."""
    split = [(row.name.split(" / "), row) for row in rows]
    text: list[str] = []
    for model in dict.fromkeys(parts[0] for parts, _ in split):
        cells = {tuple(parts[1:]): row for parts, row in split if parts[0] == model}
        counted = [f"{cells['variants', kind].value:.0f} {kind}" for kind in ("edited", "unedited")]
        ways = list(dict.fromkeys(key[0] for key, row in cells.items() if row.unit == "AUC"))
        labels = list(dict.fromkeys(key[1] for key, row in cells.items() if row.unit == "AUC"))
        for what in ("matrices", "models"):
            text += [f"**{model}**, {' and '.join(counted)} models. Area under the ROC curve, {what}.", ""]
            text += ["| edits | " + " | ".join(ways) + " |", "|---" + "|---:" * len(ways) + "|"]
            for label in labels:
                shown = [_cell(cells.get((way, label, what))) for way in ways]
                text.append(f"| {label} | " + " | ".join(shown) + " |")
            text.append("")
        text += [
            "| what it is | " + " | ".join(f"called, {way}" for way in ways) + " |",
            "|---" * (len(ways) + 1) + "|",
        ]
        alike: dict[tuple[str, ...], list[str]] = {}
        for label in dict.fromkeys(key[1] for key in cells if key[-1] == "called low-rank"):
            notes = tuple(cells[way, label, "called low-rank"].note or "unchanged" for way in ways)
            alike.setdefault(notes, []).append(label)
        text += [f"| {'; '.join(same)} | " + " | ".join(notes) + " |" for notes, same in alike.items()]
        alarms = [f"{cells[way, 'unedited', 'false alarms'].value:.0f} %" for way in ways]
        text += ["| unedited models with a false alarm | " + " | ".join(alarms) + " |", ""]
        text += _weakened(cells)
        text += [
            f"- {key[0].capitalize()}, {row.note}: {row.value:.0f} %." for key, row in cells.items() if "told" in key
        ]
        text.append("")
    return "\n".join(text)


def _weakened(cells: Mapping[tuple[str, ...], Row]) -> list[str]:
    parts = list(dict.fromkeys(key[2] for key in cells if key[1] == "weakened"))
    lengths = [cells[MODES["alone"], "weakened", part].note.split()[1] for part in parts]
    text = [
        "| ROME edits shrunk to, saved as bfloat16 | " + " | ".join(parts) + " |",
        "|---" + "|---:" * len(parts) + "|",
    ]
    text.append("| length, in lengths of the matrix (median) | " + " | ".join(lengths) + " |")
    for way in MODES.values():
        shown = [f"{cells[way, 'weakened', part].value:.0f} %" for part in parts]
        text.append(f"| called low-rank, {way} | " + " | ".join(shown) + " |")
    return [*text, ""]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    low, high = row.note.split(",")[0].split(" to ")
    return f"{row.value:.3f} ({low} to {high})"


# Making the detector -------------------------------------------------------------------------------------------------


def make(keep: Path | None, quick: bool = False) -> Detector:
    """Fit on the development variants of all embedded models."""
    from mega_core import detect_study
    from mega_core.masking.detect import CLASSES, Detector

    names = _embedded()
    found: dict[str, list[Sample]] = {name: samples(name, "development", quick, keep) for name in names}
    together = [one for part in found.values() for one in part]
    made: Mapping[str, object] = {
        "fitted_on": {name: len({one.variant for one in part}) for name, part in found.items()},
        "variants": sorted({one.label for one in together}),
        "subjects": f"candidates(seed={DEV_SEED}), first {DEV_COUNT}",
        "penalty": detect_study.PENALTY,
        "command": "python -m bench.detect",
    }
    scorers = {mode: detect_study.fit(together, mode) for mode in CLASSES}
    areas = {
        mode: {
            name: round(detect_study.judge(part, scorer, mode).matrices["all"].value, 4) for name, part in found.items()
        }
        for mode, scorer in scorers.items()
    }
    return Detector(scorers, {**made, "auc_on_these_matrices": areas})


def main() -> int:
    """Write detector.json."""
    from mega_core.folders import write_file
    from mega_core.masking.detect import DETECTOR

    parser = argparse.ArgumentParser(prog="python -m bench.detect", description="Fit the detector and write it.")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep features beside this file and go on from them")
    parser.add_argument("--model", help="only make and keep this model's features")
    parser.add_argument("--split", choices=SPLITS, default="development", help="of this split (with --model)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the variants")
    arguments = parser.parse_args()
    if arguments.model:
        samples(arguments.model, arguments.split, arguments.quick, arguments.keep)
        return 0
    plain = make(arguments.keep, arguments.quick).plain()
    write_file(DETECTOR, (json.dumps(plain, indent=1) + "\n").encode())
    print(f"Written to {DETECTOR}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
