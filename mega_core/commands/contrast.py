"""The command that contrasts edits that work with edits that fail, and saves the region they point at."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mega_core.commands.common import (
    Parser,
    checked_target,
    name_list,
    open_service,
    print_json,
    reporter,
    requests_of,
    write_json,
)
from mega_core.errors import BadInput

if TYPE_CHECKING:
    import pandas as pd

    from mega_core.contrast_study import Study
    from mega_core.events import Event, Reporter

COLUMNS = (("attn", "new"), ("attn", "true"), ("ffn", "new"), ("ffn", "true"))
MEANING = {
    "D": "what edits that succeeded moved",
    "K": "the same less what edits that failed moved",
    "C": "after edits that succeeded, less after edits that failed",
}


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Register it."""
    parser = commands.add_parser(
        "contrast", help="find the layers that edits act through: successes against failures of several methods"
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--methods", default="rome,memit,ft_m,ike", help="editors, separated by commas")
    parser.add_argument("--n", type=int, default=200, help="how many edits, each by every editor (default 200)")
    parser.add_argument("--file", help="these facts instead of random ones: as for edit, but edited one by one")
    parser.add_argument("--seed", type=int, default=0, help="which edits are drawn, and the draws of the intervals")
    parser.add_argument("--basis", default="D", choices=("D", "K", "C"), help="what leverage is read from (default D)")
    parser.add_argument("--mass", type=float, default=0.5, help="share of the leverage a region holds (default 0.5)")
    parser.add_argument("--cap", type=int, help="most layers of a region (default: by the model's depth)")
    parser.add_argument(
        "--success",
        default="argmax",
        choices=("argmax", "likelier"),
        help="a success: the new object comes first (argmax), or is likelier than the old one",
    )
    parser.add_argument(
        "--induced", type=int, default=60, help="edits on which failures are induced where there are few; 0: none"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the region file, such as region.json")
    parser.add_argument("--json", metavar="FILE", help="all tables as JSON; - is standard output")
    parser.add_argument("--ship", action="store_true", help="keep it as what the pages show of an embedded model")
    parser.set_defaults(command=_contrast)


def _contrast(arguments: argparse.Namespace) -> None:
    from mega_core.attribution.contrast import Rules
    from mega_core.contrast_study import draw

    target = checked_target(arguments.json)
    if arguments.out is not None:
        _check_out(arguments.out)
    if not 0 < arguments.mass <= 1:
        raise BadInput("--mass", f"{arguments.mass:g} is no share.", "Give a number above 0, at most 1.")
    if arguments.cap is not None and arguments.cap < 1:
        raise BadInput("--cap", f"{arguments.cap} layers.", "Give at least 1.")
    rules = Rules(basis=arguments.basis, mass=arguments.mass, cap=arguments.cap)
    requests = requests_of(arguments.file) if arguments.file is not None else draw(arguments.n, arguments.seed)
    with open_service() as service:
        study = service.studies.contrast(
            arguments.model,
            name_list(arguments.methods),
            requests,
            rules=rules,
            label=arguments.success,
            induced=max(0, arguments.induced),
            seed=arguments.seed,
            report=_reporter(),
        )
        if arguments.out is not None:
            study.region.save(arguments.out)
            service.studies.keep_region(arguments.out.stem, study.region)
        if arguments.ship:
            print(f"Written to {service.studies.ship_contrast(as_plain(study))}", file=sys.stderr)
    if arguments.json == "-":
        print_json(as_plain(study))
        return
    if target is not None:
        write_json(target, as_plain(study))
    print(summary(study))
    if arguments.out is not None:
        print(f"\nWritten to {arguments.out}. Steer there: --method mega --param region={arguments.out}")


def _check_out(path: Path) -> None:
    """Refused now rather than after the work."""
    if path.suffix != ".json" or path.is_dir():
        raise BadInput("--out", f"{path} is not a name for a region file.", "Name it something.json.")
    if not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise BadInput("--out", f"the folder of {path} is missing or can't be written to.", "Name another place.")


def _reporter() -> Reporter:
    """Progress where somebody watches, and a line when an editor is through."""
    from mega_core.events import Note

    show = reporter()

    def tell(event: Event) -> None:
        if isinstance(event, Note):
            print(event.text, file=sys.stderr, flush=True)
        show(event)

    return tell


# Words ---------------------------------------------------------------------------------------------------------------


def as_plain(study: Study) -> dict[str, object]:
    """Everything a study found, as plain JSON."""
    from mega_core import records

    return {
        "schema_version": 1,
        "region": study.region.as_plain(),
        "verdict": study.in_words,
        "claims": {name: [records.as_plain(claim) for claim in claims] for name, claims in study.verdicts.items()},
        "left_out": {name: dict(reasons) for name, reasons in study.left_out.items()},
        "frames": {name: frame.to_dict(orient="records") for name, frame in study.frames.items()},
    }


def summary(study: Study) -> str:
    """A study for a person at a terminal: counts, curves, leverage, region, and whether the pattern holds."""
    from mega_core.regions import layers_text

    region = study.region
    lines = [f"{region.model}: {region.edits} edits, seed {region.seed}. Contributions in nats, 95 % over edits.", ""]
    lines.append(f"{'editor':<10} {'success':>8} {'failure':>8} {'left out':>9}  failures for C and K")
    for name, count in region.counts.items():
        reasons = ", ".join(f"{n} {why}" for why, n in study.left_out[name].items())
        lines.append(
            f"{name:<10} {count.success:>8} {count.failure:>8} {count.left_out:>9}  {count.failures}"
            + (f"   (left out: {reasons})" if reasons else "")
        )
    lines += curves(study.frames["contrast"])
    for module, title in (("attn", "Leverage of attention"), ("ffn", "The same of MLPs, for ACE's value layers")):
        table = study.frames["leverage"]
        lines += ["", f"{title}, from {region.basis}. Editors in nats; all: in deviations, [95 %]."]
        lines += leverage(table[table["module"] == module])
    lines += [
        "",
        f"Region       {layers_text(region.layers)}",
        f"ACE          value layers {layers_text(region.value_layers)}, "
        f"query layers {layers_text(region.query_layers)}",
        "",
    ]
    for name, claims in study.verdicts.items():
        for claim in claims:
            lines.append(
                f"{name:<10} {claim.holds:<8} {claim.text}: {claim.value:+.2f} [{claim.low:+.2f}, {claim.high:+.2f}]"
            )
    return "\n".join([*lines, "", study.in_words])


def curves(table: pd.DataFrame) -> list[str]:
    """One block per editor and statistic: a row per layer."""
    lines: list[str] = []
    for (editor, statistic, failures), rows in table.groupby(["editor", "statistic", "failures"], sort=False):
        cells = rows.set_index(["layer", "module", "candidate"])
        first = rows.iloc[0]
        title = f"{editor}, {statistic}: {MEANING[str(statistic)]} ({first.n_success} against {first.n_failure}"
        title += ")" if failures == "none" else f", failures {failures})"
        heads = "".join(f"{f'{module} {candidate}':^25}" for module, candidate in COLUMNS)
        lines += ["", title, f"layer  {heads}".rstrip()]
        for layer in sorted(rows["layer"].unique()):
            shown = (cells.loc[(layer, *column)] for column in COLUMNS)
            lines.append(
                f"{layer:>5}  "
                + "".join(f"{cell['mean']:>+7.2f} [{cell['low']:>+6.2f},{cell['high']:>+6.2f}] " for cell in shown)
            )
    return lines


def leverage(table: pd.DataFrame) -> list[str]:
    """A row per layer: every editor, the mean of all, and how often draws of edits choose the layer."""
    editors: Sequence[str] = list(dict.fromkeys(table["editor"]))
    cells: Mapping[tuple[str, int], pd.Series] = {(row["editor"], row["layer"]): row for _, row in table.iterrows()}
    own = [name for name in editors if name != "all"]
    lines = ["layer  " + "".join(f"{name:>9}" for name in own) + f"{'all':>9}  {'':<15} smoothed  chosen"]
    for layer in sorted(table["layer"].unique()):
        mean = cells["all", layer]
        lines.append(
            f"{layer:>5}  "
            + "".join(f"{cells[name, layer]['leverage']:>9.2f}" for name in own)
            + f"{mean['leverage']:>9.2f}  [{mean['low']:>5.2f}, {mean['high']:>5.2f}]  {mean['smoothed']:>8.2f}"
            + f"  {100 * mean['chosen']:>4.0f} %{'  *' if mean['in_region'] else ''}"
        )
    return lines
