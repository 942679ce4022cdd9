"""Choosing an edit and up to six methods, and starting the comparison. The address keeps its id, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import streamlit as st

from mega_core.errors import ActionableError
from mega_core.records import MAX_SUBJECT, MAX_TARGET, MAX_TEMPLATE, EditRequest, Inspection
from mega_core.service import MAX_COMPARED, MethodInfo, Service
from pages.components import progress
from pages.components.run_bar import RECENT
from pages.components.session import owner, run_in_address, service, tell, told
from pages.components.text import md, seconds

USUAL = ("rome", "memit", "ft_m", "ike", "mega")
TYPED, SHOWN = "typed", "shown"
FIELDS = (
    ("compare_subject", "Subject", "Eiffel Tower", MAX_SUBJECT),
    ("compare_template", "Prompt template", "{} is located in the city of", MAX_TEMPLATE),
    ("compare_true", "Original object (optional)", "Paris", MAX_TARGET),
    ("compare_new", "New object", "Rome", MAX_TARGET),
)


@dataclass(frozen=True, slots=True)
class Edit:
    """What is to be tried by every method: a question, or what was typed."""

    model: str
    seed: int
    request: EditRequest | None
    base: Inspection | None
    """The question that the edit comes from; its own method is compared with its own parameters."""


def opened() -> tuple[Inspection, ...] | None:
    """The comparison of the address, else the one last shown unless the address brings a run. () for one that is not
    kept here. Never starts work.
    """
    asked = st.query_params.get("comparison")
    if asked is None and run_in_address() is None:
        asked = st.session_state.get("compare_shown")
        if asked:
            st.query_params["comparison"] = asked
    if not asked:
        return None
    plans = service().comparisons.find(asked)
    if plans is None:
        return ()
    st.session_state["compare_shown"] = asked
    return plans


def draw(plans: Sequence[Inspection], *, running: bool) -> None:
    """The form; a press on Run plans every method, keeps the comparison and starts what isn't there yet."""
    desk = service()
    sources = _sources(desk, plans)
    _arrive(plans, sources)
    with st.container(border=True):
        source = st.selectbox(
            "Edit",
            list(sources),
            index=None,
            format_func=lambda key: sources[key],
            placeholder="an example, one of your runs, or a fact of your own",
            key="compare_source",
            persist_state="session",
        )
        edit = _edit(desk, source, plans)
        model = edit.model if edit is not None else desk.models()[0].name
        chosen = _methods(desk.methods(model), edit)
        ready = edit is not None and bool(chosen) and not running
        if st.button(
            "Compare these methods", type="primary", icon=":material/view_column:", disabled=not ready,
            key="compare_run",
        ):  # fmt: skip
            _run(desk, edit, chosen)
    if running:
        st.caption("The comparison below is being worked on. Cancel it to start another.")


def _sources(desk: Service, plans: Sequence[Inspection]) -> dict[str, str]:
    """What an edit can be taken from: key -> label, no two alike."""
    found = {SHOWN: f"The edit below: {_fact(plans[0])}"} if plans else {}
    found[TYPED] = "Type a fact"
    for example in desk.examples():
        found.setdefault(example.digest, f"Example: {example.title} ({example.outcome}) · {example.digest[:8]}")
    for entry in desk.runs(session=owner(), limit=RECENT):
        run = entry.run
        if run.edits == 1:
            fact = f"{run.template.replace('{}', run.subject)} {run.target_new}"
            found.setdefault(run.digest, f"{fact} ({run.method.upper()}, {run.model}) · {run.digest[:8]}")
    asked = run_in_address() or st.session_state.get("run_shown")
    if asked and asked not in found and desk.cached(asked) is not None:
        found[asked] = f"The run of this link · {asked[:8]}"
    return found


def _fact(plan: Inspection) -> str:
    request = plan.requests[0]
    return f"{request.sentence} ({plan.model.name})"


def _arrive(plans: Sequence[Inspection], sources: Mapping[str, str]) -> None:
    """Fill the form for whoever comes by a link, once."""
    run = run_in_address()
    if not run and not plans:
        run = st.session_state.get("run_shown")
    token = st.query_params.get("comparison") or run
    if token and token != st.session_state.get("compare_filled"):
        st.session_state["compare_filled"] = token
        if plans:
            st.session_state["compare_source"] = SHOWN
            st.session_state["compare_methods"] = [plan.method.name for plan in plans]
        elif run in sources:
            st.session_state["compare_source"] = run
    if st.session_state.get("compare_source") not in sources:
        st.session_state["compare_source"] = None


