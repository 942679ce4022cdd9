"""The command that checks cells of views by doing what they name: predicted effect, actual effect, control."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mega_core.commands.common import (
    Parser,
    add_request,
    checked_target,
    open_service,
    plans_of,
    print_json,
    receipt_line,
    reporter,
    short,
    write_json,
)
from mega_core.errors import BadInput

if TYPE_CHECKING:
    from mega_core.verify_study import Verification

FORMS = (
    "attn:5, ffn:3, head:5.2, source:5.2.7 (layer, head, position), neuron:3.118, attention_neuron:5.2.11.7 (layer, "
    "head, dim, position), query_neuron:1.30@6, state:4.block_out.6, matrix:2.mlp_down; several joined by + are "
    "changed together"
)
WIDTH = 34


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Register it."""
    parser = commands.add_parser("verify", help="check cells of the views: change what they name, and see what happens")
    parser.add_argument("--model", required=True)
    parser.add_argument("--method", required=True)
    add_request(parser)
    parser.add_argument("--cell", action="append", required=True, help=f"{FORMS}; may be repeated")
    parser.add_argument(
        "--action",
        default="ablate",
        choices=("ablate", "scale", "patch", "restore"),
        help="ablate: make it zero; scale: times --factor; patch: its value from the other state; restore: put an "
        "edited matrix back (default ablate)",
    )
    parser.add_argument("--factor", type=float, help="of scale")
    parser.add_argument("--state", default="after", choices=("before", "after"), help="which model (default after)")
    parser.add_argument("--fact", type=int, default=1, help="with --file, which fact's prompt (default 1)")
    parser.add_argument("--controls", type=int, default=10, help="random cells per cell (default 10)")
    parser.add_argument("--json", metavar="FILE", help="the table as JSON; - is standard output")
    parser.set_defaults(command=_verify)


def _verify(arguments: argparse.Namespace) -> None:
    target = checked_target(arguments.json)
    if (arguments.factor is None) == (arguments.action == "scale"):
        what = "needs --action scale." if arguments.factor is not None else "is missing."
        raise BadInput("--factor", what, "For example: --action scale --factor 0.5.")
    with open_service() as service:
        (plan,) = plans_of(arguments, service, [arguments.method])
        if not 1 <= arguments.fact <= len(plan.requests):
            raise BadInput("--fact", f"there is no fact {arguments.fact}.", f"Give 1 to {len(plan.requests)}.")
        found = service.studies.verify(
            plan,
            arguments.cell,
            arguments.action,
            arguments.state,
            factor=arguments.factor or 0.0,
            case=arguments.fact - 1,
            controls=arguments.controls,
            seed=arguments.seed,
            report=reporter(),
        )
    if arguments.json == "-":
        print_json(as_plain(found))
        return
    if target is not None:
        write_json(target, as_plain(found))
    print(summary(found))


# Words ---------------------------------------------------------------------------------------------------------------


def as_plain(found: Verification) -> dict[str, object]:
    """Everything, as plain JSON."""
    from mega_core import records

    return {
        "schema_version": 1,
        "question": records.as_plain(found.question),
        "tokens": list(found.tokens),
        "verified": found.table.to_dict(orient="records"),
        "receipt": records.as_plain(found.receipt),
        "notes": list(found.notes),
    }


def summary(found: Verification) -> str:
    """For a person at a terminal: a line per cell and candidate."""
    from mega_core.summary import percent

    table = found.table
    first = table.iloc[0]
    request = found.question.requests[int(first["case"])]
    lines = [
        f"{request.sentence}   ({found.question.model.name}, {found.question.method.name}, {first['state']} the edit)",
        " ".join(f"{i}:{token.strip() or token!r}" for i, token in enumerate(found.tokens)),
        "",
        f"Action    {first['action']}. Effects on log p of the candidate's first token, in nats.",
        "",
        f"{'cell':<{WIDTH}}  {'candidate':<14} {'predicted':>9} {'direct':>9} {'actual':>9}   "
        f"{'control':>17}   {'p':>17}   {'rank':>13}",
    ]
    name = ""
    for row in table.itertuples():
        shown = str(row.cells) if row.cells != name else ""
        name = str(row.cells)
        known = bool(row.has_prediction)
        effects = [
            f"{row.predicted:>+9.3f}" if known else f"{'-':>9}",
            f"{row.direct:>+9.3f}" if known else f"{'-':>9}",
        ]
        control = f"{row.control:+.3f} ± {row.control_sd:.3f}" if row.controls else "-"
        probs = f"{percent(float(row.prob_before))} > {percent(float(row.prob_after))}"
        lines.append(
            f"{short(shown, WIDTH):<{WIDTH}}  {short(f'{row.candidate} {row.token.strip()!r}', 14):<14} "
            f"{' '.join(effects)} {row.actual:>+9.3f}   {control:>17}   {probs:>17}   "
            f"{f'{row.rank_before} > {row.rank_after}':>13}"
        )
    lines += [
        "",
        "predicted: by the view's score. direct: if no later layer reacted. actual: the model ran so.",
        "control: mean ± deviation of random cells of the same kind, changed in the same way.",
        "",
        f"Receipt   {receipt_line(found.receipt)}",
    ]
    return "\n".join([*lines, *(f"Note      {note}" for note in found.notes)])
