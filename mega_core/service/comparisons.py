"""Comparisons that are kept: which questions stand beside each other. Their answers are kept where all answers are."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from mega_core.errors import ActionableError
from mega_core.folders import write_file
from mega_core.keys import digest
from mega_core.records import Inspection, as_plain, inspection_from_plain
from mega_core.service.core import Core

log = logging.getLogger(__name__)

MAX_BYTES = 2**20
ID = re.compile(r"[0-9a-f]{64}")


class Comparisons:
    """One small JSON file for each, under the cache folder."""

    def __init__(self, core: Core) -> None:
        self._core = core

    @property
    def _folder(self) -> Path:
        return Path(self._core.settings.cache_dir) / "comparisons"

    def save(self, plans: Sequence[Inspection]) -> str:
        """Keep these questions together; the id under which find() knows them. The same questions have the same id.

        A disk that refuses is told in the notices: the comparison can still be run, but not linked to.
        """
        name = digest({"comparison": tuple(plans)})
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            data = json.dumps({"plans": [as_plain(plan) for plan in plans]}, ensure_ascii=False, allow_nan=False)
            write_file(self._folder / f"{name}.json", data.encode())
        except OSError as error:
            log.warning("The comparison %s can't be kept: %s", name[:12], error)
            self._core.notice("comparisons", f"Comparisons can't be kept ({error.strerror or type(error).__name__}).")
        return name

    def find(self, name: str) -> tuple[Inspection, ...] | None:
        """The questions of a comparison; None when there is none, or its file is damaged. Safe with any text."""
        if not isinstance(name, str) or not ID.fullmatch(name):
            return None
        file = self._folder / f"{name}.json"
        try:
            if file.stat().st_size > MAX_BYTES:
                return None
            plans = tuple(inspection_from_plain(plain) for plain in json.loads(file.read_bytes())["plans"])
            found = digest({"comparison": plans})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ActionableError):
            return None
        return plans if plans and found == name else None
