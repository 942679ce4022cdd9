"""Choosing what a mask is trained on, and choosing one that is there. The form is a fragment: it redraws alone."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from mega_core.service.masks import FEWEST, MOST, PRUNED, KeptMask
from pages.components import progress
from pages.components.session import owner, service, told
from pages.components.text import md, seconds

SHOW = "mask_shown"
"""Session key of the mask that is looked at; in the address it is ?mask=."""
AUTOMATIC = -1


def shown() -> tuple[KeptMask | None, bool]:
    """The mask of the address, else the one last looked at; and whether the address named one that isn't here."""
    asked = st.query_params.get("mask")
    known = asked if asked is not None else st.session_state.get(SHOW)
    kept = service().masks.kept(known) if known else None
    if kept is not None:
        show(kept.id)
    return kept, asked is not None and kept is None


def show(mask_id: str) -> None:
    """Make this the mask that the page is about."""
    st.session_state[SHOW] = mask_id
    st.query_params["mask"] = mask_id


def name_of(kept: KeptMask) -> str:
    """ "ROME on atlas-gpt2: 100 edits, 30 % of layer 2 · 1a2b3c4d"."""
    return (
        f"{kept.method.upper()} on {kept.model}: {kept.edits} edits, {kept.pruned:.0%} of layer {kept.layer} · "
        f"{kept.id[:8]}"
    )


def choose(kept: KeptMask | None) -> None:
    """The masks that are here, in a list. Draws nothing when there is none."""
    every = {one.id: one for one in service().masks.listed()}
    if not every:
        return
    now = kept.id if kept is not None else None
    if st.session_state.get("mask_list") != now:
        st.session_state["mask_list"] = now
    st.selectbox(
        "Masks trained here",
        list(every),
        format_func=lambda mask_id: name_of(every[mask_id]),
        index=None,
        placeholder="open a mask",
        key="mask_list",
        on_change=_opened,
    )


def _opened() -> None:
    chosen = st.session_state.get("mask_list")
    if chosen:
        show(chosen)


@st.fragment
@told
def draw() -> None:
    """The form."""
    desk = service()
    models = {info.name: info for info in desk.models() if info.available}
    with st.container(border=True):
        st.header("Train a mask", anchor=False)
        if not models:
            st.warning("No model is on this machine. See the status page for how to get one.", icon=":material/block:")
            return
        model = st.selectbox(
            "Model",
            list(models),
            format_func=lambda name: models[name].title,
            key="mask_model",
            persist_state="session",
            help="Facts are drawn from the tables that ship with the teaching models; other models may not know them.",
        )
        editors = desk.masks.editors(model)
        if not editors:
            st.warning("No editor that a mask can read works on this model.", icon=":material/block:")
            return
        method = st.selectbox(
            "Editor",
            editors,
            format_func=str.upper,
            key="mask_method",
            persist_state="session",
            help="Editors whose changes are sums of few directions in the MLPs: that is what a mask reads.",
        )
        n = st.slider(
            "Edits to train on",
            FEWEST,
            MOST,
            100,
            step=10,
            key="mask_n",
            persist_state="session",
            help="Each is one random known fact, edited by itself. With few, a mask learns these edits and undoes "
            "little else: with 380 it undid 76 % of unseen facts, with 100 about half as many.",
        )
        percent = st.slider(
            "Share of the matrix that is cut",
            round(100 * PRUNED[0]),
            round(100 * PRUNED[1]),
            30,
            step=5,
            format="%d %%",
            key="mask_pruned",
            persist_state="session",
            help="The paper cuts 10 % of large models. In the small teaching models a mask of 10 % undoes few unseen "
            "edits, because their neurons share each edit more evenly; from 30 % on the paper's figures hold.",
        )
        layer = st.selectbox(
            "Layer",
            [AUTOMATIC, *desk.masks.layers(model, method)],
            format_func=lambda at: "automatic" if at == AUTOMATIC else f"layer {at}",
            key="mask_layer",
            help="Automatic: the lowest edited layer without whose MLP the model loses facts or language.",
        )
        seed = st.number_input("Seed", 0, 2**31 - 1, 0, key="mask_seed", persist_state="session")
        takes = desk.masks.seconds_estimate(model, method, n)
        st.caption(f"Takes about {seconds(takes)} here." if takes is not None else "Not timed on this model yet.")
        busy = progress.live("mask") is not None
        pressed = st.button(
            "Train this mask",
            type="primary",
            icon=":material/model_training:",
            disabled=busy,
            key="mask_train",
            width="stretch",
        )
        if pressed:
            _train(model, method, n, None if layer == AUTOMATIC else layer, percent / 100, seed)


def _train(model: str, method: str, n: int, layer: int | None, pruned: float, seed: int) -> None:
    """Open the mask when it is there, else queue its training."""
    masks = service().masks
    known = masks.mask_id(model, method, n, layer=layer, pruned=pruned, seed=seed)
    if masks.kept(known) is None:
        start(lambda: masks.start_training(model, method, n, owner(), layer=layer, pruned=pruned, seed=seed))
    else:
        show(known)
        st.rerun()


def start(queue: Callable[[], str], slot: str = "mask") -> None:
    """Queue work and watch it. Raises as the queue does."""
    progress.begin(slot, queue())
    st.rerun()


def empty() -> None:
    """What stands where a mask will be."""
    with st.container(border=True):
        st.header("One mask for many edits", anchor=False)
        st.markdown(
            "An editor such as ROME changes one matrix of the model for each fact. A mask sets a fixed share of that "
            "matrix to zero. It is trained on some edits, and then undoes edits **it has never seen**: the model says "
            "the original object again."
        )
        st.markdown(
            "Train one, or open one below. You will see which weights it cuts, which edits it undoes beside controls "
            "of the same size, what it costs the model, whether the model can still be edited, and what the attention "
            "heads say before and after."
        )
        st.caption("The teaching models here are small; the share of 30 % is theirs, not that of large models.")


def badges(kept: KeptMask) -> None:
    """What the mask is, in one line."""
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.badge(md(kept.method.upper()), color="gray")
        st.badge(md(kept.model), color="gray")
        st.badge(f"layer {kept.layer}, {kept.shape[0]} × {kept.shape[1]}", color="gray")
        st.badge(f"{kept.pruned:.0%} cut", color="gray", icon=":material/content_cut:")
        st.badge(f"{kept.edits} edits", color="gray")
        st.badge(f"mask {kept.id[:8]}", color="gray", icon=":material/tag:")
