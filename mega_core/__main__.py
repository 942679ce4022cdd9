"""The command line: python -m mega_core {models,methods,edit,stack,export,facts,examples,train,cache}.

Exit status 0: done. 2: what was asked can't be done so, told in one line on stderr. 1: a failure of ours, with an error
id whose traceback is in the log file. 130: interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mega_core.errors import (
    ActionableError,
    BadInput,
    ModelUnavailable,
    UnknownName,
    UnsupportedMethod,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from mega_core.events import Event, Reporter
    from mega_core.records import EditRequest, Inspection, Receipt, Report
    from mega_core.service import Service, StackedEdit

INPUT_ERRORS = (BadInput, UnknownName, ModelUnavailable, UnsupportedMethod, UnsupportedModel)
log = logging.getLogger("mega_core")


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {_one_line(message)} See {self.prog} --help.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = build_parser(words).parse_args(words)
        return int(arguments.command(arguments) or 0)
    except INPUT_ERRORS as error:
        print(_one_line(str(error)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 - the last door: nobody is shown a traceback
        error_id = secrets.token_hex(4)
        where = _log_to_file()
        log.error("error %s", error_id, exc_info=error)
        said = _one_line(str(error)) if isinstance(error, ActionableError) else f"Unexpected {type(error).__name__}."
        print(f"{said} (error {error_id}{f', details in {where}' if where else ''})", file=sys.stderr)
        return 1


def build_parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Every command with its arguments. Those of `train` need torch, so they are there only when it is called."""
    parser = Parser(prog="python -m mega_core", description="Edit a language model and look inside before and after.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    models = commands.add_parser("models", help="list the models and how to get the missing ones")
    models.add_argument("--json", action="store_true", help="as JSON on standard output")
    models.set_defaults(command=_models)

    methods = commands.add_parser("methods", help="list the methods, or print their reference")
    form = methods.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="every method with its parameters, as JSON")
    form.add_argument("--markdown", action="store_true", help="the same for people: this is docs/methods.md")
    methods.set_defaults(command=_methods)

    edit = commands.add_parser("edit", help="edit a fact and report what changed")
    edit.add_argument("--model", required=True)
    chosen = edit.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--method")
    chosen.add_argument("--methods", help="several, separated by commas: shown side by side")
    _add_request(edit)
    edit.add_argument("--views", default="module_scores", help="ways of looking inside, separated by commas")
    edit.add_argument("--json", metavar="FILE", help="write the whole report as JSON; - is standard output")
    edit.add_argument("--fresh", action="store_true", help="compute it even when the answer is stored")
    edit.set_defaults(command=_edit)

    stack = commands.add_parser("stack", help="edits of one model in a folder, any of which can be undone")
    actions = stack.add_subparsers(required=True, metavar="ACTION", parser_class=Parser)
    for name, help_, command in (
        ("add", "prepare an edit on top of the earlier ones and save it", _stack_add),
        ("list", "what is in it", _stack_list),
        ("undo", "take one edit out", _stack_undo),
        ("check", "apply it, ask for every fact, look for signs of damage, undo it", _stack_check),
    ):
        action = actions.add_parser(name, help=help_)
        action.add_argument("--folder", required=True, type=Path, help="where the stack is saved")
        if name == "add":
            action.add_argument("--model", required=True)
            action.add_argument("--method", required=True)
            _add_request(action)
        if name == "undo":
            action.add_argument("--edit", required=True, help="its name in the list, such as rome-1")
        if name != "add":
            action.add_argument("--json", action="store_true", help="as JSON on standard output")
        action.set_defaults(command=command)

    export = commands.add_parser(
        "export", help="write an edited model as an ordinary folder of the transformers library"
    )
    export.add_argument("--stack", type=Path, metavar="FOLDER", help="all edits of this stack; instead of one edit")
    export.add_argument("--model")
    export.add_argument("--method")
    _add_request(export)
    export.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="a new or empty folder")
    export.set_defaults(command=_export)

    facts = commands.add_parser("facts", help="the facts an embedded model was trained on")
    facts.add_argument("--model", required=True)
    facts.add_argument("--json", action="store_true", help="as JSON on standard output")
    facts.set_defaults(command=_facts)

    examples = commands.add_parser("examples", help="rebuild the example reports that ship with the app")
    examples.add_argument("--model", default="atlas-gpt2")
    examples.add_argument("--method", default="rome")
    examples.add_argument("--tries", type=int, default=120, help="edits to search (default 120)")
    examples.add_argument("--seed", type=int, default=0)
    examples.set_defaults(command=_examples)

    train = commands.add_parser("train", help="train an embedded model from the fact tables")
    if "train" in words[:1]:
        from mega_core.embedded import train as training

        training.add_arguments(train)
        train.set_defaults(command=training.run)

    cache = commands.add_parser("cache", help="what is stored, or forget it")
    cache.add_argument("action", choices=("stats", "clear"))
    cache.add_argument("--json", action="store_true", help="as JSON on standard output")
    cache.set_defaults(command=_cache)
    return parser


