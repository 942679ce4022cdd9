"""A finished run on the page: verdict, answers, evidence, where in the network, receipt. Text of people and models
is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from mega_core.evaluation.text import reading, verdict
from mega_core.records import EditRequest, Report
from mega_core.summary import outcome, percent
from pages.components import charts, readings, tables
from pages.components.session import told
from pages.components.text import (
    KINDS,
    MODULES,
    STATES,
    cell_name,
    clip,
    csv_bytes,
    marked,
    md,
    seconds,
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
TABLE_TITLES = {
    "answers": "Answers by prompt",
    "next_tokens": "Next tokens",
    "metrics": "Metrics",
    "module_scores": "Contributions by layer and module",
    "module_totals": "Totals",
    "weight_change": "Weight changes",
    "generations": "Continuations",
    "tokens": "Tokens",
}


def outcome_badge(kind: str) -> None:
    """The outcome as word, icon and colour."""
    word, icon, color = OUTCOMES.get(kind, (kind, ":material/help:", "gray"))
    st.badge(md(word), icon=icon, color=color, help=OUTCOME_HELP.get(kind))  # type: ignore[arg-type]


@st.cache_data(max_entries=32, show_spinner=False)
def _prepared(digest: str, _report: Report) -> dict[str, pd.DataFrame]:
    """Every table the pictures draw, keyed by the run."""
    return {
        "cells": tables.module_cells(_report),
        "sums": tables.sum_check(_report),
        "edited": tables.edited_places(_report),
        "next": tables.next_tokens(_report),
        "evidence": tables.evidence(_report),
        "generations": tables.generations(_report),
    }


def headline(report: Report, *, share_base: str) -> None:
    """What happened, in words, with the run's identity and its downloads."""
    request = report.question.requests[0]
    with st.container(border=True, gap="small"):
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            outcome_badge(outcome(report).kind)
            restored = report.receipt.restored and report.receipt.hooks_left == 0
            st.badge(
                "model restored" if restored else "model was replaced",
                icon=":material/verified:" if restored else ":material/warning:",
                color="gray" if restored else "orange",
                help="The weights were compared by digest after the run.",
            )
            st.badge(md(report.question.method.name.upper()), color="gray")
            st.badge(md(report.question.model.name), color="gray")
            st.badge(md(seconds(sum(report.timing.values()))), icon=":material/timer:", color="gray")
            st.badge(
                f"run {report.digest[:8]}",
                icon=":material/tag:",
                color="gray",
                help="The first characters of the run id.",
            )
            st.space("stretch")
            _exports(report, share_base)
        st.header(md(verdict(report)), anchor=False)
        original = f", :gray[was {md(request.target_true)}]" if request.target_true else ""
        st.markdown(f"{md(request.prompt)} **{md(request.target_new)}**{original}")
        for note in report.notes:
            st.caption(f":material/info: {md(note)}")


def _exports(report: Report, share_base: str) -> None:
    with st.popover("Export", icon=":material/download:", width="content"):
        short = report.digest[:12]
        st.caption("Link to this run. Opening it never starts work.")
        st.code(f"{share_base}?run={report.digest}", language=None, wrap_lines=True)
        st.download_button(
            "run.json: everything",
            data=lambda: json.dumps(report.to_json(), ensure_ascii=False, indent=1),
            file_name=f"run-{short}.json",
            mime="application/json",
            icon=":material/data_object:",
            on_click="ignore",
            width="stretch",
            key="export_json",
        )
        st.caption("Tables as CSV")
        for name, frame in report.frames.items():
            if not frame.empty:
                _csv_button(TABLE_TITLES.get(name, name), frame, f"{name}-{short}", key=f"export_{name}")


def _csv_button(label: str, frame: pd.DataFrame, name: str, *, key: str) -> None:
    def data() -> bytes:
        return csv_bytes(frame)

    st.download_button(
        label,
        data=data,
        file_name=f"{name}.csv",
        mime="text/csv",
        icon=":material/table:",
        on_click="ignore",
        key=key,
        width="stretch",
    )


