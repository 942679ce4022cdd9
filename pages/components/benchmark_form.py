"""What a new benchmark measures: the form, the file that a person brings, and what would come of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import streamlit as st

from mega_core.errors import ActionableError
from mega_core.service import ModelInfo
from mega_core.service.benchmark_tables import MODES
from mega_core.service.benchmarks import MAX_UPLOAD, Outlook, Setup
from pages.components.benchmark_list import go_to
from pages.components.session import service, tell, told
from pages.components.text import md, seconds

MOST_SEED = 2**31 - 1
MOST_CASES = 1000
SUFFIXES = ["json", "jsonl", "csv"]
OWN, REPORTED, DRAWN = "A file of yours", "The reported edits", "Other edits, drawn by a seed"


@dataclass(frozen=True, slots=True)
class Wanted:
    """The form as it stands: plain values, so that what it leads to can be remembered."""

    model: str
    methods: tuple[str, ...]
    builtin: str
    """"builtin:..." or empty."""
    upload: tuple[str, str, str]
    """Id, name and format of the uploaded file; empty texts without one."""
    limit: int | None
    protocols: tuple[str, ...]
    mode: str
    every: int
    seed: int
    control: bool
    apart: bool


def draw() -> None:
    """The form, and under it what would be measured."""
    st.header("New benchmark", anchor=False)
    with st.expander("Configure", icon=":material/tune:", expanded=not service().benchmarks.all()):
        _form()


@st.fragment
@told
def _form() -> None:
    left, right = st.columns(2, gap="large")
    with left:
        model = _model()
        methods, control = _methods(model)
    with right:
        builtin, upload, limit, apart = _dataset()
    with left:
        protocols = _protocols()
    with right:
        mode, every, seed = _how()
    wanted = Wanted(
        model.name, methods, builtin, upload, limit, protocols, mode, every, seed, control, apart,
    )  # fmt: skip
    st.subheader("What will be measured", anchor=False)
    outlook = _preview(wanted)
    start = st.button(
        "Start", type="primary", icon=":material/play_arrow:", key="bench_start",
        disabled=outlook is None or not model.available,
    )  # fmt: skip
    if start and outlook is not None:
        _start(wanted, outlook.known_as)


# The fields ----------------------------------------------------------------------------------------------------------


def _model() -> ModelInfo:
    infos = {info.name: info for info in service().models()}

    def label(name: str) -> str:
        info = infos[name]
        size = ", small teaching model" if info.embedded else ""
        return f"{info.title}{size}" if info.available else f"{info.title} (not here)"

    if st.session_state.get("bench_model") not in infos:
        st.session_state["bench_model"] = next(iter(infos))
    info = infos[st.selectbox("Model", list(infos), format_func=label, key="bench_model", persist_state="session")]
    if not info.available:
        st.warning(f"{md(info.reason)} {md(info.how)}", icon=":material/cloud_off:")
    return info


def _methods(model: ModelInfo) -> tuple[tuple[str, ...], bool]:
    infos = {info.name: info for info in service().methods(model.name)}
    usable = [name for name, info in infos.items() if info.unsupported is None]
    everyone = st.toggle(
        f"All {len(usable)} methods that can edit this model", key="bench_everyone", persist_state="session"
    )
    chosen = [name for name in st.session_state.get("bench_methods", usable[:2]) if name in usable]
    if chosen != st.session_state.get("bench_methods"):  # set on every run, it would undo a choice made meanwhile
        st.session_state["bench_methods"] = chosen

    def label(name: str) -> str:
        estimate = infos[name].seconds_estimate
        return infos[name].title if estimate is None else f"{infos[name].title}, {seconds(estimate)} an edit"

    picked = st.multiselect(
        "Methods", usable, format_func=label, key="bench_methods", disabled=everyone, persist_state="session",
        help="The unedited model is always measured beside them.",
    )  # fmt: skip
    for info in infos.values():
        if info.unsupported is not None:
            st.caption(f":material/block: {md(info.title)}: not for this model: {md(info.unsupported)}")
    control = st.toggle(
        "With the methods' own controls", key="bench_control", persist_state="session",
        help="What a method offers to check itself by, such as its gate always open or a random direction, is measured "
        "as an entrant of its own.",
    )  # fmt: skip
    return ("all",) if everyone else tuple(picked), control


def _dataset() -> tuple[str, tuple[str, str, str], int | None, bool]:
    source = st.selectbox("Dataset", [REPORTED, DRAWN, OWN], key="bench_source", persist_state="session")
    builtin, upload = "", ("", "", "")
    if source == REPORTED:
        builtin = "builtin:reported"
        st.caption("Built in: edits of facts that the teaching models know, the ones that results are reported on.")
    elif source == DRAWN:
        draw = st.number_input("Seed of the draw", 0, 10**9 - 1, 1, step=1, key="bench_draw", persist_state="session")
        builtin = f"builtin:{draw}"
        st.caption("Built in: edits of facts that the teaching models know, one per subject.")
    else:
        upload = _upload()
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        limit = st.number_input(
            "Cases at most", 1, MOST_CASES, 20, step=10, key="bench_limit", persist_state="session",
            help="The first so many of the dataset. A case is one record: one edit, or several made together.",
        )  # fmt: skip
        apart = st.toggle(
            "Only cases apart", key="bench_apart", persist_state="session",
            help="Leaves out each case that asks about a subject that another one edits: in batch and sequential mode "
            "its answers would change rightly.",
        )  # fmt: skip
    return builtin, upload, int(limit), apart


def _upload() -> tuple[str, str, str]:
    """The file that a person brings: kept by its digest, told line by line what can't be used."""
    desk = service().benchmarks
    formats = {"auto": "Told by its records", **dict(desk.formats())}
    format_ = st.selectbox(
        "Format", list(formats), format_func=lambda name: formats[name], key="bench_format", persist_state="session"
    )
    file = st.file_uploader(
        "File", type=SUFFIXES, key="bench_file", max_upload_size=MAX_UPLOAD // 2**20,
        help="JSON, JSON Lines or CSV, up to 5 MB: CounterFact, zsRE, EasyEdit, RippleEdits, MQuAKE, or a table with "
        "the columns subject, prompt and target_new.",
    )  # fmt: skip
    if file is not None and st.session_state.get("bench_file_id") != (file.file_id, format_):
        st.session_state["bench_file_id"] = (file.file_id, format_)
        st.session_state.pop("bench_upload", None)
        st.session_state.pop("bench_upload_trouble", None)
        try:
            mark, _ = desk.upload(file.getvalue(), file.name, format_)
            st.session_state["bench_upload"] = (mark, file.name, format_)
        except ActionableError as error:
            st.session_state["bench_upload_trouble"] = error
    trouble = st.session_state.get("bench_upload_trouble")
    if trouble is not None:
        tell(trouble)
    kept: tuple[str, str, str] | None = st.session_state.get("bench_upload")
    if kept is None:
        return "", "", ""
    try:
        count, called, problems = _read(*kept)
    except ActionableError as error:
        tell(error)
        return "", "", ""
    st.caption(f":material/check: {md(kept[1])}: {count:,} cases read as {md(formats.get(called, called))}.")
    if problems:
        st.warning(f"{_count(len(problems), 'record')} can't be used; the rest is measured.", icon=":material/rule:")
        _listed(problems)
    return kept


