"""What the columns of a comparison are, and their reports rearranged for one picture each. Pandas only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from mega_core.evaluation.metrics import METRICS
from mega_core.records import Inspection, Report
from mega_core.summary import percent
from pages.components import tables
from pages.components.text import MODULES, word_diff

BASE = "Base"
PROTOCOLS = {
    "rome": "New against original",
    "argmax": "Most likely next token",
    "exact": "Whole object, word for word",
}
PROTOCOL_WORDS = {
    "rome": "As ROME and MEMIT score edits: which of the two objects is more likely per token (nll: mean negative "
    "log-likelihood per token).",
    "argmax": "Whether the most likely next token begins the right object. It asks more than being likelier than one "
    "other object.",
    "exact": "Whether the model, always taking its likeliest token, writes the whole right object.",
}


@dataclass(frozen=True, slots=True)
class Column:
    """One method of a comparison and how it stands."""

    label: str
    """As it is shown: the method's title, or a letter."""
    plan: Inspection
    digest: str
    state: str
    """done | working | waiting | failed | missing."""
    report: Report | None = None
    why: str = ""
    """Why it failed."""


def blinded(columns: Sequence[Column], seed: int) -> list[Column]:
    """The columns in an order drawn from the seed, under letters."""
    shuffled = list(columns)
    random.Random(seed).shuffle(shuffled)
    return [replace(column, label=f"Method {chr(65 + place)}") for place, column in enumerate(shuffled)]


def found(columns: Sequence[Column]) -> list[tuple[str, Report]]:
    """Label and report of those that are there."""
    return [(column.label, column.report) for column in columns if column.report is not None]


def metric_rows(columns: Sequence[Column], protocol: str) -> pd.DataFrame:
    """One row per metric of one protocol: metric, base and each method, n, better, how; `best` lists the best labels.

    The base model takes no part in "best": it holds no edit. Where every method has the same value, none is best.
    """
    there = found(columns)
    rows = []
    for metric in (one for one in METRICS if one.protocol == protocol):
        values: dict[str, float] = {}
        n = 0
        for label, report in there:
            mine = report.frames["metrics"]
            mine = mine[(mine["case"] == 0) & (mine["protocol"] == protocol) & (mine["metric"] == metric.name)]
            for state, name in (("before", BASE), ("after", label)):
                row = mine[mine["state"] == state]
                if len(row):
                    values[name] = float(row["value"].iloc[0])
                    n = int(row["n"].iloc[0])
        if not values:
            continue
        methods = {label: values[label] for label, _ in there if label in values}
        sign = 1 if metric.better == "higher" else -1
        top = max((sign * value for value in methods.values()), default=0.0)
        best = [label for label, value in methods.items() if sign * value >= top - 1e-9]
        rows.append(
            {
                "metric": metric.title,
                **values,
                "n": n,
                "better": f"{metric.better} is better",
                "how": metric.formula,
                "best": best if 0 < len(best) < len(methods) else [],
            }
        )
    return pd.DataFrame(rows)


def says(columns: Sequence[Column]) -> pd.DataFrame:
    """One row per prompt: prompt_kind, prompt, base, what each method makes the model say, `differs`."""
    there = found(columns)
    whole: pd.DataFrame | None = None
    for label, report in there:
        texts = tables.generations(report).rename(columns={"before": BASE, "after": label})
        if whole is None:
            whole = texts
        else:
            whole = whole.merge(texts[["prompt_kind", "prompt", label]], on=["prompt_kind", "prompt"], how="outer")
    if whole is None:
        return pd.DataFrame(columns=["prompt_kind", "prompt", BASE, "differs"])
    names = [BASE, *(label for label, _ in there)]
    whole[names] = whole[names].fillna("")
    rank = {"edit": 0, "paraphrase": 1, "neighbourhood": 2}
    whole = whole.sort_values("prompt_kind", key=lambda kinds: kinds.map(rank), kind="stable").reset_index(drop=True)
    return whole.assign(differs=whole[names].nunique(axis=1) > 1)


