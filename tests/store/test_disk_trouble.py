"""A disk that is full, read-only or pulled away, and a process killed while it writes."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mega_core import store as module
from mega_core.store import SafeBytesDisk, Store

MB = 2**20
ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("KILLS", "6"))


@pytest.fixture
def small_disk(tmp_path: Path):
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_turns_into_memory_and_back(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(small_disk / "results", 64 * MB)
    assert store.put("first", b"1" * 20_000)
    for i in range(30):
        assert store.put(f"k{i}", bytes([i]) * 200_000)
    health = store.health()
    assert health.mode == "memory"
    assert "aren't being saved" in health.notice
    assert "full" in health.notice
    assert store.get("first") == b"1" * 20_000
    for i in range(30):
        assert store.get(f"k{i}") == bytes([i]) * 200_000
    assert store.delete("k29")

    # Somebody makes room (here: a larger disk); the next write after the pause saves what was held in memory as well.
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)
    store._retry_at = 0.0
    assert store.put("last", b"v")
    assert store.health().mode == "disk"
    assert store.health().notice == ""
    store.close()
    store = Store.open(small_disk / "results", 64 * MB)
    assert [store.get(f"k{i}") for i in range(29)] == [bytes([i]) * 200_000 for i in range(29)]
    assert store.get("last") == b"v"
    store.close()


def test_a_full_disk_keeps_no_half_written_files(small_disk: Path) -> None:
    store = Store.open(small_disk / "results", 64 * MB)
    for i in range(30):
        store.put(f"k{i}", os.urandom(300_000))
    store.close()
    connection = sqlite3.connect(small_disk / "results" / "entries" / "cache.db")
    named = {name for (name,) in connection.execute("SELECT filename FROM Cache WHERE filename IS NOT NULL")}
    connection.close()
    entries = small_disk / "results" / "entries"
    assert {str(path.relative_to(entries)) for path in entries.rglob("*.val")} == named


def test_a_disk_that_is_full_from_the_start(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(3 * MB - 8192))
    store = Store.open(small_disk / "results", 64 * MB)
    assert store.put("k", b"v" * 30_000)
    assert store.get("k") == b"v" * 30_000
    assert store.health().mode == "memory"
    store.close()


def test_a_read_only_disk(small_disk: Path) -> None:
    Store.open(small_disk / "results", 64 * MB).close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    store = Store.open(small_disk / "results", 64 * MB)
    assert store.put("k", b"v")
    assert store.get("k") == b"v"
    health = store.health()
    assert (health.mode, health.entries) == ("memory", 1)
    assert "can't be written" in health.notice
    store.close()


def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    Store.open(folder, 64 * MB).close()
    script = """
import os, sys
import mega_core.store as module
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)
store = module.Store.open(sys.argv[1], 64 * 2**20)
assert store.put("k", b"v") and store.get("k") == b"v"
assert store.health().mode == "memory", store.health()
assert "can't be written" in store.health().notice, store.health()
"""
    if os.getuid() != 0:
        folder.chmod(0o500)
        pytest.skip("the owner may always change the mode back; needs root to become somebody else")
    done = subprocess.run([sys.executable, "-c", script, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_place_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    store = Store.open(tmp_path / "file" / "results", 64 * MB)
    assert store.put("k", b"v")
    assert store.get("k") == b"v"
    assert store.keys() == ["k"]
    assert store.health().mode == "memory"
    store.close()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.EROFS, "Read-only file system"),
        sqlite3.OperationalError("database or disk is full"),
        sqlite3.OperationalError("attempt to write a readonly database"),
        sqlite3.OperationalError("disk I/O error"),
    ],
)
def test_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    store = Store.open(tmp_path, 64 * MB)
    store.put("before", b"b")

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(SafeBytesDisk, "store", fail)
    assert store.put("k", b"v")
    assert store.get("k") == b"v"
    assert store.get("before") == b"b"
    health = store.health()
    assert health.mode == "memory"
    assert "aren't being saved" in health.notice
    store.close()


def test_a_busy_database_keeps_the_value_in_memory(tmp_path: Path) -> None:
    store = Store.open(tmp_path, 64 * MB)
    store.put("before", b"b")
    blocker = sqlite3.connect(tmp_path / "entries" / "cache.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    assert store.put("k", b"v" * 20_000)
    blocker.execute("ROLLBACK")
    blocker.close()
    assert store.get("k") == b"v" * 20_000
    assert store.health().mode == "disk"
    assert store.put("k", b"w")
    assert store.get("k") == b"w"
    assert not list(tmp_path.rglob("*.val"))
    store.close()


def test_the_memory_table_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMORY_LIMIT", MB)
    (tmp_path / "file").write_text("x")
    store = Store.open(tmp_path / "file" / "results", 64 * MB)
    for i in range(30):
        store.put(f"k{i}", bytes(100_000))
        store.get("k0")
    assert store.health().bytes <= MB
    assert store.get("k0") is not None
    assert store.get("k1") is None
    assert not store.put("large", bytes(2 * MB))
    store.close()


def test_the_folder_is_deleted_while_open(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "results", 64 * MB)
    store.put("k", b"v")
    shutil.rmtree(tmp_path / "results")
    assert store.get("k") is None
    assert store.put("k", b"w")
    assert store.get("k") == b"w"
    assert store.health().mode == "disk"
    store.close()


def test_another_process_repairs_the_store(tmp_path: Path) -> None:
    ours, theirs = Store.open(tmp_path, 64 * MB), Store.open(tmp_path, 64 * MB)
    ours.put("k", b"v")
    theirs._repair(theirs._cache)  # type: ignore[arg-type]
    theirs.put("new", b"n")
    assert ours.get("k") is None
    assert ours.get("new") == b"n"
    assert ours.put("ours", b"o")
    assert theirs.get("ours") == b"o"
    ours.close()
    theirs.close()


def test_orphans_are_swept_once_they_are_old(tmp_path: Path) -> None:
    store = Store.open(tmp_path, 64 * MB)
    store.put("big", bytes(50_000))
    store.close()
    young = tmp_path / "entries" / "ab" / "cd" / ("0" * 28 + ".val")
    old = young.with_name("1" * 28 + ".val")
    foreign = young.with_name("notes.val")
    young.parent.mkdir(parents=True)
    for path in (young, old, foreign, *tmp_path.rglob("*.val")):
        path.touch()
        if path != young:
            os.utime(path, (time.time() - 10_000,) * 2)
    store = Store.open(tmp_path, 64 * MB)
    assert young.exists()
    assert not old.exists()
    assert foreign.exists()
    assert store.get("big") == bytes(50_000)
    store.close()


WRITER = """
import sys
from mega_core.store import Store
store = Store.open(sys.argv[1], 64 * 2**20)
print("ready", flush=True)
i = 0
while True:
    n = i % 20
    store.put(f"k{n}", bytes([n]) * (300_000 if n % 2 else 3_000))
    i += 1
"""


def test_killed_while_writing(tmp_path: Path) -> None:
    read = 0
    for turn in range(KILLS):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.05 + 0.037 * turn)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        store = Store.open(tmp_path, 64 * MB)
        for n in range(20):
            value = store.get(f"k{n}")
            assert value in (None, bytes([n]) * (300_000 if n % 2 else 3_000))
            read += value is not None
        assert store.health().quarantined == 0
        assert store.health().mode == "disk"
        store.close()
    assert read > 0
    assert not list(tmp_path.glob("corrupt-*"))
