"""A finished run on the page: verdict, answers, evidence, where in the network, receipt. Text of people and models
is escaped.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from mega_core.records import EditRequest, Report
from mega_core.summary import percent
from pages.components import readings
from pages.components.figure import About, figure, heading
from pages.components.prepared import evidence_spec, spec_of, tables_of
from pages.components.session import told
from pages.components.text import (
    KINDS,
    STATES,
    marked,
    md,
    word_diff,
)

OUTCOMES = {
    "works": ("Works", ":material/check_circle:", "green"),
    "leaks": ("Leaks", ":material/water_drop:", "orange"),
    "narrow": ("Narrow", ":material/compress:", "orange"),
    "fails": ("Fails", ":material/cancel:", "red"),
}
OUTCOME_HELP = {
    "works": "The edit prompt and at least three quarters of the paraphrases say the new object, and at least three "
    "quarters of the neighbours keep theirs.",
    "leaks": "The edit prompt says the new object, but more than a quarter of the neighbours changed too.",
    "narrow": "The edit prompt says the new object, but fewer than three quarters of its paraphrases do.",
    "fails": "The edit prompt does not say the new object.",
}
PROBABILITIES = {
    "p_new_before": ("new, before", "P(new object) in the base model"),
    "p_new_after": ("new, after", "P(new object) in the edited model"),
    "p_true_before": ("orig., before", "P(original object) in the base model"),
    "p_true_after": ("orig., after", "P(original object) in the edited model"),
}
TURNS = {
    "new": ("P(new object)", "P of the whole new object"),
    "true": ("P(original)", "P of the whole original object"),
}
"""Candidate -> what its column of the evidence is called, and its help."""

ABOUT_NEXT = About(
    "The probability of the next token after the edit prompt: the top tokens of the base and of the edited model, and "
    "the first token of both objects.",
    "One forward pass without and one with the edit; softmax over the whole vocabulary.",
    "Only the first token of each object is shown. Two objects that begin with one token share a bar; the evidence "
    "below uses the whole object.",
)
ABOUT_EVIDENCE = About(
    "For each prompt, how much more likely the new object is than the original one, before (hollow), after (filled) "
    "the edit.",
    "Margin = mean log-probability per token of the new object minus that of the original, in nats (ROME protocol, as "
    "in the verdict). Edit prompts and paraphrases hold when the margin is positive after the edit, neighbours when it "
    "is negative.",
    "The probabilities in the table are of whole objects: longer ones get lower. A margin says which of the two is "
    "preferred, not whether either is the top answer.",
)


def outcome_badge(kind: str) -> None:
    """The outcome as word, icon and colour."""
    word, icon, color = OUTCOMES.get(kind, (kind, ":material/help:", "gray"))
    st.badge(md(word), icon=icon, color=color, help=OUTCOME_HELP.get(kind))  # type: ignore[arg-type]


def answers(report: Report) -> None:
    """Metric cards, continuations side by side, and the next-token bars."""
    data = tables_of(report.digest, report)
    request = report.question.requests[0]
    _cards(report, data["evidence"])
    _continuations(request, data["generations"])
    table = data["next"]
    if table.empty:
        return
    title, sentence = readings.of_next_tokens(table)
    wide = table.pivot_table(
        index=["token", "role"], columns="state", values="prob", aggfunc="first", sort=False
    ).reset_index()
    percent_columns = {
        state: st.column_config.NumberColumn(STATES[state], format="percent") for state in ("before", "after")
    }
    figure(
        "chart_next",
        spec_of(report.digest, "next", _report=report),
        title=title,
        reading=f"{sentence} Hollow bars are the base model, filled bars the edited one. A leading dot is a space.",
        table=wide,
        file=f"next-tokens-{report.digest[:12]}",
        about=ABOUT_NEXT,
        columns=percent_columns,
    )


def _cards(report: Report, evidence: pd.DataFrame) -> None:
    edit = evidence[evidence["prompt_kind"] == "edit"]
    has_true = "p_true_after" in evidence
    # A row that wraps: four in a line on a desk, two by two on a phone.
    row = st.container(horizontal=True, gap="small")
    if not edit.empty:
        first = edit.iloc[0]
        row.metric(
            "New object",
            percent(first["p_new_after"]),
            f"before {percent(first['p_new_before'])}",
            delta_color="off",
            delta_arrow="off",
            border=True,
            help="Probability of the whole new object after the edit prompt: the product over its tokens.",
        )
        if has_true:
            row.metric(
                "Original object",
                percent(first["p_true_after"]),
                f"before {percent(first['p_true_before'])}",
                delta_color="off",
                delta_arrow="off",
                border=True,
                help="Probability of the whole original object after the edit prompt.",
            )
    rule = "new object more likely than the original" if has_true else "new object's first token is the top answer"
    for kind, label, text in (
        (
            "paraphrase",
            "Paraphrases",
            f"Paraphrase success: share of paraphrases with the {rule}, by mean log-probability "
            "per token. Never used for fitting.",
        ),
        (
            "neighbourhood",
            "Neighbours",
            "Neighbourhood success: share of prompts about other subjects where the original object is still more "
            "likely than the new one.",
        ),
    ):
        mine = evidence[evidence["prompt_kind"] == kind]
        if mine.empty:
            row.metric(label, "–", "no prompts given", delta_color="off", delta_arrow="off", border=True, help=text)
        else:
            row.metric(
                label,
                f"{int(mine['passed_after'].sum())} / {len(mine)}",
                f"before {int(mine['passed_before'].sum())} / {len(mine)}",
                delta_color="off",
                delta_arrow="off",
                border=True,
                help=text,
            )


@st.fragment
@told
def _continuations(request: EditRequest, texts: pd.DataFrame) -> None:
    if texts.empty:
        return
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.header("What the models write", anchor=False, width="content")
        show = st.toggle("Mark differing words", value=True, key="mark_words", persist_state="session")
    first = texts.iloc[0]
    base, edited = word_diff(first["before"], first["after"])
    for column, name, words, color in zip(
        st.columns(2, gap="small"), ("Base model", "Edited model"), (base, edited), ("gray", "green"), strict=True
    ):
        with column.container(border=True, height="stretch"):
            st.caption(name)
            prompt = f":gray[{md(first['prompt'])}]"
            body = marked(words, color) if show else md(" ".join(word for word, _ in words))
            st.markdown(f"{prompt} {body or ':gray[(nothing)]'}")
    if len(texts) > 1:
        others = st.expander(
            f"All {len(texts)} prompts", icon=":material/list:", key="all_texts_open", on_change="rerun"
        )
        if not others.open:
            return
        with others:
            rest = texts.assign(
                prompt_kind=texts["prompt_kind"].map(KINDS),
                changed=(texts["before"] != texts["after"]).map({True: "✎ changed", False: "same"}),
            )
            st.dataframe(
                rest[["prompt_kind", "prompt", "before", "after", "changed"]],
                hide_index=True,
                column_config={
                    "prompt_kind": "Kind",
                    "prompt": "Prompt",
                    "before": "Base model",
                    "after": "Edited model",
                    "changed": "Compared",
                },
                key="all_texts",
                alt="Continuations of every prompt by the base and the edited model",
            )


GROUPS = {"all": "All", "edit": "Edit", "paraphrase": "Paraphrase", "neighbourhood": "Neighbourhood"}


@st.fragment
@told
def evidence(report: Report) -> None:
    """Every prompt with its margin before and after, as picture and as table, by group of prompts."""
    whole = tables_of(report.digest, report)["evidence"]
    if whole.empty:
        return
    has_true = "p_true_after" in whole
    title, sentence = readings.of_evidence(whole, has_true)
    heading(title, ABOUT_EVIDENCE)
    table = _chosen_group(whole)
    if table.empty:
        st.caption(":material/check_circle: No prompt of this group fails.")
        return
    filtered = len(table) < len(whole)
    if filtered:
        sentence = f"{readings.of_evidence(table, has_true)[0]}. {sentence}"
    shown = table.assign(
        result=table["passed"].map({True: "✓ holds", False: "✗ fails"}), kind=table["prompt_kind"].map(KINDS)
    )
    config: dict[str, Any] = {
        "result": st.column_config.TextColumn("Rule", width=62),
        "kind": st.column_config.TextColumn("Kind", width=84),
        "prompt": st.column_config.TextColumn("Prompt", width=230),
    }
    for name, (label, what) in PROBABILITIES.items():
        config[name] = st.column_config.NumberColumn(label, format="percent", width=76, help=what)
    # Before and after in one cell: four columns of numbers don't fit beside the picture.
    turns = ["new", "true"] if has_true else ["new"]
    for name in turns:
        pairs = zip(shown[f"p_{name}_before"], shown[f"p_{name}_after"], strict=True)
        shown[name] = [f"{percent(before)} → {percent(after)}" for before, after in pairs]
        config[name] = st.column_config.TextColumn(
            TURNS[name][0], width=116, help=f"{TURNS[name][1]}, base → edited model"
        )
    numbers = [name for name in PROBABILITIES if name in shown]
    left, right = st.columns([2, 3], gap="medium")
    with left:
        figure(
            "chart_evidence",
            evidence_spec(table) if filtered else spec_of(report.digest, "evidence", _report=report),
            title="Margin by prompt",
            reading=f"{sentence} Hollow: base model, filled: edited model; a circle holds, a cross fails.",
            table=shown[["result", "kind", "prompt", *numbers, "margin_before", "margin_after"]],
            file=f"evidence-{report.digest[:12]}",
            columns=config,
            level=3,
        )
    with right:
        st.dataframe(
            shown[["result", "kind", "prompt", *turns]],
            hide_index=True,
            column_config=config,
            height="content" if len(shown) <= 16 else "auto",
            key="evidence_table",
            alt=f"Evidence by prompt. {sentence}",
        )
        metrics = report.frames.get("metrics")
        if metrics is None or metrics.empty:
            return
        protocols = st.expander(
            "All metrics by protocol", icon=":material/table_rows:", key="metrics_open", on_change="rerun"
        )
        if protocols.open:
            wide = metrics.pivot_table(
                index=["protocol", "metric", "n"], columns="state", values="value", aggfunc="first", sort=False
            )
            with protocols:
                st.dataframe(
                    wide.reindex(columns=["before", "after"]).reset_index(),
                    hide_index=True,
                    column_config={
                        "before": st.column_config.NumberColumn("Before", format="%.3f"),
                        "after": st.column_config.NumberColumn("After", format="%.3f"),
                    },
                    key="metrics_table",
                    alt="All metrics by protocol",
                )


def _chosen_group(whole: pd.DataFrame) -> pd.DataFrame:
    """The rows of the group that is asked for, each group with how many of its prompts hold."""
    counts = {
        kind: f"{int(rows['passed'].sum())}/{len(rows)}"
        for kind in GROUPS
        if not (rows := whole if kind == "all" else whole[whole["prompt_kind"] == kind]).empty
    }
    if st.session_state.get("evidence_group") not in counts:
        st.session_state["evidence_group"] = "all"
    group = st.pills(
        "Prompts (holding/all)",
        list(counts),
        format_func=lambda kind: f"{GROUPS[kind]} {counts[kind]}",
        key="evidence_group",
        required=True,
        persist_state="session",
    )
    failing = st.toggle("Only those that fail", key="evidence_failing", persist_state="session")
    rows = whole if group in (None, "all") else whole[whole["prompt_kind"] == group]
    return rows[~rows["passed"]] if failing else rows


def _changes(change: pd.DataFrame | None) -> None:
    """What was changed, in words and as a table: matrices, steered activations, a memory, or the prompt alone."""
    if change is None or change.empty or set(change["kind"]) == {"prompt"}:
        st.markdown(
            "No weight was changed: a text stands in front of every prompt."
            if change is not None and not change.empty
            else "No weight was changed."
        )
        return
    weights = bool((change["kind"] == "weights").any())
    if not weights:
        st.markdown("No weight was changed: activations are moved on their way, where and by how much is below.")
    st.dataframe(
        change,
        hide_index=True,
        column_config={
            "layer": "Layer",
            "site": "Tensor" if weights else "Place",
            "kind": "Kind",
            "norm": st.column_config.NumberColumn("Norm of change", format="%.3f"),
            "relative_norm": st.column_config.NumberColumn(
                "Relative",
                format="percent",
                help="against the unedited matrix, or for steering against the activation's usual norm",
            ),
            "rank": "Rank",
            "parameters": st.column_config.NumberColumn("Parameters", format="localized", help="weights it touches"),
        },
        key="change_table",
        alt="What was changed",
    )


@st.fragment
@told
def receipt(report: Report) -> None:
    """What was changed, how long it took, and the proof that the model was given back."""
    opened = st.expander(
        "Edit receipt: what was changed, and proof that it was undone", icon=":material/receipt_long:",
        key="receipt_open", on_change="rerun",
    )  # fmt: skip
    if opened.open:
        with opened:
            _receipt(report)


def _receipt(report: Report) -> None:
    proof = report.receipt
    left, right = st.columns([3, 2], gap="medium")
    with left:
        _changes(report.frames.get("weight_change"))
        stages = pd.DataFrame({"stage": list(report.timing), "seconds": list(report.timing.values())})
        st.dataframe(
            stages,
            hide_index=True,
            column_config={"stage": "Stage", "seconds": st.column_config.NumberColumn("Seconds", format="%.2f")},
            key="timing_table",
            alt="Seconds per stage",
        )
    with right:
        state = (
            ":material/verified: Restored, bit for bit"
            if proof.restored
            else ":material/warning: Not restored: the model was dropped"
        )
        st.markdown(f"**{state}**")
        st.caption("Digest of the live parameters before and after")
        st.code(f"{proof.weights_digest_before}\n{proof.weights_digest_after}", language=None, wrap_lines=True)
        st.caption(f"Hooks left on the model: {proof.hooks_left}. Seed {report.question.seed}.")
        params = ", ".join(f"{name} = {value}" for name, value in report.question.method.params)
        st.caption(f"{md(report.question.method.name)} version {report.question.method.version}: {md(params)}")
        if report.environment:
            st.caption(md(", ".join(f"{k} {v}" for k, v in report.environment.items())))
        st.caption("Run id")
        st.code(report.digest, language=None, wrap_lines=True)
