"""Everything the operator decides: folders, device, memory, limits, models. Read once, passed down, no torch.

Environment: MEGA_CACHE_DIR, MEGA_DATABASE_URL, MEGA_DEVICE, MEGA_DEVICE_MAP, MEGA_MEMORY_GB, MEGA_MAX_MODELS,
MEGA_MODELS, MEGA_MAX_QUEUE, MEGA_MAX_QUEUE_PER_SESSION, MEGA_JOB_SECONDS, MEGA_MAX_NEW_TOKENS, MEGA_STORE_GB,
MEGA_EXECUTOR, MEGA_DETECT_DIRS.

Models come from models.toml beside this file; the TOML file named by MEGA_MODELS adds models or overrides them by name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mega_core.errors import BadInput, ModelUnavailable, UnknownName
from mega_core.keys import digest
from mega_core.records import ModelRef, Scalar

log = logging.getLogger(__name__)

CATALOGUE = Path(__file__).with_name("models.toml")
DTYPE_NAMES = ("float32", "float16", "bfloat16")
EXECUTOR_NAMES = ("local", "ray")
Defaults = Mapping[str, Mapping[str, Scalar]]
"""Method name -> parameter -> value for one model."""


@dataclass(frozen=True)
class ModelEntry:
    """One model of the catalogue."""

    name: str
    hub: str = ""
    """Repository id on the model hub."""
    path: Path | None = None
    """A folder with config.json, tokenizer and *.safetensors; wins over `hub`."""
    revision: str = ""
    """A commit of the hub repository, or "main"."""
    dtype: str = "float32"
    title: str = ""
    params: int = 0
    """Number of parameters."""
    memory_gb: float = 0.0
    """What an edit needs at `dtype`: weights, activations, statistics; GB."""
    licence: str = ""
    architecture: str = ""
    """config.model_type, for the listing; loading reads the model's own."""
    attention: str = ""
    """"eager" to force it; empty takes the fastest."""
    note: str = ""
    """A sentence for the person, such as what to do before downloading."""
    embedded: bool = False
    """Ships with the project."""
    defaults: Defaults = field(default_factory=dict)

    def __post_init__(self) -> None:
        frozen = {method: MappingProxyType(dict(values)) for method, values in self.defaults.items()}
        object.__setattr__(self, "defaults", MappingProxyType(frozen))

    def ref(self) -> ModelRef:
        """How questions name this model."""
        return ModelRef(self.name, self.revision, self.dtype)

    def locate(self, hub_cache: Path | None = None) -> Path:
        """The folder with the model's files. Raises ModelUnavailable with the reason and how to get them."""
        if self.path is not None:
            if not self.path.is_dir():
                raise ModelUnavailable(f"{self.name}: its folder isn't on this machine.", self._how())
            check_folder(self.path, self.name)
            return self.path
        if not self.hub:
            raise ModelUnavailable(f"{self.name} has neither a folder nor a hub id.", "Give it one in the models file.")
        folder = _cached_snapshot(self.hub, self.revision or "main", hub_cache)
        if folder is None:
            raise ModelUnavailable(f"{self.name} isn't on this machine.", self._how())
        check_folder(folder, self.name)
        return folder

    def missing(self, hub_cache: Path | None = None) -> ModelUnavailable | None:
        """Why the model can't be loaded, or None: for listings."""
        try:
            self.locate(hub_cache)
        except ModelUnavailable as error:
            return error
        return None

    def _how(self) -> str:
        """How to get the files, by command and by folder; never an address."""
        steps = [self.note] if self.note else []
        if self.embedded:
            steps.append("It ships with the project: restore its folder, or train it with the train command.")
        elif self.hub:
            revision = f" --revision {self.revision}" if self.revision else ""
            steps.append(
                f"Run: hf download {self.hub}{revision} --include '*.safetensors' --include '*.json' --include '*.txt' "
                f"--include 'tokenizer*'. Or name a folder as the path of {self.name!r} in the models file."
            )
        else:
            steps.append(f"Correct the path of {self.name!r} in the models file.")
        return " ".join(steps)


