"""Runs on a real Ray cluster of this machine: workers, machines and drivers die, every unit is done, nothing stays."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mega_core.errors import ActionableError, BadInput, OutOfMemory
from mega_core.events import Advanced, Cancelled, Finished, Note, Started
from mega_core.executors import LOOPBACK, Ray, WorkerFailed
from tests.conftest import ROOT
from tests.executors.toy import Heard, gone, noted, open_toy, unit

ray = pytest.importorskip("ray", reason="ray is not installed: pip install -r requirements-cluster.txt")
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def _token() -> Iterator[None]:
    """So that Ray writes no token into the home folder."""
    given = os.environ.get("RAY_AUTH_TOKEN")
    os.environ["RAY_AUTH_TOKEN"] = given or "0123456789abcdef" * 4
    yield
    if given is None:
        del os.environ["RAY_AUTH_TOKEN"]


@pytest.fixture(scope="class")
def connected() -> Iterator[None]:
    """A connection to a cluster of two cores that these tests share: Ray uses it and leaves it."""
    if ray.is_initialized():
        pytest.skip("another test left a connection")
    constants = ray._private.ray_constants
    before = getattr(constants, LOOPBACK)
    setattr(constants, LOOPBACK, False)
    try:
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False,
            logging_level=logging.ERROR, object_store_memory=2**27, _node_ip_address="127.0.0.1",
        )  # fmt: skip
        yield
        assert ray.is_initialized()
    finally:
        ray.shutdown()
        setattr(constants, LOOPBACK, before)


def plan(folder: Path, **does: object) -> str:
    return json.dumps({"folder": str(folder), **does})


def run(folder: Path, units: list[tuple[str, str]], heard: Heard | None = None, **does: Any) -> Heard:
    heard = heard or Heard()
    executor = Ray(does.pop("address", None), does.pop("actors", 2))
    executor.run(open_toy, plan(folder, **does), units, heard.take, heard.report)
    return heard


def processes_of(folder: Path) -> dict[int, str]:
    """Processes that were started with this folder in their environment -> their command line."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if place.name != str(os.getpid()) and str(folder).encode() in (place / "environ").read_bytes():
                found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def listening(pids: set[int]) -> set[str]:
    """Addresses, as /proc writes them, on which these processes listen."""
    links = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):
                links.add(os.readlink(file))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links}


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads /proc")
def test_a_cluster_of_its_own_with_a_worker_killed(tmp_path: Path):
    """Started for this run, on this machine only; a worker is killed; every unit comes; nothing stays."""
    seen: dict[str, Any] = {}

    def watch(heard: Heard) -> None:
        if heard.lines and not seen:
            seen["processes"] = processes_of(tmp_path)
            seen["addresses"] = listening(set(seen["processes"]) | {os.getpid()})
            seen["killed"] = heard.lines[0][1]["pid"]
            os.kill(seen["killed"], signal.SIGKILL)

    assert not ray.is_initialized()
    units = [unit("first", meet=2, sleep=3), *(unit(f"u{n}", sleep=0.2, lines=3) for n in range(8))]
    heard = run(tmp_path, [*units, unit("last", meet=3, lines=1)], Heard(watch))

    expected = {("first", 0), ("first", 1), ("last", 0)} | {(f"u{n}", line) for n in range(8) for line in range(3)}
    assert set(heard.told()) == expected
    assert len(noted(tmp_path, "opened")) == 3
    for key in {key for key, _ in heard.lines}:  # only the unit that the killed worker had comes twice
        assert len({line["pid"] for unit_key, line in heard.lines if unit_key == key}) == 1 + (key == heard.lines[0][0])
    assert heard.events[0] == Started("cases", 10)
    assert heard.events[-1] == Finished("cases")
    assert max(event.done for event in heard.events if isinstance(event, Advanced)) == 10
    assert any(isinstance(event, Note) and "died" in event.text for event in heard.events)
    assert heard.pids() - {seen["killed"]} <= noted(tmp_path, "closed") <= noted(tmp_path, "opened") - {seen["killed"]}

    commands = " ".join(seen["processes"].values())
    assert "raylet" in commands
    assert "dashboard.py" not in commands or "--disable-frontend" in commands  # its process also serves other parts
    # 127.0.0.1, alone and as an IPv6 address; never 0.0.0.0 or ::
    assert seen["addresses"] <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert seen["addresses"]

    assert not ray.is_initialized()
    assert gone(set(seen["processes"]) | heard.pids(), 20), processes_of(tmp_path)
    assert not {"RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"} & set(os.environ)


