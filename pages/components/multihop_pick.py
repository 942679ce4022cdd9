"""Choosing a chain, through the run in focus or put together from known facts, and the methods to try on it."""

from __future__ import annotations

import streamlit as st

from mega_core.errors import ActionableError
from mega_core.service.chains import MOST_METHODS, Link, Route
from pages.components import progress, run_bar
from pages.components.figure import heading
from pages.components.session import owner, run_in_address, service, tell, told
from pages.components.text import clip, md, seconds

USUAL = ("rome", "ace", "mega")
WAYS = {"facts": "From known facts", "run": "From a run"}


def draw(done: progress.Done, *, another: bool = False) -> None:
    """The form and, under it, the work in progress; `done` is told when it is there."""
    heading("Choose another chain" if another else "Choose a chain")
    run = run_in_address()
    if run is not None and run != st.session_state.get("multihop_run_seen"):
        st.session_state["multihop_way"] = "run"  # whoever comes with a run asks about it
    st.session_state["multihop_run_seen"] = run
    if st.session_state.get("multihop_way") not in WAYS:
        st.session_state["multihop_way"] = "facts"
    way = st.segmented_control(
        "Where the chain comes from", list(WAYS), format_func=lambda one: WAYS[one], key="multihop_way", required=True
    )
    (_of_run if way == "run" else _of_facts)()
    if progress.live("chain"):
        progress.draw("chain", done, first_time="The first edit after a start also loads the libraries and the model.")
    else:
        progress.failure("chain")


@st.fragment
@told
def _of_run() -> None:
    report = run_bar.opened("see its chains")
    if report is None:
        return
    run_bar.bar(report, "multihop")
    request = report.question.requests[0]
    routes = service().chains.of(request)
    if not routes:
        st.info(
            "The tables know no two-hop question through this fact. Build a chain from known facts instead: it can go "
            "through an edit of your choice.",
            icon=":material/route:",
        )
        return
    number = st.selectbox(
        "Chain",
        range(len(routes)),
        format_func=lambda i: f"{i + 1}. {routes[i].chain.questions[0]} → {routes[i].chain.new_answers[0]}",
        key=f"multihop_chain_{report.digest[:8]}",
    )
    _ask(report.question.model.name, routes[number])


@st.fragment
@told
def _of_facts() -> None:
    desk = service()
    models = {info.name: info for info in desk.models() if info.embedded}
    if not models:
        st.info("No embedded model is in the catalogue: choose a run instead.", icon=":material/info:")
        return
    if st.session_state.get("multihop_model") not in models:
        st.session_state["multihop_model"] = next(iter(models))
    starts = {start.relation: start for start in desk.chains.starts()}
    left, middle, right = st.columns(3, gap="small")
    with left:
        model = st.selectbox(
            "Model", list(models), format_func=lambda one: models[one].title, key="multihop_model",
            persist_state="session",
        )  # fmt: skip
    with middle:
        first = st.selectbox(
            "The chain begins with the", list(starts), format_func=lambda one: starts[one].phrase,
            key="multihop_first", persist_state="session",
        )  # fmt: skip
    with right:
        subject = st.selectbox(
            "Of", list(starts[first].subjects), key=f"multihop_subject_{first}", persist_state="session"
        )
    links = desk.chains.links(subject, (first,))
    left, middle, right = st.columns(3, gap="small")  # a row of its own: a phone stacks column after column
    with left:
        links += (_next(links[-1], "Then the", f"multihop_second_{first}_{subject}"),)
    with middle:
        third = _maybe(links[-1], f"multihop_third_{first}_{subject}_{links[-1].relation}")
        links += () if third is None else (third,)
    edited = _edited_step(links)
    objects = desk.chains.objects(links, edited)
    with right:
        new = st.selectbox(
            "New object", list(objects),
            key=f"multihop_new_{'_'.join(one.relation for one in links)}_{edited}_{subject}",
            help="Objects that lead to another answer at the end of the chain.",
        )  # fmt: skip
    if new is None:
        st.info("No other object of this step leads to another answer: edit another step.", icon=":material/info:")
        return
    question = st.text_input(
        "Whole question, in words of your own (optional)", key=f"multihop_own_{subject}_{len(links)}", max_chars=300,
        placeholder=desk.chains.forms(links)[0], help="A beginning that ends right before the answer.",
    )  # fmt: skip
    try:
        route = desk.chains.build(links, edited, str(new), question or "")
    except ActionableError as error:
        tell(error)
        return
    if not models[model].available:
        st.warning(f"{md(models[model].reason)} {md(models[model].how)}", icon=":material/cloud_off:")
        return
    _ask(model, route)


