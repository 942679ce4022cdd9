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
from pages.components import charts, contrast_charts, tables  # noqa: E402
from pages.components.anatomy_pictures import MAKERS, Look  # noqa: E402
from pages.components.anatomy_place import Place  # noqa: E402

DIVERGING = ["#b35a1f", "#eebf91", "#f7f7f7", "#a9c4ea", "#2f5fae"]
WIDTH = 560
LOOKS = {
    "head_scores": Look("new", "change"),
    "head_sources": Look("new", "after"),
    "neuron_scores": Look("new", "after"),
    "attention_neurons": Look("new", "after"),
    "query_layers": Look("new", "after"),
    "lens": Look(),
    "residual": Look("new"),
    "attention": Look("new", "change", more={"prompts": "edit"}),
    "trace": Look(more={"trace": "new.after"}),
    "stress": Look("new", "after"),
    "weight_spectrum": Look(),
}


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
    for name, look in LOOKS.items():
        made = MAKERS[name](report, strongest(report, look))
        if made is not None:
            save(made[2], folder / f"{name}.png")
    if many is not None:
        curves = many.curves
        late = curves[(curves["statistic"] == "D") & (curves["module"] == "attn") & (curves["candidate"] == "new")]
        shown = late.assign(label=late["editor"]).reset_index(drop=True)
        save(contrast_charts.bands(shown, many.region.layers, "Change, nats"), folder / "contrast.png")


def strongest(report: Report, look: Look) -> Look:
    """The same look at the head that does most for the new object after the edit."""
    frame = report.frames["head_sources"]
    mine = frame[(frame["case"] == 0) & (frame["state"] == "after") & (frame["candidate"] == "new")]
    layer, head = mine.groupby(["layer", "head"])["contribution"].sum().idxmax()
    return replace(look, place=Place(int(layer), "attn", int(head)))


def save(chart: alt.LayerChart, path: Path) -> None:
    """As a PNG on white."""
    whole = chart.properties(width=WIDTH).configure_range(diverging=DIVERGING)
    whole.configure(background="white").save(str(path), scale_factor=1.5)
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
