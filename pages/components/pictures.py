"""Charts as files: PNG and SVG of a Vega-Lite specification, drawn here without a browser or a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

WIDTH = 760
"""Of a picture whose specification leaves it to the page, in pixels."""
_VERSION = "5.20"
# What the page's light theme gives in the browser (.streamlit/config.toml).
_THEME: dict[str, Any] = {
    "background": "#ffffff",
    "font": "Helvetica, Arial, sans-serif",
    "axis": {"labelColor": "#5d6975", "titleColor": "#17212b", "gridColor": "#d8dfe6", "titleFontWeight": "normal"},
    "legend": {"labelColor": "#5d6975", "titleColor": "#17212b"},
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
    import vl_convert

    return vl_convert.vegalite_to_png(
        _whole(spec, title), vl_version=_VERSION, config=_THEME, scale=scale, allowed_base_urls=[]
    )


def _whole(spec: Mapping[str, Any], title: str) -> dict[str, Any]:
    """A copy that stands alone: with a width, a title, and no interaction."""
    whole: dict[str, Any] = json.loads(json.dumps(dict(spec)))
    if whole.get("width", "container") == "container":
        whole["width"] = WIDTH
    if title:
        whole["title"] = {"text": title, "anchor": "start", "color": "#17212b", "fontSize": 13, "limit": WIDTH}
    return whole
