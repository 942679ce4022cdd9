"""The commands about masks: train one that undoes edits, judge it on edits it has never seen, look for edits."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mega_core.commands import mask_detect
from mega_core.commands.common import (
    Parser,
    checked_target,
    open_service,
    params_of,
    print_json,
    reporter,
    show_notes,
    write_json,
)
from mega_core.errors import BadInput

if TYPE_CHECKING:
    from mega_core.mask_study import Evaluation
    from mega_core.masking.masks import Mask

SETTINGS = ("top", "small", "published")


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Register them."""
    group = commands.add_parser("mask", help="one mask that undoes many edits: train it, judge it; find edits")
    actions = group.add_subparsers(required=True, metavar="ACTION", parser_class=Parser)

    train = actions.add_parser("train", help="train a mask on edits of random known facts")
    train.add_argument("--model", required=True)
    train.add_argument("--method", default="rome", choices=("rome", "memit"))
    train.add_argument("--n", type=int, default=200, help="how many facts are edited to train on (default 200)")
    train.add_argument("--together", action="store_true", help="all facts as one edit instead of one by one")
    train.add_argument("--layer", default="auto", help="the masked layer, or auto: the lowest edited one that matters")
    train.add_argument(
        "--pruned", type=float, default=0.10, metavar="SHARE", help="share that is pruned (default 0.10)"
    )
    train.add_argument(
        "--settings",
        default="top",
        choices=SETTINGS,
        help="top: on the binary mask itself (ours); small: the published schedule, shortened; published (slow)",
    )
    train.add_argument("--epochs", type=int, help="default: by the settings")
    train.add_argument("--param", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the method")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--out", required=True, type=Path, metavar="FILE", help="the mask file")
    train.set_defaults(command=_train)

    judge = actions.add_parser("evaluate", help="judge a mask on edits that it has not seen, beside its controls")
    judge.add_argument("--mask", required=True, type=Path, metavar="FILE")
    judge.add_argument("--n", type=int, default=100, help="edits of each held-out kind (default 100)")
    judge.add_argument("--json", metavar="FILE", help="everything that was measured; - is standard output")
    judge.set_defaults(command=_evaluate)

    mask_detect.add(actions)


def _train(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise BadInput("--out", f"{out} can't be written.", "Name a file in a folder that is there.")
    notes: list[str] = []
    with open_service() as service:
        mask = service.masks.train(
            arguments.model,
            arguments.method,
            arguments.n,
            out,
            layer=_layer(arguments.layer),
            together=arguments.together,
            settings=arguments.settings,
            pruned=arguments.pruned,
            epochs=arguments.epochs,
            params=params_of(arguments.param, [arguments.method])[arguments.method],
            seed=arguments.seed,
            report=reporter(notes),
        )
    print(trained(mask))
    show_notes(notes)
    print(f"Mask      {out}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    target = checked_target(arguments.json)
    notes: list[str] = []
    with open_service() as service:
        found = service.masks.evaluate(arguments.mask, arguments.n, reporter(notes))
    if arguments.json == "-":
        print_json(found.to_json())
        return 0
    if target is not None:
        write_json(target, found.to_json())
    print(judged(found))
    show_notes(notes)
    return 0


def _layer(text: str) -> int | None:
    if text.strip().lower() == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise BadInput("--layer", f"{text[:40]!r} is no layer.", "Give a number, or auto.") from None


# Words ---------------------------------------------------------------------------------------------------------------


def trained(mask: Mask) -> str:
    """What was trained, in two lines."""
    edits = mask.trained.get("edits", 0)
    held = ", ".join(map(str, mask.trained.get("held_relations", ())))
    return (
        f"Trained   on {edits} edits of {mask.model}; {100 * mask.pruned:.1f} % of layer {mask.layer}'s {mask.site} "
        f"pruned\nUnseen    {held}: relations for judging"
    )


def judged(found: Evaluation) -> str:
    """Reversal by mask and set, the unedited model under each mask, editability, over-attention."""
    mask = found.mask
    lines = [
        f"Mask over layer {mask.layer}'s {mask.site} of {mask.model}, {100 * mask.pruned:.1f} % pruned, trained on "
        f"{mask.trained.get('edits', 0)} edits by {found.plan.method}.",
    ]
    if found.degenerate:
        lines.append(
            "This layer is degenerate: removing the whole matrix reverses the edits and costs the model nothing, so "
            "reversing edits here shows nothing."
        )
    lines += ["", "Reversed (RSR) / same first token as the unedited model (top-1), %, of edits that took", ""]
    names = list(dict.fromkeys(row.mask for row in found.rows))
    sets = list(dict.fromkeys(row.set for row in found.rows))
    kinds = [(set_, "edit") for set_ in sets] + [("held-out facts", "paraphrase")]
    heads = ["training", "facts", "relations", "facts, paraphr."]
    lost = {row.mask: row for row in found.collateral}
    table = [["mask", *heads, "recall", "perplexity"]]
    for name in names:
        cells = []
        for set_, kind in kinds:
            try:
                score = found.row(name, set_, kind)
                cells.append(f"{100 * score.rsr:.0f} / {100 * score.top1:.0f}" if score.cases else "-")
            except KeyError:
                cells.append("-")
        row = lost.get(name)
        cells += ["-", "-"] if row is None else [f"{100 * row.recall:.1f}", f"{row.perplexity:.4g}"]
        table.append([name, *cells])
    whole = lost["none"]
    table.append(["no mask", "", "", "", "", f"{100 * whole.recall:.1f}", f"{whole.perplexity:.4g}"])
    lines += _aligned(table)
    lines.append("")
    lines.append('Training edits were seen; facts and relations were not. "recall" and "perplexity" are the unedited')
    lines.append("model's under the mask.")
    took = found.row("trained", "held-out facts")
    lines.append(f"Of the held-out facts' edits {100 * took.took:.0f} % took ({took.cases} count).")
    if found.editability:
        lines += ["", "ROME afterwards: new object first, %", ""]
        lines += _aligned(
            [["", "edit prompt", "paraphrases"]]
            + [[e.where, f"{100 * e.accuracy:.0f}", f"{100 * e.paraphrase:.0f}"] for e in found.editability]
        )
    language = found.language
    lines += [
        "",
        f"Perplexity {language['original']:.4g} unedited, {language['edited']:.4g} edited, {language['masked']:.4g} "
        "edited and masked.",
    ]
    if found.shares:
        lines += ["", "What attention says for the old / the new object at the last position, by layer (logits)", ""]
        rows: dict[str, list[str]] = {}
        layers = sorted({share.layer for share in found.shares})
        value = {(s.state, s.layer, s.module, s.candidate): s.mean for s in found.shares}
        for state in ("original", "edited", "masked"):
            rows[state] = [
                f"{value[state, layer, 'attn', 'old']:.0f} / {value[state, layer, 'attn', 'new']:.0f}"
                for layer in layers
            ]
        lines += _aligned([["", *map(str, layers)], *([state, *cells] for state, cells in rows.items())])
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            f"{text:<{w}}" if i == 0 else f"{text:>{w}}" for i, (text, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
