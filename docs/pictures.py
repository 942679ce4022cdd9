"""Draw the pictures of docs/attribution.md from a real edit: python docs/pictures.py [FOLDER].

Needs vl-convert-python (requirements.txt). The edit is that of the example card that works.
"""

# ruff: noqa: T201
from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import altair as alt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import temporary_service  # noqa: E402
from mega_core.records import Report  # noqa: E402
from pages.components import charts, tables, view_charts  # noqa: E402
from pages.components.look_deeper import PANELS  # noqa: E402

DIVERGING = ["#b35a1f", "#eebf91", "#f7f7f7", "#a9c4ea", "#2f5fae"]
WIDTH = 560


def main() -> None:
    """Write one PNG for each picture."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "pictures")
    folder.mkdir(parents=True, exist_ok=True)
    with temporary_service() as service:
        card = next(example for example in service.examples() if example.outcome == "works")
        question = card.report().question
        many = service.studies.measured(question.model.name)
        report = service.run(replace(question, views=tuple(view.name for view in service.views())))
    print(question.requests[0].sentence)
    cells = tables.module_cells(report)
    edited = tables.edited_places(report)
    save(charts.module_map(cells, edited, candidate="new", limit=tables.shared_limit(cells)), folder / "modules.png")
    for panel in PANELS:
        table = one_case(report, panel.frame)
        if table is not None and not table.empty:
            save(panel.draw(table, report), folder / f"{panel.frame}.png")
    if many is not None:
        curves = many.curves
        late = curves[(curves["statistic"] == "D") & (curves["module"] == "attn") & (curves["candidate"] == "new")]
        save(view_charts.contrast_bands(late.reset_index(drop=True)), folder / "contrast.png")


def one_case(report: Report, name: str):  # noqa: ANN201
    """The rows of the first edit."""
    frame = report.frames.get(name)
    if frame is None or "case" not in frame:
        return frame
    return frame[frame["case"] == 0].drop(columns="case")


def save(chart: alt.LayerChart, path: Path) -> None:
    """As a PNG on white."""
    whole = chart.properties(width=WIDTH).configure_range(diverging=DIVERGING)
    whole.configure(background="white").save(str(path), scale_factor=1.5)
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