def _about(what: str, how: str, limits: str) -> None:
    with st.popover("", icon=":material/info:", type="tertiary", help="What this shows"):
        st.markdown(f"**What it shows.** {what}\n\n**How it is computed.** {how}\n\n**Limits.** {limits}")


def _heading(title: str, about: tuple[str, str, str], *, level: int = 2) -> None:
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
        (st.header if level == 2 else st.subheader)(md(title), anchor=False, width="content")
        _about(*about)


def _twin(label: str, frame: pd.DataFrame, name: str, key: str, config: Mapping[str, Any] | None = None) -> None:
    """The same numbers as a table, for keyboards, screen readers and spreadsheets."""
    with st.expander(label, icon=":material/table_rows:"):
        st.dataframe(frame, hide_index=True, column_config=config, key=f"{key}_table", alt=label)
        _csv_button("Download CSV", frame, name, key=f"{key}_csv")


@st.cache_data(max_entries=256, show_spinner=False)
def _spec(
    digest: str, picture: str, candidate: str = "", place: tuple[int, str] | None = None, *, _report: Report
) -> dict[str, Any]:
    """The specification of one picture of a run. Kept, and not checked again: building one takes longer than drawing
    it.
    """
    data = _prepared(digest, _report)
    cells, edited = data["cells"], data["edited"]
    chart: alt.LayerChart
    if picture == "next":
        chart = charts.next_token_bars(data["next"])
    elif picture == "evidence":
        chart = charts.margin_dumbbell(data["evidence"], axis_title=_margin_words(data["evidence"]))
    elif picture == "profile":
        chart = charts.layer_profile(cells, edited, candidate=candidate)
    else:
        limit = tables.shared_limit(cells)
        chart = charts.module_map(cells, edited, candidate=candidate, limit=limit, selected=place)
    return chart.to_dict(validate=False)


def _margin_words(evidence: pd.DataFrame) -> str:
    return "new − original, nats per token" if "p_true_after" in evidence else "new, nats per token"


def _draw(spec: dict[str, Any], key: str, description: str) -> None:
    st.vega_lite_chart(spec=spec, width="stretch", key=key, alt=description)


def answers(report: Report) -> None:
    """Metric cards, continuations side by side, and the next-token bars."""
    data = _prepared(report.digest, report)
    request = report.question.requests[0]
    _cards(report, data["evidence"])
    _continuations(request, data["generations"])
    table = data["next"]
    if table.empty:
        return
    title, sentence = readings.of_next_tokens(table)
    _heading(
        title,
        (
            "The probability of the next token after the edit prompt: the top tokens of the base and of the edited "
            "model, and the first "
            "token of both objects.",
            "One forward pass without and one with the edit; softmax over the whole vocabulary.",
            "Only the first token of each object is shown. Two objects that begin with the same token share a bar; "
            "the evidence below uses "
            "the whole object.",
        ),
    )
    _draw(_spec(report.digest, "next", _report=report), "chart_next", f"Bar chart. {sentence}")
    st.caption(f"{md(sentence)} Hollow bars are the base model, filled bars the edited one. A leading dot is a space.")
    wide = table.pivot_table(
        index=["token", "role"], columns="state", values="prob", aggfunc="first", sort=False
    ).reset_index()
    percent_columns = {
        state: st.column_config.NumberColumn(STATES[state], format="percent") for state in ("before", "after")
    }
    _twin("Next tokens as a table", wide, f"next-tokens-{report.digest[:12]}", "next", percent_columns)


