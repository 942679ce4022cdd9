"""What the pages see of `service.chains`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pandas as pd

from mega_core import frames
from mega_core.cases import Chain, Hop
from mega_core.errors import BadInput
from mega_core.records import EditRequest
from mega_core.service.chains import Link, Route, Said, Start, Traced, Went

MAKER = Link("Accord", "maker", "maker of the product", "Honda")
COUNTRY = Link("Honda", "company_country", "country of the company", "Japan")
EDIT = EditRequest("Accord", "{} is a product made by", "Apple", "Honda")
FIRST, SECOND = Hop("q", "Accord is a product made by", ("Honda",)), Hop("q", "Honda is a company from", ("Japan",))
NEW = (replace(FIRST, answers=("Apple",)), Hop("q", "Apple is a company from", ("United States",)))
CHAIN = Chain(("The home country of the maker of Accord is",), (FIRST, SECOND), NEW, ("Japan",), ("United States",))
ROUTE = Route(EDIT, CHAIN)


def said(hop: Hop, text: str) -> Said:
    """An answer to a step."""
    return Said(hop.cloze, hop.answers[0], text, text in hop.answers)


def went(method: str, first: str, second: str, whole: str) -> Went:
    """How the chain went after an edit."""
    question = Said(CHAIN.questions[0], "United States", whole, whole == "United States")
    return Went(method, (said(NEW[0], first), said(NEW[1], second)), (question,), (whole == "Japan",), 1.5)


def path(methods: tuple[str, ...]) -> dict[str, pd.DataFrame]:
    """Neurons of the path: the unedited model, then each method."""
    found = {name: [] for name in ("neuron_scores", "query_layers", "query_neurons")}
    for method in ("", *methods):
        key = {"state": "after" if method else "before"}
        for case in (0, 1):
            for candidate in ("new", "true"):
                at = {**key, "case": case, "candidate": candidate}
                tables = {
                    "neuron_scores": [
                        {**at, "layer": layer, "neuron": 7, "contribution": 0.2 * layer, "coefficient": 1.0,
                         "bound": 2.0, "rank": layer + 1, "certified": True} for layer in range(4)
                    ],
                    "query_layers": [
                        {**at, "values": "ffn", "layer": layer, "module": module, "score": 0.1 * layer}
                        for layer in range(4) for module in ("attn", "ffn")
                    ],
                    "query_neurons": [
                        {**at, "layer": 1, "neuron": 3, "score": 0.4, "coefficient": 1.0, "position": 2,
                         "token": " Accord", "rank": 1, "is_value": False}
                    ],
                }  # fmt: skip
                for name, rows in tables.items():
                    found[name].append(frames.from_rows(rows, name).assign(method=method))
    return {name: pd.concat(parts, ignore_index=True) for name, parts in found.items()}


def traced(request: EditRequest = EDIT) -> Traced:
    """ROME breaks at the composition, ACE holds, MEGA refuses."""
    before = Went("", (said(FIRST, "Honda"), said(SECOND, "Japan")),
                  (Said(CHAIN.questions[0], "Japan", "Japan", True),), (True,))  # fmt: skip
    after = (
        went("rome", "Apple", "United States", "Japan"),
        replace(went("ace", "Apple", "United States", "United States"), notes=("Value layers 4, query layers 1-3.",)),
        Went("mega", (), (), (), refused="There is no room. Choose other layers."),
    )
    return Traced(
        "c" * 32, "atlas-gpt2", request, CHAIN, 0, before, (False, True), after, path(("rome", "ace")),
        "2026-01-02T03:04:05+00:00",
    )  # fmt: skip


@dataclass
class FakeChains:
    """Frozen answers."""

    stored: dict[str, Traced] = field(default_factory=dict)
    routes: tuple[Route, ...] = (ROUTE,)
    started: list[tuple[str, Route, tuple[str, ...]]] = field(default_factory=list)
    refusal: Exception | None = None

    def of(self, request: EditRequest) -> tuple[Route, ...]:
        return self.routes

    def starts(self) -> tuple[Start, ...]:
        return (Start("maker", MAKER.phrase, ("Accord", "Civic")),)

    def links(self, subject: str, relations: tuple[str, ...]) -> tuple[Link, ...]:
        return (replace(MAKER, subject=subject),)

    def onward(self, link: Link) -> tuple[Link, ...]:
        return (COUNTRY,) if link.relation == "maker" else ()

    def objects(self, links: tuple[Link, ...], edited: int) -> tuple[str, ...]:
        return ("Apple", "Volkswagen") if edited == 0 else ()

    def forms(self, links: tuple[Link, ...]) -> tuple[str, ...]:
        return CHAIN.questions

    def build(self, links: tuple[Link, ...], edited: int, new: str, question: str = "") -> Route:
        if question == "?":
            raise BadInput("questions", "is no beginning.", "Write one.")
        return Route(EDIT, replace(CHAIN, questions=(question or CHAIN.questions[0],)))

    def start(self, model: str, route: Route, methods: list[str], owner: str) -> tuple[str, str | None]:
        if self.refusal is not None:
            raise self.refusal
        self.started.append((model, route, tuple(methods)))
        return "c" * 32, None if "c" * 32 in self.stored else "j" * 32

    def traced(self, name: str) -> Traced | None:
        return self.stored.get(name)

    def listed(self, owner: str) -> tuple[Traced, ...]:
        return tuple(self.stored.values())
