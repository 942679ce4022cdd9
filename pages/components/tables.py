"""A report's frames rearranged for one picture each: frame -> frame, no widgets. Charts and their text twins draw
the same table.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from mega_core.records import Report
from mega_core.summary import percent

STATES = ("before", "after", "change")
CANDIDATES = ("new", "true", "difference")


def _case(report: Report, name: str, case: int) -> pd.DataFrame:
    frame = report.frames.get(name)
    return pd.DataFrame() if frame is None else frame[frame["case"] == case].drop(columns="case")


def with_difference(frame: pd.DataFrame, keys: list[str], value: str) -> pd.DataFrame:
    """Add candidate "difference" (new - true) and state "change" (after - before) to a long table. Columns: keys,
    candidate, state, value.
    """
    wide = frame.pivot_table(index=keys, columns=["candidate", "state"], values=value, aggfunc="first", sort=False)
    present = set(wide.columns.get_level_values("candidate"))
    states = set(wide.columns.get_level_values("state"))
    if {"new", "true"} <= present:
        for state in states:
            wide[("difference", state)] = wide[("new", state)] - wide[("true", state)]
    if {"before", "after"} <= states:
        for candidate in set(wide.columns.get_level_values("candidate")):
            wide[(candidate, "change")] = wide[(candidate, "after")] - wide[(candidate, "before")]
    long = wide.stack(["candidate", "state"], future_stack=True).rename(value).reset_index()
    return long.dropna(subset=[value])


def module_cells(report: Report, case: int = 0) -> pd.DataFrame:
    """Contribution of every (layer, module) for new, true and their difference, before, after and the change.

    `share` is the cell's part of the sum of absolute values in its picture, `place` its rank there (1 = largest).
    """
    scores = _case(report, "module_scores", case)
    if scores.empty:
        return pd.DataFrame(columns=["layer", "module", "candidate", "state", "value", "share", "place"])
    cells = with_difference(scores.rename(columns={"contribution": "value"}), ["layer", "module"], "value")
    size = cells["value"].abs()
    groups = [cells["candidate"], cells["state"]]
    total = size.groupby(groups).transform("sum")
    cells["share"] = (size / total.where(total > 0)).fillna(0.0)
    cells["place"] = size.groupby(groups).rank(ascending=False, method="first").astype(int)
    return cells


def shared_limit(cells: pd.DataFrame) -> float:
    """One symmetric colour limit for every picture of this report: the 99.5 % quantile of the absolute values, of
    few cells the largest.
    """
    if cells.empty:
        return 1.0
    size = cells["value"].abs()
    return float(np.quantile(size, 0.995) if len(size) > 400 else size.max()) or 1.0


def sum_check(report: Report, case: int = 0) -> pd.DataFrame:
    """For new and true, before and after: log-probability at the input and at the output, the sum over modules, and
    what is left over.
    """
    totals = _case(report, "module_totals", case)
    scores = _case(report, "module_scores", case)
    if totals.empty or scores.empty:
        return pd.DataFrame(columns=["state", "candidate", "start", "end", "total", "modules", "residual"])
    modules = scores.groupby(["state", "candidate"], sort=False)["contribution"].sum().rename("modules").reset_index()
    check = totals.merge(modules, on=["state", "candidate"])
    check["residual"] = check["end"] - check["start"] - check["modules"]
    return check


def edited_places(report: Report) -> pd.DataFrame:
    """Where the change acts: layer, module, relative_norm; nowhere when only the prompt is changed."""
    frame = report.frames.get("weight_change")
    frame = None if frame is None else frame[frame["layer"] >= 0]
    if frame is None or frame.empty:
        return pd.DataFrame(
            {"layer": pd.Series(dtype=int), "module": pd.Series(dtype=str), "relative_norm": pd.Series(dtype=float)}
        )
    early = frame["site"].str.contains("attn|resid_mid")
    places = frame.assign(module=np.where(early, "attn", "ffn"))
    return places.groupby(["layer", "module"], as_index=False)["relative_norm"].max()


def next_tokens(report: Report, case: int = 0, top: int = 6, least: float = 0.002) -> pd.DataFrame:
    """First-token probabilities after the edit prompt: both objects, and the top tokens of either state that matter.

    Columns token, state, prob, role and the probability in words (percent); the likeliest token (in either state)
    first.
    """
    request = report.question.requests[case]
    tokens = _case(report, "next_tokens", case)
    answers = _case(report, "answers", case)
    rows: list[tuple[str, str, float]] = []
    roles: dict[str, str] = {}
    if not answers.empty:
        mine = answers[(answers["prompt_kind"] == "edit") & (answers["prompt"] == request.prompt)]
        for row in mine.itertuples():
            roles.setdefault(row.token, row.candidate)
            rows.append((row.token, row.state, float(row.first_prob)))
    if not tokens.empty:
        mine = tokens[tokens["prompt"] == request.prompt]
        listed = set(mine[(mine["rank"] <= top) & (mine["prob"] >= least)]["token"])
        for row in mine[mine["token"].isin(listed)].itertuples():
            rows.append((row.token, row.state, float(row.prob)))
    table = pd.DataFrame(rows, columns=["token", "state", "prob"]).drop_duplicates(["token", "state"])
    table["role"] = [roles.get(token, "other") for token in table["token"]]
    highest = table.groupby("token")["prob"].transform("max")
    words = [percent(prob) for prob in table["prob"]]
    return table.assign(highest=highest, percent=words).sort_values(
        ["highest", "token", "state"], ascending=[False, True, False], kind="stable", ignore_index=True
    )


def evidence(report: Report, case: int = 0) -> pd.DataFrame:
    """One row per prompt: probabilities of both objects before and after, the margin between their mean
    log-probabilities per token (as ROME's scores and the verdict count), and whether it passes.

    An edit prompt or paraphrase passes when the new object is more likely after the edit; a neighbour when the
    original still is. Without an original object the margin is that of the new one and the rule asks whether
    the new object's first token is the top answer.
    """
    answers = _case(report, "answers", case)
    if answers.empty:
        return pd.DataFrame(columns=["prompt_kind", "prompt", "margin_before", "margin_after", "passed"])
    values = answers.pivot_table(
        index=["prompt_kind", "prompt"],
        columns=["candidate", "state"],
        values=["prob", "mean_logprob", "is_top"],
        aggfunc="first",
        sort=False,
    )
    has_true = "true" in set(answers["candidate"])
    table = pd.DataFrame(index=values.index)
    for candidate in ("new", "true"):
        for state in ("before", "after"):
            if ("prob", candidate, state) in values:
                table[f"p_{candidate}_{state}"] = values[("prob", candidate, state)].astype(float)
    for state in ("before", "after"):
        margin = values[("mean_logprob", "new", state)].astype(float)
        if has_true:
            margin = margin - values[("mean_logprob", "true", state)].astype(float)
            says_new = margin > 0
        else:
            says_new = values[("is_top", "new", state)].astype(bool)
        table[f"margin_{state}"] = margin
        table[f"says_new_{state}"] = says_new
    table = table.reset_index()
    neighbour = table["prompt_kind"] == "neighbourhood"
    for state in ("before", "after"):
        table[f"passed_{state}"] = table[f"says_new_{state}"] ^ neighbour
    table["passed"] = table["passed_after"]
    rank = {"edit": 0, "paraphrase": 1, "neighbourhood": 2}
    return table.sort_values("prompt_kind", key=lambda kinds: kinds.map(rank), kind="stable").reset_index(drop=True)


def generations(report: Report, case: int = 0) -> pd.DataFrame:
    """One row per prompt with the base and the edited continuation; the edit prompt first."""
    texts = _case(report, "generations", case)
    if texts.empty:
        return pd.DataFrame(columns=["prompt_kind", "prompt", "before", "after"])
    wide = texts.pivot_table(
        index=["prompt_kind", "prompt"], columns="state", values="text", aggfunc="first", sort=False
    )
    rank = {"edit": 0, "paraphrase": 1, "neighbourhood": 2}
    wide = wide.reindex(columns=["before", "after"]).fillna("").reset_index()
    return wide.sort_values("prompt_kind", key=lambda kinds: kinds.map(rank), kind="stable").reset_index(drop=True)
