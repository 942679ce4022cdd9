"""Runs: everything you asked, to find, open, judge, export or delete."""

import json

import pandas as pd
import streamlit as st

from mega_core.errors import ActionableError
from mega_core.notebook import VERDICTS, Entry
from pages.components import frame
from pages.components.session import owner, service, tell
from pages.components.text import csv_bytes, md, seconds

frame.enter()
desk = service()
mine = owner()
PAGE = 200


def row(entry: Entry) -> dict[str, object]:
    """One line of the table."""
    run = entry.run
    verdicts = [v.verdict for v in entry.verdicts if v.author == mine]
    notes = [note.text for note in entry.notes if note.author == mine]
    return {
        "when": run.created,
        "fact": f"{run.template.replace('{}', run.subject)} {run.target_new}",
        "method": run.method.upper(),
        "model": run.model,
        "measured": run.verdict,
        "verdict": verdicts[0] if verdicts else "",
        "tags": list(entry.tags),
        "note": notes[0] if notes else "",
        "seconds": run.seconds,
        "run": run.digest[:8],
    }


@st.dialog("Delete this run?")
def confirm(entry: Entry) -> None:
    """Ask before deleting."""
    st.markdown(f"{md(entry.run.template.replace('{}', entry.run.subject))} **{md(entry.run.target_new)}**")
    st.caption(
        "It leaves your list with its notes and verdict. This can't be undone; running the same edit again gives the "
        "same numbers."
    )
    with st.container(horizontal=True):
        if st.button("Delete", type="primary", icon=":material/delete:", key="confirm_delete"):
            desk.delete_run(entry.run.digest, mine)
            st.session_state.pop("runs_table", None)
            st.rerun()
        if st.button("Keep", key="confirm_keep"):
            st.rerun()


st.title("Runs", anchor=False)
if desk.count_runs(session=mine) == 0:
    with st.container(border=True):
        st.header("No runs yet", anchor=False)
        st.markdown("Each edit you run or open is listed here with its verdict, to annotate, compare and export.")
        if st.button("Make an edit", type="primary", icon=":material/edit_note:"):
            st.switch_page("pages/edit.py")
    st.stop()

choices = desk.run_choices()
with st.container(horizontal=True, vertical_alignment="bottom"):
    text = st.text_input(
        "Find",
        key="runs_text",
        placeholder="words of the fact",
        icon=":material/search:",
        live="300ms",
        type="search",
        persist_state="session",
    )
    model = st.selectbox("Model", choices.get("model", ()), index=None, placeholder="any", key="runs_model", width=200)
    method = st.selectbox(
        "Method", choices.get("method", ()), index=None, placeholder="any", key="runs_method", width=160
    )
    verdict = st.selectbox("Verdict", VERDICTS, index=None, placeholder="any", key="runs_verdict", width=160)

entries = desk.runs(
    text=text or "", model=model or "", method=method or "", verdict=verdict or "", session=mine, limit=PAGE
)
if not entries:
    st.info("No run matches. Clear a filter to see more.", icon=":material/filter_alt_off:")
    st.stop()

rows = pd.DataFrame([row(entry) for entry in entries])
event = st.dataframe(
    rows,
    hide_index=True,
    key="runs_table",
    on_select="rerun",
    selection_mode="single-row",
    column_config={
        "when": st.column_config.DatetimeColumn("When", format="distance", width=135),
        "fact": st.column_config.TextColumn("Edited to say", width=330),
        "method": st.column_config.TextColumn("Method", width=80),
        "model": st.column_config.TextColumn("Model", width=110),
        "measured": st.column_config.TextColumn(
            "Measured", width=85, help="What the numbers say: works, leaks, narrow or fails."
        ),
        "verdict": st.column_config.TextColumn("Yours", width=75, help="Your own verdict."),
        "tags": st.column_config.ListColumn("Tags", width=110),
        "note": st.column_config.TextColumn("Note", width=150),
        "seconds": st.column_config.NumberColumn("Took", format="%.1f s", width=70),
        "run": st.column_config.TextColumn("Run", width=80),
    },
    alt="Your runs",
)
with st.container(horizontal=True):
    st.download_button(
        "All shown as CSV",
        data=lambda: csv_bytes(rows.assign(tags=rows["tags"].map(", ".join))),
        file_name="runs.csv",
        mime="text/csv",
        icon=":material/table:",
        on_click="ignore",
        key="runs_csv",
    )
    st.download_button(
        "All shown as JSON",
        data=lambda: json.dumps(
            json.loads(rows.assign(run=[e.run.digest for e in entries]).to_json(orient="records", date_format="iso")),
            indent=1,
        ),
        file_name="runs.json",
        mime="application/json",
        icon=":material/data_object:",
        on_click="ignore",
        key="runs_json",
    )

picked = event["selection"]["rows"]
if not picked or picked[0] >= len(entries):
    st.caption("Select a row to open, annotate or delete it.")
    st.stop()

entry = entries[picked[0]]
short = entry.run.digest[:12]
with st.container(border=True):
    st.header(f"{md(entry.run.template.replace('{}', entry.run.subject))} {md(entry.run.target_new)}", anchor=False)
    st.caption(
        md(
            f"{entry.run.method.upper()} on {entry.run.model}, {seconds(entry.run.seconds)}. Measured: "
            f"{entry.run.verdict or 'nothing'}."
        )
    )
    with st.form(f"annotate_{short}", border=False):
        left, right = st.columns([2, 1], gap="medium")
        note = left.text_area(
            "Note",
            value=next((n.text for n in entry.notes if n.author == mine), ""),
            height=110,
            max_chars=10_000,
            key=f"note_{short}",
        )
        tags = right.text_input("Tags, separated by commas", value=", ".join(entry.tags), key=f"tags_{short}")
        before = next((v.verdict for v in entry.verdicts if v.author == mine), None)
        own = right.segmented_control("Your verdict", VERDICTS, default=before, key=f"verdict_{short}")
        saved = st.form_submit_button("Save", icon=":material/save:", key=f"save_{short}")
    if saved:
        try:
            desk.note(entry.run.digest, note, mine)
            desk.tags(entry.run.digest, [tag for tag in (t.strip() for t in tags.split(",")) if tag])
            desk.verdict(entry.run.digest, own or "", author=mine)
        except ActionableError as error:
            tell(error)
        else:
            st.toast("Saved", icon=":material/check:")
            st.rerun()
    with st.container(horizontal=True):
        if st.button("Open", type="primary", icon=":material/open_in_new:", key="runs_open"):
            st.switch_page("pages/edit.py", query_params={"run": entry.run.digest})
        if st.button("Delete", icon=":material/delete:", key="runs_delete"):
            confirm(entry)
