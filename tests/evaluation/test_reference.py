"""docs/metrics.md is what the protocols' entries say."""

from __future__ import annotations

from pathlib import Path

import pytest

from mega_core.evaluation.protocols import PROTOCOLS
from mega_core.evaluation.reference import markdown

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "run `make docs`"


@pytest.mark.parametrize("name", [protocol.name for protocol in PROTOCOLS])
def test_an_entry_is_complete(name: str) -> None:
    protocol = PROTOCOLS[name]
    assert protocol.title
    assert protocol.summary[-1] in ".?"
    assert protocol.paper
    names = [one.name for one in (*protocol.metrics, *protocol.derived)]
    assert len(set(names)) == len(names)
    for metric in protocol.metrics:
        assert metric.title
        assert metric.formula
        assert metric.numerator
        assert metric.denominator
        assert f"| `{metric.name}` | {metric.title} |" in markdown()
    for derived in protocol.derived:
        assert {protocol.metric(one).name for one in derived.of} == set(derived.of)


def test_tables_have_as_many_cells_as_heads() -> None:
    tables = [line for line in markdown().splitlines() if line.startswith("|")]
    widths = [line.replace("\\|", "").count("|") for line in tables]
    heads = [width for line, width in zip(tables, widths, strict=True) if line.startswith("|---")]
    assert set(widths) == set(heads)
