"""One heading and one sentence per picture, made from its numbers by rule. Plain text: whoever shows it escapes it."""

from __future__ import annotations

import pandas as pd

from mega_core.records import EditRequest
from mega_core.summary import percent
from pages.components.text import KINDS, cell_name, signed

_KINDS = {"attn": "attention", "ffn": "MLP"}


def ordinal(place: int) -> str:
    """ "largest", "2nd largest", "11th largest"."""
    if place == 1:
        return "largest"
    suffix = "th" if 10 <= place % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{suffix} largest"


def explained(candidate: str, request: EditRequest) -> str:
    """What a candidate stands for: "Rome", "Paris", "Rome rather than Paris"."""
    if candidate == "new":
        return request.target_new
    if candidate == "true":
        return request.target_true or "the original object"
    return f"{request.target_new} rather than {request.target_true or 'the original object'}"


def of_next_tokens(table: pd.DataFrame) -> tuple[str, str]:
    """Which token leads before and after."""
    tops = {}
    for state in ("before", "after"):
        rows = table[table["state"] == state]
        if rows.empty:
            return "Next token", "No next-token probabilities were kept for this prompt."
        best = rows.loc[rows["prob"].idxmax()]
        tops[state] = (str(best["token"]).strip(), float(best["prob"]))
    (was, p_was), (now, p_now) = tops["before"], tops["after"]
    if was == now:
        return (
            f"Next token: still “{now}”",
            f"The most likely next token stays “{now}”: {percent(p_was)} before, {percent(p_now)} after.",
        )
    return (
        f"Next token: “{was}” gives way to “{now}”",
        f"The base model says “{was}” with {percent(p_was)}; the edited model says “{now}” with {percent(p_now)}.",
    )


def of_evidence(table: pd.DataFrame, has_true: bool) -> tuple[str, str]:
    """How many prompts hold, and the worst of those that don't."""
    held = int(table["passed"].sum())
    heading = f"{held} of {len(table)} prompts answer as they should"
    broken = table[~table["passed"]]
    rule = (
        "The dashed line is where the answer flips."
        if has_true
        else "The margin is the log-probability of the new object."
    )
    if broken.empty:
        return (
            heading,
            f"Every edit prompt and paraphrase says the new object and every neighbour keeps its own. {rule}",
        )
    distance = broken["margin_after"].abs()
    worst = broken.loc[distance.idxmax()]
    return heading, (
        f"Furthest from where it should be: {KINDS[worst['prompt_kind']].lower()} “{worst['prompt']}”, margin "
        f"{signed(worst['margin_after'])} after the edit ({signed(worst['margin_before'])} before). {rule}"
    )


def of_module_map(cells: pd.DataFrame, candidate: str, request: EditRequest) -> tuple[str, str]:
    """Where the change of contribution is largest."""
    what = explained(candidate, request)
    change = cells[(cells["candidate"] == candidate) & (cells["state"] == "change")]
    if change.empty:
        return f"What pushes toward {what}", "No contributions were computed for this run."
    best = change.loc[change["place"].idxmin()]
    verb = "gained" if best["value"] > 0 else "lost"
    return (
        f"What pushes toward {what}",
        f"{cell_name(int(best['layer']), best['module'])} {verb} most: {signed(best['value'])} nats, "
        f"{best['share']:.0%} of all change.",
    )


def of_cell(cells: pd.DataFrame, layer: int, module: str, candidate: str, request: EditRequest) -> str:
    """One place before and after."""
    mine = cells[(cells["layer"] == layer) & (cells["module"] == module) & (cells["candidate"] == candidate)].set_index(
        "state"
    )
    if not {"before", "after", "change"} <= set(mine.index):
        return "This place has no before and after."
    before, after, change = (float(mine.loc[state, "value"]) for state in ("before", "after", "change"))
    total = int(((cells["candidate"] == candidate) & (cells["state"] == "change")).sum())
    turn = "raised" if change > 0 else "lowered"
    flips = " It changed sign." if before * after < 0 else ""
    return (
        f"The edit {turn} this {_KINDS.get(module, module)} module's push toward {explained(candidate, request)} from "
        f"{signed(before)} to "
        f"{signed(after)} nats: the {ordinal(int(mine.loc['change', 'place']))} of {total} changes, "
        f"{float(mine.loc['change', 'share']):.0%} of their sum.{flips}"
    )


def of_profile(cells: pd.DataFrame, candidate: str, request: EditRequest) -> tuple[str, str]:
    """Which half of the network moves, and by which kind of module."""
    change = cells[(cells["candidate"] == candidate) & (cells["state"] == "change")]
    if change.empty:
        return "By layer", ""
    by_layer = change.groupby("layer")["value"].sum()
    by_module = change.groupby("module")["value"].sum()
    module = str(by_module.abs().idxmax())
    layer = int(by_layer.abs().idxmax())
    return (
        f"By layer: the turn happens at layer {layer}",
        f"Layer {layer} moves by {signed(by_layer[layer])} nats toward {explained(candidate, request)}; over all "
        f"layers "
        f"{_KINDS.get(module, module)} modules move by {signed(by_module[module])} nats.",
    )


def of_sums(check: pd.DataFrame, candidate: str) -> str:
    """Whether the modules add up to the whole."""
    if candidate == "difference":
        return "For the difference, the sums are those of the two objects subtracted."
    parts = []
    for state, word in (("before", "Base"), ("after", "Edited")):
        row = check[(check["state"] == state) & (check["candidate"] == candidate)]
        if row.empty:
            continue
        first = row.iloc[0]
        parts.append(
            f"{word}: {signed(first['start'])} at the input {signed(first['modules'])} by all modules = "
            f"{signed(first['end'])} at the "
            f"output, left over {signed(first['residual'])}."
        )
    return " ".join(parts)
