"""How long one edit takes with each method on each embedded model, as measured; the method cards show it.

Made by `python -m bench --only seconds`. A table that is missing or damaged costs an estimate, never an answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from mega_core.folders import write_file

FILE = Path(__file__).with_name("seconds.json")

Table = Mapping[str, Mapping[str, float]]
"""Model -> method -> seconds of one edit with its measurements, after warm-up."""


@cache
def load(path: Path = FILE) -> Table:
    """The table that ships; empty when it can't be read."""
    try:
        plain = json.loads(path.read_bytes())["seconds"]
        return {
            str(model): {str(name): float(value) for name, value in methods.items()} for model, methods in plain.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write(seconds: Table, machine: str, runs: int, path: Path = FILE) -> None:
    """Keep the medians, with where they come from."""
    content = {
        "what": f"Processor seconds of one edit with all its measurements in one thread, model and statistics loaded; "
        f"median of {runs}.",
        "machine": machine,
        "seconds": {
            model: {name: round(value, 2) for name, value in sorted(methods.items())}
            for model, methods in sorted(seconds.items())
        },
    }
    write_file(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    load.cache_clear()
