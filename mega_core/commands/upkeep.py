"""Commands of whoever runs the app: example reports, training, the store."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mega_core.commands.common import Parser, open_service, print_json
from mega_core.errors import BadInput


def add(commands: argparse._SubParsersAction[Parser], words: Sequence[str]) -> None:
    """Register them. The arguments of `train` need torch, so they are there only when it is called."""
    examples = commands.add_parser("examples", help="rebuild the example reports that ship with the app")
    examples.add_argument("--model", default="atlas-gpt2")
    examples.add_argument("--method", default="rome")
    examples.add_argument("--tries", type=int, default=120, help="edits to search (default 120)")
    examples.add_argument("--seed", type=int, default=0)
    examples.set_defaults(command=_examples)

    train = commands.add_parser(
        "train", help="train an embedded model from the fact tables, or a study model on a dataset's facts"
    )
    if "train" in words[:1]:
        from mega_core.embedded import train as training

        training.add_arguments(train)
        train.set_defaults(command=training.run)

    cache = commands.add_parser("cache", help="what is stored, or forget it")
    cache.add_argument("action", choices=("stats", "clear"))
    cache.add_argument("--json", action="store_true", help="as JSON on standard output")
    cache.set_defaults(command=_cache)


def _examples(arguments: argparse.Namespace) -> None:
    from mega_core.embedded import examples

    if not 1 <= arguments.tries <= 10_000:
        raise BadInput("tries", f"{arguments.tries} is out of range.", "Give 1 to 10000.")
    with open_service() as service:
        written = service.rebuild_examples(arguments.model, arguments.method, arguments.tries, arguments.seed)
    for example in written:
        print(f"{example.outcome:<6}  {example.title}  {example.sentence}")
    print(f"Written to {examples.FOLDER}")


def _cache(arguments: argparse.Namespace) -> None:
    from mega_core.records import as_plain

    with open_service() as service:
        removed = service.clear_results() if arguments.action == "clear" else None
        health = service.status().store
    if arguments.json:
        print_json({"schema_version": 1, "removed": removed, "store": as_plain(health)})
        return
    if removed is not None:
        print(f"Forgot {removed} stored entries. Notes and tags are kept.")
    print(f"{health.entries} entries, {health.bytes / 2**20:.1f} MB on {health.mode}, {health.quarantined} damaged.")
    if health.notice:
        print(health.notice)
