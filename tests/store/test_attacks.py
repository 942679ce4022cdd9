"""Somebody, or a dying disk, wrote in the store's folder: nothing runs, nothing outside is touched, no wrong data."""

from __future__ import annotations

import os
import pickle
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mega_core.store import Store

MB = 2**20
BIG = os.urandom(50_000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store = Store.open(tmp_path / "results", 64 * MB)
    store.put("small", b"small value")
    store.put("big", BIG)
    store.put("other", b"another value")
    store.close()
    return tmp_path / "results"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim.txt"
    path.write_bytes(b"precious")
    return path


def sql(folder: Path, *statements: tuple[str, tuple[object, ...]]) -> None:
    connection = sqlite3.connect(folder / "entries" / "cache.db")
    with connection:
        for statement, values in statements:
            connection.execute(statement, values)
    connection.close()


def value_file(folder: Path) -> Path:
    (path,) = folder.rglob("*.val")
    return path


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.canary,)


def test_the_bomb_explodes_where_pickle_is_allowed(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("in_file", [False, True])
def test_pickled_value(folder: Path, tmp_path: Path, in_file: bool) -> None:
    data = pickle.dumps(Bomb(tmp_path / "canary"))
    if in_file:
        value_file(folder).write_bytes(data)
        sql(folder, ("UPDATE Cache SET mode = 4 WHERE key = 'big'", ()))
    else:
        sql(folder, ("UPDATE Cache SET mode = 4, filename = NULL, value = ? WHERE key = 'big'", (data,)))
    store = Store.open(folder, 64 * MB)
    assert store.get("big") is None
    assert not (tmp_path / "canary").exists()
    assert store.get("small") == b"small value"
    assert store.health().quarantined == 1
    assert store.put("big", BIG)
    assert store.get("big") == BIG
    store.close()


def test_pickled_key(folder: Path, tmp_path: Path) -> None:
    data = pickle.dumps(Bomb(tmp_path / "canary"))
    sql(folder, ("INSERT INTO Cache(key, raw, store_time, access_time, mode, value) VALUES (?, 0, 1, 1, 1, ?)",
                 (data, b"v")))  # fmt: skip
    store = Store.open(folder, 64 * MB)
    assert store.keys() == ["big", "other", "small"]
    assert not (tmp_path / "canary").exists()
    store.close()


@pytest.mark.parametrize("key", [5, 1.5, b"small", "with blank", "é", ""])
def test_keys_of_other_kinds_are_not_listed(folder: Path, key: object) -> None:
    sql(folder, ("INSERT INTO Cache(key, raw, store_time, access_time, mode, value) VALUES (?, 1, 1, 1, 1, ?)",
                 (key, b"v")))  # fmt: skip
    store = Store.open(folder, 64 * MB)
    assert store.keys() == ["big", "other", "small"]
    store.close()


def ways_out(victim: Path, folder: Path) -> list[object]:
    up = os.path.relpath(victim, folder / "entries")
    return [
        str(victim),
        up,
        f"ab/cd/../../{up}",
        f"ab/../{up}",
        "cache.db",
        "./cache.db",
        "../store.key",
        "..",
        "",
        ".",
        "/dev/zero",
        "ab/cd/" + "0" * 28 + ".val\n",
        "ab/cd/" + "0" * 28 + ".val/../../../" + up,
        "AB/CD/" + "0" * 28 + ".val",
        "ab\\cd\\" + "0" * 28 + ".val",
        b"ab/cd/" + b"0" * 28 + b".val",
        "ab/cd/\0" + "0" * 27 + ".val",
        7,
    ]


@pytest.mark.parametrize("which", range(18))
def test_paths_in_rows_are_neither_read_nor_deleted(folder: Path, victim: Path, which: int) -> None:
    path = ways_out(victim, folder)[which]
    sql(folder, ("UPDATE Cache SET mode = 2, value = NULL, filename = ?", (path,)))
    store = Store.open(folder, 64 * MB)
    for key in ("small", "big", "other"):
        assert store.get(key) is None
    store.put("small", b"new")
    assert store.get("small") == b"new"
    store.delete("big")
    assert victim.read_bytes() == b"precious"
    assert (folder / "store.key").exists()
    assert (folder / "entries" / "cache.db").exists()
    assert store.health().mode == "disk"
    store.close()


def test_expiry_and_eviction_delete_nothing_outside(folder: Path, victim: Path) -> None:
    sql(folder, ("UPDATE Cache SET expire_time = 1, access_time = 0, filename = ?", (str(victim),)))
    store = Store.open(folder, 2 * MB)
    for i in range(30):
        store.put(f"k{i}", os.urandom(100_000))
    assert victim.read_bytes() == b"precious"
    assert not {"small", "big", "other"} & set(store.keys())
    store.close()


@pytest.mark.parametrize("offset", [0, 9, 12, 20, 49, 50, 60, -1])
@pytest.mark.parametrize("key", ["small", "big"])
def test_a_flipped_bit(folder: Path, key: str, offset: int) -> None:
    def flip(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[offset] ^= 4
        return bytes(changed)

    if key == "big":
        value_file(folder).write_bytes(flip(value_file(folder).read_bytes()))
    else:
        connection = sqlite3.connect(folder / "entries" / "cache.db")
        (data,) = connection.execute("SELECT value FROM Cache WHERE key = ?", (key,)).fetchone()
        connection.close()
        sql(folder, ("UPDATE Cache SET value = ? WHERE key = ?", (flip(data), key)))
    store = Store.open(folder, 64 * MB)
    assert store.get(key) is None
    assert store.health().quarantined == 1
    assert store.get(key) is None
    assert store.health().quarantined == 1  # it is gone, not met again
    store.close()


@pytest.mark.parametrize("size", [0, 1, 49, 50, 51, 1000, 50_049, 60_000])
def test_a_value_file_of_another_length(folder: Path, size: int) -> None:
    os.truncate(value_file(folder), size)
    store = Store.open(folder, 64 * MB)
    assert store.get("big") is None
    assert store.get("small") == b"small value"
    assert store.health().quarantined == 1
    store.close()


def test_a_value_file_that_is_gone(folder: Path) -> None:
    value_file(folder).unlink()
    store = Store.open(folder, 64 * MB)
    assert store.get("big") is None
    assert store.put("big", BIG)
    assert store.get("big") == BIG
    store.close()


def test_an_entry_moved_to_another_key(folder: Path) -> None:
    connection = sqlite3.connect(folder / "entries" / "cache.db")
    row = connection.execute("SELECT mode, filename, value FROM Cache WHERE key = 'other'").fetchone()
    connection.close()
    sql(folder, ("UPDATE Cache SET mode = ?, filename = ?, value = ? WHERE key = 'small'", row))
    store = Store.open(folder, 64 * MB)
    assert store.get("other") == b"another value"
    assert store.get("small") is None
    assert store.health().quarantined == 1
    store.close()


def test_two_entries_with_exchanged_files(folder: Path) -> None:
    store = Store.open(folder, 64 * MB)
    store.put("big2", b"x" * 50_000)
    store.close()
    one, two = folder.rglob("*.val")
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    store = Store.open(folder, 64 * MB)
    assert store.get("big") is None
    assert store.get("big2") is None
    store.close()


def test_an_entry_sealed_with_another_secret(folder: Path, tmp_path: Path) -> None:
    store = Store.open(folder, 64 * MB, secret=b"another secret")
    assert store.get("small") is None
    assert store.put("small", b"mine")
    assert store.get("small") == b"mine"
    store.close()
    store = Store.open(folder, 64 * MB)
    assert store.get("small") is None
    assert store.get("big") == BIG
    store.close()


@pytest.mark.parametrize("damage", ["gone", "empty", "short", "link"])
def test_a_damaged_key_file_means_misses(folder: Path, victim: Path, damage: str) -> None:
    key = folder / "store.key"
    if damage in ("gone", "link"):
        key.unlink()
    if damage == "link":
        key.symlink_to(victim)
    if damage in ("empty", "short"):
        key.write_bytes(b"" if damage == "empty" else b"abc")
    store = Store.open(folder, 64 * MB)
    assert store.get("big") is None
    assert store.put("big", BIG)
    assert store.get("big") == BIG
    assert store.health().mode == "disk"
    assert victim.read_bytes() == b"precious"
    assert not key.is_symlink()
    assert key.stat().st_mode & 0o777 == 0o600
    store.close()


# The database itself --------------------------------------------------------------------------------------------------


def _cut(folder: Path) -> None:
    path = folder / "entries" / "cache.db"
    os.truncate(path, path.stat().st_size // 2)


def _zero(folder: Path) -> None:
    os.truncate(folder / "entries" / "cache.db", 0)


def _garbage_head(folder: Path) -> None:
    with open(folder / "entries" / "cache.db", "r+b") as file:
        file.write(os.urandom(4096))


def _garbage_inside(folder: Path) -> None:
    with open(folder / "entries" / "cache.db", "r+b") as file:
        file.seek(4096)
        file.write(os.urandom(8192))


def _garbage_wal(folder: Path) -> None:
    (folder / "entries" / "cache.db-wal").write_bytes(os.urandom(20_000))


def _garbage_shm(folder: Path) -> None:
    (folder / "entries" / "cache.db-shm").write_bytes(os.urandom(32_768))


def _text(folder: Path) -> None:
    (folder / "entries" / "cache.db").write_text("hello " * 2000)


def _gone(folder: Path) -> None:
    (folder / "entries" / "cache.db").unlink()


def _folder_in_place(folder: Path) -> None:
    _gone(folder)
    (folder / "entries" / "cache.db").mkdir()


def _pipe_in_place(folder: Path) -> None:
    _gone(folder)
    os.mkfifo(folder / "entries" / "cache.db")


def _other_tables(folder: Path) -> None:
    _gone(folder)
    connection = sqlite3.connect(folder / "entries" / "cache.db")
    connection.executescript("CREATE TABLE Cache(a); CREATE TABLE Settings(b);")
    connection.close()


def _no_cache_table(folder: Path) -> None:
    sql(folder, ("DROP TABLE Cache", ()))


def _undecodable(folder: Path) -> None:
    sql(folder, ("UPDATE Cache SET filename = CAST(x'ff80ff' AS TEXT), mode = 2, value = NULL", ()))


DAMAGE = [_cut, _zero, _garbage_head, _garbage_inside, _garbage_wal, _garbage_shm, _text, _gone, _folder_in_place,
          _pipe_in_place, _other_tables, _no_cache_table, _undecodable]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_database_never_stops_the_store(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder)
    store = Store.open(folder, 64 * MB)
    assert store.get("small") in (None, b"small value")
    assert store.get("big") in (None, BIG)
    assert store.put("new", b"v")
    assert store.put("small", b"again")
    assert store.get("new") == b"v"
    assert store.get("small") == b"again"
    health = store.health()
    assert health.mode == "disk"
    if list(folder.glob("corrupt-*")):
        assert "set aside" in health.notice
    store.close()
    store = Store.open(folder, 64 * MB)
    assert store.get("new") == b"v"
    store.close()


@pytest.mark.parametrize("damage", [_cut, _garbage_head, _garbage_inside, _zero, _text, _gone])
def test_damage_while_the_store_is_open(folder: Path, damage: Callable[[Path], None]) -> None:
    store = Store.open(folder, 64 * MB)
    for i in range(200):
        store.put(f"k{i}", bytes([i]) * 1000)
    damage(folder)
    for _ in range(2):
        for i in range(200):
            assert store.get(f"k{i}") in (None, bytes([i]) * 1000)
    assert store.put("new", b"v")
    assert store.get("new") == b"v"
    store.health(), store.keys(), store.delete("new")
    store.close()


def test_a_garbage_journal_loses_nothing(folder: Path) -> None:
    _garbage_wal(folder)
    store = Store.open(folder, 64 * MB)
    assert store.get("big") == BIG
    assert store.get("small") == b"small value"
    store.close()


def test_at_most_two_damaged_stores_are_kept(folder: Path) -> None:
    for _ in range(4):
        _text(folder)
        Store.open(folder, 64 * MB).close()
    assert len(list(folder.glob("corrupt-*"))) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size_limit", 1),
        ("cull_limit", 10**6),
        ("eviction_policy", "none"),
        ("statistics", 1),
        ("sqlite_journal_mode", "delete"),
        ("sqlite_mmap_size", 2**30),
        ("disk_min_file_size", 0),
        ("disk_pickle_protocol", 0),
    ],
)
def test_edited_settings_are_overruled(folder: Path, key: str, value: object) -> None:
    sql(folder, ("UPDATE Settings SET value = ? WHERE key = ?", (value, key)))
    store = Store.open(folder, 64 * MB)
    store.put("more", BIG)
    assert store.get("small") == b"small value"
    assert store.get("big") == BIG
    assert store.health().entries == 4
    assert not list(folder.glob("corrupt-*"))
    store.close()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sqlite_writable_schema", 1),
        ("sqlite_user_version; DROP TABLE Cache; --", 1),
        ("close", 5),
        ("_disk", 5),
        ("disk_directory", "/"),
        ("size", -(10**12)),
        ("size", "text"),
        ("count", 10**9),
    ],
)
def test_planted_settings_put_the_store_aside(folder: Path, key: str, value: object) -> None:
    sql(folder, ("INSERT OR REPLACE INTO Settings VALUES (?, ?)", (key, value)))
    store = Store.open(folder, 64 * MB)
    assert store.get("big") is None
    assert store.put("big", BIG)
    assert store.get("big") == BIG
    assert len(list(folder.glob("corrupt-*"))) == 1
    store.close()


