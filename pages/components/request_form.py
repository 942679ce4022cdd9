"""The form of the edit page: what to edit, on which model, by which method. A fragment, so typing redraws nothing
else.

Every field lives in the session under an `edit_` key. A draft from elsewhere (an example, a link, a shown run) is
put aside with `lay_down` and picked up before the widgets are made, since a widget's value can't be set after it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import streamlit as st

from mega_core.errors import ActionableError, BadInput
from mega_core.records import MAX_SUBJECT, MAX_TARGET, MAX_TEMPLATE, EditRequest, Inspection
from mega_core.service import MethodInfo, ModelInfo, Service
from pages.components import method_picker, progress
from pages.components.session import forget_run, owner, service, start, tell, told, unforeseen
from pages.components.text import md

FIELDS: Mapping[str, Any] = {
    "edit_subject": "",
    "edit_template": "",
    "edit_true": "",
    "edit_new": "",
    "edit_seed": 0,
    "edit_paraphrases": "",
    "edit_neighbours": "",
}
FOLDED = {"edit_seed": "edit_advanced", "edit_paraphrases": "edit_checks", "edit_neighbours": "edit_checks"}
"""Widget -> the expander it is in, which opens when something is wrong with it."""
# The field of a BadInput -> the widget it is told next to.
PLACES = {
    "subject": "edit_subject",
    "template": "edit_template",
    "target_true": "edit_true",
    "target_new": "edit_new",
    "seed": "edit_seed",
    "paraphrases": "edit_paraphrases",
    "neighbours": "edit_neighbours",
    "model": "edit_model",
}
SAMPLED_FACTS = 60


@dataclass(frozen=True, slots=True)
class Problem:
    """Why the form can't be run, and the widget it is about ("" when about none in particular)."""

    place: str
    what: str
    next_step: str


def lay_down(values: Mapping[str, Any]) -> None:
    """Fill the form with these the next time it is drawn."""
    st.session_state["edit_draft"] = dict(values)
    st.session_state.pop("edit_problem", None)


def draft_of_request(request: EditRequest) -> dict[str, Any]:
    """The form's fields for a request."""
    return {
        "edit_subject": request.subject,
        "edit_template": request.template,
        "edit_true": request.target_true or "",
        "edit_new": request.target_new,
        "edit_paraphrases": "\n".join(request.paraphrases),
        "edit_neighbours": "\n".join(request.neighbours),
    }


def draft_of_plan(plan: Inspection) -> dict[str, Any]:
    """The form's fields for a whole question, its method's parameters included."""
    knobs = {f"knob_{plan.method.name}_{name}": value for name, value in plan.method.params}
    return {
        **draft_of_request(plan.requests[0]),
        "edit_model": plan.model.name,
        "edit_method": plan.method.name,
        "edit_seed": plan.seed,
        **{key: repr(value) if isinstance(value, float) else value for key, value in knobs.items()},
    }


def reset() -> None:
    """Empty the form and forget what was shown."""
    method_picker.forget_knobs()
    for key in ("edit_problem", "edit_ask"):
        st.session_state.pop(key, None)
    forget_run()
    lay_down(FIELDS)
    st.session_state["edit_changed"] = True


@st.fragment
@told
def draw_form() -> None:
    """The whole form but its buttons. A problem is told at its field, and nothing typed is lost."""
    desk = service()
    for key, value in FIELDS.items():
        st.session_state.setdefault(key, value)
    # Only a draft may set a widget's value: setting it on every run would overwrite what is being typed.
    st.session_state.update(st.session_state.pop("edit_draft", {}))
    model = _model(desk)
    _start_from(desk, model)
    st.text_input(
        "Subject",
        key="edit_subject",
        max_chars=MAX_SUBJECT,
        placeholder="Eiffel Tower",
        help="Who or what the fact is about, without an article.",
        live="300ms",
        persist_state="session",
    )
    _complaint("edit_subject")
    st.text_input(
        "Prompt template",
        key="edit_template",
        max_chars=MAX_TEMPLATE,
        placeholder="{} is located in the city of",
        help="A sentence that ends right before the object, with {} where the subject goes.",
        live="300ms",
        persist_state="session",
    )
    _complaint("edit_template")
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        st.text_input(
            "Original object (optional)",
            key="edit_true",
            max_chars=MAX_TARGET,
            placeholder="Paris",
            help="What the model says now. The edit is measured against it.",
            live="300ms",
            persist_state="session",
        )
        ask = st.button(
            "Ask the model",
            icon=":material/forum:",
            help="Fill in what the unedited model says after this prompt.",
            disabled=not model.available,
            key="edit_ask_button",
        )
    if ask:
        _ask(desk, model)
    _listen(desk)
    _complaint("edit_true")
    st.text_input(
        "New object",
        key="edit_new",
        max_chars=MAX_TARGET,
        placeholder="Rome",
        help="What the model should say instead.",
        live="300ms",
        persist_state="session",
    )
    _complaint("edit_new")
    _preview()
    method = method_picker.pick_method(desk.methods(model.name))
    advanced = st.expander("Advanced", icon=":material/tune:", key="edit_advanced", on_change="rerun")
    if advanced.open:
        with advanced:
            _advanced(method)
    checks = st.expander("Prompts to check with", icon=":material/checklist:", key="edit_checks", on_change="rerun")
    if checks.open:
        with checks:
            _checks()


