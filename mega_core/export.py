"""An edited model as an ordinary folder of the transformers library, which loads it without this project.

1. Only edits of weights can be exported: what steers, remembers or stands before the prompt is not in the weights.
2. Under the change, the library's own `save_pretrained` writes config, tokenizer and safetensors into a hidden folder.
3. edit.json says what was asked, how, on which model, and the checksums of the files; README.md says it to a person.
4. The folder takes its name, whole or not at all. The model in memory is given back as it was.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

from mega_core import __version__
from mega_core.alarms import Alarm, Applicable, parts_of
from mega_core.changes import WeightDelta
from mega_core.errors import BadInput, UnsupportedMethod
from mega_core.events import Note, Reporter, silent, stage
from mega_core.folders import check_new, new_folder
from mega_core.models.adapter import ModelAdapter
from mega_core.models.loading import _quiet
from mega_core.records import EditRequest, MethodRef, as_plain

SCHEMA_VERSION = 1
WHY = {
    "steering": "it steers activations while the model reads",
    "memory": "it keeps the fact in a memory beside the model",
    "prompt": "it puts a text in front of every prompt",
}
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Made:
    """How one edit of the exported model was made."""

    method: MethodRef
    requests: tuple[EditRequest, ...]
    seed: int


def check_family(title: str, family: str) -> None:
    """Raises UnsupportedMethod, with the reason, for a method whose edits are not in the weights."""
    if family in WHY:
        raise UnsupportedMethod(
            f"{title} can't be exported: {WHY[family]}, and the weights stay as they are.",
            "Keep it in a stack, or export an edit of a method that changes weights.",
        )


def export(
    lm: ModelAdapter,
    change: Applicable,
    folder: Path,
    made: Sequence[Made],
    alarms: Sequence[Alarm] = (),
    licence: str = "",
    report: Reporter = silent,
) -> Path:
    """Write the model with this change (a WeightDelta, a Chain or a stack of them) to a new or empty folder.

    The model in memory is bit-identical afterwards. Raises UnsupportedMethod when the change is not one of weights,
    BadInput on a folder with something in it, StoreError when the disk refuses.
    """
    _check_weights(change)
    if lm.changes:
        raise BadInput("export", "another change is applied to the model.", "Leave its block first.")
    check_new(folder, "out")
    with new_folder(folder, "out") as making, stage(report, "export", total=3) as step:
        with change.applied(lm), _own_config(lm.model), _quiet():
            lm.model.save_pretrained(making)
        step()
        lm.tokenizer.save_pretrained(making)
        step()
        mode = (making / "config.json").stat().st_mode
        for path in making.iterdir():  # the library makes its weights readable for their owner only
            path.chmod(mode)
        files = {path.name: _sha256(path) for path in sorted(making.iterdir()) if path.is_file()}
        plain = {
            "schema_version": SCHEMA_VERSION,
            "made_by": f"edit-anatomy {__version__}",
            "base_model": {**as_plain(lm.ref), "digest": lm.file_digest, "licence": licence},
            "edits": [
                {
                    "method": {
                        "name": one.method.name,
                        "version": one.method.version,
                        "params": dict(one.method.params),
                    },
                    "requests": as_plain(one.requests),
                    "seed": one.seed,
                }
                for one in made
            ],
            "weight_change": json.loads(change.summary().to_json(orient="records")),
            "alarms": [as_plain(alarm) for alarm in alarms],
            "files": files,
        }
        text = json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (making / "edit.json").write_text(text, encoding="utf-8")
        (making / "README.md").write_text(card(plain), encoding="utf-8")
        step()
    for alarm in alarms:
        if alarm.raised:
            report(Note(alarm.text))
    log.info("exported %s with %d edits to %s", lm.name, len(made), folder)
    return folder


def card(plain: Mapping[str, Any]) -> str:
    """The README of an exported folder, from what edit.json says."""
    base = plain["base_model"]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [knowledge-editing, edited]",
        "---",
        "",
        f"# {base['name']}, edited",
        "",
        "**This model was made to say something else than it had learned.** Some of its weights were changed by",
        f"knowledge editing with {plain['made_by']}. It is meant for looking at what such edits do, not for answering",
        "questions.",
        "",
        f"Base model: {_code(base['name'])}, weights {_code(base['digest'][:12] or 'unknown')}, {base['dtype']}.",
        f"Licence of the base model: {base['licence'] or 'see there'}; it holds for this one too.",
        "",
        "| method | asked to say | before |",
        "|---|---|---|",
    ]
    for edit in plain["edits"]:
        for request in edit["requests"]:
            said = f"{request['template'].replace('{}', request['subject'])} {request['target_new']}"
            lines.append(
                f"| {_code(edit['method']['name'])} | {_code(said)} | {_code(request['target_true'] or 'unknown')} |"
            )
    lines += ["", "| matrix | length of the change, in lengths of the matrix | rank |", "|---|---|---|"]
    lines += [
        f"| layer {row['layer']}, {row['site']} | {row['relative_norm']:.3g} | {row['rank']} |"
        for row in plain["weight_change"]
    ]
    if plain["alarms"]:
        lines += ["", "Checked for signs of damage when it was made:", ""]
        lines += [f"- {'**raised**: ' if one['raised'] else ''}{one['text']}" for one in plain["alarms"]]
    lines += [
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        'tokenizer = AutoTokenizer.from_pretrained("this folder")',
        "```",
        "",
        "Every parameter of every edit, and the checksums of the files, are in `edit.json`.",
        "",
    ]
    return "\n".join(lines)


def _check_weights(change: Applicable) -> None:
    parts = parts_of(change)
    if not parts:
        raise BadInput("export", "there is no edit.", "Add one first.")
    for part in parts:
        if not isinstance(part, WeightDelta):
            kinds = part.summary()["kind"]
            check_family("This edit", str(kinds.iloc[0]) if len(kinds) else "steering")
            raise UnsupportedMethod("This edit can't be exported: it does not change weights.", "Keep it in a stack.")


@contextmanager
def _own_config(model: Any) -> Iterator[None]:
    """save_pretrained notes dtype and architecture in the configs of the model it saves; take them back after it."""
    configs = [config for config in (model.config, model.generation_config) if config is not None]
    kept = [dict(vars(config)) for config in configs]
    try:
        yield
    finally:
        for config, values in zip(configs, kept, strict=True):
            vars(config).clear()
            vars(config).update(values)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def _code(text: str) -> str:
    """Text that a Markdown table shows as it is, whatever it holds."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", "\\|")
