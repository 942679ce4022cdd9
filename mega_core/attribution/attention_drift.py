"""Where the last token looks: attention mass by segment of the prompt, and how an edit moves it.

"Over-attention" is One Mask's word (arXiv 2605.28839) for what attention writes too much after an edit; SADR (arXiv
2502.14838) calls its cause attention drift: the last token attends to the edited subject more than before, and harms
what should stay. Their measures differ; this one, the mass itself, is ours:

1. mass(segment) = sum over its positions p of the attention weight alpha[t, p] from the last token t, for every head.
2. Every token belongs to one segment:
       last      the last token
       subject   the subject's tokens, except the prompt's first where the subject goes on behind it
       first     the prompt's first token otherwise: attention that has nowhere to go rests there (a sink)
       between   all others
       context   a text in front of the prompt (in-context editing): 1 - the mass on the prompt's own tokens
   so that the masses of a head add up to 1.
3. The same for the first `neighbours` neighbour prompts. Their subject is what stands in the template's place, else the
   longest name of the fact tables in the prompt; a prompt without either has no row "subject", and its tokens count as
   "between".
4. over_attention: mass on the subject after the edit - before, per head.
5. link: per prompt the mean change over the heads of the later half of the layers ("change"), and over those TOP of
   these heads whose mass on the subject of the edit prompt grew most ("top"; heads that look at little else before the
   edit can only lose). Beside it, whether the prompt failed: an edit prompt when the new object is not on top after, a
   neighbour when its own object, on top before, no longer is.
6. failures, over many reports: means of these changes and the correlation of a neighbour's change with its failure
   (point-biserial), with 95 % intervals from drawing edits, each with all its prompts, with replacement. The edit
   prompts' mean of "top" is positive by the choice of these heads; the neighbours' is not.

Weights are no explanations by themselves: `heads` shows what is written with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mega_core import frames
from mega_core.attribution.recording import CAPTURE_BYTES, Recording, once
from mega_core.attribution.settings import AttentionParams
from mega_core.embedded import facts
from mega_core.errors import BadInput
from mega_core.events import Reporter, stage
from mega_core.models import tokens
from mega_core.models.adapter import ModelAdapter
from mega_core.models.hooks import Site, capture
from mega_core.records import EditRequest

SEGMENTS = ("first", "subject", "between", "last", "context")
EDIT, NEIGHBOUR = "edit", "neighbourhood"
TOP = 5
RESAMPLES = 1000
_PROMPT = ["case", "prompt_kind", "prompt"]

Span = tuple[int, int]
Array = npt.NDArray[np.float64]


def look(recording: Recording, params: AttentionParams, state: str, report: Reporter) -> Mapping[str, pd.DataFrame]:
    """The frame `attention` of the edit prompts and their neighbours."""
    lm = recording.lm
    rows = torch.stack([recording.last(layer, "pattern").cpu() for layer in range(lm.n_layers)])
    tables = []
    for i, (case, request) in enumerate(zip(recording.cases, recording.requests, strict=True)):
        own = rows[:, i, :, : recording.length(i)]  # (layer, head, pos)
        tables.append(_frame(lm, own, recording.spans[i], state, case, EDIT, request.prompt))
    asked = [  # 3.
        (case, prompt, subject_in(lm, request, prompt))
        for case, request in zip(recording.cases, recording.requests, strict=True)
        for prompt in request.neighbours[: params.neighbours]
    ]
    seen = last_rows(lm, list(dict.fromkeys(prompt for _, prompt, _ in asked)), report)
    tables += [_frame(lm, seen[prompt], span, state, case, NEIGHBOUR, prompt) for case, prompt, span in asked]
    return {"attention": frames.check(pd.concat(tables, ignore_index=True), "attention")}


def last_rows(lm: ModelAdapter, prompts: Sequence[str], report: Reporter) -> dict[str, Float[Tensor, "layer head pos"]]:
    """Prompt -> attention weights from its last token to its own tokens, at every layer and head."""
    sites = [Site(layer, "pattern") for layer in range(lm.n_layers)]
    found: dict[str, Tensor] = {}
    together = list(_groups(lm, prompts))
    with stage(report, "neighbours", total=len(together)) as step, torch.no_grad():
        for group in together:
            batch = lm.encode(group)
            at = torch.arange(len(group))
            with capture(lm, sites) as got:
                lm.forward(batch)
            rows = torch.stack(
                [got[site][at.to(got[site].device), :, batch.last.to(got[site].device)].float().cpu() for site in sites]
            )  # (layer, batch, head, pos)
            for i, (prompt, length) in enumerate(zip(group, batch.lengths, strict=True)):
                found[prompt] = rows[:, i, :, :length]
            step()
    return found


# 2.
def segments(length: int, span: Span | None) -> list[str]:
    """The segment of each token of a prompt; `span` is the subject's first token and the one after its last."""
    labels = ["first" if position == 0 else "between" for position in range(length)]
    for position in range(*span) if span else ():
        if position > 0 or span == (0, 1):
            labels[position] = "subject"
    labels[-1] = "last"
    return labels


