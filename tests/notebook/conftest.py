"""A place for a notebook on each database: a SQLite file, and a throwaway PostgreSQL server where one is installed."""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def _binaries() -> Path | None:
    for folder in [os.path.dirname(shutil.which("postgres") or ""), *sorted(glob.glob("/usr/lib/postgresql/*/bin"))]:
        if folder and all(os.access(os.path.join(folder, name), os.X_OK) for name in ("postgres", "initdb", "pg_ctl")):
            return Path(folder)
    return None


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The address of a PostgreSQL server that listens on a Unix socket in a temporary folder only."""
    pytest.importorskip("psycopg", reason="the PostgreSQL driver (psycopg) isn't installed")
    binaries = _binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server (postgres, initdb) on this machine")
    # Not below pytest's own folder: other users may not enter that, and a socket's path has 107 characters at most.
    home = Path(tempfile.mkdtemp(prefix="notebook-pg-"))
    prefix: list[str] = []
    if os.getuid() == 0:  # the server refuses to run as root
        try:
            account = next(pwd.getpwnam(n) for n in ("postgres", "nobody") if n in {p.pw_name for p in pwd.getpwall()})
        except StopIteration:
            pytest.skip("PostgreSQL can't run as root, and there is no other account")
        os.chown(home, account.pw_uid, account.pw_gid)
        prefix = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]

    def call(*arguments: str) -> None:
        done = subprocess.run([*prefix, *arguments], cwd=home, capture_output=True, text=True, timeout=120)
        if done.returncode:
            pytest.skip(f"PostgreSQL does not start here: {(done.stderr or done.stdout)[-300:]}")

    data = home / "data"
    try:
        call(str(binaries / "initdb"), "-D", str(data), "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-sync")
        options = f"-c listen_addresses='' -c unix_socket_directories='{home}' -c fsync=off"
        call(str(binaries / "pg_ctl"), "-D", str(data), "-w", "-l", str(home / "log"), "-o", options, "start")
        try:
            yield f"postgresql://tester@/postgres?host={home}"
        finally:
            call(str(binaries / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where an empty notebook can be made."""
    if request.param == "sqlite":
        yield str(tmp_path / "notebook.db")
        return
    url = request.getfixturevalue("postgres_url")
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    yield url
