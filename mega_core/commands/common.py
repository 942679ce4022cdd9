"""What the commands share: the parser, the fact that is asked about, progress, files and lines of text."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mega_core.errors import BadInput

if TYPE_CHECKING:
    from mega_core.events import Event, Reporter
    from mega_core.records import EditRequest, Inspection, Receipt
    from mega_core.service import Service


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {one_line(message)} See {self.prog} --help.\n")


# What is asked -------------------------------------------------------------------------------------------------------


def add_request(parser: argparse.ArgumentParser) -> None:
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


def plans_of(
    arguments: argparse.Namespace, service: Service, names: Sequence[str], views: Sequence[str] = ()
) -> list[Inspection]:
    """One complete question per method, all about the same facts. Raises before any of them is worked on."""
    if len(set(names)) < len(names) or not names:
        raise BadInput("--methods", "names one twice, or none.", "For example: --methods rome,memit,mega.")
    params = with_regions(params_of(arguments.param, names), service, arguments.model)
    if arguments.file is not None:
        for name in ("subject", "template", "target_new", "target_true", "paraphrase", "neighbour"):
            if getattr(arguments, name):
                raise BadInput(f"--{name.replace('_', '-')}", "does not go with --file.", "Leave one of them out.")
        requests = requests_of(arguments.file)
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


def name_list(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def params_of(pairs: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, object]]:
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


def with_regions(
    params: Mapping[str, Mapping[str, object]], service: Service, model: str
) -> dict[str, dict[str, object]]:
    """The parameters with each region file in them turned into its layers: a question never holds a file's name.

    A name without a folder that is no file here means one of the regions that `contrast` kept.
    """
    from mega_core import regions

    def layers(method: str, name: str, given: object) -> object:
        if not regions.names_file(method, name, given):
            return given
        path = Path(str(given).strip())
        kept = service.studies.regions(model).get(path.stem) if path.parent == Path() and not path.exists() else None
        region = kept or regions.Region.load(path)
        return region.check(model, service.studies.weights(model), f"{method}.{name}").text(
            regions.PLACES[method, name]
        )

    return {
        method: {name: layers(method, name, value) for name, value in own.items()} for method, own in params.items()
    }


def requests_of(name: str) -> list[EditRequest]:
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


# What comes back -----------------------------------------------------------------------------------------------------


def checked_target(name: str | None) -> Path | None:
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


def write_json(path: Path, value: object) -> None:
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


def print_json(value: object) -> None:
    """To standard output."""
    print(_json(value), end="")


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=_number) + "\n"


def _number(value: Any) -> Any:
    """A NumPy number as Python's; TypeError on anything else, as json expects."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def reporter(notes: list[str] | None = None) -> Reporter:
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


def show_notes(notes: Sequence[str]) -> None:
    """One line each."""
    for note in notes:
        print(f"Note      {note}")


def receipt_line(receipt: Receipt) -> str:
    """In words."""
    restored = "restored bit for bit" if receipt.restored else "NOT RESTORED"
    return f"{restored}, {receipt.hooks_left} hooks left"


def open_service() -> Service:
    """The service on the settings of the environment."""
    from mega_core.service import Service

    return Service.open()


def one_line(text: str) -> str:
    """Every run of white space as one blank."""
    return " ".join(text.split())


def short(text: str, width: int) -> str:
    """One line of at most `width` characters."""
    line = one_line(text)
    return line if len(line) <= width else f"{line[: width - 1]}…"
