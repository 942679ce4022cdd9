"""What can be done with the chosen runs: open, compare, export, delete, and judge one."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from mega_core.errors import ActionableError
from mega_core.notebook import VERDICTS, Entry
from mega_core.records import Report
from mega_core.service import MAX_COMPARED
from pages.components import run_files, runs_compare, runs_list
from pages.components.session import owner, service, tell, told
from pages.components.text import md, seconds

CHARTS_SECONDS = 2
"""What the pictures of one run take, about."""
EXPORT_AT_MOST = 50
NAMED = 8


def draw(picked: Sequence[Entry]) -> None:
    """The buttons for what is chosen, and what belongs to one run or to several."""
    if not picked:
        st.caption(
            f"Select a row to open, annotate, export or delete it, 2 to {MAX_COMPARED} rows to compare them. With the "
            "keyboard: arrow keys move, Space selects."
        )
        return
    several = len(picked) > 1
    with st.container(border=True):
        title = f"{len(picked)} runs selected" if several else runs_list.fact(picked[0])
        st.header(md(title), anchor=False)
        if not several:
            run = picked[0].run
            measured = f"Measured: {run.verdict or 'nothing'}."
            st.caption(md(f"{run.method.upper()} on {run.model}, {seconds(run.seconds)}. {measured}"))
        with st.container(horizontal=True):
            if not several and st.button("Open", type="primary", icon=":material/open_in_new:", key="runs_open"):
                st.switch_page("pages/edit.py", query_params={"run": picked[0].run.digest})
            if several:
                runs_compare.open_button(picked)
            _export(picked)
            if st.button("Delete", icon=":material/delete:", key="runs_delete"):
                _confirm(list(picked))
        if not several:
            _annotate(picked[0])
    if several:
        runs_compare.draw(picked)


def _export(picked: Sequence[Entry]) -> None:
    """One archive of all chosen runs."""
    with st.popover("Export", icon=":material/download:", key="runs_export"):
        _archive(picked)


@st.fragment  # Streamlit drops a file that is made on demand at each redraw: the shorter one is, the fewer presses fail
@told
def _archive(picked: Sequence[Entry]) -> None:
    desk = service()
    parts = st.pills(
        "What to put in",
        list(run_files.PARTS),
        selection_mode="multi",
        default=["run.json", "tables"],
        format_func=lambda part: f"{part}: {run_files.PARTS[part]}",
        key="runs_parts",
    )
    chosen = picked[:EXPORT_AT_MOST]
    if len(picked) > len(chosen):
        st.caption(f"The first {EXPORT_AT_MOST} of {len(picked)} go in.")
    if "charts" in parts or "report.html" in parts:
        st.caption(f"Drawing takes about {seconds(CHARTS_SECONDS * len(chosen))}.")

    def found() -> list[Report]:
        return [report for entry in chosen if (report := desk.cached(entry.run.digest)) is not None]

    index = runs_list.list_csv(chosen)
    st.download_button(
        f"Download {len(chosen)} run{'' if len(chosen) == 1 else 's'}",
        data=lambda: run_files.several_zip(found(), parts, index),
        file_name="runs.zip" if len(chosen) > 1 else f"run-{chosen[0].run.digest[:12]}.zip",
        mime="application/zip",
        icon=":material/download:",
        on_click="ignore",
        type="primary",
        disabled=not parts,
        key="runs_zip",
    )
    st.caption("A folder for each run, and the list of them. A run whose result was cleared is in the list only.")


@st.dialog("Delete from your list?")
def _confirm(picked: list[Entry]) -> None:
    """Ask before deleting, and say what is lost."""
    mine, desk = owner(), service()
    st.markdown(f"**{len(picked)} run{'' if len(picked) == 1 else 's'}** will leave your list:")
    st.markdown("\n".join(f"- {md(runs_list.fact(entry))}" for entry in picked[:NAMED]))
    if len(picked) > NAMED:
        st.caption(f"and {len(picked) - NAMED} more.")
    notes = sum(any(note.author == mine for note in entry.notes) for entry in picked)
    verdicts = sum(any(verdict.author == mine for verdict in entry.verdicts) for entry in picked)
    tags = sum(bool(entry.tags) for entry in picked)
    brought = len({entry.run.digest for entry in picked} & desk.sharing.imported())
    lost = [
        f"{count} {what}{'' if count == 1 else 's'}"
        for count, what in ((notes, "note"), (verdicts, "verdict"), (tags, "set of tags"))
        if count
    ]
    st.caption(
        f"{'Lost with them: ' + ', '.join(lost) + '. ' if lost else ''}This can't be undone. Running the same edit "
        "again gives the same numbers."
    )
    if brought:
        st.caption(f"{brought} imported: only the file it came from brings it back.")
    with st.container(horizontal=True):
        if st.button(
            "Delete", type="primary", icon=":material/delete:", key="confirm_delete", on_click=_delete,
            args=(tuple(entry.run.digest for entry in picked),),
        ):  # fmt: skip
            st.rerun()
        if st.button("Keep", key="confirm_keep"):
            st.rerun()


def _delete(digests: tuple[str, ...]) -> None:
    desk = service()
    try:
        for digest in digests:
            desk.delete_run(digest, owner())
            desk.sharing.forget(digest)
    except ActionableError as error:
        tell(error)


def _annotate(entry: Entry) -> None:
    """Note, tags and verdict of one run."""
    desk, mine, short = service(), owner(), entry.run.digest[:12]
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
        before = next((v for v in entry.verdicts if v.author == mine), None)
        given = (before.verdict or None) if before else None
        own = right.segmented_control("Your verdict", VERDICTS, default=given, key=f"verdict_{short}")
        saved = st.form_submit_button("Save", icon=":material/save:", key=f"save_{short}")
    if not saved:
        return
    try:
        desk.note(entry.run.digest, note, mine)
        desk.tags(entry.run.digest, [tag for tag in (t.strip() for t in tags.split(",")) if tag], mine)
        failure, severity = (before.failure, before.severity) if before else ("", 0)  # what a review said stays
        desk.verdict(entry.run.digest, str(own or ""), failure, severity, author=mine)
    except ActionableError as error:
        tell(error)
    else:
        st.toast("Saved", icon=":material/check:")
        st.rerun()
