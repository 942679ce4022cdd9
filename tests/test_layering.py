"""Who may import whom: the map in mega_core/README.md, held by walking the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module may import what stands in a row above, and its own package. In "free" rows modules may import each other.
ROWS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("free", ("", "records", "frames", "events", "errors", "keys", "params", "cases")),  # "": mega_core/__init__.py
    ("free", ("registry", "store", "notebook", "settings", "migrations", "summary", "folders", "documents", "regions")),
    ("apart", ("models",)),
    ("apart", ("changes", "embedded")),
    ("apart", ("methods", "attribution", "masking", "evaluation", "datasets")),
    ("free", ("alarms", "reference")),
    (
        "apart",
        (
            "pipeline",
            "stack",
            "export",
            "executors",
            "contrast_study",
            "verify_study",
            "detect_study",
            "mask_study",
            "embedded.train",
        ),
    ),
    ("apart", ("benchmark", "benchmark_report")),
    ("apart", ("jobs",)),
    ("apart", ("service",)),
    ("apart", ("commands",)),
    ("apart", ("__main__",)),
)
# Training measures what it made with the methods; the rest of `embedded` is read by them.
TOOLS = dict.fromkeys(
    ("mega_core.embedded.train", "mega_core.embedded.evaluate", "mega_core.embedded.study"), "embedded.train"
)
RANK = {name: rank for rank, (_, names) in enumerate(ROWS) for name in names}

# Pages draw what the service hands them: plain values, the words they are written in, and their table columns.
PAGES_MAY_USE = {"records", "params", "frames", "errors", "events", "service", "jobs", "notebook", "summary", ""}
PAGES_MAY_USE |= {"documents"}
# From below the service only what describes things and computes nothing on a model.
PAGES_MAY_ALSO_USE = {"mega_core.methods.base", "mega_core.evaluation.metrics", "mega_core.evaluation.text"}
# What has to start fast: the first page and the command line's help are drawn before torch is imported.
WITHOUT_TORCH = (
    "mega_core.service",
    "mega_core.methods",
    "mega_core.attribution",
    "mega_core.datasets",
    "mega_core.evaluation.protocols",
    "mega_core.benchmark",
    "mega_core.reference",
    "mega_core.commands",
    "mega_core.__main__",
)


@dataclass(frozen=True)
class Import:
    """One import: who, whom (module path), and whether it runs when the importer is imported."""

    importer: str
    imported: str
    at_import: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for folder in ("mega_core", "pages") for path in sorted((ROOT / folder).rglob("*.py"))}
FILES["app"] = ROOT / "app.py"


def imports_of(name: str, source: str) -> Iterator[Import]:
    """Every import of a file, those under TYPE_CHECKING and inside functions included (but not `at_import`)."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            now = at_import and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.Import):
                yield from (Import(name, alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    package = name.split(".") if FILES.get(name, Path()).name == "__init__.py" else name.split(".")[:-1]
                    package = package[: len(package) - child.level + 1]
                    base = ".".join([*package, *([base] if base else [])])
                for alias in child.names:
                    whole = f"{base}.{alias.name}"
                    yield Import(name, whole if whole in FILES else base, at_import)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for part in child.body:
                    yield from walk(ast.Module([part], []), False)
                for part in child.orelse:
                    yield from walk(ast.Module([part], []), at_import)
            else:
                yield from walk(child, now)

    yield from walk(ast.parse(source), True)


ALL = [found for name, path in FILES.items() for found in imports_of(name, path.read_text(encoding="utf-8"))]


def top(module: str) -> str:
    """The name in the map: "mega_core.models.hooks" -> "models"."""
    return TOOLS.get(module) or (module.split(".") + [""])[1]


def reversed_arrow(found: Import) -> str | None:
    """What is wrong with this import, or None."""
    arrow = f"{found.importer} imports {found.imported}"
    inside = found.importer.split(".")[0] == "mega_core"
    if found.imported.split(".")[0] == "streamlit" and inside:
        return f"{arrow}: the core must not know what draws it"
    if found.imported.split(".")[0] in ("pages", "app") and inside:
        return f"{arrow}: the core must not know the pages"
    if found.imported.split(".")[0] != "mega_core":
        return None
    who, whom = top(found.importer), top(found.imported)
    if not inside:
        allowed = whom in PAGES_MAY_USE or found.imported in PAGES_MAY_ALSO_USE
        return None if allowed else f"{arrow}: pages may use {', '.join(sorted(PAGES_MAY_USE - {''}))}"
    if who not in RANK or whom not in RANK:
        return f"{arrow}: give {who if who not in RANK else whom!r} a place in ROWS and in mega_core/README.md"
    if who == whom or RANK[whom] < RANK[who] or whom == "":
        return None
    if RANK[who] == RANK[whom] and ROWS[RANK[who]][0] == "free":
        return None
    relation = "are of the same row and must not meet" if RANK[who] == RANK[whom] else "is a reversed arrow"
    return f"{arrow}: {who} -> {whom} {relation}"


def test_no_arrow_is_reversed() -> None:
    wrong = [problem for found in ALL if (problem := reversed_arrow(found))]
    assert not wrong, "\n".join(wrong)


def test_every_module_has_a_place() -> None:
    strays = {top(name) for name in FILES if name.startswith("mega_core")} - set(RANK)
    assert not strays, f"give {sorted(strays)} a place in ROWS and in mega_core/README.md"


@pytest.mark.parametrize(
    ("importer", "line", "words"),
    [
        (
            "mega_core.methods.rome",
            "from mega_core.evaluation import looks",
            "methods -> evaluation are of the same row",
        ),
        ("mega_core.records", "from mega_core.models import hooks", "records -> models is a reversed arrow"),
        ("mega_core.models.pool", "def f():\n    from ..jobs import Jobs", "models -> jobs is a reversed arrow"),
        ("mega_core.keys", "import streamlit as st", "must not know what draws it"),
        ("mega_core.store", "from pages.components import charts", "must not know the pages"),
        ("pages.start", "from mega_core.models.pool import ModelPool", "pages may use"),
        ("pages.start", "from mega_core.evaluation.looks import look", "pages may use"),
        ("mega_core.models.pool", "import mega_core.nowhere", "give 'nowhere' a place"),
    ],
)
def test_a_reversed_arrow_is_named(importer: str, line: str, words: str) -> None:
    (found,) = imports_of(importer, line)
    assert words in (reversed_arrow(found) or "")


def test_imports_are_seen_wherever_they_stand() -> None:
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import torch
else:
    import json
def late():
    import mega_core.jobs
class Here:
    import mega_core.keys
try:
    from mega_core import models
except ImportError:
    pass
"""
    found = {(i.imported, i.at_import) for i in imports_of("mega_core.x", source)}
    assert found == {
        ("typing", True), ("torch", False), ("json", True), ("mega_core.jobs", False), ("mega_core.keys", True),
        ("mega_core.models", True),
    }  # fmt: skip


def reach(start: str) -> dict[str, str]:
    """Every module that importing `start` imports -> the module that asks for it."""
    seen: dict[str, str] = {start: ""}
    waiting = [start]
    while waiting:
        name = waiting.pop()
        for found in ALL:
            # Importing a.b.c runs a and a.b first.
            if found.importer == name and found.at_import:
                parts = found.imported.split(".")
                for whole in (".".join(parts[: n + 1]) for n in range(len(parts))):
                    if whole not in seen:
                        seen[whole] = name
                        waiting.append(whole)
    return seen


@pytest.mark.parametrize(
    "start", [*WITHOUT_TORCH, *sorted(name for name in FILES if name.split(".")[0] in ("pages", "app"))]
)
def test_no_path_of_imports_leads_to_torch(start: str) -> None:
    seen = reach(start)
    for heavy in ("torch", "transformers", "jaxtyping"):
        path, at = [heavy], heavy
        while seen.get(at):
            at = seen[at]
            path.append(at)
        assert heavy not in seen, f"importing {start} imports {heavy}: {' <- '.join(path)}"


def test_importing_what_starts_fast_imports_no_torch() -> None:
    """The same promise, asked of Python itself: third-party modules could import torch as well."""
    code = "; ".join(
        ["import sys", *(f"import {name}" for name in WITHOUT_TORCH if not name.endswith("__main__"))]
        + [
            "heavy = [m for m in ('torch', 'transformers', 'streamlit') if m in sys.modules]",
            "sys.exit(str(heavy) if heavy else 0)",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_hooks_are_registered_in_one_file_only() -> None:
    places = [
        name for name, path in FILES.items()
        if name.startswith("mega_core") and ".embedded" not in name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr.startswith("register_") and node.attr.endswith("_hook")
    ]  # fmt: skip
    assert set(places) == {"mega_core.models.hooks"}


def test_the_first_heading_waits_for_no_model_library():
    """Start draws its heading with what app.py and its own first lines import; the service comes after it."""
    before = (ROOT / "pages/start.py").read_text(encoding="utf-8").split("st.title(")[0]
    assert "frame.enter()" in before
    names = [line for part in ((ROOT / "app.py").read_text(encoding="utf-8"), before) for line in part.splitlines()]
    imports = "\n".join(line for line in names if line.startswith(("import ", "from ")))
    heavy = "[name for name in ('mega_core.service', 'torch', 'pandas', 'sqlalchemy') if name in sys.modules]"
    code = f"import sys\n{imports}\nprint({heavy})"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
