"""What goes in comes out: values, reports, arrays, limits, counters."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from mega_core import frames
from mega_core.records import EditRequest, Inspection, MethodRef, ModelRef, Receipt, Report
from mega_core.store import Store

MB = 2**20
ROOT = Path(__file__).parents[2]


def a_report(digest: str = "ab" * 32) -> Report:
    request = EditRequest("The Eiffel Tower", "{} is in the city of", "Rome", "Paris")
    question = Inspection(ModelRef("tiny"), MethodRef("rome", 1, (("layer", 5),)), (request,))
    row = {"state": "before", "case": 0, "layer": 1, "module": "ffn", "candidate": "new", "contribution": 0.25}
    tables = {"module_scores": frames.from_rows([row], "module_scores")}
    return Report(question, digest, "cd" * 32, tables, Receipt(True, "a", "a", 0), {"edit": 1.5})


@pytest.fixture
def store(tmp_path: Path):
    opened = Store.open(tmp_path / "results", 64 * MB)
    yield opened
    opened.close()


@pytest.mark.parametrize("size", [0, 1, 100, 8191, 8192, 3 * MB])
def test_the_same_bytes_come_back(store: Store, tmp_path: Path, size: int) -> None:
    value = os.urandom(size)
    assert store.get("k") is None
    assert store.put("k", value)
    assert store.get("k") == value
    store.close()
    again = Store.open(tmp_path / "results", 64 * MB)
    assert again.get("k") == value
    assert again.health().mode == "disk"
    assert again.health().notice == ""
    again.close()


def test_a_value_can_be_replaced_and_forgotten(store: Store) -> None:
    for value in (b"one", b"two" * 10_000, b"three"):
        store.put("k", value)
        assert store.get("k") == value
    assert store.keys() == ["k"]
    assert store.delete("k")
    assert not store.delete("k")
    assert store.get("k") is None
    assert store.keys() == []
    assert not list(store.folder.rglob("*.val"))


@pytest.mark.parametrize("key", ["", "a b", "a\nb", "é", "k" * 201, 5, None, b"k"])
def test_a_key_that_is_no_plain_text_is_refused(store: Store, key: object) -> None:
    for call in (store.get, store.delete, lambda k: store.put(k, b"v")):
        with pytest.raises(ValueError, match="store key"):
            call(key)  # type: ignore[operator]


def test_only_bytes_are_kept(store: Store) -> None:
    for value in ("text", bytearray(b"x"), 5, {"a": 1}, None):
        with pytest.raises(TypeError, match="keeps bytes"):
            store.put("k", value)  # type: ignore[arg-type]


def test_the_folder_and_the_key_belong_to_their_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    Store.open(folder, 64 * MB).close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "entries").stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "store.key").stat().st_mode) == 0o600
    assert (folder / "store.key").stat().st_size == 32


def test_the_size_is_bounded_and_the_least_recently_used_go_first(tmp_path: Path) -> None:
    store = Store.open(tmp_path, 5 * MB)
    for i in range(40):
        store.put(f"k{i}", os.urandom(200_000))
        assert store.get("k0") is not None, i  # used all the time, so it stays
    health = store.health()
    assert health.bytes <= 5 * MB
    assert 20 <= health.entries <= 26  # 5 MB / 200 kB
    assert store.get("k39") is not None
    assert store.get("k5") is None
    files = sum(path.stat().st_size for path in tmp_path.rglob("*.val"))
    assert files <= 5 * MB
    store.close()


def test_a_few_large_entries_do_not_empty_the_store(tmp_path: Path) -> None:
    store = Store.open(tmp_path, 10 * MB)
    for i in range(6):
        assert store.put(f"k{i}", os.urandom(3 * MB))
    assert store.health().entries == 3
    assert not store.put("huge", bytes(6 * MB))
    assert store.get("huge") is None
    store.close()


def test_counters(store: Store) -> None:
    store.put("k", b"v")
    store.get("k"), store.get("k"), store.get("other")
    health = store.health()
    assert (health.hits, health.misses, health.quarantined, health.entries) == (2, 1, 0, 1)


def test_reports(store: Store) -> None:
    report = a_report()
    assert store.get_report(report.digest) is None
    assert store.put_report(report)
    back = store.get_report(report.digest)
    assert back is not None
    assert back.to_bytes() == report.to_bytes()
    for digest in ("", "../../etc/passwd", "AB" * 32, "x" * 64, None, 5):
        assert store.get_report(digest) is None  # type: ignore[arg-type]


def test_a_report_that_cannot_be_read_or_answers_another_question_is_a_miss(store: Store) -> None:
    store.put("report:" + "12" * 32, b"not a report")
    store.put("report:" + "34" * 32, a_report("56" * 32).to_bytes())
    assert store.get_report("12" * 32) is None
    assert store.get_report("34" * 32) is None
    assert store.health().quarantined == 2
    assert store.keys() == []


def test_arrays(store: Store) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "wide": rng.standard_normal((64, 48)).astype(np.float32),
        "turned": rng.standard_normal((5, 7)).T,
        "strided": np.arange(20)[::3],
        "half": np.ones((2, 2), np.float16),
        "scalar": np.array(3.5),
        "none": np.zeros((0, 4)),
    }
    assert store.put_arrays("cov", arrays)
    back = store.get_arrays("cov")
    assert back is not None
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)
        assert back[name].flags.writeable
    assert store.get_arrays("other") is None
    with pytest.raises(TypeError, match="bad"):
        store.put_arrays("cov", {"bad": np.array([object()])})
    store.put("arrays:junk", b"\xff" * 64)
    assert store.get_arrays("junk") is None
    assert store.health().quarantined == 1


def test_threads_share_a_store(store: Store) -> None:
    wrong: list[str] = []

    def work(me: int) -> None:
        for i in range(30):
            key, value = f"{me}-{i}", bytes([me]) * (i * 700)
            if not store.put(key, value) or store.get(key) != value:
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(store.keys()) == 180


def test_processes_share_a_store(store: Store) -> None:
    script = """