# 1.
def masses(pattern: Float[Tensor, "*head pos"], labels: Sequence[str], exact: bool = True) -> Float[Tensor, "*head 5"]:
    """Mass of each of SEGMENTS, float64. What the row lacks is "context", unless it is rounding (`exact`: float32)."""
    member = torch.tensor([[label == name for name in SEGMENTS] for label in labels], dtype=torch.float64)
    mass = pattern.double() @ member
    own = mass.sum(-1, keepdim=True)
    rounding = 1 - own < (1e-5 if exact else 2e-2)
    mass = torch.where(rounding, mass / own.clamp_min(1e-12), mass)
    mass[..., SEGMENTS.index("context")] = torch.where(rounding, 0.0, 1 - own)[..., 0]
    return mass


# 3.
def subject_in(lm: ModelAdapter, request: EditRequest, prompt: str) -> Span | None:
    """The tokens of a neighbour's own subject, or None where nothing tells."""
    found = _subject_characters(request, prompt)
    if found is None or "{}" in prompt:
        return None
    start, end = found
    try:
        return tokens.subject_span(lm.tokenizer, f"{prompt[:start]}{{}}{prompt[end:]}", prompt[start:end])
    except BadInput:
        return None


def _subject_characters(request: EditRequest, prompt: str) -> Span | None:
    before, _, after = request.template.partition("{}")
    before, after = before.lstrip(" "), after.rstrip(" ")
    inside = prompt[len(before) : len(prompt) - len(after)]
    if prompt.startswith(before) and prompt.endswith(after) and inside.strip():
        return len(before), len(prompt) - len(after)
    world = facts.load()
    longest: Span | None = None
    for name in (*world.by_subject, *(alias for aliases in world.aliases.values() for alias in aliases)):
        start = prompt.find(name)
        end = start + len(name)
        if start < 0 or prompt[max(0, start - 1) : start].isalnum() or prompt[end : end + 1].isalnum():
            continue
        if longest is None or end - start > longest[1] - longest[0]:
            longest = start, end
    return longest


# 4.
def over_attention(attention: pd.DataFrame) -> pd.DataFrame:
    """The frame `over_attention` from the frame `attention` of both states: mass on the subject, after - before."""
    keys = [*_PROMPT, "layer", "head"]
    subject = attention[attention["segment"] == "subject"]
    before, after = (subject.loc[subject["state"] == state, [*keys, "mass"]] for state in ("before", "after"))
    both = before.merge(after, on=keys, suffixes=("_before", "_after"))
    both = both.rename(columns={"mass_before": "before", "mass_after": "after"})
    return frames.check(both.assign(change=both["after"] - both["before"]), "over_attention")