@st.fragment
@told
def draw_run(done: progress.Done) -> None:
    """Run and Reset, and below them the work and how it failed; `done` as in progress.draw. A fragment of its own:
    the work's place in the queue is there before a whole page could be drawn.
    """
    if st.session_state.pop("edit_changed", False):
        st.rerun()
    with st.container(horizontal=True, gap="xsmall"):
        st.button(
            "Run this edit",
            type="primary",
            icon=":material/play_arrow:",
            shortcut="Ctrl+Enter",
            disabled=progress.live("edit") is not None,
            key="edit_run",
            on_click=_run,
        )
        st.button("Reset", icon=":material/restart_alt:", on_click=reset, key="edit_reset")
    _complaint("")
    progress.failure("edit")
    progress.draw("edit", done)


def _advanced(method: MethodInfo | None) -> None:
    if method is not None:
        method_picker.draw_knobs(method)
    st.number_input(
        "Seed",
        min_value=0,
        max_value=2**31 - 1,
        step=1,
        key="edit_seed",
        help="The same question with the same seed gives the same numbers.",
        persist_state="session",
    )
    _complaint("edit_seed")


def _checks() -> None:
    st.caption(
        "One prompt per line, used to measure, never to fit. Left empty, a fact the model is known to hold brings "
        "its own."
    )
    st.text_area(
        "Paraphrases: the same question in other words", key="edit_paraphrases", height=110, persist_state="session"
    )
    _complaint("edit_paraphrases")
    st.text_area(
        "Neighbours: other subjects, must not change", key="edit_neighbours", height=110, persist_state="session"
    )
    _complaint("edit_neighbours")


def warm_up() -> None:
    """Start loading the chosen model in the background, so that the first edit doesn't wait for it."""
    desk = service()
    name = st.session_state.get("edit_model")
    if name != st.session_state.get("edit_warmed") and any(
        info.name == name and info.available for info in desk.models()
    ):
        st.session_state["edit_warmed"] = name
        desk.warm_up(str(name))


def _model(desk: Service) -> ModelInfo:
    infos = {info.name: info for info in desk.models()}
    if st.session_state.get("edit_model") not in infos:
        st.session_state["edit_model"] = next(iter(infos))

    def label(name: str) -> str:
        info = infos[name]
        return info.title if info.available else f"{info.title} (not here)"

    name = st.selectbox("Model", list(infos), format_func=label, key="edit_model", persist_state="session")
    info = infos[name]
    if not info.available:
        st.warning(f"{md(info.reason)} {md(info.how)}", icon=":material/cloud_off:")
    _complaint("edit_model")
    return info


def _start_from(desk: Service, model: ModelInfo) -> None:
    examples = {f"example:{example.name}": example for example in desk.examples()}
    facts = _sampled_facts(model.name) if model.embedded else {}

    def label(key: str) -> str:
        # Labels must differ: the browser sends back the label, not its place.
        if key in examples:
            return f"{examples[key].title} ({examples[key].outcome})"
        return str(facts.get(key, {}).get("label", key))

    def picked() -> None:
        key = st.session_state.get("edit_start")
        if key in examples:
            lay_down(draft_of_plan(examples[key].report().question))
        elif key in facts:
            lay_down({**FIELDS, **facts[key]["draft"], "edit_seed": st.session_state.get("edit_seed", 0)})

    def surprise() -> None:
        request = desk.suggest(st.session_state["edit_model"], random.SystemRandom().randrange(2**31))
        lay_down(draft_of_request(request))
        st.session_state["edit_start"] = None

    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        st.selectbox(
            "Start from",
            [*examples, *facts],
            index=None,
            format_func=label,
            placeholder="an example or a fact",
            key="edit_start",
            on_change=picked,
        )
        if model.embedded:
            st.button(
                "Surprise me",
                icon=":material/casino:",
                on_click=surprise,
                key="edit_surprise",
                help="A random false fact.",
            )


@st.cache_data(max_entries=4, show_spinner=False)
def _sampled_facts(model: str) -> dict[str, dict[str, Any]]:
    """Some facts the model knows, the same ones every time: key -> label and the form's fields."""
    facts = service().facts(model)
    chosen = sorted(random.Random(0).sample(range(len(facts)), min(SAMPLED_FACTS, len(facts))))
    result: dict[str, dict[str, Any]] = {}
    for index in chosen:
        fact = facts[index]
        template = fact["templates"]["edit"][0]
        result[f"fact:{index}"] = {
            "label": f"{template.replace('{}', fact['subject'])} {fact['object']}",
            "draft": {"edit_subject": fact["subject"], "edit_template": template, "edit_true": fact["object"]},
        }
    return dict(sorted(result.items(), key=lambda item: item[1]["label"]))


