"""The command line: python -m mega_core {models,edit,facts,examples,train,cache}.

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
from collections.abc import Mapping, Sequence
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
    from mega_core.records import Report
    from mega_core.service import Service

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

    edit = commands.add_parser("edit", help="edit one fact and report what changed")
    edit.add_argument("--model", required=True)
    edit.add_argument("--method", required=True)
    edit.add_argument("--subject", required=True, help='the entity, for example "Eiffel Tower"')
    edit.add_argument("--template", required=True, help='the relation with one {}, "{} is located in the city of"')
    edit.add_argument("--target-new", required=True, help="the new object")
    edit.add_argument("--target-true", default="", help="the object the model says now")
    edit.add_argument("--paraphrase", action="append", default=[], help="a prompt asking the same; may be repeated")
    edit.add_argument(
        "--neighbour", action="append", default=[], help="a prompt whose answer must stay; may be repeated"
    )
    edit.add_argument("--param", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the method")
    edit.add_argument("--seed", type=int, default=0)
    edit.add_argument("--views", default="module_scores", help="ways of looking inside, separated by commas")
    edit.add_argument("--json", metavar="FILE", help="write the whole report as JSON; - is standard output")
    edit.add_argument("--fresh", action="store_true", help="compute it even when the answer is stored")
    edit.set_defaults(command=_edit)

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


def _edit(arguments: argparse.Namespace) -> None:
    from mega_core.events import silent

    target = _checked_target(arguments.json)
    with _service() as service:
        plan = service.plan(
            arguments.model,
            arguments.method,
            subject=arguments.subject,
            template=arguments.template,
            target_new=arguments.target_new,
            target_true=arguments.target_true,
            paraphrases=tuple(arguments.paraphrase),
            neighbours=tuple(arguments.neighbour),
            params=_params(arguments.param),
            views=tuple(view.strip() for view in arguments.views.split(",") if view.strip()),
            seed=arguments.seed,
        )
        progress = _progress() if sys.stderr.isatty() else silent
        report = service.run(plan, progress, fresh=arguments.fresh)
    if arguments.json == "-":
        _print_json(report.to_json())
        return
    if target is not None:
        _write_json(target, report.to_json())
    print(summary(report))


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
    change = report.frames.get("weight_change")
    if change is not None and not change.empty:
        lines.append("")
        for row in change.itertuples():
            lines.append(
                f"Weights   layer {row.layer} {row.site}: {row.relative_norm:.3g} of its norm, rank {row.rank}"
            )
    receipt = report.receipt
    restored = "restored bit for bit" if receipt.restored else "NOT RESTORED"
    lines += [
        f"Receipt   {restored}, {receipt.hooks_left} hooks left, weights {receipt.weights_digest_after[:12]}",
        f"Seconds   {sum(report.timing.values()):.1f}  "
        + ", ".join(f"{name} {value:.1f}" for name, value in report.timing.items()),
        f"Run       {report.digest[:12]}",
    ]
    lines += [f"Note      {note}" for note in report.notes]
    return "\n".join(lines)


def _params(pairs: Sequence[str]) -> Mapping[str, object]:
    result: dict[str, object] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise BadInput("--param", f"{pair[:40]!r} is not NAME=VALUE.", "For example: --param layer=4.")
        result[name.strip()] = value.strip()
    return result


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