def _edit(desk: Service, source: str | None, plans: Sequence[Inspection]) -> Edit | None:
    if source is None:
        return None
    if source == TYPED:
        return _typed(desk)
    base = plans[0] if source == SHOWN and plans else None
    if base is None:
        report = desk.cached(source)
        if report is None:
            st.warning("This run's result has been cleared: choose another, or type the fact.", icon=":material/info:")
            return None
        base = report.question
    request = base.requests[0]
    original = f", :gray[was {md(request.target_true)}]" if request.target_true else ""
    st.markdown(f"{md(request.prompt)} **{md(request.target_new)}**{original}")
    st.caption(
        f"On {md(base.model.name)}, seed {base.seed}; {len(request.paraphrases)} paraphrases and "
        f"{len(request.neighbours)} neighbours to check with."
    )
    return Edit(base.model.name, base.seed, request, base)


def _typed(desk: Service) -> Edit | None:
    models = {info.name: info for info in desk.models() if info.available}
    if not models:
        st.warning("No model is on this machine. The page Status says how to get one.", icon=":material/cloud_off:")
        return None
    if st.session_state.get("compare_model") not in models:
        st.session_state["compare_model"] = next(iter(models))
    model = st.selectbox(
        "Model", list(models), format_func=lambda name: models[name].title, key="compare_model",
        persist_state="session",
    )  # fmt: skip
    row = st.container(horizontal=True, gap="small")
    for key, label, example, limit in FIELDS:
        row.text_input(label, key=key, max_chars=limit, placeholder=example, persist_state="session")
    st.caption(
        "The template ends right before the object, with {} for the subject. A fact that the model is known to hold "
        "brings its own paraphrases and neighbours."
    )
    return Edit(model, 0, None, None)


def _methods(infos: Sequence[MethodInfo], edit: Edit | None) -> list[str]:
    usable = {info.name: info for info in infos if info.unsupported is None}
    own = edit.base.method.name if edit is not None and edit.base is not None else ""
    if "compare_methods" not in st.session_state:
        first = dict.fromkeys((own, *USUAL) if own else USUAL)
        st.session_state["compare_methods"] = [name for name in first if name in usable][:MAX_COMPARED]
    st.session_state["compare_methods"] = [n for n in st.session_state["compare_methods"] if n in usable]
    chosen = st.multiselect(
        f"Methods (up to {MAX_COMPARED})",
        list(usable),
        format_func=lambda name: usable[name].title,
        max_selections=MAX_COMPARED,
        key="compare_methods",
        persist_state="session",
        help="Each edits the unedited model, one after the other; the model is given back after each.",
    )
    refused = [info.title for info in infos if info.unsupported is not None]
    known = [(usable[name].title, usable[name].seconds_estimate) for name in chosen]
    if known:
        each = ", ".join(f"{md(title)} {seconds(estimate)}" for title, estimate in known)
        whole = sum(estimate for _, estimate in known if estimate is not None)
        more = " and what is not measured" if any(estimate is None for _, estimate in known) else ""
        total = f" In all about {seconds(whole)}{more}, less what is there already." if whole else ""
        st.caption(f":material/timer: {each}.{total}")
    if refused:
        st.caption(f":material/block: Not for this model: {md(', '.join(refused))}.")
    return chosen


def _run(desk: Service, edit: Edit | None, methods: Sequence[str]) -> None:
    if edit is None:
        return
    try:
        plans = _plans(desk, edit, methods)
        start_missing(desk, plans)
    except ActionableError as error:
        tell(error)
        return
    st.session_state.pop("compare_blind", None)
    name = desk.comparisons.save(plans)
    st.session_state.update(compare_shown=name, compare_filled=name)
    st.query_params.from_dict({"comparison": name})
    st.rerun()


def _plans(desk: Service, edit: Edit, methods: Sequence[str]) -> list[Inspection]:
    """The edit by every method. Raises as Service.plan does."""
    base = edit.base
    request = edit.request
    if request is None:
        typed = {key: str(st.session_state.get(key, "")) for key, *_ in FIELDS}
        subject, template = typed["compare_subject"], typed["compare_template"]
        new, true = typed["compare_new"], typed["compare_true"]
        return [desk.plan(edit.model, name, subject, template, new, target_true=true) for name in methods]
    return [
        base
        if base is not None and base.method.name == name and len(base.requests) == 1
        else desk.plan(
            edit.model, name, request.subject, request.template, request.target_new,
            target_true=request.target_true or "", paraphrases=request.paraphrases, neighbours=request.neighbours,
            seed=edit.seed,
        )
        for name in methods
    ]  # fmt: skip


def start_missing(desk: Service, plans: Sequence[Inspection]) -> None:
    """Queue the questions that have no answer yet. Raises as Service.submit_several does."""
    missing = [plan for plan in plans if desk.cached(desk.digest(plan)) is None]
    st.session_state["compare_asked"] = [desk.digest(plan) for plan in missing]
    st.session_state["compare_failed"] = {}
    if missing:
        progress.begin("compare", desk.submit_several(missing, owner()))


@told
def run_missing(plans: Sequence[Inspection]) -> None:
    """The button's callback: ask for what isn't there."""
    start_missing(service(), plans)
