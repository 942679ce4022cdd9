"""How varied a text is: weighted n-gram entropy, ROME's measure of fluency (arXiv 2202.05262). No torch.

1. A text is cut into words. The cut is ours, as simple as can be said: each run of letters, digits and underscores is a
   word, and so is every other character that is not a blank. ROME takes NLTK's, which also parts "don't" and keeps
   "U.S." together.
2. H_n = - sum over the text's different n-grams of f log2 f, with f the n-gram's share of all of them; bits. A text too
   short for an n-gram has H_n 0.
3. The entropy of a text is (2/3 H_2 + 4/3 H_3) / 2. A text that says one word over and over has 0; chance letters have
   much: a fall tells of repetition, a rise tells nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from math import log2

WEIGHTS = {2: 2 / 3, 3: 4 / 3}
"""Length of an n-gram -> its weight."""

_WORD = re.compile(r"\w+|[^\w\s]")


# 1.
def words(text: str) -> list[str]:
    """The words and signs of a text, in order; case stays."""
    return _WORD.findall(text)


# 2.
def entropy_of(listed: Sequence[str], n: int) -> float:
    """H_n of a list of words, bits."""
    counts = Counter(tuple(listed[i : i + n]) for i in range(len(listed) - n + 1))
    total = sum(counts.values())
    return sum(count / total * log2(total / count) for count in counts.values())


# 3.
def entropy(text: str) -> float:
    """The weighted n-gram entropy of a text, bits."""
    listed = words(text)
    return sum(weight * entropy_of(listed, n) for n, weight in WEIGHTS.items()) / len(WEIGHTS)
