"""The reference of all protocols, from their entries: `make docs` writes it to docs/metrics.md. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from mega_core.evaluation.asking import NEW_TOKENS
from mega_core.evaluation.protocols import PROTOCOLS
from mega_core.evaluation.protocols.base import Metric, Protocol

_HOW = {"forced": "forced", "generated": "generated", "text": "other"}
_ONCE = {"mean": "", "all": "; all prompts of a group", "any": "; any prompt of a group"}


def markdown() -> str:
    """The page, ending with a line break."""
    lines = [
        "# Metrics",
        "",
        "<!-- Written by `make docs` from the code: change the protocol's file, not this one. -->",
        "",
        "A protocol is one published way of scoring edits, or ours. Equal names hide different formulas: numbers of",
        "different protocols never share an average, a chart or a ranking.",
        "",
        "**forced**: read off next-token probabilities while the answer is fed token by token, which gives its tokens",
        "and its length away. **generated**: read off greedy text, which sees no answer; it ends with the end of text,",
        f"at most {NEW_TOKENS} tokens long. The protocol `ours` shows success both ways and is measured beside every",
        "other one.",
        "",
        "Averages are taken within a record (a case of a dataset) first, then over records. 95 % intervals are",
        "Wilson's where every record is a success or a failure, else from drawing records anew 1,000 times. A record",
        "that a metric has nothing to ask about leaves its mean alone. An arrow tells which way is better; a share",
        "lies in 0 to 1.",
        "",
        "| protocol | name | in one sentence | paper |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| [{_cell(one.title)}](#{one.name}) | `{one.name}` | {_cell(one.summary)} | {_cell(one.paper)} |"
        for one in PROTOCOLS
    ]
    for one in PROTOCOLS:
        lines += ["", f'<a id="{one.name}"></a>', "", *_section(one)]
    return "\n".join(lines) + "\n"


def _section(protocol: Protocol) -> Iterator[str]:
    yield f"## {protocol.title}"
    yield ""
    yield protocol.summary
    yield ""
    yield f"Name `{protocol.name}`, version {protocol.version}. Paper: {protocol.paper}."
    yield ""
    yield "| metric | title | formula | how | numerator | denominator | unit |"
    yield "|---|---|---|---|---|---|---|"
    yield from (_row(metric) for metric in protocol.metrics)
    for derived in protocol.derived:
        cells = (_cell(derived.title), _cell(derived.formula), "from means", "", "", "")
        yield f"| `{derived.name}` | {' | '.join(cells)} |"
    if protocol.notes:
        yield ""
        yield f"**Read with care.** {protocol.notes}"


def _row(metric: Metric) -> str:
    arrow = "↑" if metric.better == "higher" else "↓"
    once = _ONCE[metric.combine]
    none = "" if metric.if_none is None else f"; {metric.if_none:g} where none counted"
    cells = (
        _cell(metric.title),
        _cell(metric.formula),
        _HOW[metric.how],
        _cell(metric.numerator),
        _cell(metric.denominator) + once + none,
        f"{metric.unit} {arrow}",
    )
    return f"| `{metric.name}` | {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
