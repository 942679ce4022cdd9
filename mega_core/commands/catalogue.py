"""Commands about what there is: models, methods, facts."""

from __future__ import annotations

import argparse

from mega_core.commands.common import Parser, one_line, open_service, print_json
from mega_core.errors import BadInput


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """Register them."""
    models = commands.add_parser("models", help="list the models and how to get the missing ones")
    models.add_argument("--json", action="store_true", help="as JSON on standard output")
    models.set_defaults(command=_models)

    methods = commands.add_parser("methods", help="list the methods, or print their reference")
    form = methods.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="every method with its parameters, as JSON")
    form.add_argument("--markdown", action="store_true", help="the same for people: this is docs/methods.md")
    methods.set_defaults(command=_methods)

    facts = commands.add_parser("facts", help="the facts an embedded model was trained on")
    facts.add_argument("--model", required=True)
    facts.add_argument("--json", action="store_true", help="as JSON on standard output")
    facts.set_defaults(command=_facts)


def _models(arguments: argparse.Namespace) -> None:
    from mega_core.records import as_plain

    with open_service() as service:
        infos = service.models()
    if arguments.json:
        print_json({"schema_version": 1, "models": [as_plain(info) for info in infos]})
        return
    width = max(len(info.name) for info in infos)
    for info in infos:
        size = f"{info.parameters / 1e6:,.0f}M" if info.parameters else "?"
        state = "ready" if info.available else "not here"
        print(f"{info.name:<{width}}  {state:<8}  {size:>7}  {info.memory_gb:>4g} GB  {info.dtype:<8}  {info.title}")
        if not info.available:
            print(f"{'':<{width}}  {one_line(f'{info.reason} {info.how}')}")


def _methods(arguments: argparse.Namespace) -> None:
    from mega_core import reference

    if arguments.json:
        print_json({"schema_version": reference.SCHEMA_VERSION, "methods": reference.entries()})
    elif arguments.markdown:
        print(reference.markdown(), end="")
    else:
        print(reference.listing())


def _facts(arguments: argparse.Namespace) -> None:
    with open_service() as service:
        facts = service.facts(arguments.model)
    if not facts:
        raise BadInput("model", f"{arguments.model} has no fact tables.", "They belong to the embedded models.")
    if arguments.json:
        print_json(list(facts))
        return
    for fact in facts:
        print(f"{fact['subject']}\t{fact['relation']}\t{fact['object']}")