def _preview() -> None:
    subject, template = st.session_state["edit_subject"].strip(), st.session_state["edit_template"].strip()
    new, true = st.session_state["edit_new"].strip(), st.session_state["edit_true"].strip()
    with st.container(border=True, gap=None):
        st.caption("The new fact reads")
        if not template:
            st.markdown(":gray[Fill in the template to see the sentence.]")
            return
        mark = f":primary-background[{md(subject or 'subject')}]"
        sentence = md(template).replace(r"\{\}", mark, 1)
        struck = f" :gray[~~{md(true)}~~]" if true else ""
        st.markdown(f"{sentence}{struck} **{md(new or '…')}**")


def _complaint(place: str) -> None:
    problem: Problem | None = st.session_state.get("edit_problem")
    if problem is not None and problem.place == place:
        st.error(f"**{md(problem.what)}** {md(problem.next_step)}", icon=":material/edit:")


def _lines(key: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in str(st.session_state.get(key, "")).splitlines() if line.strip())


def _run() -> None:
    """Ask for what the form says. Called before anything is drawn, so that the work shows at once; what else it changes
    on the page (a stored answer, a complaint at a field, an old one gone) needs the whole page.
    """
    desk = service()
    changed = st.session_state.pop("edit_problem", None) is not None
    try:
        model, name = str(st.session_state["edit_model"]), st.session_state.get("edit_method")
        if not any(info.name == model and info.available for info in desk.models()):
            raise BadInput("model", f"{model} is not on this machine.", "Choose another, or add it as said above.")
        method = next((info for info in desk.methods(model) if info.name == name), None)
        if method is None:
            raise BadInput("method", "None that can edit this model is chosen.", "Choose a method or another model.")
        plan = desk.plan(
            model,
            method.name,
            st.session_state["edit_subject"],
            st.session_state["edit_template"],
            st.session_state["edit_new"],
            target_true=st.session_state["edit_true"],
            paraphrases=_lines("edit_paraphrases"),
            neighbours=_lines("edit_neighbours"),
            params=method_picker.knob_values(method),
            seed=int(st.session_state["edit_seed"]),
        )
        start(plan)
    except BadInput as error:
        place = PLACES.get(error.field, "")
        st.session_state["edit_problem"] = Problem(place, error.what, error.next_step)
        if place in FOLDED:
            st.session_state[FOLDED[place]] = True
    except ActionableError as error:
        st.session_state["edit_problem"] = Problem("", error.what, error.next_step)
    except Exception as error:
        st.session_state["edit_problem"] = Problem("", *unforeseen(error))
    st.session_state["edit_changed"] = changed or "edit_job" not in st.session_state


def _ask(desk: Service, model: ModelInfo) -> None:
    st.session_state.pop("edit_problem", None)
    subject, template = st.session_state["edit_subject"], st.session_state["edit_template"]
    try:
        # The rules for subject and template are those of a request; its objects don't matter to the question.
        prompt = EditRequest(subject, template, "?").prompt
        st.session_state["edit_ask"] = desk.ask(model.name, prompt, owner())
    except BadInput as error:
        st.session_state["edit_problem"] = Problem(PLACES.get(error.field, "edit_true"), error.what, error.next_step)
        st.rerun()
    except ActionableError as error:
        st.session_state["edit_problem"] = Problem("edit_true", error.what, error.next_step)
        st.rerun()


def _listen(desk: Service) -> None:
    """While a question to the model is open, look every half second; then hand its answer to the form."""
    job_id = st.session_state.get("edit_ask")
    if not job_id:
        return

    @st.fragment(run_every=0.5)
    @told
    def listening() -> None:
        try:
            view = desk.job(job_id, owner())
            answer = desk.answer(job_id, owner()) if view.state == "done" else None
        except ActionableError as error:
            st.session_state.pop("edit_ask", None)
            tell(error)
            return
        if answer is not None:
            st.session_state.pop("edit_ask", None)
            lay_down({"edit_true": first_object(answer.continuation)})
            st.rerun()
        if view.over:
            st.session_state.pop("edit_ask", None)
            if view.error is not None:
                st.error(f"**{md(view.error.what)}** {md(view.error.next_step)}", icon=":material/error:")
            return
        st.caption(":material/hourglass_top: Asking the model …")

    listening()


def first_object(continuation: str) -> str:
    """The object a continuation begins with: up to the first punctuation, at most four words."""
    words = re.split(r"[.,;:!?\n\"()]", continuation.strip(), maxsplit=1)[0].split()
    return " ".join(words[:4])[:MAX_TARGET]
