"""Status: what runs here, what it promises, the words it uses, and its limits."""

import platform
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version

import streamlit as st

from pages.components import frame
from pages.components.session import service
from pages.components.text import md
from pages.components.words import GLOSSARY, LIMITS, PRIVACY

frame.enter()
desk = service()
state = desk.status()

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
columns[2].metric("Running now", state.running, border=True)
columns[3].metric(
    "Waiting",
    f"{state.waiting} of {state.max_waiting}",
    border=True,
    help="More than that are asked to come back later.",
)

left, right = st.columns(2, gap="large")
with left:
    st.header("Models", anchor=False)
    st.dataframe(
        [
            {
                "state": "● loaded"
                if info.name in state.models_loaded
                else "✓ here"
                if info.available
                else "○ not here",
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
    st.header("Storage", anchor=False)

    def readable(name: str, value: object) -> str:
        """A field of a health record in words."""
        if name == "bytes" and isinstance(value, int):
            return f"{value / 2**20:.1f} MB"
        return str(value) or "none"

    def facts(name: str, health: object) -> list[dict[str, str]]:
        """One row per field of a health record."""
        values = asdict(health) if is_dataclass(health) and not isinstance(health, type) else {}
        return [{"of": name, "what": k.replace("_", " "), "value": readable(k, v)} for k, v in values.items()]

    st.dataframe(
        [*facts("results", state.store), *facts("notebook", state.notebook)],
        hide_index=True,
        column_config={"of": "", "what": "What", "value": "Value"},
        height="content",
        key="status_storage",
        alt="Health of the result store and the notebook",
    )
with right:
    st.header("Promises", anchor=False)
    st.markdown("\n".join(f"- {md(promise)}" for promise in state.promises))
    st.header("Limits", anchor=False)
    st.markdown("\n".join(f"- {md(limit)}" for limit in LIMITS))
    st.header("Privacy", anchor=False)
    st.markdown(
        f"{md(PRIVACY)} Results are shared by their id: whoever has a run's link can open it on this server. Notes "
        f"and verdicts are "
        "yours alone."
    )
    st.header("Versions", anchor=False)

    def installed(package: str) -> str:
        """The version of a package here."""
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    packages = ("torch", "transformers", "safetensors", "streamlit", "altair", "pandas", "numpy")
    rows = [
        ("edit anatomy", state.version),
        ("python", platform.python_version()),
        *((name, installed(name)) for name in packages),
    ]
    st.dataframe(
        [{"package": name, "version": number} for name, number in rows],
        hide_index=True,
        column_config={"package": "Package", "version": "Version"},
        key="status_versions",
        alt="Versions of the app and its libraries",
    )

st.header("Words", anchor=False)
words = [f"**{md(word)}**: {md(meaning)}" for word, meaning in GLOSSARY.items()]
half = (len(words) + 1) // 2
for column, some in zip(st.columns(2, gap="large"), (words[:half], words[half:]), strict=True):
    column.markdown("\n\n".join(some))