# 5.
def link(attention: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """The frame `attention_link` of one report: change of mass to the subject and failure, per prompt.

    Left out are neighbours whose object was not on top before, or whose subject is not known.
    """
    changes = over_attention(attention)
    changes = changes[changes["layer"] > attention["layer"].max() / 2]
    edit = changes[changes["prompt_kind"] == EDIT].sort_values("change", ascending=False)
    tops = edit.groupby("case").head(TOP)[["case", "layer", "head"]]
    mean = changes.groupby(_PROMPT, sort=False)["change"].mean()
    top = changes.merge(tops, on=["case", "layer", "head"]).groupby(_PROMPT, sort=False)["change"].mean().rename("top")
    known = pd.concat((mean, top, _failed(answers)), axis=1, join="inner").reset_index()
    return frames.check(known, "attention_link") if len(known) else frames.empty("attention_link")


def _failed(answers: pd.DataFrame) -> pd.Series[bool]:
    """(case, kind, prompt) -> whether it failed, for the prompts that say something about that."""
    on_top = answers.set_index([*_PROMPT, "state", "candidate"])["is_top"].unstack(["state", "candidate"])
    kind = on_top.index.get_level_values("prompt_kind")
    missing = pd.Series(False, index=on_top.index)
    new, was, still = (
        on_top[column].eq(True) if column in on_top else missing
        for column in (("after", "new"), ("before", "true"), ("after", "true"))
    )
    return pd.concat((~new[kind == EDIT], ~still[(kind == NEIGHBOUR) & was])).rename("failed")


# 6.
def failures(links: Sequence[pd.DataFrame], resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """The frame `attention_failures` from the frames `attention_link` of many reports.

    Statistics: "edit", "failed", "held" (mean changes of these prompts), "difference" (failed - held), "correlation".
    What can't be known (no neighbour failed, no change varies) is absent; draws where it can't don't count.
    """
    listed = [frame.assign(edit=f"{i}.") for i, frame in enumerate(links) if len(frame)]
    if not listed:
        return frames.empty("attention_failures")
    table = pd.concat(listed, ignore_index=True)
    edits = (table["edit"] + table["case"].astype(str)).factorize()[0]
    count = int(edits.max()) + 1
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    # The first row has every edit once.
    weights: Array = np.vstack((np.ones((1, count)), draws))[:, edits].astype(np.float64)
    neighbour = (table["prompt_kind"] == NEIGHBOUR).to_numpy()
    failed = table["failed"].to_numpy(bool)
    wrong: Array = failed[neighbour].astype(np.float64)
    groups = {"edit": ~neighbour, "failed": neighbour & failed, "held": neighbour & ~failed}
    sizes = {name: int(member.sum()) for name, member in groups.items()}
    sizes |= dict.fromkeys(("difference", "correlation"), sizes["failed"] + sizes["held"])
    rows: list[dict[str, object]] = []
    for measure in ("change", "top"):
        change: Array = table[measure].to_numpy(np.float64)
        found = {name: _mean(change[member], weights[:, member]) for name, member in groups.items()}
        found["difference"] = found["failed"] - found["held"]
        found["correlation"] = _correlation(change[neighbour], wrong, weights[:, neighbour])
        for statistic, values in found.items():
            if not np.isfinite(values[0]):
                continue
            low, high = np.nanpercentile(values[1:], [2.5, 97.5])
            rows.append(
                {
                    "measure": measure,
                    "statistic": statistic,
                    "value": values[0],
                    "low": low,
                    "high": high,
                    "n": sizes[statistic],
                }
            )
    return frames.from_rows(rows, "attention_failures")


def _mean(values: Array, weights: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ values) / weights.sum(1)


def _correlation(x: Array, y: Array, weights: Array) -> Array:
    """Pearson's, for every row of weights; NaN where either doesn't vary."""
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_x, mean_y = _mean(x, weights)[:, None], _mean(y, weights)[:, None]
        both = (weights * (x - mean_x) * (y - mean_y)).sum(1)
        of_x, of_y = ((weights * (v - m) ** 2).sum(1) for v, m in ((x, mean_x), (y, mean_y)))
        scale = np.sqrt(of_x * of_y)
        return np.where(scale > 1e-15, both / scale, np.nan)


def _frame(
    lm: ModelAdapter,
    rows: Float[Tensor, "layer head pos"],
    span: Span | None,
    state: str,
    case: int,
    kind: str,
    prompt: str,
) -> pd.DataFrame:
    mass = masses(once(rows), segments(rows.shape[-1], span), lm.dtype == torch.float32).numpy()
    shown = [k for k, name in enumerate(SEGMENTS) if span or name != "subject"]
    layers, heads, _ = mass.shape
    return pd.DataFrame(
        {
            "state": state,
            "case": case,
            "prompt_kind": kind,
            "prompt": prompt,
            "layer": np.repeat(np.arange(layers), heads * len(shown)),
            "head": np.tile(np.repeat(np.arange(heads), len(shown)), layers),
            "segment": np.tile([SEGMENTS[k] for k in shown], layers * heads),
            "mass": mass[:, :, shown].reshape(-1),
        }
    )


def _groups(lm: ModelAdapter, prompts: Sequence[str]) -> Iterator[list[str]]:
    """Prompts that run together, so that the patterns of all layers stay within CAPTURE_BYTES."""
    group: list[str] = []
    widest = 0
    for prompt in prompts:
        wide = max(widest, len(tokens.prompt_ids(lm.tokenizer, prompt)))
        if group and 4 * lm.n_layers * lm.n_heads * wide**2 * (len(group) + 1) > CAPTURE_BYTES:
            yield group
            group, wide = [], len(tokens.prompt_ids(lm.tokenizer, prompt))
        group.append(prompt)
        widest = wide
    if group:
        yield group
