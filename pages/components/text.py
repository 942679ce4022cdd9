"""Text from people and models, made safe to show and to export, and numbers as people read them."""

from __future__ import annotations

import csv
import re
import string
from difflib import SequenceMatcher

import pandas as pd

_PUNCTUATION = re.compile("([" + re.escape(string.punctuation) + "])")
# Streamlit rewrites ":name:", "->", "<-" and "--" after the markdown is parsed, where a backslash no longer helps.
_REWRITTEN = re.compile(r"(?<=:)(?=[\w+/-])|(?<=-)(?=[->])|(?<=<)(?=-)")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
WORD_JOINER = "\u2060"


def md(text: object) -> str:
    """The text as markdown that shows exactly this text on one line: no image, link, HTML, maths, directive or emoji
    can arise.
    """
    flat = " ".join(str(text).split())
    return _PUNCTUATION.sub(r"\\\1", _REWRITTEN.sub(WORD_JOINER, flat))


def clip(text: str, limit: int) -> str:
    """At most `limit` characters, cut in the middle."""
    if len(text) <= limit:
        return text
    tail = limit // 3
    return f"{text[: limit - tail - 1].rstrip()}…{text[-tail:].lstrip()}"


def word_diff(base: str, edited: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts as (word, differs) pairs."""
    left, right = base.split(), edited.split()
    blocks = SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks()
    same_left = {block.a + i for block in blocks for i in range(block.size)}
    same_right = {block.b + i for block in blocks for i in range(block.size)}
    return (
        [(word, i not in same_left) for i, word in enumerate(left)],
        [(word, i not in same_right) for i, word in enumerate(right)],
    )


def marked(words: list[tuple[str, bool]], color: str) -> str:
    """Markdown of a word_diff side with the differing runs on a coloured background."""
    parts: list[str] = []
    run: list[str] = []
    for word, differs in [*words, ("", False)]:
        if differs:
            run.append(word)
            continue
        if run:
            parts.append(f":{color}-background[{md(' '.join(run))}]")
            run = []
        if word:
            parts.append(md(word))
    return " ".join(parts)


def csv_bytes(frame: pd.DataFrame) -> bytes:
    """The table as UTF-8 CSV in which no text cell can be read as a formula by a spreadsheet."""
    safe = frame.copy()
    for column in safe.columns:
        if not pd.api.types.is_numeric_dtype(safe[column]):
            safe[column] = [_inert(value) for value in safe[column]]
    safe.columns = [_inert(str(column)) for column in safe.columns]
    return safe.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC).encode("utf-8-sig")


def _inert(value: object) -> object:
    return "'" + value if isinstance(value, str) and value.startswith(_FORMULA) else value


def seconds(value: float | None) -> str:
    """A duration: "0.4 s", "12 s", "3 min"."""
    if value is None:
        return "not measured yet"
    if value < 0.95:
        return f"{value:.1f} s" if value >= 0.05 else "< 0.1 s"
    if value < 9.5:
        return f"{value:.1f} s"
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.0f} min"


def signed(value: float) -> str:
    """A signed number with a true minus: "+2.31", "−0.04"."""
    return f"{value:+.2f}".replace("-", "−")


def token_label(token: str) -> str:
    """A token with its blanks visible, "·Rome", and whatever can't be printed spelled out, "\\x08"."""
    shown = token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown) or "∅"


MODULES = {"attn": "Attention", "ffn": "MLP"}
STATES = {"before": "Before", "after": "After", "change": "Change"}
KINDS = {"edit": "Edit prompt", "paraphrase": "Paraphrase", "neighbourhood": "Neighbour"}


def cell_name(layer: int, module: str) -> str:
    """A place in the network: "Layer 3 · MLP"."""
    return f"Layer {layer} · {MODULES.get(module, module)}"