def _next(link: Link, label: str, key: str) -> Link:
    onward = {one.relation: one for one in service().chains.onward(link)}
    chosen = st.selectbox(label, list(onward), format_func=lambda one: onward[one].phrase, key=key)
    return onward[chosen]


def _maybe(link: Link, key: str) -> Link | None:
    """A third step, if there is one and it is wanted."""
    onward = {one.relation: one for one in service().chains.onward(link)}
    if not onward:
        st.caption("The chain ends here: nothing is known of that object.")
        return None
    chosen = st.selectbox(
        "And then the (optional)",
        list(onward),
        index=None,
        format_func=lambda one: onward[one].phrase,
        placeholder="two steps are enough",
        key=key,
    )
    return onward[chosen] if chosen else None


def _edited_step(links: tuple[Link, ...]) -> int:
    labels = [f"{i + 1}. {link.subject} → {link.object}" for i, link in enumerate(links)]
    picked = st.radio(
        "The step that is edited", labels, horizontal=True, key=f"multihop_edited_{'_'.join(labels)[:200]}"
    )
    return labels.index(picked)


def _ask(model: str, route: Route) -> None:
    desk = service()
    request, chain = route.request, route.chain
    with st.container(border=True, gap=None):
        st.caption("The edit, and the question through it")
        st.markdown(f"{md(request.prompt)} :gray[~~{md(request.target_true)}~~] **{md(request.target_new)}**")
        st.markdown(f"{md(chain.questions[0])} :gray[~~{md(chain.answers[0])}~~] **{md(chain.new_answers[0])}**")
    usable = {info.name: info for info in desk.methods(model) if info.unsupported is None}
    methods = st.pills(
        f"Methods, up to {MOST_METHODS}",
        list(usable),
        selection_mode="multi",
        default=[name for name in USUAL if name in usable] or list(usable)[:1],
        format_func=lambda name: usable[name].title,
        key=f"multihop_methods_{model}",
        persist_state="session",
    )
    times = [usable[name].seconds_estimate for name in methods]
    known = [one for one in times if one is not None]
    if known:
        st.caption(f"About {seconds(sum(known) / len(known) * len(times))} on this machine.")
    pressed = st.button(
        "Ask the chain", type="primary", icon=":material/route:", key="multihop_run",
        disabled=not 1 <= len(methods) <= MOST_METHODS or bool(st.session_state.get("chain_job")),
    )  # fmt: skip
    if len(methods) > MOST_METHODS:
        st.warning(f"{len(methods)} methods are chosen; take at most {MOST_METHODS}.", icon=":material/warning:")
    if pressed:
        try:
            name, job = desk.chains.start(model, route, methods, owner())
        except ActionableError as error:
            tell(error)
            return
        if job is None:
            st.query_params["chain"] = name
        else:
            progress.begin("chain", job)
        st.rerun()


def earlier() -> None:
    """The chains that this person asked before."""
    there = {one.id: one for one in service().chains.listed(owner())}
    if not there:
        return

    def picked() -> None:
        chosen = st.session_state.get("multihop_earlier")
        if chosen:
            st.query_params["chain"] = str(chosen)
            st.session_state["multihop_earlier"] = None

    st.selectbox(
        "Chains asked before",
        list(there),
        index=None,
        format_func=lambda one: (
            f"{clip(there[one].chain.questions[0], 70)} → {there[one].chain.new_answers[0]} "
            f"({', '.join(went.method for went in there[one].after)}, {there[one].model}) · {one[:8]}"
        ),
        placeholder="open one again",
        key="multihop_earlier",
        on_change=picked,
    )
