"""Status: what runs here, what it promises, the words it uses, and its limits."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import streamlit as st

from mega_core.service import Status
from pages.components import frame, status_check
from pages.components.session import service, told
from pages.components.text import md, seconds
from pages.components.words import GLOSSARY, LIMITS, PRIVACY

frame.enter()
desk = service()
state = desk.status()

PACKAGES = ("torch", "transformers", "safetensors", "streamlit", "altair", "pandas", "numpy")


def size(count: int) -> str:
    """Bytes as people read them: "12.3 MB"."""
    return f"{count / 2**20:.1f} MB" if count < 2**30 else f"{count / 2**30:.2f} GB"


@st.cache_data(show_spinner=False)
def versions() -> list[dict[str, str]]:
    """The libraries of this server; they can't change while it runs."""
    rows = [{"package": "python", "version": platform.python_version()}]
    for package in PACKAGES:
        try:
            rows.append({"package": package, "version": version(package)})
        except PackageNotFoundError:
            rows.append({"package": package, "version": "not installed"})
    return rows


def numbers(status: Status) -> Iterator[tuple[str, str]]:
    """Memory, queue, cache and history, as rows of a table."""
    yield "Memory of this process", size(status.memory_bytes) if status.memory_bytes else "not known"
    for gpu in status.gpus:
        yield f"GPU memory, {gpu.name}", f"{size(gpu.used)} of {size(gpu.total)}"
    yield "Running now", str(status.running)
    yield "Waiting", f"{status.waiting} of {status.max_waiting}"
    yield "Questions per person at a time", str(status.per_session)
    yield "Time limit of an edit", seconds(status.job_seconds)
    store = status.store
    yield "Cache", f"{size(store.bytes)} of {size(status.store_limit)}"
    yield "Cache entries", f"{store.entries:,}, on {store.mode}"
    asked = store.hits + store.misses
    share = f" ({store.hits / asked:.0%})" if asked else ""
    yield "Cache hits since the start", f"{store.hits:,} of {asked:,}{share}"
    yield "Cache entries found damaged", f"{store.quarantined:,}"
    yield "Runs in the history", f"{status.notebook.runs:,}"
    yield "Database of the history", f"{status.notebook.backend}, schema {status.notebook.revision}"


@st.fragment
@told
def glossary() -> None:
    """The words, narrowed by what is searched."""
    st.header("Words", anchor=False)
    wanted = st.text_input("Search the words", key="status_words", placeholder="leverage, mask, paraphrase")
    needle = wanted.strip().casefold()
    found = {
        word: meaning for word, meaning in GLOSSARY.items() if needle in word.casefold() or needle in meaning.casefold()
    }
    first = {word: needle not in word.casefold() for word in found}
    texts = [f"**{md(word)}**: {md(found[word])}" for word in sorted(found, key=lambda word: first[word])]
    st.caption(f"{len(found)} of {len(GLOSSARY)} words." if found else "No word matches. Search for a part of it.")
    half = (len(texts) + 1) // 2
    for column, some in zip(st.columns(2, gap="large"), (texts[:half], texts[half:]), strict=True):
        column.markdown("\n\n".join(some))


st.title("Status", anchor=False)
for notice in state.notices:
    st.warning(md(notice), icon=":material/warning:")
if not state.notices:
    st.success("Everything works.", icon=":material/check_circle:")

columns = st.columns(4, gap="small")
columns[0].metric(
    "Device",
    state.device.upper() if state.device != "auto" else "Auto",
    border=True,
    help="Where models run; auto decides when the first one is loaded.",
)
columns[1].metric(
    "Models loaded", len(state.models_loaded), border=True, help=md(", ".join(state.models_loaded) or "none yet")
)
columns[2].metric(
    "Memory",
    size(state.memory_bytes) if state.memory_bytes else "not known",
    border=True,
    help="Of this process: the app, its libraries and the loaded models.",
)
columns[3].metric(
    "Running, waiting",
    f"{state.running}, {state.waiting}",
    border=True,
    help=f"At most {state.max_waiting} may wait; more are asked to come back later.",
)

st.header("Models", anchor=False)
st.dataframe(
    [
        {
            "state": "● loaded" if info.name in state.models_loaded else "✓ here" if info.available else "○ not here",
            "model": info.title,
            "architecture": info.architecture,
            "dtype": info.dtype,
            "licence": info.licence,
            "reason": info.reason,
        }
        for info in desk.models()
    ],
    hide_index=True,
    column_config={
        "state": st.column_config.TextColumn("", width=80),
        "model": "Model",
        "architecture": "Architecture",
        "dtype": "Numbers",
        "licence": "Licence",
        "reason": "Why not",
    },
    height="content",
    key="status_models",
    alt="Models, whether they are here or loaded, and why not",
)

left, right = st.columns(2, gap="large")
with left:
    st.header("Memory, queue and storage", anchor=False)
    st.dataframe(
        [{"what": what, "value": value} for what, value in numbers(state)],
        hide_index=True,
        column_config={"what": "What", "value": "Value"},
        height="content",
        key="status_numbers",
        alt="Memory, queue, cache and history of this server",
    )
    st.header("Versions", anchor=False)
    st.dataframe(
        [{"package": "edit anatomy", "version": state.version}, *versions()],
        hide_index=True,
        column_config={"package": "Package", "version": "Version"},
        height="content",
        key="status_versions",
        alt="Versions of the app and its libraries",
    )
with right:
    status_check.draw()
    st.header("Promises", anchor=False)
    st.markdown("\n".join(f"- {md(promise)}" for promise in state.promises))
    st.header("Limits", anchor=False)
    st.markdown("\n".join(f"- {md(limit)}" for limit in LIMITS))
    st.header("Privacy", anchor=False)
    st.markdown(
        f"{md(PRIVACY)} Results are shared by their id: whoever has a run's link can open it on this server. Notes "
        "and verdicts are yours alone."
    )

glossary()