def _add_request(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what to edit, and how."""
    parser.add_argument("--subject", help='the entity, for example "Eiffel Tower"')
    parser.add_argument("--template", help='the relation with one {}, "{} is located in the city of"')
    parser.add_argument("--target-new", help="the new object")
    parser.add_argument("--target-true", default="", help="the object the model says now")
    parser.add_argument("--paraphrase", action="append", default=[], help="a prompt asking the same; may be repeated")
    parser.add_argument(
        "--neighbour", action="append", default=[], help="a prompt whose answer must stay; may be repeated"
    )
    parser.add_argument(
        "--file",
        help="several facts edited together: a JSON list of objects with subject, template, target_new and, if known, "
        "target_true, paraphrases, neighbours",
    )
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter; METHOD.NAME=VALUE sets it for one of several methods",
    )
    parser.add_argument("--seed", type=int, default=0)


# Commands ------------------------------------------------------------------------------------------------------------


def _models(arguments: argparse.Namespace) -> None:
    from mega_core.records import as_plain

    with _service() as service:
        infos = service.models()
    if arguments.json:
        _print_json({"schema_version": 1, "models": [as_plain(info) for info in infos]})
        return
    width = max(len(info.name) for info in infos)
    for info in infos:
        size = f"{info.parameters / 1e6:,.0f}M" if info.parameters else "?"
        state = "ready" if info.available else "not here"
        print(f"{info.name:<{width}}  {state:<8}  {size:>7}  {info.memory_gb:>4g} GB  {info.dtype:<8}  {info.title}")
        if not info.available:
            print(f"{'':<{width}}  {_one_line(f'{info.reason} {info.how}')}")


def _methods(arguments: argparse.Namespace) -> None:
    from mega_core import reference

    if arguments.json:
        _print_json({"schema_version": reference.SCHEMA_VERSION, "methods": reference.entries()})
    elif arguments.markdown:
        print(reference.markdown(), end="")
    else:
        print(reference.listing())


def _edit(arguments: argparse.Namespace) -> int:
    target = _checked_target(arguments.json)
    names = _names(arguments.methods) if arguments.methods is not None else [arguments.method]
    with _service() as service:
        plans = _plans(arguments, service, names, _names(arguments.views))
        progress = _reporter()
        if arguments.methods is None:
            report = service.run(plans[0], progress, fresh=arguments.fresh)
            if arguments.json == "-":
                _print_json(report.to_json())
                return 0
            if target is not None:
                _write_json(target, report.to_json())
            print(summary(report) if len(report.question.requests) == 1 else comparison([report]))
            return 0
        reports: list[Report] = []
        failed: dict[str, str] = {}
        for plan in plans:
            try:
                reports.append(service.run(plan, progress, fresh=arguments.fresh))
            except ActionableError as error:  # the other methods still answer
                failed[plan.method.name] = _one_line(str(error))
    whole = {"schema_version": 1, "reports": [report.to_json() for report in reports], "failed": failed}
    if arguments.json == "-":
        _print_json(whole)
    else:
        if target is not None:
            _write_json(target, whole)
        if reports:
            print(comparison(reports))
    for name, why in failed.items():
        print(f"{name}: {why}", file=sys.stderr)
    return 1 if failed else 0


def _stack_add(arguments: argparse.Namespace) -> None:
    notes: list[str] = []
    with _service() as service:
        (plan,) = _plans(arguments, service, [arguments.method])
        name = service.stack_add(arguments.folder, plan, _reporter(notes))
    print(f"Added {name} to {arguments.folder}.")
    _show_notes(notes)


def _stack_list(arguments: argparse.Namespace) -> None:
    with _service() as service:
        _show_stack(service.stack_edits(arguments.folder), arguments.json)


def _stack_undo(arguments: argparse.Namespace) -> None:
    with _service() as service:
        left = service.stack_undo(arguments.folder, arguments.edit)
    if not arguments.json:
        print(f"Undone: {arguments.edit}. Left:")
    _show_stack(left, arguments.json)


def _show_stack(edits: Sequence[StackedEdit], as_json: bool) -> None:
    from mega_core.records import as_plain

    if as_json:
        _print_json({"schema_version": 1, "edits": [as_plain(edit) for edit in edits]})
        return
    for edit in edits:
        for request in edit.requests:
            print(f"{edit.name:<16} {edit.kind:<12} {request.sentence}")
    if not edits:
        print("No edits.")


def _stack_check(arguments: argparse.Namespace) -> int:
    from mega_core.records import as_plain
    from mega_core.summary import percent

    with _service() as service:
        found = service.stack_check(arguments.folder, _reporter())
    if arguments.json:
        _print_json({"schema_version": 1, **as_plain(found)})
    else:
        for held in found.held:
            said = "says" if held.says_new else "does not say"
            print(f"{held.edit:<16} {said:<13} {held.request.sentence}   ({percent(held.prob)})")
        for text in found.signs:
            print(f"{'ALARM' if text in found.raised else 'sign':<8} {text}")
        print(f"Receipt  {_receipt(found.receipt)}")
    return 0 if found.receipt.restored else 1


def _export(arguments: argparse.Namespace) -> None:
    notes: list[str] = []
    with _service() as service:
        if arguments.stack is not None:
            given = ("model", "method", "subject", "template", "target_new", "file")
            if extra := [name for name in given if getattr(arguments, name)]:
                raise BadInput(f"--{extra[0].replace('_', '-')}", "does not go with --stack.", "Leave one of them out.")
            folder = service.export_stack(arguments.stack, arguments.out, _reporter(notes))
        else:
            for name in ("model", "method"):
                if not getattr(arguments, name):
                    raise BadInput(f"--{name}", "is missing.", "Give it, or --stack.")
            (plan,) = _plans(arguments, service, [arguments.method])
            folder = service.export(plan, arguments.out, _reporter(notes))
    print(f"Written to {folder}. Load it with AutoModelForCausalLM.from_pretrained({str(folder)!r}).")
    _show_notes(notes)


def _show_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"Note      {note}")


def _plans(
    arguments: argparse.Namespace, service: Service, names: Sequence[str], views: Sequence[str] = ()
) -> list[Inspection]:
    """One complete question per method, all about the same facts. Raises before any of them is worked on."""
    if len(set(names)) < len(names) or not names:
        raise BadInput("--methods", "names one twice, or none.", "For example: --methods rome,memit,mega.")
    params = _params(arguments.param, names)
    if arguments.file is not None:
        for name in ("subject", "template", "target_new", "target_true", "paraphrase", "neighbour"):
            if getattr(arguments, name):
                raise BadInput(f"--{name.replace('_', '-')}", "does not go with --file.", "Leave one of them out.")
        requests = _requests(arguments.file)
        return [
            service.plan_several(arguments.model, name, requests, params[name], views, arguments.seed) for name in names
        ]
    missing = [name for name in ("subject", "template", "target_new") if getattr(arguments, name) is None]
    if missing:
        words = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise BadInput(words, "is missing." if len(missing) == 1 else "are missing.", "Give the fact, or --file.")
    return [
        service.plan(
            arguments.model,
            name,
            subject=arguments.subject,
            template=arguments.template,
            target_new=arguments.target_new,
            target_true=arguments.target_true,
            paraphrases=tuple(arguments.paraphrase),
            neighbours=tuple(arguments.neighbour),
            params=params[name],
            views=views,
            seed=arguments.seed,
        )
        for name in names
    ]


def _facts(arguments: argparse.Namespace) -> None:
    with _service() as service:
        facts = service.facts(arguments.model)
    if not facts:
        raise BadInput("model", f"{arguments.model} has no fact tables.", "They belong to the embedded models.")
    if arguments.json:
        _print_json(list(facts))
        return
    for fact in facts:
        print(f"{fact['subject']}\t{fact['relation']}\t{fact['object']}")


def _examples(arguments: argparse.Namespace) -> None:
    from mega_core.embedded import examples

    if not 1 <= arguments.tries <= 10_000:
        raise BadInput("tries", f"{arguments.tries} is out of range.", "Give 1 to 10000.")
    with _service() as service:
        written = service.rebuild_examples(arguments.model, arguments.method, arguments.tries, arguments.seed)
    for example in written:
        print(f"{example.outcome:<6}  {example.title}  {example.sentence}")
    print(f"Written to {examples.FOLDER}")


def _cache(arguments: argparse.Namespace) -> None:
    from mega_core.records import as_plain

    with _service() as service:
        removed = service.clear_results() if arguments.action == "clear" else None
        health = service.status().store
    if arguments.json:
        _print_json({"schema_version": 1, "removed": removed, "store": as_plain(health)})
        return
    if removed is not None:
        print(f"Forgot {removed} stored entries. Notes and tags are kept.")
    print(f"{health.entries} entries, {health.bytes / 2**20:.1f} MB on {health.mode}, {health.quarantined} damaged.")
    if health.notice:
        print(health.notice)


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
            lines.append(f"  {_short(str(prompt), 48):<48}  {_short(word, 16):<16} {shown[0]:>9}  {shown[1]:>9}")
    texts = report.frames.get("generations")
    if texts is not None and not texts.empty:
        lines += ["", "Continuations"]
        for prompt, pair in texts[texts["case"] == 0].groupby("prompt", sort=False):
            lines.append(f"  {_short(str(prompt), 100)}")
            lines += [f"    {row.state:<7} {_short(str(row.text), 90)}" for row in pair.itertuples()]
    lines.append("")
    lines += [f"{title:<9} {text}" for title, text in changes(report)]
    lines += [
        f"Receipt   {_receipt(report.receipt)}, weights {report.receipt.weights_digest_after[:12]}",
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


def _receipt(receipt: Receipt) -> str:
    restored = "restored bit for bit" if receipt.restored else "NOT RESTORED"
    return f"{restored}, {receipt.hooks_left} hooks left"


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _params(pairs: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, object]]:
    """Method -> its parameters. METHOD.NAME goes to that one, NAME to all that have it; raises when none has."""
    from mega_core.methods import METHODS

    known = {name: {knob.name for knob in METHODS[name].knobs()} for name in methods}
    shared: dict[str, dict[str, object]] = {name: {} for name in methods}
    own: dict[str, dict[str, object]] = {name: {} for name in methods}
    for pair in pairs:
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not name:
            raise BadInput("--param", f"{pair[:40]!r} is not NAME=VALUE.", "For example: --param layer=4.")
        method, dot, param = name.partition(".")
        if dot:
            if method not in known:
                raise BadInput(
                    "--param", f"{method[:40]!r} is none of the methods here.", f"They are {', '.join(known)}."
                )
            own[method][param] = value  # one that it doesn't have is told by the method
            continue
        having = [one for one in methods if name in known[one]]
        if not having and len(methods) > 1:
            raise BadInput(
                "--param", f"no method here has a parameter {name[:40]!r}.", "See: python -m mega_core methods."
            )
        for one in having or methods:
            shared[one][name] = value
    return {name: {**shared[name], **own[name]} for name in methods}


def _requests(name: str) -> list[EditRequest]:
    """The facts of a JSON file, or of standard input for "-"."""
    from mega_core.records import EditRequest

    try:
        text = sys.stdin.read(MAX_FILE + 1) if name == "-" else _read(Path(name))
        if len(text) > MAX_FILE:
            raise BadInput("--file", f"{name} has more than {MAX_FILE // 2**20} MB.", "Give fewer facts.")
        listed = json.loads(text)
    except OSError as error:
        raise BadInput("--file", f"{name} can't be read ({error.strerror}).", "Correct the name.") from error
    except (ValueError, RecursionError) as error:
        raise BadInput("--file", f"{name} is not JSON.", "Write a list of objects.") from error
    if not isinstance(listed, list) or not listed:
        raise BadInput("--file", f"{name} is not a list of facts.", "Write a list of objects.")
    found = []
    for number, plain in enumerate(listed, start=1):
        where = f"--file, fact {number}"
        if not isinstance(plain, dict):
            raise BadInput(where, "is not an object.", "Give it subject, template and target_new.")
        if unknown := sorted(set(plain) - set(_FACT)):
            raise BadInput(where, f"has an unknown key {unknown[0][:40]!r}.", f"Known: {', '.join(_FACT)}.")
        if missing := [key for key in _FACT[:3] if key not in plain]:
            raise BadInput(where, f"has no {missing[0]}.", "Give it subject, template and target_new.")
        for key in _FACT[4:]:
            if not isinstance(plain.get(key, []), list):
                raise BadInput(where, f"{key} is not a list.", "Write a list of prompts.")
        try:
            fact: dict[str, Any] = {k: tuple(v) if k in _FACT[4:] else v for k, v in plain.items()}
            found.append(EditRequest(**fact))
        except BadInput as error:
            raise BadInput(f"{where}, {error.field}", error.what.partition(": ")[2], error.next_step) from error
    return found


MAX_FILE = 8 * 2**20
_FACT = ("subject", "template", "target_new", "target_true", "paraphrases", "neighbours")


def _read(path: Path) -> str:
    with path.open(encoding="utf-8") as stream:
        return stream.read(MAX_FILE + 1)


def _checked_target(name: str | None) -> Path | None:
    """The file to write, refused now rather than after the work."""
    if name is None or name == "-":
        return None
    path = Path(name)
    if path.is_dir():
        raise BadInput("--json", f"{name} is a folder.", "Name a file.")
    if not path.parent.is_dir():
        raise BadInput("--json", f"there is no folder {path.parent}.", "Make it first.")
    if not os.access(path.parent, os.W_OK):
        raise BadInput("--json", f"{path.parent} can't be written to.", "Choose another folder.")
    return path


def _write_json(path: Path, value: object) -> None:
    """Whole or not at all."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with fresh.open("w", encoding="utf-8") as stream:
            stream.write(_json(value))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _print_json(value: object) -> None:
    print(_json(value), end="")


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=_number) + "\n"