import sys
from mega_core.store import Store
store = Store.open(sys.argv[1], 64 * 2**20)
me = int(sys.argv[2])
for i in range(40):
    assert store.put(f"{me}-{i}", bytes([me]) * (i * 700))
    assert store.get(f"{me}-{i}") == bytes([me]) * (i * 700)
assert store.health().mode == "disk", store.health()
"""
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(store.folder), str(n)], cwd=ROOT, stderr=subprocess.PIPE)
        for n in (1, 2, 3)
    ]
    for process in running:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err.decode()
    assert len(store.keys()) == 120
    assert store.get("2-39") == b"\2" * (39 * 700)
    assert store.health().quarantined == 0


def test_processes_that_open_a_new_store_together_agree_on_its_key(tmp_path: Path) -> None:
    script = """
import sys
from mega_core.store import Store
store = Store.open(sys.argv[1], 64 * 2**20)
assert store.put(sys.argv[2], b"v"), store.health()
"""
    folder = tmp_path / "new"
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(folder), f"k{n}"], cwd=ROOT, stderr=subprocess.PIPE)
        for n in range(4)
    ]
    for process in running:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err.decode()
    store = Store.open(folder, 64 * MB)
    assert [store.get(f"k{n}") for n in range(4)] == [b"v"] * 4
    assert not list(folder.glob("corrupt-*"))
    store.close()


def test_a_closed_store_answers_nothing(store: Store) -> None:
    store.put("k", b"v")
    store.close()
    assert store.get("k") is None
    assert not store.put("k", b"v")
    assert store.keys() == []


def test_importing_the_store_brings_no_torch() -> None:
    code = "import sys, mega_core.store, mega_core.notebook, mega_core.jobs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
