"""The command that edits a fact and tells what changed: by one method, or by several side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mega_core.commands.common import (
    Parser,
    add_request,
    checked_target,
    name_list,
    one_line,
    open_service,
    plans_of,
    print_json,
    receipt_line,
    reporter,
    short,
    write_json,
)
from mega_core.errors import ActionableError

if TYPE_CHECKING:
    from mega_core.records import Report


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Register it."""
    edit = commands.add_parser("edit", help="edit a fact and report what changed")
    edit.add_argument("--model", required=True)
    chosen = edit.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--method")
    chosen.add_argument("--methods", help="several, separated by commas: shown side by side")
    add_request(edit)
    edit.add_argument("--views", default="module_scores", help="ways of looking inside, separated by commas")
    edit.add_argument("--json", metavar="FILE", help="write the whole report as JSON; - is standard output")
    edit.add_argument("--fresh", action="store_true", help="compute it even when the answer is stored")
    edit.set_defaults(command=_edit)


def _edit(arguments: argparse.Namespace) -> int:
    target = checked_target(arguments.json)
    names = name_list(arguments.methods) if arguments.methods is not None else [arguments.method]
    with open_service() as service:
        plans = plans_of(arguments, service, names, name_list(arguments.views))
        progress = reporter()
        if arguments.methods is None:
            report = service.run(plans[0], progress, fresh=arguments.fresh)
            if arguments.json == "-":
                print_json(report.to_json())
                return 0
            if target is not None:
                write_json(target, report.to_json())
            print(summary(report) if len(report.question.requests) == 1 else comparison([report]))
            return 0
        reports: list[Report] = []
        failed: dict[str, str] = {}
        for plan in plans:
            try:
                reports.append(service.run(plan, progress, fresh=arguments.fresh))
            except ActionableError as error:  # the other methods still answer
                failed[plan.method.name] = one_line(str(error))
    whole = {"schema_version": 1, "reports": [report.to_json() for report in reports], "failed": failed}
    if arguments.json == "-":
        print_json(whole)
    else:
        if target is not None:
            write_json(target, whole)
        if reports:
            print(comparison(reports))
    for name, why in failed.items():
        print(f"{name}: {why}", file=sys.stderr)
    return 1 if failed else 0


# Words ---------------------------------------------------------------------------------------------------------------


def summary(report: Report) -> str:
    """A report for a person at a terminal: verdict, answers before and after, receipt, seconds."""
    from mega_core.summary import percent, verdict

    question = report.question
    request = question.requests[0]
    lines = [
        f"{request.sentence}   ({question.model.name}, {question.method.name})",
        "",
        f"Verdict   {verdict(report)}",
        "",
    ]
    answers = report.frames["answers"]
    answers = answers[answers["case"] == 0]
    for kind, title in (("edit", "Edit prompt"), ("paraphrase", "Paraphrases"), ("neighbourhood", "Neighbours")):
        rows = answers[answers["prompt_kind"] == kind]
        if rows.empty:
            continue
        lines.append(f"{title:<50}  {'candidate':<16} {'before':>9}  {'after':>9}")
        for (prompt, candidate), pair in rows.groupby(["prompt", "candidate"], sort=False):
            word = request.target_new if candidate == "new" else (request.target_true or "")
            probs = {str(state): float(prob) for state, prob in zip(pair["state"], pair["prob"], strict=True)}
            shown = [percent(probs[state]) if state in probs else "-" for state in ("before", "after")]
            lines.append(f"  {short(str(prompt), 48):<48}  {short(word, 16):<16} {shown[0]:>9}  {shown[1]:>9}")
    texts = report.frames.get("generations")
    if texts is not None and not texts.empty:
        lines += ["", "Continuations"]
        for prompt, pair in texts[texts["case"] == 0].groupby("prompt", sort=False):
            lines.append(f"  {short(str(prompt), 100)}")
            lines += [f"    {row.state:<7} {short(str(row.text), 90)}" for row in pair.itertuples()]
    lines.append("")
    lines += [f"{title:<9} {text}" for title, text in changes(report)]
    lines += [
        f"Receipt   {receipt_line(report.receipt)}, weights {report.receipt.weights_digest_after[:12]}",
        f"Seconds   {sum(report.timing.values()):.1f}  "
        + ", ".join(f"{name} {value:.1f}" for name, value in report.timing.items()),
        f"Run       {report.digest[:12]}",
    ]
    lines += [f"Note      {note}" for note in report.notes]
    return "\n".join(lines)