def _number(value: Any) -> Any:
    """A NumPy number as Python's; TypeError on anything else, as json expects."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _reporter(notes: list[str] | None = None) -> Reporter:
    """Progress where somebody watches. What is noted is part of a report; where there is none it goes into `notes`."""
    from mega_core.events import Note, silent

    show = _progress() if sys.stderr.isatty() else silent

    def tell(event: Event) -> None:
        if notes is not None and isinstance(event, Note) and event.text not in notes:
            notes.append(event.text)
        show(event)

    return tell


def _progress() -> Reporter:
    from mega_core.events import Advanced, Finished, Started

    def show(event: Event) -> None:
        if isinstance(event, Started):
            sys.stderr.write(f"\r\033[K{event.stage} ...")
        elif isinstance(event, Advanced) and event.total:
            sys.stderr.write(f"\r\033[K{event.stage} {event.done}/{event.total}")
        elif isinstance(event, Finished):
            sys.stderr.write("\r\033[K")
        sys.stderr.flush()

    return show


def _service() -> Service:
    from mega_core.service import Service

    return Service.open()


def _log_to_file() -> Path | None:
    """Send the log to a file in the cache folder; None when that can't be written, and then the log goes nowhere."""
    from mega_core.settings import Settings

    try:
        folder = Settings.read().cache_dir / "logs"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / "mega_core.log"
        handler = logging.FileHandler(path, encoding="utf-8")
    except (OSError, ActionableError):
        return None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    log.addHandler(handler)
    log.propagate = False
    return path


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _short(text: str, width: int) -> str:
    line = _one_line(text)
    return line if len(line) <= width else f"{line[: width - 1]}…"


if __name__ == "__main__":
    sys.exit(main())
