"""The reference of all methods, from registry and catalogue: `make docs` writes it to docs/methods.md. No torch.

Nothing here is written by hand for one method: title, paper, family and parameters come from its entry, the paragraph
on our choices from the head of its file, per-model defaults from models.toml.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

from mega_core.methods import METHODS
from mega_core.methods.base import Knob, Method
from mega_core.settings import CATALOGUE, ModelEntry, read_catalogue

SCHEMA_VERSION = 1
CHANGES = {
    "weights": "weight matrices of the model",
    "steering": "activations while the model reads; no weight",
    "memory": "what a memory beside one MLP answers; no weight",
    "prompt": "the text in front of every prompt; no weight",
}
"""Family -> what such a method changes."""
_TYPES = {int: "whole number", float: "number", bool: "true or false", str: "text"}


def entries(models: Iterable[ModelEntry] | None = None) -> list[dict[str, Any]]:
    """Every method as plain values, in the order of the registry. `models` is the shipped catalogue by default."""
    known = list(read_catalogue(CATALOGUE).values() if models is None else models)
    return [_entry(method, known) for method in METHODS]


def markdown(models: Iterable[ModelEntry] | None = None) -> str:
    """The reference as Markdown."""
    listed = entries(models)
    lines = [
        "# Methods",
        "",
        "<!-- Written by `make docs` from the code: change the method's file or models.toml, not this one. -->",
        "",
        "Every parameter can be set in the form, or with `--param NAME=VALUE`. A default with a star is our choice:",
        "the paper leaves it open, or its value does not fit. A model's own defaults, from `mega_core/models.toml`,",
        "come before those of the method.",
        "",
        "| method | name | family | in one sentence |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| [{e['title']}](#{e['name']}) | `{e['name']}` | {e['family']} | {_cell(e['summary'])} |" for e in listed
    ]
    for entry in listed:
        lines += ["", f'<a id="{entry["name"]}"></a>', "", *_section(entry)]
    return "\n".join(lines) + "\n"


def listing() -> str:
    """The methods for a person at a terminal: name, family, sentence."""
    width = max(len(method.name) for method in METHODS)
    return "\n".join(
        f"{method.name:<{width}}  {method.family:<8}  {method.title}: {method.summary}" for method in METHODS
    )


def _entry(method: Method[Any], models: list[ModelEntry]) -> dict[str, Any]:
    knobs = method.knobs()
    return {
        "name": method.name,
        "title": method.title,
        "summary": method.summary,
        "family": method.family,
        "changes": CHANGES[method.family],
        "paper": method.paper,
        "version": method.version,
        "params": [
            {
                "name": knob.name,
                "type": _TYPES[knob.kind],
                "default": knob.default,
                "low": knob.low,
                "high": knob.high,
                "choices": list(knob.choices),
                "optional": knob.optional,
                "ours": knob.ours,
                "help": knob.help,
            }
            for knob in knobs
        ],
        "models": {model.name: own for model in models if (own := _differing(knobs, model.defaults.get(method.name)))},
        "choices": choices(method),
    }


def choices(method: Method[Any]) -> str:
    """The paragraph of the method's file that names the choices which are ours, on one line; "" when it has none."""
    text = sys.modules[method.prepare.__module__].__doc__ or ""
    found = [part for part in text.split("\n\n") if part.lstrip().startswith("Choices")]
    return " ".join(" ".join(found).split())


def _differing(knobs: Iterable[Knob], own: Mapping[str, Any] | None) -> dict[str, Any]:
    defaults = {knob.name: knob.default for knob in knobs}
    return {name: value for name, value in (own or {}).items() if name not in defaults or value != defaults[name]}


def _section(entry: Mapping[str, Any]) -> list[str]:
    lines = [
        f"## {entry['title']}",
        "",
        entry["summary"],
        "",
        f"Name `{entry['name']}`, version {entry['version']}. Paper: {entry['paper']}. Changes: {entry['changes']}.",
    ]
    if entry["params"]:
        lines += ["", "| parameter | type | range | default | meaning |", "|---|---|---|---|---|"]
        lines += [
            f"| `{p['name']}` | {p['type']} | {_range(p)} | {_value(p['default'])}{' *' if p['ours'] else ''} "
            f"| {_cell(p['help'])} |"
            for p in entry["params"]
        ]
    if entry["models"]:
        lines += ["", "| model | its own defaults |", "|---|---|"]
        lines += [
            f"| {model} | {', '.join(f'`{name}` {_value(value)}' for name, value in own.items())} |"
            for model, own in entry["models"].items()
        ]
    if entry["choices"]:
        lines += ["", _prose(entry["choices"])]
    return lines


def _range(param: Mapping[str, Any]) -> str:
    if param["choices"]:
        return ", ".join(f"`{choice}`" for choice in param["choices"])
    low, high = param["low"], param["high"]
    if low is None and high is None:
        return "any"
    if high is None:
        return f"{low:g} or more"
    return f"up to {high:g}" if low is None else f"{low:g} to {high:g}"


def _value(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{_cell(format(value, 'g') if isinstance(value, float) else str(value)) or ' '}`"


def _prose(text: str) -> str:
    """Text of a docstring as Markdown: what stands in backticks stays, signs outside mean themselves."""
    parts = text.split("`")
    plain = (re.sub(r"([*_<|\\[\]])", r"\\\1", part) for part in parts[::2])
    code = (f"`{part}`" for part in parts[1::2])
    return "".join(piece for pair in zip_longest(plain, code, fillvalue="") for piece in pair)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
