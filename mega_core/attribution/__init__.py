"""Ways of looking inside a model. A new view is one function and one entry here."""

from mega_core.attribution.base import VIEWS, View, look_at, read_view

__all__ = ["VIEWS", "View", "look_at", "read_view"]

VIEWS.add(
    "module_scores",
    View(
        "module_scores",
        "Layer and module contributions (NLKA)",
        "How much each layer's attention and MLP raise or lower the log-probability of the new and the true object.",
        ("module_scores", "module_totals"),
        "mega_core.attribution.nlka:look",
    ),
)
