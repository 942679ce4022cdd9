"""How good an edit is, as numbers from the table `answers`. Equal names hide different formulas: each has a protocol.

Protocols:
  rome    as ROME and MEMIT score CounterFact: the candidates' mean negative log-likelihood per token, new against true.
  argmax  the candidate's first token is the most likely next token.
  exact   the whole candidate is the greedy continuation, token by token.

A metric is the mean over a record's prompts of one kind; `n` is how many prompts, so value * n is the numerator.
Averages over records are averages of these values ("within a record first"). Metrics that need the true object are
left out where it is unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mega_core import frames

# From one row per state, case and prompt (columns "<value>_new" and "<value>_true" of `answers`) to a number each.
Score = Callable[[pd.DataFrame], pd.Series]


def new_preferred(pairs: pd.DataFrame) -> pd.Series:
    """1[nll_true > nll_new]: strictly, with nll the mean over the object's tokens of -log p."""
    return pairs["mean_logprob_new"] > pairs["mean_logprob_true"]


def new_margin(pairs: pd.DataFrame) -> pd.Series:
    """e^-nll_new - e^-nll_true: a difference of geometric-mean token probabilities, not of sequence probabilities."""
    return np.exp(pairs["mean_logprob_new"]) - np.exp(pairs["mean_logprob_true"])


def true_preferred(pairs: pd.DataFrame) -> pd.Series:
    """1[nll_true < nll_new]: strictly."""
    return pairs["mean_logprob_true"] > pairs["mean_logprob_new"]


def true_margin(pairs: pd.DataFrame) -> pd.Series:
    """e^-nll_true - e^-nll_new."""
    return -new_margin(pairs)


def new_is_top(pairs: pd.DataFrame) -> pd.Series:
    """1[argmax of the next token = first token of new]."""
    return pairs["is_top_new"]


def true_is_top(pairs: pd.DataFrame) -> pd.Series:
    """1[argmax of the next token = first token of true]."""
    return pairs["is_top_true"]


def new_is_greedy(pairs: pd.DataFrame) -> pd.Series:
    """1[every token of new is the argmax after the prompt and the tokens before it]."""
    return pairs["is_greedy_new"]


def true_is_greedy(pairs: pd.DataFrame) -> pd.Series:
    """1[every token of true is the argmax after the prompt and the tokens before it]."""
    return pairs["is_greedy_true"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: which prompts it averages over, and what it gives each of them."""

    name: str
    protocol: str
    title: str
    formula: str
    """The same as text, for a tooltip."""
    prompt_kind: str
    score: Score
    needs_true: bool = True
    better: str = "higher"


METRICS: tuple[Metric, ...] = (
    Metric("ES", "rome", "Efficacy score", "mean of 1[nll(true) > nll(new)], edit prompt", "edit", new_preferred),
    Metric("EM", "rome", "Efficacy magnitude", "mean of e^-nll(new) - e^-nll(true), edit prompt", "edit", new_margin),
    Metric("PS", "rome", "Paraphrase score", "as ES, over the paraphrases", "paraphrase", new_preferred),
    Metric("PM", "rome", "Paraphrase magnitude", "as EM, over the paraphrases", "paraphrase", new_margin),
    Metric(
        "NS",
        "rome",
        "Neighbourhood score",
        "mean of 1[nll(true) < nll(new)], neighbour prompts",
        "neighbourhood",
        true_preferred,
    ),
    Metric(
        "NM",
        "rome",
        "Neighbourhood magnitude",
        "mean of e^-nll(true) - e^-nll(new), neighbour prompts",
        "neighbourhood",
        true_margin,
    ),
    Metric(
        "accuracy",
        "argmax",
        "Accuracy",
        "the most likely next token begins the new object, edit prompt",
        "edit",
        new_is_top,
        needs_true=False,
    ),
    Metric(
        "paraphrase_accuracy",
        "argmax",
        "Paraphrase accuracy",
        "share of paraphrases whose most likely next token begins the new object",
        "paraphrase",
        new_is_top,
        needs_true=False,
    ),
    Metric(
        "neighbourhood_accuracy",
        "argmax",
        "Neighbourhood accuracy",
        "share of neighbour prompts whose most likely next token begins the true object",
        "neighbourhood",
        true_is_top,
    ),
    Metric(
        "exact",
        "exact",
        "Exact match",
        "the greedy continuation is the whole new object, edit prompt",
        "edit",
        new_is_greedy,
        needs_true=False,
    ),
    Metric(
        "paraphrase_exact",
        "exact",
        "Paraphrase exact match",
        "share of paraphrases continued greedily by the whole new object",
        "paraphrase",
        new_is_greedy,
        needs_true=False,
    ),
    Metric(
        "neighbourhood_exact",
        "exact",
        "Neighbourhood exact match",
        "share of neighbour prompts continued greedily by the whole true object",
        "neighbourhood",
        true_is_greedy,
    ),
)

_ROW = ["state", "case", "prompt_kind", "prompt"]
_USED = ["mean_logprob", "is_top", "is_greedy"]


def measure(answers: pd.DataFrame) -> pd.DataFrame:
    """The frame `answers` -> the frame `metrics`: each metric, for every state and case with its prompts."""
    sides = {
        side: answers[answers["candidate"] == side].set_index(_ROW)[_USED].add_suffix(f"_{side}")
        for side in ("new", "true")
    }
    any_true = sides["new"].reset_index()
    with_true = sides["new"].join(sides["true"], how="inner").reset_index()
    rows: list[dict[str, object]] = []
    for metric in METRICS:
        pairs = with_true if metric.needs_true else any_true
        chosen = pairs[pairs["prompt_kind"] == metric.prompt_kind]
        for (state, case), group in chosen.groupby(["state", "case"], sort=False):
            rows.append(
                {
                    "state": state,
                    "case": case,
                    "protocol": metric.protocol,
                    "metric": metric.name,
                    "value": float(metric.score(group).astype("float64").mean()),
                    "n": len(group),
                }
            )
    return frames.from_rows(rows, "metrics")