@pytest.mark.parametrize(("key", "value"), [("size", "text"), ("count", "x"), ("size", None)])
def test_settings_edited_while_the_store_is_open(folder: Path, key: str, value: object) -> None:
    store = Store.open(folder, 64 * MB)
    sql(folder, ("UPDATE Settings SET value = ? WHERE key = ?", (value, key)))
    store.health()
    assert store.put("new", BIG)
    assert store.get("new") == BIG
    store.close()


# Links ----------------------------------------------------------------------------------------------------------------


def test_a_value_file_that_is_a_link(folder: Path, victim: Path) -> None:
    path = value_file(folder)
    path.unlink()
    path.symlink_to(victim)
    store = Store.open(folder, 64 * MB)
    assert store.get("big") is None
    store.delete("big")
    assert victim.read_bytes() == b"precious"
    store.close()


def test_a_value_folder_that_is_a_link(folder: Path, tmp_path: Path) -> None:
    path = value_file(folder)
    outside = tmp_path / "outside"
    path.parent.rename(outside)
    path.parent.symlink_to(outside)
    store = Store.open(folder, 64 * MB)
    assert store.get("big") is None
    store.delete("big")
    assert list(outside.iterdir())
    store.close()


def test_a_value_file_that_is_a_pipe_does_not_block(folder: Path) -> None:
    path = value_file(folder)
    path.unlink()
    os.mkfifo(path)
    store = Store.open(folder, 64 * MB)
    started = time.monotonic()
    assert store.get("big") is None
    assert time.monotonic() - started < 5
    store.close()


@pytest.mark.parametrize("what", ["entries", "entries/cache.db"])
def test_a_linked_database_is_not_followed(folder: Path, tmp_path: Path, what: str) -> None:
    away = tmp_path / "away"
    (folder / what).rename(away)
    (folder / what).symlink_to(away)
    before = sorted((p, p.stat().st_mtime_ns) for p in [away, *away.rglob("*")])
    store = Store.open(folder, 64 * MB)
    assert store.get("small") is None
    assert store.put("small", b"v")
    assert store.get("small") == b"v"
    store.close()
    assert sorted((p, p.stat().st_mtime_ns) for p in [away, *away.rglob("*")]) == before


def test_a_linked_store_folder_is_not_used(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    store = Store.open(link, 64 * MB)
    assert store.health().mode == "memory"
    assert store.get("small") is None
    store.close()
