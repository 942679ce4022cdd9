"""The teaching steps on the page: predict, run, see, explain. Answers stay in the session; a link never starts work."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import streamlit as st

from mega_core.errors import ActionableError
from mega_core.jobs import JobView
from mega_core.records import Inspection, Report
from mega_core.service import Answer
from mega_core.summary import outcome, percent, verdict
from pages.components import (
    compare_charts,
    compare_tables,
    learn_charts,
    learn_steps,
    progress,
    readings,
    tables,
    view_charts,
)
from pages.components.compare_tables import Column
from pages.components.figure import figure
from pages.components.learn_steps import STEPS, Question
from pages.components.prepared import spec_of, tables_of
from pages.components.report_view import outcome_badge
from pages.components.session import owner, run_in_address, service, tell
from pages.components.text import MODULES, STATES, md, seconds
from pages.components.words import GLOSSARY

STEP = re.compile(r"[1-8]")
SKIPPED = -1


# Where one is --------------------------------------------------------------------------------------------------------


def step_asked() -> int:
    """The step of the address when it is a new one, else the one last looked at. Anything but 1 to 8 counts as 1."""
    asked = st.query_params.get("step")
    if asked is not None and asked != st.session_state.get("learn_address"):
        st.session_state["learn_at"] = int(asked) if STEP.fullmatch(asked) else 1
    at = int(st.session_state.setdefault("learn_at", 1))
    st.session_state["learn_address"] = str(at)
    st.query_params["step"] = str(at)
    return at


def go_to(number: int) -> None:
    """Turn to a step."""
    st.session_state["learn_at"] = number
    st.session_state["learn_step"] = number
    st.session_state["learn_address"] = str(number)
    st.query_params["step"] = str(number)


def followed() -> Report | None:
    """The run that the steps follow: that of the address, else the one chosen here, else the first example."""
    desk = service()
    examples = readable()
    asked = run_in_address()
    linked = desk.cached(asked) if asked else None
    if asked is not None and linked is None:
        st.warning(
            "The run of this link is not stored here, or the link is damaged. The steps follow an example instead.",
            icon=":material/link_off:",
        )
    if linked is not None and linked.digest not in examples:
        st.session_state["learn_linked"] = linked.digest
    labels = {digest: f"{example.title} ({example.outcome})" for digest, example in examples.items()}
    own = st.session_state.get("learn_linked")
    report = desk.cached(own) if own else None
    if report is not None:
        labels[report.digest] = f"{report.question.requests[0].sentence} · {report.digest[:8]}"
    if not labels:
        return None
    if linked is not None and st.session_state.get("learn_arrived") != linked.digest:
        st.session_state["learn_fact"] = st.session_state["learn_arrived"] = linked.digest
    if st.session_state.get("learn_fact") not in labels:
        st.session_state["learn_fact"] = next(iter(labels))
    chosen = st.selectbox(
        "Fact to follow", list(labels), format_func=lambda digest: labels[digest], key="learn_fact",
        persist_state="session", help="The steps ask about this edit, and every answer comes from its numbers.",
    )  # fmt: skip
    return desk.cached(chosen)


def readable() -> dict[str, Any]:
    """The example cards whose reports can be had, by digest, the one that works first."""
    found = {
        example.digest: example for example in service().examples() if service().cached(example.digest) is not None
    }
    return dict(sorted(found.items(), key=lambda item: item[1].outcome != "works"))


def steps_list(report: Report, at: int) -> None:
    """All steps with what is answered; choosing one turns to it."""
    marks = {}
    for number in range(1, len(STEPS) + 1):
        chosen = _answers().get(_key(report, number))
        marks[number] = "" if chosen is None else "– " if chosen == SKIPPED else "✓ "

    def turned() -> None:
        number = st.session_state.get("learn_step")
        if number:
            go_to(int(number))

    st.session_state["learn_step"] = at
    st.pills(
        "Steps (✓ answered, – looked up)",
        list(marks),
        format_func=lambda number: f"{marks[number]}{number} {STEPS[number - 1].short}",
        key="learn_step",
        required=True,
        on_change=turned,
    )


def turn_page(at: int) -> None:
    """Previous and next."""
    with st.container(horizontal=True, horizontal_alignment="distribute"):
        st.button(
            "Previous step", icon=":material/arrow_back:", disabled=at == 1, on_click=go_to, args=(max(1, at - 1),),
            key="learn_previous",
        )  # fmt: skip
        st.button(
            "Next step", icon=":material/arrow_forward:", disabled=at == len(STEPS), on_click=go_to,
            args=(min(len(STEPS), at + 1),), key="learn_next", type="primary",
        )  # fmt: skip


def _answers() -> dict[str, int]:
    found: dict[str, int] = st.session_state.setdefault("learn_answers", {})
    return found


def _key(report: Report, number: int) -> str:
    return f"{report.digest}:{number}"


# One step ------------------------------------------------------------------------------------------------------------


def draw(report: Report, at: int, address: str) -> None:
    """One step: what it is about, the prediction, the run where one is needed, the picture, and what it means."""
    step = STEPS[at - 1]
    st.header(f"Step {at} of {len(STEPS)}: {step.title}", anchor=False)
    st.markdown(step.intro)
    if at < len(STEPS):  # the last step is about other facts
        _fact(report)
    question, see = _parts(report, at)
    revealed = _predict(report, at, question)
    if revealed:
        see()
        if question is None or question.right is not None:
            st.subheader("What this means", anchor=False)
            st.markdown(step.explained)
    else:
        st.caption("The picture and its explanation appear when you have answered, or pressed Show me.")
    with st.expander("Words of this step", icon=":material/dictionary:"):
        for word in step.words:
            if word in GLOSSARY:
                st.markdown(f"**{md(word)}**: {md(GLOSSARY[word])}")
    with st.expander("Link to this step, for a lesson", icon=":material/link:"):
        st.caption("It opens this step with this fact and starts nothing.")
        st.code(f"{address}?step={at}&run={report.digest}", language=None, wrap_lines=True)
    if at == len(STEPS):
        _farewell(report)


def _fact(report: Report) -> None:
    request = report.question.requests[0]
    with st.container(border=True, gap="small"):
        original = f", :gray[was {md(request.target_true)}]" if request.target_true else ""
        st.markdown(f"{md(request.prompt)} **{md(request.target_new)}**{original}")
        st.caption(
            f"By {md(report.question.method.name.upper())} on {md(report.question.model.name)}. The embedded models "
            "are small and made for teaching: they know a few thousand facts and prove nothing about large models."
        )


See = Callable[[], None]


def _parts(report: Report, at: int) -> tuple[Question | None, See]:
    """The question of a step and what draws its picture."""
    if at == 1:
        return learn_steps.next_token(report), lambda: _see_next(report)
    if at == 2:
        return learn_steps.before_edit(report), lambda: _see_objects(report)
    if at == 3:
        sizes = {info.name: info.parameters for info in service().models()}
        size = sizes.get(report.question.model.name, 0)
        return learn_steps.how_much_changes(report, size), lambda: _see_edit(report)
    if at == 4:
        return learn_steps.how_many_follow(report), lambda: _see_evidence(report, "learn_evidence")
    if at == 5:
        return learn_steps.where_it_grows(report), lambda: _see_map(report)
    if at == 6:
        plan = _with_lens(report)
        looked = report if "lens" in report.frames else _stored(plan)
        return learn_steps.where_it_overtakes(report, looked), lambda: _see_lens(plan, looked)
    if at == 7:
        name = "rome" if report.question.method.name == "mega" else "mega"
        other_plan = _by(report, name)
        other = _stored(other_plan) if other_plan is not None else None
        question = learn_steps.which_spares_more(report, other, name.upper())
        return question, lambda: _see_two(report, other_plan, other, name.upper())
    shown = {example.outcome: example for example in reversed(readable().values())}
    leaking = service().cached(shown["leaks"].digest) if "leaks" in shown else None
    failing = service().cached(shown["fails"].digest) if "fails" in shown else None
    return learn_steps.does_it_leak(leaking), lambda: _see_failures(leaking, failing)


def _predict(report: Report, at: int, question: Question | None) -> bool:
    """Ask, check, tell. Whether the picture may be shown."""
    if question is None:
        st.caption("This run has no numbers to ask about here.")
        return True
    key = _key(report, at)
    answers = _answers()
    with st.container(border=True):
        st.subheader("Your prediction", anchor=False)
        pick = st.radio(
            md(question.text), range(len(question.options)), index=None,
            format_func=lambda place: md(question.options[place]), key=f"learn_pick_{key}", persist_state="session",
        )  # fmt: skip
        with st.container(horizontal=True, gap="small"):
            check = st.button(
                "Check my answer",
                type="primary",
                icon=":material/check:",
                disabled=pick is None,
                key=f"learn_check_{at}",
            )
            skip = st.button("Show me", icon=":material/visibility:", disabled=key in answers, key=f"learn_skip_{at}")
        if check and pick is not None:
            answers[key] = int(pick)
            st.rerun()
        if skip:
            answers[key] = SKIPPED
            st.rerun()
        if key in answers:
            _judge(question, answers[key])
    return key in answers


def _judge(question: Question, chosen: int) -> None:
    if question.right is None:
        said = "" if chosen == SKIPPED else f" Your answer, “{md(question.options[chosen])}”, is kept."
        st.info(f"The numbers for this are not there yet: run it below.{said}", icon=":material/hourglass_empty:")
        return
    right = md(question.options[question.right])
    if chosen == question.right:
        st.success(f"**Right: {right}.** {md(question.why)}", icon=":material/check_circle:")
    elif chosen == SKIPPED:
        st.info(f"**The answer: {right}.** {md(question.why)}", icon=":material/visibility:")
    else:
        st.warning(f"**Not this time. The answer: {right}.** {md(question.why)}", icon=":material/cancel:")


def _farewell(report: Report) -> None:
    told = []
    for number in range(1, len(STEPS) + 1):
        chosen = _answers().get(_key(report, number))
        if chosen is not None and chosen != SKIPPED:
            question, _ = _parts(report, number)
            told.append((chosen, question.right if question is not None else None))
    with st.container(border=True):
        st.subheader("This was the last step", anchor=False)
        st.markdown(f"{md(learn_steps.answered(told))}. Now try an edit of your own.")
        with st.container(horizontal=True, gap="small"):
            st.page_link("pages/edit.py", label="Make an edit", icon=":material/edit_note:")
            st.page_link("pages/compare.py", label="Compare methods", icon=":material/view_column:")


# Running -------------------------------------------------------------------------------------------------------------


def _with_lens(report: Report) -> Inspection:
    return replace(report.question, views=(*report.question.views, "lens"))


def _by(report: Report, method: str) -> Inspection | None:
    """The same fact by another method with this model's usual parameters; None where that can't be."""
    request = report.question.requests[0]
    try:
        return service().plan(
            report.question.model.name, method, request.subject, request.template, request.target_new,
            target_true=request.target_true or "", paraphrases=request.paraphrases, neighbours=request.neighbours,
            seed=report.question.seed,
        )  # fmt: skip
    except ActionableError:
        return None


def _stored(plan: Inspection) -> Report | None:
    """The answer of a question, if it is there. Never computes."""
    desk = service()
    try:
        return desk.cached(desk.digest(plan))
    except ActionableError:
        return None


def _live(label: str, plan: Inspection, what: str, *, fresh: bool = False) -> None:
    """A button that runs a question, its progress, and how it ended."""
    if progress.live("learn"):
        progress.draw("learn", _done)
        return
    progress.failure("learn")
    if st.button(label, icon=":material/play_arrow:", type="secondary" if fresh else "primary", key="learn_run"):
        try:
            progress.begin("learn", service().submit(plan, owner(), fresh=fresh, kind="learn"))
        except ActionableError as error:
            tell(error)
            return
        st.rerun()
    st.caption(md(what))


def _done(view: JobView) -> None:
    st.session_state["learn_ran"] = view.digest


# Seeing --------------------------------------------------------------------------------------------------------------


def _see_next(report: Report) -> None:
    table = tables.next_tokens(report)
    table = table[table["state"] == "before"].sort_values("prob", ascending=False).drop(columns=["highest", "state"])
    if table.empty:
        return
    top = table.iloc[0]
    figure(
        "learn_next",
        learn_charts.base_bars(table),
        title="What the unedited model would say next",
        reading=f"“{str(top['token']).strip()}” leads with {percent(top['prob'])}.",
        table=table,
        file=f"learn-next-{report.digest[:8]}",
        level=3,
    )


def _see_objects(report: Report) -> None:
    evidence = tables.evidence(report)
    mine = evidence[evidence["prompt_kind"] == "edit"].head(1)
    request = report.question.requests[0]
    rows = [("new", request.target_new, "p_new_before"), ("true", request.target_true, "p_true_before")]
    table = pd.DataFrame(
        [
            {"object": name, "role": role, "prob": float(mine[column].iloc[0])}
            for role, name, column in rows
            if name and column in mine and len(mine)
        ],
        columns=["object", "role", "prob"],
    )
    if len(table):
        words = [percent(prob) for prob in table["prob"]]
        figure(
            "learn_objects",
            learn_charts.odds_points(table.assign(percent=words)),
            title="Both objects before any edit",
            reading="; ".join(f"“{name}”: {word}" for name, word in zip(table["object"], words, strict=True)) + ".",
            table=table,
            file=f"learn-objects-{report.digest[:8]}",
            level=3,
        )
    _ask(report)


def _ask(report: Report) -> None:
    """Ask the unedited model anything."""
    desk = service()
    st.subheader("Ask the model yourself", anchor=False)
    prompt = st.text_input(
        "A beginning for the model to go on with", value=report.question.requests[0].prompt, max_chars=512,
        key="learn_prompt", persist_state="session",
    )  # fmt: skip
    if progress.live("learn_ask"):
        progress.draw("learn_ask", _heard, first_time="The first question after a start also loads the model.")
    else:
        progress.failure("learn_ask")
        if st.button("Ask the unedited model", icon=":material/forum:", key="learn_ask_button"):
            try:
                progress.begin("learn_ask", desk.ask(report.question.model.name, prompt or "", owner()))
            except ActionableError as error:
                tell(error)
            else:
                st.rerun()
    said: Answer | None = st.session_state.get("learn_said")
    if said is not None:
        with st.container(border=True, gap="small"):
            st.markdown(f":gray[{md(said.prompt)}] **{md(said.continuation)}**")
            likely = ", ".join(f"“{md(token.strip())}” {md(percent(prob))}" for token, prob in said.tokens[:4])
            st.caption(f"Likeliest next tokens: {likely}.")


def _heard(view: JobView) -> None:
    st.session_state["learn_said"] = service().answer(view.id, owner())


def _see_edit(report: Report) -> None:
    table = tables_of(report.digest, report)["next"]
    if not table.empty:
        title, sentence = readings.of_next_tokens(table)
        figure(
            "learn_edit",
            spec_of(report.digest, "next", _report=report),
            title=title,
            reading=f"{sentence} Hollow: base model, filled: edited model.",
            table=table,
            file=f"learn-edit-{report.digest[:8]}",
            level=3,
        )
    _live(
        "Run this edit yourself",
        report.question,
        "What you see is kept from an earlier run. Running it again shows that the same edit gives the same numbers.",
        fresh=True,
    )
    if st.session_state.get("learn_ran") == report.digest:
        _same(report)


def _same(report: Report) -> None:
    """What a person's own run of a shipped example shows."""
    shipped = next((one for one in service().examples() if one.digest == report.digest), None)
    took = f"Run on this machine in {seconds(sum(report.timing.values()))}."
    if shipped is None:
        st.success(md(took), icon=":material/check_circle:")
        return
    one, two = (
        r.frames["answers"].set_index(["state", "prompt", "candidate"])["prob"] for r in (report, shipped.report())
    )
    apart = float((one - two).abs().max())
    told = "the numbers are the same to the last digit" if apart == 0 else f"the largest difference is {apart:.1e}"
    st.success(f"{md(took)} Against the example as shipped, {told}.", icon=":material/check_circle:")


