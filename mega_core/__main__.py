"""The command line: python -m mega_core COMMAND; --help lists them.

Exit status 0: done. 2: what was asked can't be done so, told in one line on stderr. 1: a failure of ours, with an error
id whose traceback is in the log file. 130: interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from mega_core.commands import bench, catalogue, contrast, edit, mask, stack, upkeep, verify
from mega_core.commands.common import Parser, one_line
from mega_core.errors import (
    ActionableError,
    BadInput,
    ModelUnavailable,
    UnknownName,
    UnsupportedMethod,
    UnsupportedModel,
)

INPUT_ERRORS = (BadInput, UnknownName, ModelUnavailable, UnsupportedMethod, UnsupportedModel)
log = logging.getLogger("mega_core")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = build_parser(words).parse_args(words)
        return int(arguments.command(arguments) or 0)
    except INPUT_ERRORS as error:
        print(one_line(str(error)), file=sys.stderr)
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
        said = one_line(str(error)) if isinstance(error, ActionableError) else f"Unexpected {type(error).__name__}."
        print(f"{said} (error {error_id}{f', details in {where}' if where else ''})", file=sys.stderr)
        return 1


def build_parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Every command with its arguments."""
    parser = Parser(prog="python -m mega_core", description="Edit a language model and look inside before and after.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    catalogue.add(commands)
    edit.add(commands)
    bench.add(commands)
    contrast.add(commands)
    verify.add(commands)
    mask.add(commands)
    stack.add(commands)
    upkeep.add(commands, words)
    return parser


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


if __name__ == "__main__":
    sys.exit(main())