def _cards(report: Report, evidence: pd.DataFrame) -> None:
    edit = evidence[evidence["prompt_kind"] == "edit"]
    has_true = "p_true_after" in evidence
    # A row that wraps: four in a line on a desk, two by two on a phone.
    row = st.container(horizontal=True, gap="small")
    columns = [row.container(width="stretch") for _ in range(4)]
    if not edit.empty:
        first = edit.iloc[0]
        columns[0].metric(
            "New object",
            percent(first["p_new_after"]),
            f"before {percent(first['p_new_before'])}",
            delta_color="off",
            delta_arrow="off",
            border=True,
            help="Probability of the whole new object after the edit prompt: the product over its tokens.",
        )
        if has_true:
            columns[1].metric(
                "Original object",
                percent(first["p_true_after"]),
                f"before {percent(first['p_true_before'])}",
                delta_color="off",
                delta_arrow="off",
                border=True,
                help="Probability of the whole original object after the edit prompt.",
            )
    rule = "new object more likely than the original" if has_true else "new object's first token is the top answer"
    for column, kind, label, text in (
        (
            columns[2],
            "paraphrase",
            "Paraphrases say it",
            f"Paraphrase success: share of paraphrases with the {rule}, by mean log-probability "
            "per token. Never used for fitting.",
        ),
        (
            columns[3],
            "neighbourhood",
            "Neighbours kept",
            "Neighbourhood success: share of prompts about other subjects where the original object is still more "
            "likely than the new one.",
        ),
    ):
        mine = evidence[evidence["prompt_kind"] == kind]
        if mine.empty:
            column.metric(label, "–", "no prompts given", delta_color="off", delta_arrow="off", border=True, help=text)
        else:
            column.metric(
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
        rest = texts.assign(
            prompt_kind=texts["prompt_kind"].map(KINDS),
            changed=(texts["before"] != texts["after"]).map({True: "✎ changed", False: "same"}),
        )
        with st.expander(f"All {len(texts)} prompts", icon=":material/list:"):
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


def evidence(report: Report) -> None:
    """Every prompt with its margin before and after, as picture and as table."""
    table = _prepared(report.digest, report)["evidence"]
    if table.empty:
        return
    has_true = "p_true_after" in table
    title, sentence = readings.of_evidence(table, has_true)
    _heading(
        title,
        (
            "For each prompt, how much more likely the new object is than the original one, before (hollow) and after "
            "(filled) the edit.",
            "Margin = mean log-probability per token of the new object minus that of the original, in nats (ROME's "
            "protocol, as in the verdict). Edit prompts and paraphrases hold when the margin "
            "is positive after the edit, neighbours when it is negative.",
            "The probabilities in the table are of whole objects: longer ones get lower. "
            "A margin says which of the two is preferred, not whether either "
            "is the top answer.",
        ),
    )
    left, right = st.columns([2, 3], gap="medium")
    with left:
        _draw(
            _spec(report.digest, "evidence", _report=report), "chart_evidence", f"Dumbbell chart of margins. {sentence}"
        )
        st.caption(f"{md(sentence)} Hollow: base model, filled: edited model.")
    shown = table.assign(
        result=table["passed"].map({True: "✓ holds", False: "✗ fails"}), kind=table["prompt_kind"].map(KINDS)
    )
    columns = ["result", "kind", "prompt", "p_new_before", "p_new_after"]
    if has_true:
        columns += ["p_true_before", "p_true_after"]
    config: dict[str, Any] = {
        "result": st.column_config.TextColumn("Rule", width=62),
        "kind": st.column_config.TextColumn("Kind", width=84),
        "prompt": st.column_config.TextColumn("Prompt", width=270),
        "p_new_before": st.column_config.NumberColumn(
            "new, before", format="percent", width=76, help="P(new object) in the base model"
        ),
        "p_new_after": st.column_config.NumberColumn(
            "new, after", format="percent", width=76, help="P(new object) in the edited model"
        ),
        "p_true_before": st.column_config.NumberColumn(
            "orig., before", format="percent", width=76, help="P(original object) in the base model"
        ),
        "p_true_after": st.column_config.NumberColumn(
            "orig., after", format="percent", width=76, help="P(original object) in the edited model"
        ),
    }
    with right:
        st.dataframe(
            shown[columns],
            hide_index=True,
            column_config=config,
            height="content" if len(shown) <= 16 else "auto",
            key="evidence_table",
            alt=f"Evidence by prompt. {sentence}",
        )
        _csv_button(
            "Download CSV",
            shown[[*columns, "margin_before", "margin_after"]],
            f"evidence-{report.digest[:12]}",
            key="evidence_csv",
        )
        metrics = report.frames.get("metrics")
        if metrics is not None and not metrics.empty:
            wide = metrics.pivot_table(
                index=["protocol", "metric", "n"], columns="state", values="value", aggfunc="first", sort=False
            )
            _twin(
                "All metrics by protocol",
                wide.reindex(columns=["before", "after"]).reset_index(),
                f"metrics-{report.digest[:12]}",
                "metrics",
                {
                    "before": st.column_config.NumberColumn("Before", format="%.3f"),
                    "after": st.column_config.NumberColumn("After", format="%.3f"),
                },
            )


def _clicked(chart_key: str, pick_key: str, places: list[tuple[int, str]]) -> Callable[[], None]:
    def on_click() -> None:
        event = st.session_state.get(chart_key) or {}
        points = event["selection"].get(charts.CELL, []) if "selection" in event else []
        if points:
            place = (points[0].get("layer"), points[0].get("module"))
            if place in places:  # the browser's word is only an index into our own list
                st.session_state[pick_key] = place

    return on_click


def _candidate_label(candidate: str, request: EditRequest) -> str:
    """Short, and never the same for two candidates: the browser sends the label back."""
    if candidate == "difference":
        return "difference"
    word = "new" if candidate == "new" else "original"
    return f"{md(clip(readings.explained(candidate, request), 20))} ({word})"


@st.fragment
@told
def anatomy(report: Report) -> None:
    """Layer x module map with a detail panel, and the layer profile with the sum check."""
    data = _prepared(report.digest, report)
    cells, edited = data["cells"], data["edited"]
    request = report.question.requests[0]
    if cells.empty:
        return
    present = [c for c in tables.CANDIDATES if c in set(cells["candidate"])]
    st.header("Where in the network", anchor=False)
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        candidate = st.segmented_control(
            "Explain",
            present,
            default=present[-1],
            format_func=lambda c: _candidate_label(c, request),
            key="anatomy_candidate",
            required=True,
            persist_state="session",
        )
        candidate = candidate if candidate in present else present[-1]
        places = [
            (int(layer), str(m))
            for layer, m in cells[["layer", "module"]].drop_duplicates().sort_values(["layer", "module"]).to_numpy()
        ]
        pick_key = f"anatomy_cell_{report.digest[:8]}"
        if st.session_state.get(pick_key) not in places:
            change = cells[(cells["candidate"] == candidate) & (cells["state"] == "change")]
            best = change.loc[change["place"].idxmin()] if not change.empty else cells.iloc[0]
            st.session_state[pick_key] = (int(best["layer"]), str(best["module"]))
        place = st.selectbox(
            "Place",
            places,
            format_func=lambda p: cell_name(*p),
            key=pick_key,
            help="The same as clicking a cell.",
            width=220,
        )
    title, sentence = readings.of_module_map(cells, candidate, request)
    if candidate == "new":
        sentence = reading(report.frames["module_scores"], request.target_new)
    left, right = st.columns([2, 1], gap="medium")
    with left:
        _heading(
            title,
            (
                "How much each layer's attention and MLP module raises (blue) or lowers (orange) the log-probability "
                "of the object at the end of "
                "the edit prompt, in the base model, in the edited model, and the change. All pictures of a run share "
                "one colour scale.",
                "The residual stream is read through the final norm and the unembedding before and after each "
                "module's output joins it; the "
                "difference in log-probability is the module's contribution, in nats.",
                "Attribution is not causation. Reading middle layers through the unembedding is approximate, and only "
                "the object's first token "
                "is explained.",
            ),
            level=3,
        )
        chart_key = f"chart_map_{report.digest[:8]}"
        st.vega_lite_chart(
            spec=_spec(report.digest, "map", candidate, place, _report=report),
            width="stretch",
            key=chart_key,
            on_select=_clicked(chart_key, pick_key, places),
            selection_mode=charts.CELL,
            alt=f"Heat-map of layers and modules. {sentence} The list named Place selects a cell by keyboard.",
        )
        triangle = "Triangles mark edited layers. " if not edited.empty else ""
        st.caption(f"{md(sentence)} {triangle}Click a cell for its numbers.")
    with right:
        _detail(cells, place, candidate, request)
    title, sentence = readings.of_profile(cells, candidate, request)
    left, right = st.columns([2, 1], gap="medium")
    with left:
        st.subheader(md(title), anchor=False)
        _draw(
            _spec(report.digest, "profile", candidate, _report=report),
            "chart_profile",
            f"Line chart by layer. {sentence}",
        )
        st.caption(
            f"{md(sentence)} Dashed and hollow: base model, solid and filled: edited model."
            f"{_tinted(data['edited']['layer'].nunique())}"
        )
    with right:
        st.subheader("Do the parts add up?", anchor=False)
        st.caption(md(readings.of_sums(data["sums"], candidate)))
        check = data["sums"]
        st.dataframe(
            check.assign(
                candidate=check["candidate"].map({"new": request.target_new, "true": request.target_true or "original"})
            )[["candidate", "state", "start", "modules", "end", "residual"]],
            hide_index=True,
            column_config={
                "candidate": "Object",
                "state": "State",
                "start": st.column_config.NumberColumn(
                    "Input", format="%.2f", help="log-probability read at the input of the first block"
                ),
                "modules": st.column_config.NumberColumn("Modules", format="%+.2f", help="sum of all contributions"),
                "end": st.column_config.NumberColumn("Output", format="%.2f", help="log-probability of the model"),
                "residual": st.column_config.NumberColumn("Left over", format="%.3f"),
            },
            key="sum_table",
            alt="Sum check of contributions",
        )
    twin = cells[cells["candidate"] == candidate].assign(
        module=lambda t: t["module"].map(MODULES), state=lambda t: t["state"].map(STATES)
    )
    wide = twin.pivot_table(
        index=["layer", "module"], columns="state", values="value", aggfunc="first", sort=False
    ).reset_index()
    number = {name: st.column_config.NumberColumn(name, format="%+.3f") for name in STATES.values()}
    _twin("Contributions as a table", wide, f"contributions-{candidate}-{report.digest[:12]}", "cells", number)


def _detail(cells: pd.DataFrame, place: tuple[int, str], candidate: str, request: EditRequest) -> None:
    layer, module = place
    with st.container(border=True):
        st.subheader(cell_name(layer, module), anchor=False)
        st.markdown(md(readings.of_cell(cells, layer, module, candidate, request)))
        mine = cells[(cells["layer"] == layer) & (cells["module"] == module)].copy()
        mine["object"] = [
            readings.explained(c, request) if c != "difference" else "difference" for c in mine["candidate"]
        ]
        wide = mine.pivot_table(index="object", columns="state", values="value", aggfunc="first", sort=False)
        extra = mine[mine["state"] == "change"].set_index("object")[["share", "place"]]
        shown = wide.reindex(columns=[s for s in tables.STATES if s in wide]).join(extra).reset_index()
        st.dataframe(
            shown,
            hide_index=True,
            column_config={
                "object": st.column_config.TextColumn("Object", width=108),
                **{s: st.column_config.NumberColumn(STATES[s], format="%+.2f") for s in tables.STATES},
                "share": st.column_config.NumberColumn(
                    "Share", format="percent", help="of the sum of all absolute changes"
                ),
                "place": st.column_config.NumberColumn("Rank", help="by absolute change"),
            },
            key="detail_table",
            alt=f"Contributions of {cell_name(layer, module)}",
        )


def _tinted(layers: int) -> str:
    """What the tint of the profile means; nothing where no layer was touched."""
    if not layers:
        return ""
    return " The tinted layer is where the edit acts." if layers == 1 else " The edit acts in the tinted layers."


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


def receipt(report: Report) -> None:
    """What was changed, how long it took, and the proof that the model was given back."""
    proof = report.receipt
    with st.expander("Edit receipt: what was changed, and proof that it was undone", icon=":material/receipt_long:"):
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