@st.cache_data(max_entries=16, show_spinner="Reading the file …")
def _read(mark: str, name: str, format_: str) -> tuple[int, str, tuple[tuple[int, str, str], ...]]:
    found = service().benchmarks.uploaded(mark, name, format_)
    return len(found.cases), found.format, tuple((one.line, one.record, one.text) for one in found.problems)


def _listed(problems: Sequence[tuple[int, str, str]]) -> None:
    st.dataframe(
        pd.DataFrame(problems, columns=["line", "record", "reason"]),
        hide_index=True,
        height=min(36 * (len(problems) + 1) + 3, 220),
        column_config={
            "line": st.column_config.NumberColumn("Line", width=60, format="%d"),
            "record": st.column_config.TextColumn("Record", width=80),
            "reason": st.column_config.TextColumn("Why, and what to do"),
        },
        alt="Records of the dataset that can't be used",
    )


def _protocols() -> tuple[str, ...]:
    offered = {one.name: one for one in service().benchmarks.scorings()}
    chosen = st.multiselect(
        "Protocols", list(offered), format_func=lambda name: offered[name].title, key="bench_protocols",
        placeholder="those that fit the dataset", persist_state="session",
        help="Published ways of scoring. Our own, success forced and as generated text, is always beside them.",
    )  # fmt: skip
    for name in chosen:
        st.caption(f"**{md(offered[name].title)}**: {md(offered[name].summary)} {md(offered[name].paper)}")
    return tuple(chosen)


