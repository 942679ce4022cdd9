"""Whether a text that a model made gives an answer. No torch.

1. Texts are compared without case, articles (a, an, the), punctuation and extra blanks, after Unicode's NFKC: as
   open-domain question answering does (SQuAD, arXiv 1606.05250). Every sign of punctuation is a blank here, so that
   "London's" holds the word London (ours; SQuAD's script deletes the signs).
2. Exact: the answer is all that the text says up to a stop, which is the end of its first line or of a sentence in it.
   Arguing that only such text shows what a person would read: "The Mirage of Model Editing" (arXiv 2502.11177).
3. Contains: the answer stands in the text as whole words. Scripts without blanks between words have no such borders.

An answer that is nothing but articles is compared with its articles, one that is nothing but punctuation as it stands.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_ARTICLES = frozenset({"a", "an", "the"})
_STOP = re.compile(r"[.!?。！？]+(?=\s|$|[\"'”’)\]])|[。！？]+")
_LINE_ENDS = re.compile(r"[\n\r\u2028\u2029]")
_WITHOUT_BLANKS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


# 1.
def words(text: str, articles: bool = False) -> list[str]:
    """The words that count in a comparison; `articles` keeps a, an and the."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    plain = "".join(" " if unicodedata.category(sign)[0] in "PZC" else sign for sign in folded)
    return [word for word in plain.split() if articles or word not in _ARTICLES]


# 2.
def is_exactly(text: str, answer: str) -> bool:
    """Whether the text says the answer and then stops. The answer may hold stops itself ("St. Louis")."""
    line = _LINE_ENDS.split(text.strip(), maxsplit=1)[0]
    ends = [*(stop.start() for stop in _STOP.finditer(line)), len(line)]
    return any(_same(line[:end], answer) for end in ends)


# 3.
def contains(text: str, answer: str) -> bool:
    """Whether the answer stands in the text as whole words."""
    for articles in (False, True):
        wanted = " ".join(words(answer, articles))
        if wanted:
            before = "" if _runs_on(wanted[0]) else r"(?<!\S)"
            after = "" if _runs_on(wanted[-1]) else r"(?!\S)"
            return re.search(before + re.escape(wanted) + after, " ".join(words(text, articles))) is not None
    return answer.strip() in text


def is_exactly_any(text: str, names: Iterable[str]) -> bool:
    """Whether the text says one of the names and then stops."""
    return any(is_exactly(text, name) for name in names)


def contains_any(text: str, names: Iterable[str]) -> bool:
    """Whether one of the names stands in the text as whole words."""
    return any(contains(text, name) for name in names)


def _same(said: str, answer: str) -> bool:
    for articles in (False, True):
        wanted = words(answer, articles)
        if wanted:
            return words(said, articles) == wanted
    return said.strip() == answer.strip()


def _runs_on(sign: str) -> bool:
    return unicodedata.name(sign, "").startswith(_WITHOUT_BLANKS)
