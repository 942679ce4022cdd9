"""The command that looks for knowledge edits in a model's folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mega_core.commands.common import (
    Parser,
    checked_target,
    one_line,
    open_service,
    print_json,
    reporter,
    short,
    write_json,
)

if TYPE_CHECKING:
    from mega_core.masking.detect import Detection, Finding

SHOWN = 5
"""Neurons, tokens and places in the text form; the JSON has all."""


def add(actions: argparse._SubParsersAction[Parser]) -> None:
    """Register it."""
    parser = actions.add_parser("detect", help="look for knowledge edits in a model's folder")
    parser.add_argument("--folder", required=True, type=Path, metavar="MODEL_FOLDER", help="the model to look at")
    parser.add_argument(
        "--reference", metavar="NAME_OR_FOLDER", help="what it was made from; without, only its own statistics are used"
    )
    parser.add_argument("--mask", type=Path, metavar="FILE", help="show what this mask restores (with --prompt)")
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="ask this and search it for edits; may be repeated",
    )
    parser.add_argument("--json", metavar="FILE", help="everything that was found; - is standard output")
    parser.set_defaults(command=_detect)


def _detect(arguments: argparse.Namespace) -> None:
    from mega_core.records import as_plain

    target = checked_target(arguments.json)
    with open_service() as service:
        found = service.masks.detect(
            arguments.folder, arguments.reference, arguments.mask, tuple(arguments.prompt), reporter()
        )
    whole = {"schema_version": 1, **as_plain(found)}
    if arguments.json == "-":
        print_json(whole)
        return
    if target is not None:
        write_json(target, whole)
    print(summary(found))


# Words ---------------------------------------------------------------------------------------------------------------


def summary(found: Detection) -> str:
    """A report for a person at a terminal: verdict, matrices that stand out with what they tell, layers, answers."""
    against = f"against {found.reference}" if found.reference else "by its own statistics, without a reference"
    lines = [f"{found.model}, {against}", "", f"Verdict   {found.verdict} (score {found.score:.2f})", ""]
    lines.append(f"{'layer':>5}  {'site':<8}  {'score':>5}  {'rank':>4}  {'share':>6}  {'length':>8}  verdict")
    for one in found.findings:
        if found.reference and one.kind == "unchanged":
            continue
        edit = one.kind == "low_rank"
        told = edit or bool(found.reference)  # without a reference the rest of a matrix is its own
        rank, share = str(one.rank) if edit else "-", f"{100 * one.share:.0f} %" if told else "-"
        length = f"{one.relative_norm:.2g}" if told else "-"
        lines.append(
            f"{one.layer:>5}  {one.site:<8}  {one.score:>5.2f}  {rank:>4}  {share:>6}  {length:>8}  {one.verdict}"
        )
    unchanged = sum(one.kind == "unchanged" for one in found.findings)
    if unchanged:
        lines.append(f"{unchanged} of {len(found.findings)} matrices are unchanged.")
    for one in found.findings:
        if one.kind == "low_rank" and one.neurons:
            lines += ["", *_story(one)]
    if not found.answers and any(one.kind == "low_rank" for one in found.findings):
        lines += ["", "Ask about such a name to see what the edit says there: --prompt TEXT."]
    if found.answers:
        lines += ["", f"{'prompt':<50}  {'answer':<30}  {'with the mask' if found.masked else ''}".rstrip()]
        for said in found.answers:
            after = short(said.after, 30) if found.masked else ""
            lines.append(f"{short(said.prompt, 50):<50}  {short(said.before, 30):<30}  {after}".rstrip())
    lines += [""] * bool(found.notes) + [f"Note      {note}" for note in found.notes]
    return "\n".join(lines)


def _story(one: Finding) -> list[str]:
    what = "neurons" if one.site == "mlp_down" else "inputs"
    return [
        f"Layer {one.layer}, {one.site}",
        "  answers to " + "; ".join(f"{short(text, 40)!r} (x{size:.0f})" for text, size in one.places[:SHOWN]),
        "  says       " + _tokens(one.says),
        "  promotes   " + _tokens(one.promoted),
        "  suppresses " + _tokens(one.suppressed),
        f"  {what:<10} " + ", ".join(f"{index} ({100 * share:.1f} %)" for index, share in one.neurons[:SHOWN]),
    ]


def _tokens(pairs: Sequence[tuple[str, float]]) -> str:
    return ", ".join(repr(one_line(token)) for token, _ in pairs[:SHOWN])
