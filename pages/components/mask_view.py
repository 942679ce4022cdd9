"""A trained mask: what it cuts, what it undoes, what it costs, and what attention says under it."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from mega_core.service.masks import SIZES, Judgement, KeptMask
from pages.components import figure, mask_charts, mask_form, mask_own, progress, view_charts
from pages.components.figure import About
from pages.components.mask_charts import MASKS, SETS
from pages.components.session import owner, service, told
from pages.components.text import clip, csv_bytes

PAPER = "Holmov et al., One Mask to Rule Them All, arXiv 2605.28839"
CONTROLS = ("random", "within rows", "within columns", "largest change", "largest weight", "smallest weight",
            "active inputs")  # fmt: skip
"""Masks of exactly the same size, made without training."""
POINTS = 200
MOST_MARKS = 1500
DUMBBELLS = 25
CUT = About(
    "For every neuron (a column of the matrix) and every output (a row) the share of its weights that the mask sets to "
    "zero; sorted, the most cut first.",
    "Counted on the binary mask. The dashed rule is the share over the whole matrix: an even mask would follow it. "
    f"The mask is trained as in {PAPER}, on the binary mask itself (ours).",
    "Where the mask cuts says where edits are read, not where facts are stored.",
)
UNDONE = About(
    "Share of edits that are undone: under edit and mask the model prefers the original object again (RSR). Of edits "
    "that took; n stands in the tooltip.",
    "RSR = share of cases with log P(old) − log P(new) > 0 under (W + D) ⊙ K; whole objects, nats. Controls of the "
    "same size cut other places; “restore, not cut” puts the unedited weights back instead of zero; “each edit's own” "
    f"knows the edit and is an upper bound. {PAPER}; the controls are ours.",
    "Undoing alone flatters: cutting the whole matrix undoes most edits by breaking the model. Read it with the cost.",
)
COST = About(
    "What the unedited model loses under each mask: the share of 400 known facts whose object's first token still "
    "comes first.",
    "Recall over facts in trained words, drawn by a stable hash; perplexity of a fixed text beside it in the table.",
    "Facts of the shipped tables only; other abilities are not measured.",
)
EDITABLE = About(
    "Whether ROME still works under the mask: the share of edits whose new object's first token comes first.",
    "ROME from scratch with the mask in place, at the masked layer and at another one; what it writes at cut places is "
    "lost. A random mask of the same size beside it.",
    "Few edits are tried; each step of the bars is one of them.",
)
ATTENTION = About(
    "What attention heads say for the new object at the last position, against the unedited model: after the edit, and "
    "after edit and mask. Logits.",
    f"Head output times W_O times the unembedding of the object's first token, without the final norm; mean over the "
    f"edits of unseen facts. {PAPER} calls the rise over-attention.",
    "Direct contributions only: what a head changes through later layers is not in it.",
)


def head(kept: KeptMask) -> None:
    """What the mask is, what it does in a sentence, the button that judges it, and what it cuts."""
    found = service().masks.judgement(kept.id)
    st.header("The mask in view", anchor=False)
    mask_form.badges(kept)
    st.markdown(summary(found))
    if found is None:
        _ask(kept)
    elif found.size != "full":
        _ask_again(kept)
    _cuts(kept)
    figure.download(
        "Mask file",
        lambda: service().masks.file(kept.id),
        f"mask_{kept.id[:8]}.mask",
        "application/octet-stream",
        key="mask_file",
    )


def draw(kept: KeptMask) -> None:
    """What it does, once it is judged."""
    found = service().masks.judgement(kept.id)
    if found is None:
        mask_own.draw(kept)
        return
    if found.degenerate:
        st.warning(
            "This layer is degenerate: without the whole matrix the edits are undone and the model loses nothing, so "
            "undoing edits here shows nothing.",
            icon=":material/warning:",
        )
    _undoes(found)
    _each(found)
    mask_own.draw(kept)
    _costs(found)
    _editable(found)
    _attends(found)


def summary(found: Judgement | None) -> str:
    """One sentence on what the mask does, or that it is not known."""
    if found is None:
        return "Trained, not judged yet: what it does to edits it has never seen is not known."
    facts = _rsr(found, "trained", "held-out facts")
    relations = _rsr(found, "trained", "held-out relations")
    return (
        f"Undoes {facts:.0%} of edits of unseen facts and {relations:.0%} of edits of unseen relations; the unedited "
        f"model keeps {_recall(found, 'trained'):.1%} of its facts under it ({_recall(found, 'none'):.1%} without)."
    )


@st.fragment
@told
def _ask(kept: KeptMask) -> None:
    with st.container(border=True):
        st.header("Judge this mask", anchor=False)
        st.markdown(
            "Try it on edits it has never seen, beside controls of the same size, and measure what it costs the "
            f"model. {SIZES['quick'][0]} edits of each kind take about a minute on a quiet machine."
        )
        if _pressed("Judge this mask", "quick"):
            mask_form.start(lambda: service().masks.start_judging(kept.id, owner(), "quick"))


@st.fragment
@told
def _ask_again(kept: KeptMask) -> None:
    edits, editable = SIZES["full"]
    st.caption(
        f"Judged on {SIZES['quick'][0]} edits of each kind. On {edits} of each, with {editable} facts edited under the "
        "mask, the shares are firmer; that takes some minutes."
    )
    if _pressed("Judge on more edits", "full"):
        mask_form.start(lambda: service().masks.start_judging(kept.id, owner(), "full"))


def _pressed(label: str, size: str) -> bool:
    return st.button(
        label, type="primary" if size == "quick" else "secondary", icon=":material/gavel:", key=f"mask_judge_{size}",
        disabled=progress.live("mask") is not None,
    )  # fmt: skip


# What it cuts --------------------------------------------------------------------------------------------------------


def _cuts(kept: KeptMask) -> None:
    table = pd.concat(
        [
            _profile("neurons", kept.neurons, kept.shape[1]),
            _profile("outputs", kept.outputs, kept.shape[0]),
        ],
        ignore_index=True,
    )
    neurons = sorted(kept.neurons, reverse=True)
    tenth = max(1, len(neurons) // 10)
    top, bottom = sum(neurons[:tenth]) / tenth, sum(neurons[-tenth:]) / tenth
    left, right = st.columns(2, gap="large")
    with left:
        figure.figure(
            "mask_cut",
            mask_charts.cut_profile(table, kept.pruned),
            title="Where the mask cuts",
            reading=f"The tenth of neurons that is cut most loses {top:.0%} of its weights, the tenth that is cut "
            f"least {bottom:.0%}; an even mask would cut {kept.pruned:.0%} everywhere.",
            table=table,
            file=f"mask_{kept.id[:8]}_cut",
            about=CUT,
            columns={"part": "Of", "place": _percent("Place"), "cut": _percent("Cut")},
        )
    blocks = pd.DataFrame(
        [
            {"row": i + 1, "column": j + 1, "cut": value}
            for i, row in enumerate(kept.blocks)
            for j, value in enumerate(row)
        ]
    )
    with right:
        figure.figure(
            "mask_blocks",
            mask_charts.blocks(blocks),
            title="The mask from afar",
            reading=f"Each block is a part of the {kept.shape[0]} × {kept.shape[1]} matrix; in the fullest "
            f"{blocks['cut'].max():.0%} is cut, in the emptiest {blocks['cut'].min():.0%}.",
            table=blocks,
            file=f"mask_{kept.id[:8]}_blocks",
            about=CUT,
            columns={"row": "Outputs", "column": "Neurons", "cut": _percent("Cut")},
        )


def _profile(part: str, values: tuple[float, ...], count: int) -> pd.DataFrame:
    """Sorted shares at up to POINTS places from 0 to 1."""
    ordered = sorted(values, reverse=True)
    at = sorted({round(i * (count - 1) / (POINTS - 1)) for i in range(POINTS)})
    return pd.DataFrame({"part": part, "place": [i / max(1, count - 1) for i in at], "cut": [ordered[i] for i in at]})


# What it undoes ------------------------------------------------------------------------------------------------------


def _undoes(found: Judgement) -> None:
    rows = found.reversal[found.reversal["kind"] == "edit"].copy()
    rows["label"] = rows["mask"].map(lambda name: MASKS.get(name, name))
    rows["set_name"] = rows["set"].map(SETS)
    rows = rows[rows["cases"] > 0].sort_values("mask", key=lambda names: names.map(list(MASKS).index), kind="stable")
    facts = rows[rows["set"] == "held-out facts"].set_index("mask")["rsr"]
    controls = facts[facts.index.isin(CONTROLS)]
    reading = f"The trained mask undoes {facts.get('trained', float('nan')):.0%} of edits of unseen facts"
    if len(controls):
        best = str(controls.idxmax())
        reading += f"; the best control of the same size, {MASKS[best]}, undoes {controls[best]:.0%}"
    figure.figure(
        "mask_undoes",
        mask_charts.reversal(rows),
        title="Which edits it undoes",
        reading=f"{reading}.",
        table=rows[["label", "set_name", "cases", "took", "rsr", "rsm", "top1", "top5", "top10", "top100"]],
        file=f"mask_{found.id[:8]}_reversal",
        about=UNDONE,
        columns={
            "label": "Mask", "set_name": "Edits", "cases": "n", "took": _percent("Took"), "rsr": _percent("Undone"),
            "rsm": st.column_config.NumberColumn("Margin, nats", format="%.2f"),
            "top1": _percent("Same first token"), "top5": _percent("Top 5 shared"),
            "top10": _percent("Top 10 shared"), "top100": _percent("Top 100 shared"),
        },
    )  # fmt: skip


@st.fragment
@told
def _each(found: Judgement) -> None:
    figure.heading("Edit by edit")
    sets = {name: label for name, label in SETS.items() if name in set(found.edits["set"])}
    chosen = st.segmented_control(
        "Edits",
        list(sets),
        format_func=lambda name: sets[name].capitalize(),
        default="held-out facts" if "held-out facts" in sets else next(iter(sets)),
        required=True,
        key="mask_each",
    )
    rows = found.edits[found.edits["set"] == chosen].copy()
    counted = rows[rows["took"]]
    st.caption(
        f"{int(counted['reversed'].sum())} of {len(counted)} edits that took are undone. Margin: log P(old) − "
        "log P(new) in nats. Undone means above zero: the original object is preferred to the new one, though the "
        "model may say a third."
    )
    mask_own.table(rows, "mask_each_table", f"Every edit of the set {sets[chosen]} with what the model says")
    figure.download("CSV", lambda: csv_bytes(rows), f"mask_{found.id[:8]}_edits.csv", "text/csv", key="mask_each_csv")
    if counted.empty:
        return
    drawn = counted.nsmallest(DUMBBELLS, "margin_masked").reset_index(drop=True)
    drawn["label"] = [
        f"{i + 1}. {clip(subject, 16)} → {clip(new, 10)}"
        for i, (subject, new) in enumerate(zip(drawn["subject"], drawn["new"], strict=True))
    ]
    drawn["result"] = ["✓ undone" if back else "✗ still edited" for back in drawn["reversed"]]
    figure.figure(
        "mask_margins",
        mask_charts.margins(drawn),
        title="How far each edit is moved back",
        reading=f"{_which(len(drawn), len(counted))} are moved by "
        f"{(drawn['margin_masked'] - drawn['margin_edited']).mean():+.1f} nats on average; "
        f"{int(drawn['reversed'].sum())} end right of zero.",
        table=drawn[["label", "prompt", "margin_original", "margin_edited", "margin_masked", "result"]],
        file=f"mask_{found.id[:8]}_margins",
        about=UNDONE,
        level=3,
    )


def _which(drawn: int, there: int) -> str:
    return f"All {drawn} edits that took" if drawn == there else f"The {drawn} of {there} edits that come back least"


# What it costs -------------------------------------------------------------------------------------------------------


def _costs(found: Judgement) -> None:
    rows = found.collateral.copy()
    rows["label"] = rows["mask"].map(lambda name: MASKS.get(name, name))
    order = ["none", "trained", *CONTROLS, "K = 0"]
    rows = rows[rows["mask"].isin(order)].sort_values("mask", key=lambda names: names.map(order.index))
    rows["value"] = rows["recall"].astype(float)
    rows["told"] = [f"{value:.0%}" for value in rows["value"]]
    language = {name: value for name, value in found.perplexity.items() if value is not None}
    said = rows.set_index("mask")["perplexity"]
    reading = (
        f"Under the trained mask the unedited model still knows {_recall(found, 'trained'):.1%} of the facts "
        f"({_recall(found, 'none'):.1%} without a mask); perplexity {said['trained']:.3g} against {said['none']:.3g}."
    )
    if {"edited", "masked"} <= set(language):
        reading += f" With an edit it is {language['edited']:.3g}, with edit and mask {language['masked']:.3g}."
    figure.figure(
        "mask_costs",
        mask_charts.shares(rows, "Known facts recalled", marked=MASKS["trained"]),
        title="What it costs the model",
        reading=reading,
        table=rows[["label", "pruned", "recall", "perplexity"]],
        file=f"mask_{found.id[:8]}_cost",
        about=COST,
        columns={
            "label": "Mask", "pruned": _percent("Cut"), "recall": _percent("Recall"),
            "perplexity": st.column_config.NumberColumn("Perplexity", format="%.3f"),
        },
    )  # fmt: skip


def _editable(found: Judgement) -> None:
    if found.editability.empty:
        return
    rows = found.editability.assign(
        label=found.editability["where"], value=found.editability["accuracy"].astype(float)
    ).reset_index(drop=True)
    n = int(rows["n"].iloc[0])
    rows["told"] = [f"{value:.0%}" for value in rows["value"]]
    under = next((label for label in rows["label"] if label.startswith("masked, ")), "")
    value = dict(zip(rows["label"], rows["value"], strict=True))
    free = next((label for label in rows["label"] if label.startswith("free, ")), "")
    reading = (
        f"At the masked layer ROME works on {value[under]:.0%} of {n} facts under the mask, {value[free]:.0%} without."
        if under and free
        else ""
    )
    figure.figure(
        "mask_editable",
        mask_charts.shares(rows, "New object comes first", marked=under),
        title="Can the model still be edited",
        reading=reading,
        table=rows[["where", "n", "accuracy", "paraphrase"]],
        file=f"mask_{found.id[:8]}_editability",
        about=EDITABLE,
        columns={"where": "Where", "accuracy": _percent("Edit prompt"), "paraphrase": _percent("Paraphrases")},
    )


# What attention says -------------------------------------------------------------------------------------------------


def _attends(found: Judgement) -> None:
    figure.heading("Over-attention", ATTENTION)
    heads = found.heads[found.heads["candidate"] == "new"]
    wide = heads.pivot_table(index=["layer", "head"], columns="state", values="mean", aggfunc="first")
    if {"original", "edited", "masked"} <= set(wide.columns) and 0 < len(wide) <= MOST_MARKS:
        change = wide.sub(wide["original"], axis=0)
        limit = float(change[["edited", "masked"]].abs().max().max()) or 1.0
        top = change["edited"].idxmax()
        titles = {"edited": "After the edit", "masked": "After edit and mask"}
        for state, place in zip(titles, st.columns(2, gap="large"), strict=True):
            table = change[state].rename("contribution").reset_index()
            most = table.loc[table["contribution"].idxmax()]
            with place:
                figure.figure(
                    f"mask_heads_{state}",
                    view_charts.head_map(table, "contribution", "logits", limit=limit),
                    title=titles[state],
                    reading=f"Head {int(most['head'])} of layer {int(most['layer'])} says the new object most, "
                    f"{most['contribution']:+.1f} logits against the unedited model; all heads together "
                    f"{table['contribution'].sum():+.1f}.",
                    table=table,
                    file=f"mask_{found.id[:8]}_heads_{state}",
                    columns={"layer": "Layer", "head": "Head", "contribution": "Change, logits"},
                    level=3,
                )
        st.markdown(
            f"The head that an edit raises most is head {top[1]} of layer {top[0]}: {change['edited'][top]:+.1f} "
            f"logits after the edit, {change['masked'][top]:+.1f} with the mask."
        )
    states = {"original": "Unedited", "edited": "Edited", "masked": "Edited, masked"}
    rows = found.modules[(found.modules["module"] == "attn") & (found.modules["candidate"] == "new")].copy()
    rows["state_name"] = rows["state"].map(states)
    total = rows.groupby("state")["mean"].sum()
    figure.figure(
        "mask_attention",
        mask_charts.over_attention(rows),
        title="Attention by layer",
        reading=f"Summed over layers attention says {total.get('original', 0.0):.0f} logits for the new object in the "
        f"unedited model, {total.get('edited', 0.0):.0f} in the edited one, {total.get('masked', 0.0):.0f} under the "
        "mask.",
        table=found.modules,
        file=f"mask_{found.id[:8]}_attention",
        about=ATTENTION,
        level=3,
    )


def _rsr(found: Judgement, mask: str, set_: str) -> float:
    rows = found.reversal
    hit = rows[(rows["mask"] == mask) & (rows["set"] == set_) & (rows["kind"] == "edit")]["rsr"]
    return float(hit.iloc[0]) if len(hit) else float("nan")


def _recall(found: Judgement, mask: str) -> float:
    hit = found.collateral[found.collateral["mask"] == mask]["recall"]
    return float(hit.iloc[0]) if len(hit) else float("nan")


def _percent(label: str) -> object:
    return st.column_config.NumberColumn(label, format="percent")
