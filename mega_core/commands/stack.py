"""Commands about edits that stay: a stack in a folder, and an edited model as a folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mega_core.commands.common import (
    Parser,
    add_request,
    open_service,
    plans_of,
    print_json,
    receipt_line,
    reporter,
    show_notes,
)
from mega_core.errors import BadInput

if TYPE_CHECKING:
    from mega_core.service import StackedEdit


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Register them."""
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
            add_request(action)
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
    add_request(export)
    export.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="a new or empty folder")
    export.set_defaults(command=_export)


def _stack_add(arguments: argparse.Namespace) -> None:
    notes: list[str] = []
    with open_service() as service:
        (plan,) = plans_of(arguments, service, [arguments.method])
        name = service.stacks.add(arguments.folder, plan, reporter(notes))
    print(f"Added {name} to {arguments.folder}.")
    show_notes(notes)


def _stack_list(arguments: argparse.Namespace) -> None:
    with open_service() as service:
        _show_stack(service.stacks.edits(arguments.folder), arguments.json)


def _stack_undo(arguments: argparse.Namespace) -> None:
    with open_service() as service:
        left = service.stacks.undo(arguments.folder, arguments.edit)
    if not arguments.json:
        print(f"Undone: {arguments.edit}. Left:")
    _show_stack(left, arguments.json)


def _show_stack(edits: Sequence[StackedEdit], as_json: bool) -> None:
    from mega_core.records import as_plain

    if as_json:
        print_json({"schema_version": 1, "edits": [as_plain(edit) for edit in edits]})
        return
    for edit in edits:
        for request in edit.requests:
            print(f"{edit.name:<16} {edit.kind:<12} {request.sentence}")
    if not edits:
        print("No edits.")


def _stack_check(arguments: argparse.Namespace) -> int:
    from mega_core.records import as_plain
    from mega_core.summary import percent

    with open_service() as service:
        found = service.stacks.check(arguments.folder, reporter())
    if arguments.json:
        print_json({"schema_version": 1, **as_plain(found)})
    else:
        for held in found.held:
            said = "says" if held.says_new else "does not say"
            print(f"{held.edit:<16} {said:<13} {held.request.sentence}   ({percent(held.prob)})")
        for text in found.signs:
            print(f"{'ALARM' if text in found.raised else 'sign':<8} {text}")
        print(f"Receipt  {receipt_line(found.receipt)}")
    return 0 if found.receipt.restored else 1


def _export(arguments: argparse.Namespace) -> None:
    notes: list[str] = []
    with open_service() as service:
        if arguments.stack is not None:
            given = ("model", "method", "subject", "template", "target_new", "file")
            if extra := [name for name in given if getattr(arguments, name)]:
                raise BadInput(f"--{extra[0].replace('_', '-')}", "does not go with --stack.", "Leave one of them out.")
            folder = service.stacks.export_stack(arguments.stack, arguments.out, reporter(notes))
        else:
            for name in ("model", "method"):
                if not getattr(arguments, name):
                    raise BadInput(f"--{name}", "is missing.", "Give it, or --stack.")
            (plan,) = plans_of(arguments, service, [arguments.method])
            folder = service.stacks.export(plan, arguments.out, reporter(notes))
    print(f"Written to {folder}. Load it with AutoModelForCausalLM.from_pretrained({str(folder)!r}).")
    show_notes(notes)