@dataclass(frozen=True)
class Settings:
    """The operator's choices."""

    cache_dir: Path = Path("cache")
    database_url: str = ""
    """SQLAlchemy URL of the notebook; empty means a SQLite file in cache_dir."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    device_map: str = ""
    """"auto" spreads a model over several devices."""
    memory_gb: float | None = None
    """Budget for all loaded models; None leaves it to max_models."""
    max_models: int = 1
    """Models in memory at once."""
    max_queue: int = 16
    """Jobs waiting."""
    max_queue_per_session: int = 2
    """Jobs waiting or running per browser session."""
    job_seconds: float = 1800.0
    """A job is stopped after this long."""
    max_new_tokens: int = 64
    """Longest continuation."""
    store_gb: float = 1.0
    """Size of the result store."""
    executor: str = "local"
    """Where the dashboard's benchmarks run: local or ray."""
    detect_dirs: tuple[Path, ...] = ()
    """Folders whose models the dashboard may search for edits: the model folders in or below them."""
    hub_cache: Path | None = None
    """Where downloaded models lie; None is the hub library's own default."""
    models: Mapping[str, ModelEntry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "models", MappingProxyType(dict(self.models)))

    @classmethod
    def read(cls, env: Mapping[str, str] | None = None) -> Settings:
        """From the environment. Raises BadInput naming the variable, or the entry and key of a models file."""
        env = os.environ if env is None else env
        catalogue = read_catalogue(CATALOGUE)
        if extra := env.get("MEGA_MODELS", "").strip():
            catalogue = read_catalogue(Path(extra).expanduser(), catalogue)
        device = env.get("MEGA_DEVICE", "").strip() or "auto"
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
            raise BadInput("MEGA_DEVICE", f"there is no device {device[:40]!r}.", "Set auto, cpu, mps, cuda or cuda:N.")
        device_map = env.get("MEGA_DEVICE_MAP", "").strip()
        if device_map not in ("", "auto", "balanced", "sequential"):
            raise BadInput(
                "MEGA_DEVICE_MAP", f"{device_map[:40]!r} is unknown.", "Set auto, balanced, sequential or nothing."
            )
        executor = env.get("MEGA_EXECUTOR", "").strip() or "local"
        if executor not in EXECUTOR_NAMES:
            raise BadInput("MEGA_EXECUTOR", f"there is no executor {executor[:40]!r}.", "Set local, ray or nothing.")
        cache_dir = Path(env.get("MEGA_CACHE_DIR", "").strip() or "cache").expanduser()
        return cls(
            cache_dir=cache_dir,
            database_url=env.get("MEGA_DATABASE_URL", "").strip(),
            device=device,
            device_map=device_map,
            memory_gb=_number(env, "MEGA_MEMORY_GB", 1.0) if env.get("MEGA_MEMORY_GB", "").strip() else None,
            max_models=_count(env, "MEGA_MAX_MODELS", 1),
            max_queue=_count(env, "MEGA_MAX_QUEUE", 16),
            max_queue_per_session=_count(env, "MEGA_MAX_QUEUE_PER_SESSION", 2),
            job_seconds=_number(env, "MEGA_JOB_SECONDS", 1800.0),
            max_new_tokens=_count(env, "MEGA_MAX_NEW_TOKENS", 64),
            store_gb=_number(env, "MEGA_STORE_GB", 1.0),
            executor=executor,
            detect_dirs=_folders(env, "MEGA_DETECT_DIRS"),
            hub_cache=_hub_cache(env),
            models=catalogue,
        )

    def model(self, name: str) -> ModelEntry:
        """A catalogue entry by name (or by hub id). Raises UnknownName with the closest known one."""
        if name in self.models:
            return self.models[name]
        for entry in self.models.values():
            if entry.hub and entry.hub == name:
                return entry
        raise UnknownName("model", name, self.models)

    def locate(self, entry: ModelEntry) -> Path:
        """The folder of a model's files. Raises ModelUnavailable with the reason and how to get them."""
        return entry.locate(self.hub_cache)

    def available(self) -> tuple[ModelEntry, ...]:
        """The models whose files are on this machine, in the catalogue's order."""
        return tuple(entry for entry in self.models.values() if entry.missing(self.hub_cache) is None)


# The catalogue -------------------------------------------------------------------------------------------------------

_KINDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "hub": (str,),
    "path": (str,),
    "revision": (str,),
    "dtype": (str,),
    "title": (str,),
    "params": (int,),
    "memory_gb": (int, float),
    "licence": (str,),
    "architecture": (str,),
    "attention": (str,),
    "note": (str,),
    "embedded": (bool,),
    "defaults": (dict,),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,99}")