def _see_evidence(report: Report, key: str) -> None:
    table = tables_of(report.digest, report)["evidence"]
    if table.empty:
        return
    title, sentence = readings.of_evidence(table, "p_true_after" in table)
    figure(
        key,
        spec_of(report.digest, "evidence", _report=report),
        title=title,
        reading=sentence,
        table=table.drop(columns=[column for column in table if column.startswith("says_")]),
        file=f"learn-evidence-{report.digest[:8]}",
        level=3,
    )


def _see_map(report: Report) -> None:
    cells = tables_of(report.digest, report)["cells"]
    if cells.empty:
        return
    title, sentence = readings.of_module_map(cells, "new", report.question.requests[0])
    figure(
        "learn_map",
        spec_of(report.digest, "map", "new", None, _report=report),
        title=title,
        reading=sentence,
        table=cells[cells["candidate"] == "new"].assign(
            module=lambda t: t["module"].map(MODULES), state=lambda t: t["state"].map(STATES)
        ),
        file=f"learn-map-{report.digest[:8]}",
        level=3,
    )


def _see_lens(plan: Inspection, looked: Report | None) -> None:
    if looked is None or "lens" not in looked.frames:
        _live("Look through the layers", plan, "The same edit once more, read after every layer: some seconds.")
        return
    lens = looked.frames["lens"]
    lens = lens[lens["case"] == 0]
    lens = lens[lens["position"] == lens["position"].max()]
    crossing = looked.frames.get("lens_crossing")
    figure(
        "learn_lens",
        view_charts.lens_lines(lens, None if crossing is None else crossing[crossing["case"] == 0]),
        title="How likely each object would be, layer by layer",
        reading=_lens_words(lens),
        table=lens.drop(columns=["case", "position"]),
        file=f"learn-lens-{looked.digest[:8]}",
        level=3,
    )


