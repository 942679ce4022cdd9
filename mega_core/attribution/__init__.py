"""Ways of looking inside a model. A new view is one function and one line here."""

from mega_core.attribution.base import VIEWS, View

__all__ = ["VIEWS", "View"]

VIEWS.add(
    "module_scores",
    View(
        "module_scores",
        "Layer and module contributions (NLKA)",
        ("module_scores", "module_totals"),
        "mega_core.attribution.nlka:look",
    ),
)