def read_catalogue(file: Path, base: Mapping[str, ModelEntry] | None = None) -> dict[str, ModelEntry]:
    """The models of a TOML file on top of `base`: a [[model]] of a known name overrides the keys it gives.

    A relative `path` counts from the file's folder. Raises BadInput naming the entry and key.
    """
    label = f"models file {file.name}"
    try:
        with file.open("rb") as stream:
            content = tomllib.load(stream)
    except OSError as error:
        raise BadInput(label, f"can't be read ({error.strerror}).", "Correct MEGA_MODELS.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(label, f"is not valid TOML ({error}).", "Correct that line.") from error
    if unknown := sorted(set(content) - {"model"}):
        raise BadInput(label, f"has an unknown table {unknown[0]!r}.", "Write each model as [[model]].")
    listed = content.get("model", [])
    if not isinstance(listed, list):
        raise BadInput(label, "'model' is not a list.", "Write each model as [[model]], with double brackets.")
    catalogue = dict(base or {})
    seen: set[str] = set()
    for number, raw in enumerate(listed, start=1):
        entry = _entry(raw, f"{label}, model {number}", file.parent, catalogue)
        if entry.name in seen:
            raise BadInput(f"{label}, model {entry.name!r}", "is listed twice.", "Keep one.")
        seen.add(entry.name)
        catalogue[entry.name] = entry
    return catalogue


def _entry(raw: Any, where: str, folder: Path, base: Mapping[str, ModelEntry]) -> ModelEntry:
    if not isinstance(raw, dict):
        raise BadInput(where, "is not a table.", "Write each model as [[model]].")
    name = raw.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadInput(f"{where}, key 'name'", "needs letters, digits, '.', '_' or '-'.", 'For example: name = "gpt2"')
    where = f"{where.rsplit(', ', 1)[0]}, model {name!r}"
    for key, value in raw.items():
        at = f"{where}, key {key!r}"
        if key not in _KINDS:
            raise BadInput(at, "is unknown.", f"Known: {', '.join(_KINDS)}.")
        if not isinstance(value, _KINDS[key]) or (isinstance(value, bool) and bool not in _KINDS[key]):
            expected = " or ".join({"str": "text", "dict": "a table"}.get(t.__name__, t.__name__) for t in _KINDS[key])
            raise BadInput(at, f"expected {expected}, found {type(value).__name__}.", "Correct its value.")
    given = dict(raw)
    _check_value(
        where, "dtype", given.get("dtype", "float32"), given.get("dtype", "float32") in DTYPE_NAMES, DTYPE_NAMES
    )
    attention = given.get("attention", "")
    _check_value(where, "attention", attention, attention in ("", "eager", "sdpa"), ("eager", "sdpa"))
    for key, pattern in (("hub", _HUB), ("revision", _REVISION)):
        if given.get(key) and (not pattern.fullmatch(given[key]) or ".." in given[key]):
            raise BadInput(f"{where}, key {key!r}", f"{given[key][:60]!r} is not a {key} name.", "Correct it.")
    if given.get("memory_gb", 0) < 0 or given.get("params", 0) < 0:
        raise BadInput(f"{where}, key 'memory_gb'", "is negative.", "Give it in GB.")
    if "memory_gb" in given:
        given["memory_gb"] = float(given["memory_gb"])
    if given.get("path"):
        given["path"] = (folder / Path(given["path"]).expanduser()).absolute()
    else:
        given.pop("path", None)
    known = base.get(name)
    given["defaults"] = _defaults(given.get("defaults", {}), where, known.defaults if known else {})
    if known:
        if "hub" in given and "path" not in given:
            given["path"] = None  # another hub id is another model: the old folder must not win over it
        return replace(known, **given)
    if not given.get("hub") and not given.get("path"):
        raise BadInput(f"{where}, key 'path'", "is missing, and so is 'hub'.", "Give one of them.")
    return ModelEntry(**{"title": name, **given})


def _check_value(where: str, key: str, value: str, good: bool, known: tuple[str, ...]) -> None:
    if not good:
        raise BadInput(f"{where}, key {key!r}", f"{value[:40]!r} is unknown.", f"Known: {', '.join(known)}.")


def _defaults(raw: dict[str, Any], where: str, base: Defaults) -> dict[str, dict[str, Scalar]]:
    merged = {method: dict(values) for method, values in base.items()}
    for method, values in raw.items():
        at = f"{where}, key 'defaults.{method}'"
        if not isinstance(values, dict):
            raise BadInput(at, "is not a table.", f"Write [model.defaults.{method}].")
        for param, value in values.items():
            if not isinstance(value, str | int | float | bool):
                raise BadInput(f"{at[:-1]}.{param}'", "expected text, a number or true/false.", "Correct its value.")
        merged[method] = {**merged.get(method, {}), **values}
    return merged


# Files of a model ----------------------------------------------------------------------------------------------------

_DIGESTED = ("config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json",
             "special_tokens_map.json", "added_tokens.json")  # fmt: skip


def check_folder(path: Path, name: str) -> None:
    """Raises ModelUnavailable unless the folder can be loaded without running anything from it."""
    config = _json(path / "config.json", name)
    if not sorted(path.glob("*.safetensors")):
        if _pickles(path):
            raise ModelUnavailable(
                f"{name}: its weights are pickle files ({_pickles(path)[0]}), which can run code when they are read.",
                "Get its safetensors files, or convert it on a machine you can afford to lose.",
            )
        raise ModelUnavailable(f"{name}: there are no *.safetensors files in its folder.", "Download the model again.")
    for file in ("config.json", "tokenizer_config.json"):
        content = config if file == "config.json" else _json(path / file, name, optional=True)
        if "auto_map" in content:
            raise ModelUnavailable(
                f"{name}: its {file} asks to run code from its folder (auto_map).",
                "Choose a model of a built-in architecture.",
            )
    if "quantization_config" in config:
        raise ModelUnavailable(f"{name}: its weights are quantised, so they can't be edited.", "Get the full weights.")
    index = _json(path / "model.safetensors.index.json", name, optional=True)
    shards = index.get("weight_map", {})
    lacking = sorted({str(s) for s in shards.values()} - {f.name for f in path.glob("*.safetensors")})
    if lacking:
        raise ModelUnavailable(
            f"{name}: {len(lacking)} weight files are missing, such as {lacking[0]}.", "Download the model again."
        )


def weights_digest(path: Path, cache_dir: Path | None = None) -> str:
    """sha256 over weights, config and tokenizer: the model in every key.

    Remembered in cache_dir by names, sizes and modification times, since reading gigabytes takes seconds.
    """
    files = [*sorted(path.glob("*.safetensors")), *(path / n for n in _DIGESTED if (path / n).is_file())]
    stats = [(f.name, (s := f.stat()).st_size, s.st_mtime_ns, s.st_ino) for f in files]
    memo = None
    if cache_dir is not None:
        memo = cache_dir / "digests" / digest({"folder": str(path.resolve()), "files": [list(s) for s in stats]})
        try:
            known = memo.read_text(encoding="ascii").strip()
            if re.fullmatch(r"[0-9a-f]{64}", known):
                return known
        except (OSError, UnicodeDecodeError):
            pass
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            total.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    found = total.hexdigest()
    if memo is not None:
        _remember(memo, found)
    return found


def _remember(memo: Path, text: str) -> None:
    """Write whole or not at all; a memo that can't be written only costs time."""
    try:
        memo.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=memo.parent)
        with os.fdopen(handle, "w", encoding="ascii") as stream:
            stream.write(text)
        os.replace(temporary, memo)
    except OSError as error:
        log.warning("the digest of the weights could not be remembered: %s", error)


