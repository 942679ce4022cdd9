"""No network, no writing outside a temporary folder, and shared models that every test gives back as it found them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Before any library reads them: the hub's client looks at its environment when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes that each take every core stand in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from mega_core.models.adapter import ModelAdapter

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
ARCH_NAMES = ("gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(autouse=True)
def _cache_in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reads the settings writes below tmp_path; the operator's own variables don't reach the tests."""
    for name in [name for name in os.environ if name.startswith("MEGA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MEGA_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _network_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the machine itself may be reached."""
    connect, connect_ex, lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def refuse_far(sock: socket.socket, address: Any) -> None:
        if sock.family != socket.AF_UNIX and not _is_loopback(address[0]):
            raise RuntimeError(f"a test tried to reach {address[0]!r}: tests run without the network")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        refuse_far(self, address)
        return connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        refuse_far(self, address)
        return connect_ex(self, address)

    def guarded_lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host is not None and not _is_loopback(host) and host not in ("0.0.0.0", "::"):
            raise RuntimeError(f"a test tried to look up {host!r}: tests run without the network")
        return lookup(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_lookup)


def _is_loopback(host: Any) -> bool:
    name = host.decode() if isinstance(host, bytes) else str(host)
    return name in ("localhost", "::1", "") or name.startswith("127.")


class SharedModels:
    """Tiny models made once per session, by architecture."""

    def __init__(self) -> None:
        self._models: dict[str, tuple[ModelAdapter, str]] = {}

    def __call__(self, arch: str) -> ModelAdapter:
        """The shared model of this architecture; leave it as you found it."""
        if arch not in self._models:
            from tests.tiny import tiny

            lm = tiny(arch)
            self._models[arch] = (lm, lm.live_digest())
        return self._models[arch][0]

    def leaks(self) -> list[str]:
        """What was left on a model. That model is dropped, so that one leak is one failure."""
        found = []
        for arch, (lm, digest) in list(self._models.items()):
            problem = ""
            if lm.hook_count():
                problem = f"{lm.hook_count()} hooks left"
            elif lm.capture_limits:
                problem = "a capture left open"
            elif any(p.requires_grad or p.grad is not None for p in lm.model.parameters()):
                problem = "gradients left on"
            elif lm.model.training:
                problem = "training mode left on"
            elif lm.live_digest() != digest:
                problem = "weights changed"
            if problem:
                found.append(f"{arch}: {problem}")
                del self._models[arch]
        return found


@pytest.fixture(scope="session")
def shared_models() -> SharedModels:
    """The models behind `tiny_lm`."""
    return SharedModels()


@pytest.fixture(scope="session")
def tiny_lm(shared_models: SharedModels) -> Callable[[str], ModelAdapter]:
    """tiny_lm("gpt2"): the shared tiny model of an architecture."""
    return shared_models


@pytest.fixture(params=ARCH_NAMES)
def lm(request: pytest.FixtureRequest, shared_models: SharedModels) -> ModelAdapter:
    """The test runs once per architecture."""
    return shared_models(request.param)


@pytest.fixture(autouse=True)
def _leak_guard(shared_models: SharedModels) -> Iterator[None]:
    yield
    leaks = shared_models.leaks()
    if leaks:
        pytest.fail("a shared model was not given back as it was found: " + "; ".join(leaks), pytrace=False)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """shared_data("gpt2-tokenizer"): third-party data beside the checkout; the test is skipped where it is absent."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"{name} is not beside this checkout (expected in ../shared/data)")
        return path

    return find
