"""Charts as files: PNG and SVG of a Vega-Lite specification, drawn here without a browser or a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from mega_core.documents import element

WIDTH = 760
"""Of a picture whose specification leaves it to the page, in pixels."""
PAGE_WIDTH = 640
_VERSION = "5.20"
# What the page's light theme gives in the browser (.streamlit/config.toml).
_THEME: dict[str, Any] = {
    "background": "#ffffff",
    "font": "Helvetica, Arial, sans-serif",
    "view": {"stroke": None},
    "axis": {"labelColor": "#5d6975", "titleColor": "#17212b", "gridColor": "#d8dfe6", "titleFontWeight": "normal"},
    # Of fonts that are common it has the signs for "holds" and "does not hold".
    "legend": {"labelColor": "#5d6975", "titleColor": "#17212b", "labelFont": "DejaVu Sans, Helvetica, sans-serif"},
    "range": {
        "category": ["#12998a", "#78838f", "#b3bcc6", "#8a6fd8", "#b0821f", "#2b9160", "#d24d57"],
        "diverging": [
            "#8f3f00", "#bf5a08", "#e07f2e", "#f2ad74", "#fdf3ea", "#eef5fc", "#94c0e8", "#4d96d9", "#1f6fba",
            "#0d4a86",
        ],
        "heatmap": [
            "#f2faf9", "#d8f0ec", "#b8e3dc", "#93d3c9", "#6bc0b4", "#45ab9e", "#2a9587", "#157d71", "#0b645b",
            "#054a44",
        ],
    },
}  # fmt: skip
_THEME["range"]["ramp"] = _THEME["range"]["heatmap"]


def svg(spec: Mapping[str, Any], title: str = "") -> str:
    """The picture as SVG text; `title` stands above it. Loads nothing from anywhere."""
    import vl_convert

    return vl_convert.vegalite_to_svg(_whole(spec, title), vl_version=_VERSION, config=_THEME, allowed_base_urls=[])


def png(spec: Mapping[str, Any], title: str = "", scale: float = 2.0) -> bytes:
    """As svg(), as PNG bytes with `scale` pixels per unit."""
    return png_of(svg(spec, title), scale)


def png_of(text: str, scale: float = 2.0) -> bytes:
    """SVG text as PNG bytes with `scale` pixels per unit."""
    import vl_convert

    return vl_convert.svg_to_png(text, scale=scale)


def drawn(spec: Mapping[str, Any], name: str, title: str, told: str) -> Markup:
    """The picture as an element of an HTML page, whose style colours its text and grid; `told` is its description."""
    import vl_convert

    whole = _whole(spec, "")
    whole["width"] = PAGE_WIDTH if spec.get("width", "container") == "container" else whole["width"]
    text = vl_convert.vegalite_to_svg(
        whole, vl_version=_VERSION, config={**_THEME, "background": None}, allowed_base_urls=[]
    )
    return element(text, name, title, told)


def _whole(spec: Mapping[str, Any], title: str) -> dict[str, Any]:
    """A copy that stands alone: with a width, a title, and no interaction."""
    whole: dict[str, Any] = json.loads(json.dumps(dict(spec)))
    if whole.get("width", "container") == "container":
        whole["width"] = WIDTH
    if title:
        whole["title"] = {"text": title, "anchor": "start", "color": "#17212b", "fontSize": 13, "limit": WIDTH}
    return whole