def _pickles(path: Path) -> list[str]:
    return sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for f in path.glob(pattern))


def _json(file: Path, name: str, optional: bool = False) -> dict[str, Any]:
    if optional and not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelUnavailable(f"{name}: there is no {file.name} in its folder.", "Download the model again.") from None
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"{name}: its {file.name} can't be read.", "Download the model again.") from error
    if not isinstance(content, dict):
        raise ModelUnavailable(f"{name}: its {file.name} is not a JSON object.", "Download the model again.")
    return content


def _cached_snapshot(hub: str, revision: str, hub_cache: Path | None) -> Path | None:
    """The snapshot folder in the hub's cache, without touching the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub, revision=revision, cache_dir=hub_cache, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    return folder if folder.is_dir() else None


def _hub_cache(env: Mapping[str, str]) -> Path | None:
    if direct := env.get("HF_HUB_CACHE", "").strip():
        return Path(direct).expanduser()
    if home := env.get("HF_HOME", "").strip():
        return Path(home).expanduser() / "hub"
    return None


def _number(env: Mapping[str, str], key: str, default: float) -> float:
    text = env.get(key, "").strip()
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:  # also refuses nan and infinity
        raise BadInput(key, f"{text[:40]!r} is not a number above 0.", "Correct or unset it.")
    return value


def _folders(env: Mapping[str, str], name: str) -> tuple[Path, ...]:
    """Folders divided by commas or by the system's separator of paths. Raises BadInput on one that isn't there."""
    found = []
    for text in re.split(f"[,{re.escape(os.pathsep)}]", env.get(name, "")):
        if text.strip():
            folder = Path(text.strip()).expanduser()
            if not folder.is_dir():
                raise BadInput(name, f"there is no folder {text.strip()[:200]!r}.", "Correct or unset it.")
            found.append(folder)
    return tuple(found)


def _count(env: Mapping[str, str], key: str, default: int) -> int:
    value = _number(env, key, float(default))
    if not value.is_integer():
        raise BadInput(key, f"{value:g} is not a whole number.", "Correct or unset it.")
    return int(value)
