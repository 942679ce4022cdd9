"""HTML pages that stand alone, for results that leave: no network, no script, light and dark.

1. Text of people and models is escaped by the template, and its hidden characters are spelled out.
2. A picture is an SVG element of the page: it scales, the style of the page colours its text and grid, and it has a
   title and a description for who can't see it.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:
    from jinja2 import Environment

_BIDI = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
_NOT_NEEDED = ("role", "version", "pointer-events", "href", "font-family")
_SPACE = re.compile(r"\{[^}]*\}")
_LINK = re.compile(r"url\(#([\w-]+)\)")


def visible(text: str) -> str:
    """The text with its control characters, direction marks and lone surrogates spelled out: "\\u202e"."""
    return "".join(_spelled(c) if _hidden(c) else c for c in text)


def _hidden(c: str) -> bool:
    if c in "\n\t" or " " <= c <= "~":
        return False
    return unicodedata.category(c) in ("Cc", "Cs") or unicodedata.bidirectional(c) in _BIDI or c in "\u200e\u200f"


def _spelled(c: str) -> str:
    return f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}"


def templates(folder: Path) -> Environment:
    """Templates of a folder, and document.css: all text is escaped and made visible, a name not given is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    def finalize(value: object) -> object:
        return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    return Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finalize,
    )


def element(svg: str, name: str, title: str, told: str) -> Markup:
    """A drawn picture as an element of a page. `name` begins its ids, so that several can stand in one page."""
    root = ElementTree.fromstring(svg)
    for part in root.iter():
        part.tag = _SPACE.sub("", part.tag)
        label = part.get("aria-label")
        speaks = label is not None and part.get("role") == "graphics-symbol" and part.tag in ("path", "line")
        for key in list(part.attrib):
            value = part.attrib.pop(key)
            key = _SPACE.sub("", key)
            if key.startswith(("aria-", "xmlns")) or key in _NOT_NEEDED:
                continue
            part.attrib[key] = f"{name}-{value}" if key == "id" else _LINK.sub(rf"url(#{name}-\1)", value)
        if speaks:
            ElementTree.SubElement(part, "title").text = label
    for parent in list(root.iter()):
        for child in [c for c in parent if c.get("class") in ("background", "foreground")]:
            parent.remove(child)
    for index, (tag, text) in enumerate((("title", title), ("desc", told))):
        part = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        part.text = visible(text)
        root.insert(index, part)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title", "aria-describedby": f"{name}-desc"}
    return Markup(ElementTree.tostring(root, encoding="unicode"))
