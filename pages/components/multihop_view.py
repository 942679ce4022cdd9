"""What became of a chain: its steps before and after, where it breaks, methods side by side, neurons of its path."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from mega_core.service.chains import PLACES, Said, Traced, Went
from pages.components import multihop_charts
from pages.components.contrast_view import teaching
from pages.components.figure import About, figure, heading
from pages.components.session import service, told
from pages.components.text import md, seconds, signed

ABOUT_STEPS = About(
    "Whether each step of the chain and each wording of the whole question is answered: by the unedited model as it "
    "was before the edit, and after the edit by each method as it should be then.",
    "A step counts when every token of one of its answer's names is the most likely one after its prompt; a whole "
    "question when the first line of the greedy text gives the answer (MQuAKE, arXiv 2305.14795; see docs/metrics).",
    "One chain says little about a method: the benchmark page asks many.",
)
ABOUT_VALUES = About(
    "The 30 MLP neurons that promote the object most at the last token, added up by layer, before and after the edit.",
    "Imp(neuron) = log p(object | stream + neuron) − log p(object | stream), in nats (Yu and Ananiadou, arXiv "
    "2312.12141).",
    "Neurons overlap, so sums are no contributions of layers. A method that works outside MLPs shows little here.",
)
ABOUT_QUERIES = About(
    "What switches these value neurons on: how much of their input each layer's attention and MLP wrote, weighted by "
    "their scores.",
    "score(module) = sum over value neurons of (what the module wrote · key / stream · key) × Imp; shares of a neuron "
    "add up to 1. The embedding's share is in the table (layer −1).",
    "It follows the stream, not causes; a share below zero holds the neuron back.",
)
PLACE_NAMES = {"edit": "Edited fact's prompt", "question": "Whole question"}
ACE_WORDS = (
    "**What ACE does differently.** Most editors change what the network says about the edited subject, at the layers "
    "where the fact is looked up. In a question through several facts the first answer is never said: it only has to "
    "*switch on* what a later MLP says. ACE calls the MLPs whose output promotes the answer *value* layers, and those "
    "below that switch them on *query* layers; it finds both by attribution and writes the new fact into both groups. "
    "Where an editor answers the edited step but not the whole question, its query side is what is missing."
)


def titles(model: str) -> dict[str, str]:
    """Method -> title; the unedited model goes by no method."""
    return {"": "Unedited", **{info.name: info.title for info in service().methods(model)}}


def draw(found: Traced) -> None:
    """Everything about one chain."""
    request, names = found.request, titles(found.model)
    with st.container(border=True, gap="small"):
        with st.container(horizontal=True, gap="small"):
            st.badge(f"{len(found.chain.new_hops)} steps", icon=":material/route:")
            st.badge(md(found.model), color="gray")
            st.badge(f"chain {found.id[:8]}", icon=":material/tag:", color="gray")
        st.markdown(f"Edit: {md(request.prompt)} :gray[~~{md(request.target_true)}~~] **{md(request.target_new)}**")
        st.markdown(
            f"Question: {md(found.chain.questions[0])} :gray[~~{md(found.chain.answers[0])}~~] "
            f"**{md(found.chain.new_answers[0])}**"
        )
    st.markdown(before_words(found))
    for went in found.after:
        st.markdown(f"**{md(names.get(went.method, went.method))}**: {after_words(found, went)}")
    if teaching(found.model):
        st.caption(
            ":material/school: A small teaching model, and one chain: small models often fail compositions that they "
            "were not trained on, edited or not."
        )
    _steps(found, names)
    _table(found, names)
    _path(found, names)
    st.markdown(ACE_WORDS)
    for went in found.after:
        if went.method == "ace":
            for note in went.notes:
                st.caption(f":material/info: {md(note)}")


def before_words(found: Traced) -> str:
    """What the unedited model knew, so that nobody blames an edit for what was missing before."""
    went = found.before
    right = sum(one.right for one in went.questions)
    text = (
        f"Before any edit the model recalls {went.recalled} of {len(went.hops)} steps and gives the old answer to "
        f"{right} of {len(went.questions)} wordings of the whole question."
    )
    if not went.answered:
        text += " So it cannot put these facts together even unedited: an edit can hardly make it."
    missing = [i + 1 for i, knew in enumerate(found.knew) if not knew and i != found.edited]
    if missing:
        steps = ", ".join(map(str, missing))
        text += f" Of the chain after the edit it does not know step {steps}, which no edit here teaches."
    return text


def after_words(found: Traced, went: Went) -> str:
    """Where the chain breaks with one method."""
    if went.refused:
        return f"made no edit: {md(went.refused)}"
    right, old = sum(one.right for one in went.questions), sum(went.old)
    of = f"{right} of {len(went.questions)} wordings"
    if went.broke_at == "":
        text = f"✓ the chain holds: every step is recalled, the whole question is answered in {of}."
    elif went.broke_at == "composition":
        said = md(went.questions[0].said or "nothing")
        text = (
            f"✗ breaks at the composition: every step is right, putting them together isn't. Asked as a whole it says "
            f"“{said}”, not “{md(found.chain.new_answers[0])}”."
        )
    else:
        at = int(went.broke_at.split()[-1]) - 1
        hop = went.hops[at]
        why = "the edit itself did not take" if at == found.edited else "this step is not the edited one"
        knew = "" if at == found.edited else (
            "; the unedited model knew it" if found.knew[at] else "; the unedited model did not know it either"
        )  # fmt: skip
        text = (
            f"✗ breaks at step {at + 1}: “{md(hop.prompt)}” gives “{md(hop.said or 'nothing')}”, not "
            f"“{md(hop.expected)}” ({why}{knew}). The whole question is answered in {of}."
        )
    if old:
        text += f" The old answer is still given in {old} of {len(went.old)}."
    return text


@st.fragment
@told
def _steps(found: Traced, names: dict[str, str]) -> None:
    heading("The chain, step by step")
    went = _method(found, names, "multihop_steps_method")
    if went is None:
        return
    title = names.get(went.method, went.method)
    columns = st.columns(len(went.hops) + 1, gap="small")
    for number, (column, old, new) in enumerate(zip(columns, found.before.hops, went.hops, strict=False)):
        with column, st.container(border=True, gap="small"):
            with st.container(horizontal=True, gap="small"):
                st.badge(f"Step {number + 1}", icon=":material/arrow_forward:", color="gray")
                if number == found.edited:
                    st.badge("edited", icon=":material/edit:", color="primary")
            _pair(old, new, title)
    with columns[-1], st.container(border=True, gap="small"):
        st.badge("Whole question", icon=":material/flag:", color="gray")
        for old, new in zip(found.before.questions, went.questions, strict=True):
            _pair(old, new, title)


def _pair(old: Said, new: Said, title: str) -> None:
    """One prompt, or two where the step is about something else after the edit, with both answers."""
    st.caption(md(old.prompt))
    st.markdown(f"Before: {_answer(old)}")
    if new.prompt != old.prompt:
        st.caption(md(new.prompt))
    st.markdown(f"After {md(title)}: {_answer(new)}")


def _answer(said: Said) -> str:
    mark = ":green[✓ right]" if said.right else ":red[✗ wrong]"
    wanted = "" if said.right else f" :gray[should be {md(said.expected)}]"
    return f"**{md(said.said or 'nothing')}** {mark}{wanted}"


def _method(found: Traced, names: dict[str, str], key: str) -> Went | None:
    """The method to show, among those that made an edit."""
    made = {went.method: went for went in found.after if not went.refused}
    if not made:
        st.info("No method made this edit.", icon=":material/info:")
        return None
    if st.session_state.get(key) not in made:
        st.session_state[key] = next(iter(made))
    chosen = st.segmented_control(
        "Method", list(made), format_func=lambda one: names.get(one, one), key=key, required=True
    )
    return made[str(chosen)]


def _table(found: Traced, names: dict[str, str]) -> None:
    rows = []
    for went in (found.before, *found.after):
        for number, hop in enumerate(went.hops):
            mark = " (edited)" if number == found.edited else ""
            rows.append(_row(names, went, f"Step {number + 1}{mark}", hop))
        for number, one in enumerate(went.questions):
            rows.append(_row(names, went, f"Whole {number + 1}", one))
    table = pd.DataFrame(rows)
    asked = [went for went in found.after if not went.refused]
    held = [names.get(went.method, went.method) for went in asked if not went.broke_at]
    figure(
        "multihop_steps",
        multihop_charts.steps(table),
        title="Methods side by side",
        reading=f"The chain holds with {len(held)} of {len(asked)} methods"
        + (f": {', '.join(held)}." if held else "."),
        table=table,
        file=f"chain-{found.id[:12]}",
        about=ABOUT_STEPS,
    )
    summary = [
        {
            "method": names.get(went.method, went.method),
            "steps recalled": f"{went.recalled} of {len(went.hops)}",
            "whole question answered": f"{sum(one.right for one in went.questions)} of {len(went.questions)}",
            "old answer persists": f"{sum(went.old)} of {len(went.old)}",
            "breaks at": went.refused or went.broke_at.replace("hop", "step") or "holds",
            "seconds": None if not went.method else went.seconds,
        }
        for went in (found.before, *found.after)
    ]
    st.dataframe(
        pd.DataFrame(summary),
        hide_index=True,
        column_config={"seconds": st.column_config.NumberColumn(format="%.1f")},
        key="multihop_summary",
        alt="Methods: steps recalled, whole question answered, old answer persists",
    )
    total = sum(went.seconds for went in found.after)
    st.caption(f"The unedited row is judged by the facts before the edit. {seconds(total)} for all edits and answers.")


def _row(names: dict[str, str], went: Went, step: str, said: Said) -> dict[str, object]:
    return {"method": names.get(went.method, went.method), "step": step, "prompt": said.prompt,
            "expected": said.expected, "said": said.said, "right": said.right}  # fmt: skip


@st.fragment
@told
def _path(found: Traced, names: dict[str, str]) -> None:
    heading("Value and query neurons of the path")
    with st.container(horizontal=True, gap="medium"):
        went = _method(found, names, "multihop_path_method")
        place = st.segmented_control(
            "Looked at", list(PLACES), default="edit", format_func=lambda one: PLACE_NAMES[one],
            key="multihop_place", required=True,
        )  # fmt: skip
        candidate = st.segmented_control(
            "Object", ["new", "true"], default="new", key="multihop_candidate", required=True,
            format_func=lambda one: "New answer" if one == "new" else "Old answer",
        )  # fmt: skip
    if went is None:
        return
    case = PLACES.index(str(place))
    title = names.get(went.method, went.method)
    values, queries, neurons = (_chosen(found, frame, went.method, case, str(candidate)) for frame in found.path)
    if values.empty or queries.empty:
        st.info("There is no such answer here to look at.", icon=":material/info:")
        return
    summed = values[values["contribution"] > 0].groupby(["state", "layer"], as_index=False).agg(
        contribution=("contribution", "sum"), neurons=("neuron", "count")
    )  # fmt: skip
    word = _word(found, str(place), str(candidate))
    figure(
        f"multihop_values_{went.method}_{place}_{candidate}",
        multihop_charts.value_bars(summed),
        title=f"Value neurons: who says “{word}”",
        reading=_most(summed, "contribution", title),
        table=summed,
        file=f"value-neurons-{found.id[:12]}-{went.method}-{place}",
        about=ABOUT_VALUES,
        level=3,
    )
    mlp = queries[(queries["values"] == "ffn") & (queries["layer"] >= 0)]
    figure(
        f"multihop_queries_{went.method}_{place}_{candidate}",
        multihop_charts.query_lines(mlp),
        title="Query layers: who switches them on",
        reading=_most(mlp, "score", title),
        table=queries,
        file=f"query-layers-{found.id[:12]}-{went.method}-{place}",
        about=ABOUT_QUERIES,
        level=3,
    )
    after = neurons[neurons["state"] == "after"].sort_values("rank").head(10)
    known = neurons[neurons["state"] == "before"].set_index(["layer", "neuron"])["score"]
    listed = [known.get((layer, neuron)) for layer, neuron in zip(after["layer"], after["neuron"], strict=True)]
    st.markdown(f"Query neurons with most score after {md(title)}")
    st.dataframe(
        after.assign(before=listed)[["layer", "neuron", "score", "before", "position", "token"]],
        hide_index=True,
        key="multihop_query_neurons",
        column_config={
            "score": st.column_config.NumberColumn("score after, nats", format="%.3f"),
            "before": st.column_config.NumberColumn("before, if listed", format="%.3f"),
        },
        alt="Query neurons: layer, number, score, position and token",
    )


def _chosen(found: Traced, frame: str, method: str, case: int, candidate: str) -> pd.DataFrame:
    """The rows of the unedited model and of one method."""
    table = found.path[frame]
    mine = table[table["method"].isin(["", method]) & (table["case"] == case) & (table["candidate"] == candidate)]
    return mine.drop(columns=["method", "case", "candidate"]).reset_index(drop=True)


def _word(found: Traced, place: str, candidate: str) -> str:
    if place == "edit":
        return str(found.request.target_new if candidate == "new" else found.request.target_true)
    return (found.chain.new_answers if candidate == "new" else found.chain.answers)[0]


def _most(table: pd.DataFrame, value: str, title: str) -> str:
    """Where most is, before and after."""
    parts = []
    for state, words in (("before", "Before the edit"), ("after", f"after {title}")):
        mine = table[table["state"] == state]
        if len(mine):
            top = mine.loc[mine[value].idxmax()]
            module = {"attn": " attention", "ffn": " MLP"}.get(str(top.get("module", "")), "")
            parts.append(
                f"{words} most comes from layer {int(top['layer'])}{module} ({signed(float(top[value]))} nats)"
            )
    return "; ".join(parts) + "."
