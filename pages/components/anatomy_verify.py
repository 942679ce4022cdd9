"""Verify a place: change what a cell names in the real model, and hold the effect against the predicted one."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from mega_core.errors import ActionableError
from mega_core.jobs import JobView
from mega_core.records import Report
from mega_core.summary import percent
from pages.components import anatomy_tables as rearranged
from pages.components import progress, view_charts
from pages.components.anatomy_place import Place
from pages.components.figure import About, figure
from pages.components.session import owner, service, tell
from pages.components.text import md, signed, token_label

SLOT = "verify"
KEPT = 12
CONTROLS = 10
ACTIONS = {
    "ablate": "Take it out",
    "scale": "Scale it",
    "patch": "Swap in the other state",
    "restore": "Put weights back",
}
ACTION_HELP = {
    "ablate": "What it writes at the last token becomes zero.",
    "scale": "What it writes is multiplied.",
    "patch": "It takes the value that it has in the other state of the model: unedited for edited, and the reverse.",
    "restore": "The edited matrix of this place is put back as it was; the rest of the edit stays.",
}
STATES = {"after": "Edited model", "before": "Base model"}
SITES = {"attn": "attn_out", "ffn": "mlp_down"}
ABOUT = About(
    "The effect on the log-probability of both objects' first tokens at the end of the edit prompt, in nats: predicted "
    "by the score, actual after the model ran with the place changed, and the mean of as many random places with one "
    "standard deviation.",
    "Predicted: the score's own formula with the final norm held fixed. Actual: an intervention in the running model; "
    "everything behind it reacts. Random places: the same kind and number in the same layers where there are enough.",
    "One prompt of one edit. A matrix has no prediction: it writes nothing of its own at the last token.",
)


def draw(report: Report, place: Place) -> None:
    """The form for one place, the work in progress, and what came out in this session for this run."""
    st.header("Verify", anchor=False)
    st.caption(
        f"Does {md(place.title)} do what its score says? It is changed in the running model, and the effect stands "
        "beside the predicted one and that of random places."
    )
    matrix = f"matrix:{place.layer}.{SITES[place.module]}" if place.module else ""
    actions = [action for action in ACTIONS if action != "restore" or matrix in rearranged.restorable(report)]
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        action = _control("Change", actions, ACTIONS, "anatomy_verify_action")
        state = "after" if action == "restore" else _control("In", list(STATES), STATES, "anatomy_verify_state")
        factor = 0.0
        if action == "scale":
            factor = st.number_input(
                "Factor", -100.0, 100.0, 0.5, 0.25, key="anatomy_verify_factor", width=120, persist_state="session"
            )
        live = progress.live(SLOT) is not None
        pressed = st.button(
            "Verify", icon=":material/science:", type="primary", key="anatomy_verify_go", disabled=live,
            help="A verification is at work already." if live else None,
        )  # fmt: skip
    st.caption(ACTION_HELP[action])
    if pressed:
        cells = matrix if action == "restore" else "+".join(place.cells)
        try:
            job = service().studies.start_verify(
                report.question, [cells], action, state, owner=owner(), factor=factor, controls=CONTROLS
            )
        except ActionableError as error:
            tell(error)
        else:
            progress.begin(SLOT, job)
    progress.draw(SLOT, done, first_time="The first verification after a start also loads the libraries and the model.")
    progress.failure(SLOT)
    _results(report)


def _control(label: str, options: list[str], names: dict[str, str], key: str) -> str:
    if st.session_state.get(key) not in options:
        st.session_state.pop(key, None)
    chosen = st.segmented_control(
        label, options, default=options[0], format_func=lambda one: names[one], key=key, required=True,
        persist_state="session",
    )  # fmt: skip
    return str(chosen or options[0])


def done(view: JobView) -> None:
    """Keep what came out with its run."""
    found = service().result(view.id, owner())
    digest = service().digest(found.question)
    every: dict[str, pd.DataFrame] = st.session_state.setdefault("anatomy_verified", {})
    tables = [every[digest]] if digest in every else []
    keys = ["cells", "action", "state", "candidate"]
    table = pd.concat([found.table, *tables], ignore_index=True).drop_duplicates(keys, ignore_index=True)
    every[digest] = table.head(2 * KEPT)
    if not found.receipt.restored:
        st.session_state["anatomy_verify_damaged"] = True


def _results(report: Report) -> None:
    table = st.session_state.get("anatomy_verified", {}).get(report.digest)
    if st.session_state.get("anatomy_verify_damaged"):
        st.error(
            "**The model was not given back as it was.** Restart the app before you go on.", icon=":material/error:"
        )
    if table is None or table.empty:
        return
    shown = table.assign(label=[_label(row) for row in table.itertuples()])
    last = table[(table["cells"] == table["cells"].iloc[0]) & (table["action"] == table["action"].iloc[0])]
    last = last[last["state"] == last["state"].iloc[0]]
    keep = [
        "cells", "action", "state", "candidate", "token", "predicted", "direct", "actual", "control", "control_sd",
        "controls", "prob_before", "prob_after", "rank_before", "rank_after",
    ]  # fmt: skip
    figure(
        "anatomy_verified_chart",
        view_charts.effects(shown),
        title="Predicted and actual effect",
        reading=sentence(last),
        table=table[keep],
        file=f"verified-{report.digest[:12]}",
        about=ABOUT,
        level=3,
    )


def _label(row: Any) -> str:
    """Short enough for a phone: "L5·H2 out · Rome"."""
    words = {"ablate": "out", "patch": "swapped", "restore": "back"}
    base = " (base)" if row.state == "before" else ""
    return f"{short(str(row.cells))} {words.get(row.action, row.action)}{base} · {token_label(str(row.token).strip())}"


def short(cells: str) -> str:
    """ "head:5.2" as "L5·H2", "attn:5+ffn:5" as "L5·Attn+L5·MLP"."""
    names = []
    for cell in cells.split("+"):
        kind, _, rest = cell.partition(":")
        layer, _, part = rest.partition(".")
        letter = {"attn": "Attn", "ffn": "MLP", "head": f"H{part}", "neuron": f"N{part}", "matrix": part}
        names.append(f"L{layer}·{letter.get(kind, rest)}")
    return "+".join(names)


def sentence(rows: pd.DataFrame) -> str:
    """What one verification found, of each object."""
    parts = []
    for row in rows.itertuples():
        moved = f"from {percent(float(row.prob_before))} to {percent(float(row.prob_after))}"  # type: ignore[arg-type]
        actual, predicted = float(row.actual), float(row.predicted)  # type: ignore[arg-type]
        text = f"“{str(row.token).strip()}” goes {moved}, {signed(actual)} nats"
        if row.has_prediction:
            text += f"; predicted {signed(predicted)} ({_verdict(predicted, actual)})"
        if int(row.controls):  # type: ignore[call-overload]
            text += f"; {row.controls} random places {signed(float(row.control))} on average"  # type: ignore[arg-type]
        parts.append(f"{text}.")
    return f"{short(str(rows['cells'].iloc[0]))}: {' '.join(parts)}"


def _verdict(predicted: float, actual: float) -> str:
    if max(abs(predicted), abs(actual)) < 0.05:
        return "next to nothing, as it is"
    if predicted * actual < 0:
        return "the other way round"
    small, large = sorted((abs(predicted), abs(actual)))
    if large <= 2 * small:
        return "about right"
    return "less happens" if abs(actual) < abs(predicted) else "more happens"
