"""MEGA in the region that a contrast of edits measured, against the model's default region and against other layers.

1. The region that ships with each embedded model, made by `python -m mega_core contrast --model M --ship` on edits
   whose subjects the reported split doesn't have.
2. The reported split (see bench/quality) is edited one fact at a time with MEGA's parameters for the model, but in its
   default region, the measured one, the lowest layers, and random ones: as many as were measured (three at least), of
   the random ones at most half the same.
3. The first two once more with alpha chosen for each edit on withheld fit prompts: a model's alpha was tuned for its
   default region.
4. The nine metrics, kept in `--keep FILE` as bench/quality does. Differences of averages come with the standard error
   over edits drawn with replacement, the same for both.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from typing import TYPE_CHECKING, Any

from bench import quality
from bench.common import Row, Unmeasured

if TYPE_CHECKING:
    from mega_core.evaluation.probes import Tally

    Scores = Mapping[str, Tally]

RANDOM_REGIONS = 2
RESAMPLES = 500
DEFAULT = "default region"
CHOSEN = ", alpha chosen"


def measure(quick: bool, models: Sequence[str] = (), count: int | None = None, keep: Path | None = None) -> list[Row]:
    """Rows "model / setup / metric"; see the file's head."""
    from mega_core.settings import Settings

    settings = Settings.read()
    names = list(models) or [entry.name for entry in settings.available() if entry.embedded]
    if not names:
        raise Unmeasured("no embedded model is here")
    kept = quality.Kept(keep)
    requests = quality.test_split(count or (10 if quick else quality.COUNT))
    rows: list[Row] = []
    for name in names:
        chosen = setups(name)
        rows += quality.of_model(name, requests, chosen, kept)
        for setup in chosen:
            against = DEFAULT + (CHOSEN if setup.label.endswith(CHOSEN) else "")
            if setup.label != against:
                rows.append(above(name, kept, setup.label, against))
    return [replace(row, group="regions") for row in rows]


def setups(model: str) -> list[quality.Setup]:
    """What to measure on a model. Raises Unmeasured where no region is there."""
    from mega_core.embedded.measured import load as measured_contrast
    from mega_core.methods import METHODS
    from mega_core.methods.mega import FEWEST_LAYERS
    from mega_core.regions import layers_text
    from mega_core.settings import Settings, weights_digest

    settings = Settings.read()
    shipped = measured_contrast(model, weights_digest(settings.locate(settings.model(model))))
    if shipped is None:
        raise Unmeasured(f"no region ships with {model}: python -m mega_core contrast --model {model} --ship")
    region = shipped.region
    early = layers_text(range(max(FEWEST_LAYERS, len(region.layers))))
    others = [layers_text(layers) for layers in drawn(region.layers, region.n_layers)]
    measured: dict[str, dict[str, object]] = {f"measured, {layers_text(region.layers)}": {"region": region.text()}}
    chosen: dict[str, dict[str, object]] = {
        DEFAULT: {},
        **measured,
        f"early, {early}": {"region": early},
        **{f"random, {text}": {"region": text} for text in others},
        **{f"{label}{CHOSEN}": {**where, "alpha": "auto"} for label, where in {DEFAULT: {}, **measured}.items()},
    }
    return [quality.Setup(label, METHODS["mega"], given) for label, given in chosen.items()]


def drawn(layers: Sequence[int], n_layers: int) -> list[tuple[int, ...]]:
    """Different random regions of that many layers, at most half of them the same; fewer where there are no more."""
    most = max(len(layers) // 2, 2 * len(layers) - n_layers)
    generator = random.Random(0)
    found: list[tuple[int, ...]] = []
    for _ in range(1000):
        if len(found) == RANDOM_REGIONS:
            break
        one = tuple(sorted(generator.sample(range(n_layers), len(layers))))
        if one not in found and len({*one} & {*layers}) <= most:
            found.append(one)
    return found


def above(model: str, kept: quality.Kept, one: str, other: str) -> Row:
    """The difference of two setups' averages over the nine metrics."""
    from mega_core.evaluation import probes

    first, second = (_scores(kept.of(f"{model} / {label}")) for label in (one, other))
    edits = range(len(first))

    def difference(which: Sequence[int]) -> float:
        return 100 * (probes.average([first[i] for i in which]) - probes.average([second[i] for i in which]))

    generator = random.Random(0)
    error = stdev(difference(generator.choices(edits, k=len(edits))) for _ in range(RESAMPLES))
    note = f"points, against {other}, standard error {error:.1f}"
    return Row("regions", f"{model} / {one} / above", difference(edits), "points", note)


def _scores(records: Sequence[Mapping[str, Any]]) -> list[Scores]:
    from mega_core.evaluation.probes import Tally

    return [{metric: Tally(*tally) for metric, tally in record["scores"].items()} for record in records]


def markdown(rows: Sequence[Row]) -> str:
    """A table per model: the nine metrics, their average, how far it is above the default region's, seconds."""
    columns = (*quality.COLUMNS, "above", "seconds")
    cells = {tuple(row.name.split(" / ")): row for row in rows}
    text: list[str] = []
    for model in dict.fromkeys(model for model, _, _ in cells):
        labels = list(dict.fromkeys(label for one, label, _ in cells if one == model))
        edits = cells[model, quality.UNEDITED, "average"].note
        text += [f"**{model}**, {edits}, in percent; above the default region in points, with the standard error.", ""]
        text.append("| MEGA's layers | " + " | ".join(columns) + " |")
        text.append("|---" + "|---:" * len(columns) + "|")
        for label in labels:
            shown = " | ".join(_cell(cells.get((model, label, column)), column) for column in columns)
            text.append(f"| {label} | {shown} |")
        text.append("")
    return "\n".join(text)


def _cell(row: Row | None, column: str) -> str:
    if row is None:
        return ""
    if column == "above":
        return f"{row.value:+.1f} ± {row.note.rsplit(' ', 1)[1]}"
    return f"{row.value:.2f}" if column == "seconds" else f"{row.value:.1f}"
