"""Where the notebook lives: files that are damaged, read-only or old, addresses that are wrong."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from mega_core import notebook as module
from mega_core.errors import BadInput, StoreError
from mega_core.notebook import Notebook
from tests.notebook.test_notebook import a_run, digest

ROOT = Path(__file__).parents[2]


def filled(path: Path, runs: int = 3) -> Path:
    book = Notebook.open(path)
    for i in range(1, runs + 1):
        book.add_run(a_run(i))
        book.set_note(digest(i), "remember " * 50)
    book.close()
    return path


def test_sqlite_is_set_up_to_lose_nothing(tmp_path: Path) -> None:
    book = Notebook.open(tmp_path / "deep" / "notebook.db")
    with book._reading() as connection:
        for pragma, value in {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}.items():
            assert connection.exec_driver_sql(f"PRAGMA {pragma}").scalar() == value
    assert book.health().backend == "sqlite"
    assert stat.S_IMODE((tmp_path / "deep" / "notebook.db").stat().st_mode) == 0o600
    book.close()


@pytest.mark.parametrize("damage", ["cut", "garbage", "text"])
def test_a_damaged_file_is_kept_and_a_new_one_begun(tmp_path: Path, damage: str) -> None:
    path = filled(tmp_path / "notebook.db", 30)
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "garbage":
        with open(path, "r+b") as file:
            file.seek(4096)
            file.write(os.urandom(8192))
    else:
        path.write_text("hello " * 5000)
    before = path.read_bytes()
    book = Notebook.open(path)
    assert book.count() == 0
    book.add_run(a_run())
    assert "damaged" in book.health().notice
    (kept,) = tmp_path.glob("notebook.db.damaged-*")
    assert kept.read_bytes() == before
    assert kept.name in book.health().notice
    book.close()
    assert Notebook.open(path).count() == 1


def test_an_empty_file_is_a_new_notebook(tmp_path: Path) -> None:
    (tmp_path / "notebook.db").touch()
    book = Notebook.open(tmp_path / "notebook.db")
    book.add_run(a_run())
    assert book.health().notice == ""
    book.close()


def test_a_place_that_cannot_be_written_gives_way_to_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    book = Notebook.open(tmp_path / "file" / "notebook.db")
    book.add_run(a_run())
    book.set_note(digest(1), "n")
    assert book.count() == 1
    assert book.health().backend == "memory"
    assert "aren't being saved" in book.health().notice
    book.close()


def test_a_database_in_memory(tmp_path: Path) -> None:
    book = Notebook.open("sqlite://")
    book.add_run(a_run())
    assert book.count() == 1
    assert book.health().backend == "memory"
    book.close()


def _add_runs(book: Notebook) -> None:
    for i in range(2, 200):
        book.add_run(a_run(i))


def test_a_write_on_a_full_disk_says_so(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        book = Notebook.open(place / "notebook.db")
        book.add_run(a_run())
        (place / "filler").write_bytes(b"x" * (int(os.statvfs(place).f_bavail * os.statvfs(place).f_frsize) - 4096))
        with pytest.raises(StoreError, match=r"Could not record the run: the disk is full\. Make room"):
            _add_runs(book)
        before = book.count()
        (place / "filler").unlink()
        book.add_run(a_run(500))
        assert book.count() == before + 1
        book.close()
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_errors_of_the_database_do_not_show_its_insides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    book = Notebook.open(tmp_path / "notebook.db")

    def fail(*args: object) -> None:
        raise OperationalError("SELECT secret", {}, sqlite3.OperationalError("no such table at /home/somebody"))

    monkeypatch.setattr(module, "_upsert", fail)
    with pytest.raises(StoreError) as caught:
        book.add_run(a_run())
    assert "somebody" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "somebody" in caplog.text
    book.close()


def test_an_older_notebook_is_copied_before_its_tables_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path / "notebook.db")
    folder = tmp_path / "steps" / "migrations"
    source = Path(module.__file__).parent / "migrations"
    (folder / "versions").mkdir(parents=True)
    steps = sorted(file.name for file in (source / "versions").glob("0*.py"))
    for name in ("env.py", "script.py.mako", *(f"versions/{step}" for step in steps)):
        (folder / name).write_text((source / name).read_text())
    head = steps[-1][:4]
    (folder / "versions" / "9999_more.py").write_text(
        f"import sqlalchemy as sa\nfrom alembic import op\nrevision, down_revision = '9999', {head!r}\n"
        "branch_labels = depends_on = None\n"
        "def upgrade():\n    op.add_column('runs', sa.Column('extra', sa.Text))\n"
    )
    monkeypatch.setattr(module, "__file__", str(tmp_path / "steps" / "notebook.py"))
    book = Notebook.open(path)
    assert book.health().revision == "9999"
    assert book.health().runs == 3
    book.close()
    monkeypatch.undo()
    copy = tmp_path / "notebook.db.before-9999"
    old = Notebook.open(copy)
    assert old.health().revision == head
    assert old.count() == 3
    assert old.get(digest(2)).notes  # type: ignore[union-attr]
    old.close()


@pytest.mark.parametrize("place", ["mysql://u:p@h/d", "http://example.org", "://", "oracle://x", "sqlite+x://y"])
def test_other_databases_are_refused(place: str) -> None:
    with pytest.raises(BadInput, match="postgresql://"):
        Notebook.open(place)


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(StoreError, match="MEGA_DATABASE_URL") as caught:
        Notebook.open(f"postgresql://somebody:geheim@/db?host={tmp_path}")
    assert "geheim" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


WRITER = """
import sys
from mega_core.notebook import Notebook
from tests.notebook.test_notebook import a_run, digest
book = Notebook.open(sys.argv[1])
print("ready", flush=True)
for i in range(1, 100_000):
    book.add_run(a_run(i))
    book.set_note(digest(i), "remember " * 100)
    print(i, flush=True)
"""


def test_what_was_saved_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "notebook.db"
    for turn in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.2 + 0.13 * turn)
        os.kill(process.pid, signal.SIGKILL)
        told = [line for line in process.stdout.read().split(b"\n") if line][:-1]  # the last line may be half
        process.wait()
        process.stdout.close()
        book = Notebook.open(path)
        assert book.health().backend == "sqlite"
        assert book.health().notice == ""
        for line in told[-5:]:
            entry = book.get(digest(int(line)))
            assert entry is not None
            assert entry.notes
        book.close()