def bracketed(base: str, text: str) -> str:
    """The text with the words that the base model did not say in «»."""
    parts: list[str] = []
    run: list[str] = []
    for word, differs in [*word_diff(base, text)[1], ("", False)]:
        if differs:
            run.append(word)
            continue
        if run:
            parts.append(f"«{' '.join(run)}»")
            run = []
        if word:
            parts.append(word)
    return " ".join(parts)


def changes(columns: Sequence[Column], candidate: str) -> pd.DataFrame:
    """Change of every module's contribution to one candidate, in nats: method, layer, module, value, share, edited,
    limit (the largest absolute change of that method).
    """
    parts = []
    for label, report in found(columns):
        cells = tables.module_cells(report)
        mine = cells[(cells["candidate"] == candidate) & (cells["state"] == "change")]
        if mine.empty:
            continue
        places = tables.edited_places(report)
        where = set(zip(places["layer"], places["module"], strict=True))
        parts.append(
            mine[["layer", "module", "value", "share"]].assign(
                method=label,
                edited=[pair in where for pair in zip(mine["layer"], mine["module"], strict=True)],
                limit=float(mine["value"].abs().max()) or 1.0,
            )
        )
    if not parts:
        return pd.DataFrame(columns=["layer", "module", "value", "share", "method", "edited", "limit"])
    return pd.concat(parts, ignore_index=True)


def next_objects(columns: Sequence[Column]) -> pd.DataFrame:
    """Probability that the next token begins each object, after the edit prompt: method (the base first), who, token,
    prob, percent.
    """
    rows: list[dict[str, object]] = []
    for place, (label, report) in enumerate(found(columns)):
        answers = report.frames["answers"]
        prompt = report.question.requests[0].prompt
        mine = answers[(answers["case"] == 0) & (answers["prompt_kind"] == "edit") & (answers["prompt"] == prompt)]
        states = (("before", BASE), ("after", label)) if place == 0 else (("after", label),)
        for state, name in states:
            for row in mine[mine["state"] == state].itertuples():
                rows.append(
                    {
                        "method": name,
                        "who": "new object" if row.candidate == "new" else "original object",
                        "token": row.token,
                        "prob": float(row.first_prob),
                        "percent": percent(float(row.first_prob)),
                    }
                )
    return pd.DataFrame(rows, columns=["method", "who", "token", "prob", "percent"])


KINDS_OF_CHANGE = {
    "weights": "weights",
    "steering": "activations, no weight",
    "memory": "a memory beside the weights",
    "prompt": "a text before the prompt, no weight",
}


def costs(columns: Sequence[Column]) -> pd.DataFrame:
    """One row per method: seconds in all and for the edit alone, what was changed, where, by how much."""
    rows = []
    for label, report in found(columns):
        change = report.frames.get("weight_change")
        change = pd.DataFrame(columns=["kind", "layer", "site"]) if change is None else change
        kinds = list(dict.fromkeys(change["kind"]))
        layers = sorted({int(layer) for layer in change["layer"] if layer >= 0})
        rows.append(
            {
                "method": label,
                "seconds": float(sum(report.timing.values())),
                "edit_seconds": float(report.timing["edit"]) if "edit" in report.timing else None,
                "changed": ", ".join(KINDS_OF_CHANGE.get(kind, kind) for kind in kinds) or "nothing",
                "where": ", ".join(map(str, layers)) or "nowhere in the network",
                "weights": int(change.loc[change["kind"] == "weights", "parameters"].sum()) if len(change) else 0,
                "norm": float((change["norm"] ** 2).sum() ** 0.5) if len(change) else 0.0,
                "relative": float(change["relative_norm"].max()) if len(change) else 0.0,
            }
        )
    return pd.DataFrame(rows)


def place_of(row: pd.Series) -> str:
    """A place of `changes` in words: "layer 3 MLP"."""
    return f"layer {int(row['layer'])} {MODULES.get(row['module'], row['module'])}"