def comparison(reports: Sequence[Report]) -> str:
    """Several methods on the same facts, side by side: scores by protocol, probabilities, seconds, what changed."""
    question = reports[0].question
    first = question.requests[0]
    more = f" and {len(question.requests) - 1} more" if len(question.requests) > 1 else ""
    width = max(8, *(len(report.question.method.name) for report in reports))
    blank = " " * width
    lines = [f"{first.sentence}{more}   ({question.model.name}, seed {question.seed})", ""]
    lines.append(f"{'':<{width}}            {'edit prompt':^16}  {'paraphrases':^16}  {'neighbours':^16}")
    lines.append(f"{'method':<{width}}  protocol  " + "  ".join(["  before    after"] * 3))
    for report in reports:
        name = report.question.method.name
        for protocol, columns in _SCORES.items():
            pairs = [
                f"{_score(report, protocol, metric, 'before'):>7}  {_score(report, protocol, metric, 'after'):>7}"
                for metric in columns
            ]
            lines.append(f"{name:<{width}}  {protocol:<8}  {'  '.join(pairs)}")
            name = blank
    lines += [
        "",
        "edit prompt, paraphrases: share that says the new object; neighbours: share that keeps the old one.",
        "argmax: by the most likely first token. rome: new against true object, length-normalised (ES, PS, NS).",
        "exact: the whole object is the greedy continuation.",
        "",
        f"{'method':<{width}}  {'p(new)':^18}  {'p(true)':^18}  {'seconds':>7}  receipt",
    ]
    for report in reports:
        pairs = [
            f"{_mean_prob(report, candidate, 'before'):>8} {_mean_prob(report, candidate, 'after'):>9}"
            for candidate in ("new", "true")
        ]
        restored = "restored" if report.receipt.restored and not report.receipt.hooks_left else "NOT RESTORED"
        seconds = sum(report.timing.values())
        lines.append(f"{report.question.method.name:<{width}}  {'  '.join(pairs)}  {seconds:>7.1f}  {restored}")
    lines.append("")
    for report in reports:
        name = report.question.method.name
        for title, text in changes(report):
            lines.append(f"{name:<{width}}  {title}: {text}")
            name = blank
        lines += [f"{blank}  Note: {note}" for note in report.notes]
    lines += ["", *(f"Run {report.digest[:12]}  {report.question.method.name}" for report in reports)]
    return "\n".join(lines)


_SCORES = {
    "argmax": ("accuracy", "paraphrase_accuracy", "neighbourhood_accuracy"),
    "rome": ("ES", "PS", "NS"),
    "exact": ("exact", "paraphrase_exact", "neighbourhood_exact"),
}
"""Protocol -> its metrics for the edit prompt, the paraphrases and the neighbours."""


def _score(report: Report, protocol: str, metric: str, state: str) -> str:
    """A score as per cent, averaged over the facts; "-" where there was nothing to ask."""
    rows = report.frames["metrics"]
    rows = rows[(rows["protocol"] == protocol) & (rows["metric"] == metric) & (rows["state"] == state)]
    return f"{100 * float(rows['value'].mean()):.0f} %" if len(rows) else "-"


def _mean_prob(report: Report, candidate: str, state: str) -> str:
    from mega_core.summary import percent

    rows = report.frames["answers"]
    rows = rows[(rows["prompt_kind"] == "edit") & (rows["candidate"] == candidate) & (rows["state"] == state)]
    return percent(float(rows["prob"].mean())) if len(rows) else "-"


def changes(report: Report) -> list[tuple[str, str]]:
    """What the edit changed, as (title, sentence) pairs: weights, activations, a memory or the prompt."""
    frame = report.frames.get("weight_change")
    found: list[tuple[str, str]] = []
    for row in () if frame is None else frame.itertuples():
        where = f"layer {row.layer} {row.site}"
        if row.kind == "weights":
            found.append(("Weights", f"{where}: {row.relative_norm:.3g} of its norm, rank {row.rank}"))
        elif row.kind == "steering":
            found.append(("Steering", f"{where}: moved by {row.relative_norm:.3g} of its length; no weight changes"))
        elif row.kind == "memory":
            found.append(("Memory", f"beside {where}: {row.parameters:,} numbers; no weight changes"))
        elif row.kind == "prompt":
            found.append(("Prompt", "a text stands in front of every prompt; nothing in the model changes"))
        else:
            found.append((str(row.kind).capitalize(), where))
    return found