def _lens_words(lens: pd.DataFrame) -> str:
    """What the new object has at the start and at the end, in the edited model."""
    mine = lens[(lens["state"] == "after") & (lens["candidate"] == "new")].sort_values(["layer", "site"])
    ends = mine[mine["site"] == "block_out"]
    ends = mine if ends.empty else ends
    if ends.empty:
        return ""
    return (
        f"In the edited model the new object has {percent(float(ends['prob'].iloc[0]))} after the first layer and "
        f"{percent(float(ends['prob'].iloc[-1]))} after the last."
    )


def _see_two(report: Report, plan: Inspection | None, other: Report | None, name: str) -> None:
    if plan is None:
        st.caption(f"{md(name)} can't edit this model.")
        return
    if other is None:
        _live(f"Run {name} on the same fact", plan, "A job of some seconds; no weight is changed by steering.")
        return
    columns = [
        Column(one.question.method.name.upper(), one.question, one.digest, "done", one) for one in (report, other)
    ]
    table = compare_tables.next_objects(columns)
    figure(
        "learn_two",
        compare_charts.object_bars(table),
        title=f"{columns[0].label} and {columns[1].label} on the same fact",
        reading="; ".join(
            f"{column.label} gives the new object {percent(outcome(one).prob_after)}"
            for column, one in zip(columns, (report, other), strict=True)
        )
        + ".",
        table=table,
        file=f"learn-two-{report.digest[:8]}",
        level=3,
    )
    costs = compare_tables.costs(columns)
    costs["neighbours"] = [str(outcome(one).neighbours) for one in (report, other)]
    costs["paraphrases"] = [str(outcome(one).paraphrases) for one in (report, other)]
    st.dataframe(
        costs[["method", "changed", "weights", "paraphrases", "neighbours", "seconds"]],
        hide_index=True,
        column_config={
            "method": "Method",
            "changed": "Changes",
            "weights": st.column_config.NumberColumn("Weights touched", format="localized"),
            "paraphrases": "Paraphrases that follow",
            "neighbours": "Neighbours kept",
            "seconds": st.column_config.NumberColumn("Seconds", format="%.1f"),
        },
        key="learn_two_costs",
        alt="What the two methods change, and how many prompts follow",
    )
    st.page_link("pages/compare.py", label="Compare more methods", icon=":material/view_column:",
                 query_params={"run": report.digest})  # fmt: skip


def _see_failures(leaking: Report | None, failing: Report | None) -> None:
    for name, report in (("leaks", leaking), ("fails", failing)):
        if report is None:
            continue
        with st.container(border=True):
            with st.container(horizontal=True, vertical_alignment="center", gap="small"):
                outcome_badge(outcome(report).kind)
                st.markdown(f"{md(report.question.requests[0].sentence)}")
            st.caption(md(verdict(report)))
            _see_evidence(report, f"learn_{name}")
            st.page_link("pages/edit.py", label="Open this run", icon=":material/edit_note:",
                         query_params={"run": report.digest})  # fmt: skip