def _how() -> tuple[str, int, int]:
    mode = st.segmented_control(
        "Mode", list(MODES), default="single", format_func=str.capitalize, key="bench_mode", required=True,
        persist_state="session",
    )  # fmt: skip
    mode = mode or "single"
    st.caption(f"{MODES[mode].capitalize()}.")
    with st.container(horizontal=True, gap="small"):
        every = 0
        if mode == "sequential":
            every = st.number_input(
                "Ask every … edits", 0, MOST_CASES, 5, step=1, key="bench_every", persist_state="session",
                help="0: only at the end.",
            )  # fmt: skip
        seed = st.number_input("Seed", 0, MOST_SEED, 0, step=1, key="bench_seed", persist_state="session")
    return mode, int(every), int(seed)


# What would come of it -----------------------------------------------------------------------------------------------


def _preview(wanted: Wanted) -> Outlook | None:
    """Say what the form leads to; None where it can't be measured as it stands."""
    if not wanted.builtin and not wanted.upload[0]:
        st.info("Choose a file to see what would be measured.", icon=":material/upload_file:")
        return None
    if not wanted.methods:
        st.info("Choose at least one method.", icon=":material/checklist:")
        return None
    try:
        found = _outlook(wanted)
    except ActionableError as error:
        tell(error)
        return None
    titles = {one.name: one.title for one in service().benchmarks.scorings()}
    methods = len(found.methods) - 1
    edits = (
        f"{found.cases:,} cases" if found.edits == found.cases else f"{found.cases:,} cases with {found.edits:,} edits"
    )
    st.markdown(
        f"**{found.measurements:,} measurements**: {_count(methods, 'method')} and the unedited model on {edits}, "
        f"under {md(', '.join(titles[name] for name in found.protocols))}."
    )
    if found.seconds is not None:
        rest = f", and {md(', '.join(found.unknown))} that nobody has timed here yet" if found.unknown else ""
        st.caption(f":material/schedule: About {seconds(found.seconds)}{rest}. Others' questions go in between.")
    else:
        st.caption(":material/schedule: Nobody has timed these methods here yet; the time left is shown once it runs.")
    for name, reason, count in found.left_out:
        st.caption(f":material/block: {md(titles[name])}: {_count(count, 'case')} left out: {md(reason)}")
    for label, reason in found.unsupported:
        st.caption(f":material/block: {md(label)}: not measured: {md(reason)}")
    if found.apart:
        st.caption(
            f":material/block: {_count(found.apart, 'case')} passed over: another one asks about their subjects."
        )
    if found.problems and wanted.builtin:
        _listed(found.problems)
    if found.known_as:
        st.caption(":material/history: This benchmark is on this machine already: Start goes on with it, or opens it.")
    return found


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def _outlook(wanted: Wanted) -> Outlook:
    times = tuple((info.name, info.seconds_estimate) for info in service().methods(wanted.model))
    names = tuple(one.name for one in service().benchmarks.all())  # whether it is there already may change
    return _planned(wanted, times, names)


@st.cache_data(max_entries=32, show_spinner="Looking at the cases …", hash_funcs={Wanted: repr})
def _planned(wanted: Wanted, times: tuple[tuple[str, float | None], ...], names: tuple[str, ...]) -> Outlook:
    del names
    desk = service().benchmarks
    return desk.outlook(_setup(wanted), dict(times))


def _setup(wanted: Wanted) -> Setup:
    desk = service().benchmarks
    data = desk.uploaded(*wanted.upload) if wanted.upload[0] else wanted.builtin
    return desk.plan(
        wanted.model, wanted.methods, data, limit=wanted.limit, protocols=wanted.protocols, mode=wanted.mode,
        every=wanted.every, seed=wanted.seed, control=wanted.control, apart=wanted.apart,
    )  # fmt: skip


def _start(wanted: Wanted, known_as: str) -> None:
    desk = service().benchmarks
    try:
        name = known_as if known_as and desk.sweep(known_as).state == "done" else desk.start(_setup(wanted))
    except ActionableError as error:
        tell(error)
        return
    go_to(name)
    st.rerun()