@pytest.mark.usefixtures("connected")
class TestConnected:
    def test_lines_arrive_while_the_unit_runs_and_cancelling_ends_the_workers(self, tmp_path: Path):
        def stop(heard: Heard) -> None:
            if len(heard.pids()) == 2:
                raise Cancelled

        heard = Heard(stop)
        with pytest.raises(Cancelled):
            run(tmp_path, [unit(f"u{n}", sleep=600) for n in range(4)], heard)
        assert len(heard.pids()) == 2
        assert gone(heard.pids(), 30)

    def test_errors_keep_their_words(self, tmp_path: Path):
        with pytest.raises(BadInput) as found:
            run(tmp_path, [unit("a"), unit("bad", **{"raise": "input"})])
        assert (str(found.value), found.value.field) == ("subject: isn't in the prompt. Write it out.", "subject")
        with pytest.raises(WorkerFailed, match="Unit bad: KeyError: 'a key of the toy'"):
            run(tmp_path, [unit("bad", **{"raise": "defect"})])
        with pytest.raises(OutOfMemory, match="There is no room for the toy. Tidy up."):
            run(tmp_path, [unit("a")], refuse=True)
        assert gone(noted(tmp_path, "tried"), 30)

    def test_what_kills_every_worker_stops_the_run(self, tmp_path: Path):
        with pytest.raises(WorkerFailed, match="Unit bad: the worker that had it died 3 times"):
            run(tmp_path, [unit("bad", die="always")])
        with pytest.raises(WorkerFailed, match="No worker could open the model"):
            run(tmp_path, [unit("a")], room=0)
        assert gone(noted(tmp_path, "tried"), 30)

    def test_more_workers_than_room_take_turns(self, tmp_path: Path):
        heard = run(tmp_path, [unit(f"u{n}") for n in range(12)], actors=None)
        assert heard.told() == sorted((f"u{n}", line) for n in range(12) for line in range(2))
        assert len(heard.pids()) == 1  # two cores, four for each worker where nobody says otherwise


def test_a_machine_of_a_cluster_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cluster named by its address: a machine disappears with its worker; the cluster itself is left running."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    monkeypatch.setattr(ray._private.ray_constants, LOOPBACK, False)
    quiet = {"include_dashboard": False, "node_ip_address": "127.0.0.1", "object_store_memory": 2**27}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **quiet})
    try:
        lost = cluster.add_node(num_cpus=1, **quiet)
        cluster.wait_for_nodes()
        told: list[str] = []

        def drop(heard: Heard) -> None:
            if len(heard.pids()) == 2 and not told:
                told.append("lost")
                cluster.remove_node(lost, allow_graceful=False)

        units = [unit("a", meet=2, sleep=1), unit("b", meet=2, sleep=1), *(unit(f"u{n}", sleep=0.3) for n in range(8))]
        heard = run(tmp_path, units, Heard(drop), address=cluster.address)
        assert told
        assert set(heard.told()) == {(key, line) for key, _ in units for line in range(2)}
        assert gone(heard.pids(), 30)
        assert not ray.is_initialized()
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
        assert ray.cluster_resources()["CPU"] >= 1.0
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_cluster_of_its_own_ends_with_its_driver(tmp_path: Path):
    script = (
        "import json, sys\n"
        "from mega_core.executors import Ray\n"
        "from tests.executors.toy import open_toy, unit\n"
        "Ray(None, 1).run(open_toy, json.dumps({'folder': sys.argv[1]}), [unit('a', sleep=600)],"
        " lambda *line: None, lambda event: None)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not noted(tmp_path, "opened"):
        assert time.monotonic() < until
        assert driver.poll() is None
        time.sleep(0.1)
    own = re.escape(os.path.join(tempfile.gettempdir(), "ray-"))
    folders = set(re.findall(rf"--temp[_-]dir=({own}\w+)", " ".join(processes_of(tmp_path).values())))
    # Ray's agents look for their parent now and then, and are not waited for.
    of_run = {pid for pid, line in processes_of(tmp_path).items() if "agent" not in line.lower()}
    assert of_run > noted(tmp_path, "opened")
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    try:
        assert gone(of_run, 60), processes_of(tmp_path)
    finally:
        for folder in folders:  # a driver that is killed can't remove it
            shutil.rmtree(folder, ignore_errors=True)


def test_an_address_that_does_not_answer_is_named():
    with pytest.raises(BadInput, match="not host:port"):
        Ray("ray://127.0.0.1:10001").run(open_toy, "{}", [unit("a")], print, print)
    with pytest.raises(ActionableError, match=r"No Ray cluster answers at 127\.0\.0\.1:1:"):
        Ray("127.0.0.1:1").run(open_toy, "{}", [unit("a")], print, print)
    assert not ray.is_initialized()
