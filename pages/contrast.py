"""Success against failure: what edits that work have in common, and the layers that follow from it."""

import streamlit as st

from mega_core.errors import ActionableError
from mega_core.jobs import JobView
from mega_core.service.contrasted import Contrasted
from pages.components import contrast_form, contrast_view, frame
from pages.components.session import owner, service, tell
from pages.components.text import clip, md

frame.enter()
desk = service()


def done(view: JobView) -> None:
    """The study is there: show it."""
    st.query_params["study"] = str(desk.result(view.id, owner()))


st.title("Success against failure", anchor=False)
st.caption(
    "Many edits of one model, by several editors: which layers move when an edit works, how that differs from edits "
    "that fail, and where MEGA can steer because of it."
)

asked = st.query_params.get("study")
study: Contrasted | None = None
try:
    study = desk.studies.contrasted(asked) if asked else None
    if asked and study is None:
        st.warning(
            "The study of this link is not stored here: it was made elsewhere or has been cleared. Running it again "
            "with the same settings gives the same numbers.",
            icon=":material/link_off:",
        )
except ActionableError as error:
    tell(error)

models = {info.name: info for info in desk.models()}
if study is not None and study.region.model in models:
    st.session_state["contrast_model"] = study.region.model
elif st.session_state.get("contrast_model") not in models:
    st.session_state["contrast_model"] = next(iter(models))


def other_model() -> None:
    """A study belongs to its model."""
    st.query_params.pop("study", None)


def other_study() -> None:
    """Open what was picked."""
    picked = str(st.session_state.get("contrast_study") or "")
    if picked:
        st.query_params["study"] = picked
    else:
        st.query_params.pop("study", None)


left, right = st.columns([1, 2], gap="small")
with left:
    name = st.selectbox(
        "Model",
        list(models),
        format_func=lambda one: models[one].title if models[one].available else f"{models[one].title} (not here)",
        key="contrast_model",
        on_change=other_model,
    )
shipped = desk.studies.shipped(name)
with right:
    there = {row["id"]: row for row in desk.studies.studies(name, owner())}
    if study is not None and study.id not in there:  # somebody else's, by its link
        there[study.id] = {"source": study.source, "methods": tuple(study.region.counts), "edits": study.region.edits,
                           "made": study.made}  # fmt: skip
    choices = ([""] if shipped is not None else []) + list(there)

    def label(one: str) -> str:
        """What a study is, in a line; no two alike."""
        if not one:
            return f"Shipped with the model ({shipped.region.edits} edits)" if shipped is not None else ""
        row = there[one]
        whose = "my runs, " if row["source"] == "mine" else ""
        return f"{whose}{', '.join(row['methods'])}: {row['edits']} edits, {row['made'][:16]} · {one[:8]}"

    if choices:
        current = study.id if study is not None else choices[0]
        st.session_state["contrast_study"] = current
        st.selectbox("Study", choices, format_func=label, key="contrast_study", on_change=other_study)
        if study is None and current:
            study = desk.studies.contrasted(current)

shown = study or shipped
if shown is not None:
    contrast_view.draw(shown, shipped)
    try:
        contrast_view.send(shown)
    except ActionableError as error:
        tell(error)
else:
    st.info(
        f"No study of {md(clip(models[name].title, 60))} is here yet. Run one below: you will see C, D and K by layer "
        "with intervals for each editor, the layers with most leverage, and whether the published pattern holds.",
        icon=":material/balance:",
    )
contrast_form.draw(models[name], done)
