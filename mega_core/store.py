"""Results on disk by key: bytes in, the same bytes out, or nothing.

diskcache keeps the files and the index, but by itself it unpickles values and keys and opens or deletes any path
written in its database, so whoever can write the folder could run code. Three layers close that:

1. `SafeBytesDisk` replaces every place where diskcache turns rows into objects or paths: text keys, byte values and
   our own file names only.
2. Each value travels in an envelope (magic, schema, length, HMAC-SHA256 over key and payload), so damage, forgery and
   an entry moved to another key are all noticed. A bad entry is a miss and is removed (quarantined).
3. The folder is 0700, its settings are passed at every open, its database is checked before diskcache reads it.

A damaged database is renamed to corrupt-<time> and a fresh one begins; on a full or read-only disk the store goes on in
memory and says so in `health()`. Losing an entry only costs computing it again, so no failure here reaches the
person's work.
"""

from __future__ import annotations

import hmac
import logging
import os
import re
import secrets
import shutil
import sqlite3
import stat
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import diskcache
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from mega_core.errors import ActionableError
from mega_core.records import Report

try:
    import fcntl
except ImportError:  # Windows: two processes opening one new store at the same instant are not guarded there
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
DEFAULT_SIZE_LIMIT = 4 * 2**30
MEMORY_LIMIT = 128 * 2**20
KEPT_CORRUPT = 2
RETRY_SECONDS = 30.0
ORPHAN_SECONDS = 3600.0

_MAGIC = b"EDITANAT"
_HEADER = struct.Struct(">8sHQ32s")  # magic, schema version, payload length, HMAC
_KEY = re.compile(r"[\x21-\x7e]{1,200}")
_DIGEST = re.compile(r"[0-9a-f]{12,64}")
_VALUE_FILE = re.compile(r"[0-9a-f]{2}/[0-9a-f]{2}/[0-9a-f]{28}\.val")

# Every setting diskcache knows: one left out would be taken from the database file, where anybody could have edited it.
_SETTINGS: Mapping[str, Any] = {
    "statistics": 0,
    "tag_index": 0,
    "eviction_policy": "least-recently-used",
    "cull_limit": 1,  # one per write; Store.put trims the rest, so that a few large entries don't empty the store
    "sqlite_auto_vacuum": 1,
    "sqlite_cache_size": 2**11,
    "sqlite_journal_mode": "wal",
    "sqlite_mmap_size": 0,  # a mapped database that somebody truncates would kill the process
    "sqlite_synchronous": 1,
    "disk_min_file_size": 2**13,
    "disk_pickle_protocol": 5,
}
_KNOWN_SETTINGS = frozenset({*_SETTINGS, "size_limit", "count", "size", "hits", "misses"})


class Refused(Exception):
    """A row or file that this store can't have written. Not an OSError: diskcache would take that for a plain miss."""


class SafeBytesDisk(diskcache.Disk):
    """Text keys and byte values only: no pickle, no path but our own value files, no symbolic link."""

    def __init__(self, directory: str, min_file_size: int = 0, pickle_protocol: int = 0) -> None:
        super().__init__(directory, min_file_size=min_file_size, pickle_protocol=pickle_protocol)
        self.max_value_size = 2**40
        self.written = threading.local()  # .path: the value file this thread wrote last

    def put(self, key: Any) -> tuple[str, bool]:
        """The database key of a text key of at most 200 visible ASCII characters."""
        if type(key) is not str or not _KEY.fullmatch(key):
            raise ValueError(f"A store key is text of 1 to 200 visible ASCII characters, not {key!r:.80}.")
        return key, True

    def get(self, key: Any, raw: Any) -> str | None:
        """The text key of a row; None for a row with any other key, so that listing the keys survives it."""
        return key if raw == 1 and type(key) is str and _KEY.fullmatch(key) else None

    def store(self, value: Any, read: Any, key: Any = diskcache.UNKNOWN) -> tuple[int, int, str | None, Any]:
        """Keep short values in the row, longer ones in a file; a file is written whole or not at all."""
        if read or type(value) is not bytes:
            raise TypeError(f"The store keeps bytes, not {type(value).__name__}.")
        self.written.path = None
        if len(value) < self.min_file_size:
            return 0, _MODE_RAW, None, sqlite3.Binary(value)
        name, path = self.filename(key, value)
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(handle, "wb") as writer:
                writer.write(value)
        except BaseException:
            with suppress(OSError):
                os.unlink(path)
            raise
        self.written.path = path
        return len(value), _MODE_BINARY, name, None

    def fetch(self, mode: Any, filename: Any, value: Any, read: Any) -> bytes:
        """The bytes of a row. Raises Refused for any mode but bytes in the row or in one of our own value files."""
        if read:
            raise Refused("open file handles are not given out")
        if mode == _MODE_RAW and filename is None and isinstance(value, bytes):
            return value
        if mode != _MODE_BINARY or value is not None:
            raise Refused(f"mode {mode!r:.20} is not one this store writes")
        handle = os.open(
            self._own_path(filename), os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        )
        with open(handle, "rb") as reader:
            status = os.fstat(reader.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Refused("the value file is not a regular file")
            if status.st_size > self.max_value_size:
                raise Refused("the value file is larger than the store allows")
            return reader.read()

    def remove(self, file_path: Any) -> None:
        """Delete one of our own value files; any other path is left alone, since diskcache passes what the row says."""
        try:
            path = self._own_path(file_path)
        except Refused as reason:
            log.warning("Left a path alone that the store did not write: %s.", reason)
            return
        with suppress(OSError):
            os.unlink(path)
        with suppress(OSError):
            os.rmdir(os.path.dirname(path))

    def _own_path(self, filename: Any) -> str:
        """The absolute path of a value file. Raises Refused unless it has our form and no link stands in the way."""
        if not isinstance(filename, str):
            raise Refused("the file name is not text")
        name = filename.replace(os.sep, "/")
        if not _VALUE_FILE.fullmatch(name):
            raise Refused(f"{filename!r:.80} is not the name of a value file")
        root = os.path.realpath(self._directory)
        path = os.path.join(root, *name.split("/"))
        if os.path.realpath(path) != path:
            raise Refused(f"{filename!r:.80} leads through a symbolic link")
        return path


_MODE_RAW, _MODE_BINARY = 1, 2


class _Cache(diskcache.Cache):
    """diskcache's Cache that can evict down to its limit one entry at a time (its own cull() drops ten at once)."""

    def trim(self) -> None:
        while len(self) and self.volume() > self.size_limit:
            before = len(self)
            with self._transact() as (sql, cleanup):
                self._cull(time.time(), sql, cleanup, limit=1)
            if len(self) >= before:
                return


class _Memory:
    """The fallback: a least-recently-used table of bytes, bounded."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self.rows: OrderedDict[str, bytes] = OrderedDict()

    def get(self, key: str) -> bytes | None:
        if key in self.rows:
            self.rows.move_to_end(key)
        return self.rows.get(key)

    def put(self, key: str, value: bytes) -> bool:
        self.drop(key)
        if len(value) > self.limit:
            return False
        self.rows[key] = value
        self.size += len(value)
        while self.size > self.limit:
            self.size -= len(self.rows.popitem(last=False)[1])
        return True

    def drop(self, key: str) -> bool:
        value = self.rows.pop(key, None)
        self.size -= len(value or b"")
        return value is not None


@dataclass(frozen=True, slots=True)
class StoreHealth:
    """How the store is doing, for the status page."""

    mode: str
    """"disk" or "memory"."""
    notice: str
    """One sentence for the person; empty when all is well."""
    entries: int
    bytes: int
    """On disk, index included; in memory mode what is held there as well."""
    hits: int
    misses: int
    quarantined: int
    """Entries found damaged or forged, each answered as a miss."""


class Store:
    """Bytes by key, shared by the threads of this process and by other processes on this machine."""

    def __init__(self, folder: Path, size_limit: int, secret: bytes | None) -> None:
        self.folder = folder
        self.size_limit = size_limit
        self._given_secret = secret
        self._secret = secret or secrets.token_bytes(32)
        self._lock = threading.RLock()
        self._memory = _Memory(min(size_limit, MEMORY_LIMIT))
        self._cache: _Cache | None = None
        self._identity: tuple[int, int] | None = None
        self._mode, self._notice = "memory", ""
        self._retry_at = 0.0
        self._closed = False
        self._hits = self._misses = self._quarantined = 0

    @classmethod
    def open(cls, folder: str | Path, size_limit: int = DEFAULT_SIZE_LIMIT, *, secret: bytes | None = None) -> Store:
        """Open or create the store in `folder`. Never fails on the disk's state: see health() for what became of it.

        `secret` authenticates entries; without it a key file in the folder does, which protects against damage and
        mixed-up entries but not against somebody who can read the folder.
        """
        if size_limit < 2**20:
            raise ValueError(f"size_limit is {size_limit} bytes; give at least {2**20}.")
        store = cls(Path(folder), size_limit, secret)
        store._reopen()
        return store

    def get(self, key: str) -> bytes | None:
        """What was put under this key, or None."""
        SafeBytesDisk.put(_KEY_CHECK, key)
        with self._lock:
            held = self._memory.get(key)
        value = held if held is not None else self._attempt(lambda cache: self._read(cache, key))
        with self._lock:
            if value is None:
                self._misses += 1
            else:
                self._hits += 1
        return value

    def put(self, key: str, value: bytes) -> bool:
        """Keep a value; False when it is too large to keep (half the size limit, or the memory fallback's)."""
        SafeBytesDisk.put(_KEY_CHECK, key)
        if type(value) is not bytes:
            raise TypeError(f"The store keeps bytes, not {type(value).__name__}.")
        if len(value) > self.size_limit // 2:
            log.warning(
                "Not stored: %s has %d bytes, the limit for one entry is %d.", key, len(value), self.size_limit // 2
            )
            return False
        sealed = self._seal(key, value)
        self._retry_if_due()
        if self._mode == "disk" and self._attempt(lambda cache: self._write(cache, key, sealed)):
            with self._lock:
                self._memory.drop(key)
            return True
        with self._lock:
            return not self._closed and self._memory.put(key, value)

    def delete(self, key: str) -> bool:
        """Forget a key; True when there was something to forget."""
        SafeBytesDisk.put(_KEY_CHECK, key)
        with self._lock:
            held = self._memory.drop(key)
        return bool(self._attempt(lambda cache: cache.delete(key))) or held

    def keys(self) -> list[str]:
        """Every key, sorted."""
        on_disk = self._attempt(lambda cache: [key for key in cache if key is not None]) or []
        with self._lock:
            return sorted({*on_disk, *self._memory.rows})

    def health(self) -> StoreHealth:
        """Mode, notice and counters."""
        entries, size = self._attempt(lambda cache: (len(cache), cache.volume())) or (0, 0)
        with self._lock:
            entries, size = entries + len(self._memory.rows), size + self._memory.size
            return StoreHealth(self._mode, self._notice, entries, size, self._hits, self._misses, self._quarantined)

    def close(self) -> None:
        """Give the files back. A closed store answers every get with None."""
        with self._lock:
            self._closed = True
            self._drop_cache()
            self._memory = _Memory(0)

    # Typed values --------------------------------------------------------------------------------------------------

    def get_report(self, digest: str) -> Report | None:
        """The report of a question, or None; also None for what isn't a digest, since it may come from a link."""
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            return None
        key = f"report:{digest}"
        data = self.get(key)
        if data is None:
            return None
        try:
            report = Report.from_bytes(data)
        except ActionableError as reason:  # written by another version of the app
            self._discard(key, str(reason))
            return None
        if report.digest != digest:
            self._discard(key, "it answers another question")
            return None
        return report

    def put_report(self, report: Report) -> bool:
        """Keep a finished report under its digest."""
        return self.put(f"report:{report.digest}", report.to_bytes())

    def get_arrays(self, key: str) -> dict[str, NDArray[Any]] | None:
        """The arrays put under this key (writable copies), or None."""
        key = f"arrays:{key}"
        data = self.get(key)
        if data is None:
            return None
        try:
            return {name: np.array(array) for name, array in load_safetensors(data).items()}
        except (SafetensorError, KeyError, TypeError, ValueError) as reason:
            self._discard(key, str(reason))
            return None

    def put_arrays(self, key: str, arrays: Mapping[str, NDArray[Any]]) -> bool:
        """Keep named arrays of numbers as safetensors."""
        objects = [name for name, array in arrays.items() if array.dtype.kind not in "biufc"]
        if objects:
            raise TypeError(f"The store keeps arrays of numbers; {', '.join(objects)} holds something else.")
        return self.put(f"arrays:{key}", save_safetensors({name: np.array(a, order="C") for name, a in arrays.items()}))

    # Envelope ------------------------------------------------------------------------------------------------------

    def _mac(self, key: str, payload: bytes | memoryview) -> bytes:
        name = key.encode("ascii")
        mac = hmac.new(self._secret, struct.pack(">8sHQH", _MAGIC, SCHEMA_VERSION, len(payload), len(name)), sha256)
        mac.update(name)
        mac.update(payload)
        return mac.digest()

    def _seal(self, key: str, payload: bytes) -> bytes:
        return _HEADER.pack(_MAGIC, SCHEMA_VERSION, len(payload), self._mac(key, payload)) + payload

    def _unseal(self, key: str, sealed: bytes) -> bytes:
        """The payload. Raises Refused when the envelope isn't ours, isn't whole, or belongs to another key."""
        if len(sealed) < _HEADER.size:
            raise Refused("it is shorter than an envelope")
        magic, version, length, mac = _HEADER.unpack_from(sealed)
        payload = memoryview(sealed)[_HEADER.size :]
        if magic != _MAGIC or version != SCHEMA_VERSION:
            raise Refused("it isn't an envelope of this version")
        if length != len(payload) or not hmac.compare_digest(mac, self._mac(key, payload)):
            raise Refused("its authentication code does not fit")
        return bytes(payload)

    # Reading and writing -------------------------------------------------------------------------------------------

    def _read(self, cache: _Cache, key: str) -> bytes | None:
        try:
            sealed = cache.get(key)
            return None if sealed is None else self._unseal(key, sealed)
        except Refused as reason:
            self._discard(key, str(reason), cache)
            return None

    def _write(self, cache: _Cache, key: str, sealed: bytes) -> bool:
        disk = cache.disk
        try:
            cache.set(key, sealed)
        except BaseException:
            # diskcache leaves the value file behind when the row can't be written; nothing would count or evict it.
            if getattr(disk.written, "path", None):
                with suppress(OSError):
                    os.unlink(disk.written.path)
            raise
        finally:
            disk.written.path = None
        with suppress(diskcache.Timeout):  # somebody else is writing and will trim
            cache.trim()
        return True

    def _discard(self, key: str, reason: str, cache: _Cache | None = None) -> None:
        """Count and remove a bad entry; to the caller it is a miss."""
        log.warning("Quarantined the stored entry %.80s: %s.", key, reason)
        with self._lock:
            self._quarantined += 1
            self._memory.drop(key)
        if cache is None:
            self._attempt(lambda current: current.delete(key))
        else:
            with suppress(OSError, sqlite3.DatabaseError, diskcache.Timeout):
                cache.delete(key)

    def _attempt(self, action: Callable[[_Cache], Any]) -> Any:
        """Do something with the disk; None when that fails. Damage is repaired, a refusal turns into memory mode."""
        for last in (False, True):
            cache = self._current()
            if cache is None:
                return None
            try:
                return action(cache)
            except (OSError, sqlite3.Error, diskcache.Timeout, TypeError, ValueError) as error:
                # TypeError and ValueError: diskcache met a row edited to hold something it never writes.
                kind = _trouble(error)
                log.warning("The store met %s (%s: %s).", kind, type(error).__name__, error)
                if kind == "damage" and not last:
                    self._repair(cache)
                    continue
                if kind == "refusal":
                    self._go_to_memory(error)
                return None
        return None

    def _current(self) -> _Cache | None:
        """The open cache, opened anew when another process has replaced its database."""
        cache = self._cache
        if cache is not None and _identity(Path(cache.directory)) != self._identity:
            with self._lock:
                if self._cache is cache:
                    self._reopen()
                cache = self._cache
        return cache

    # Opening, repairing, falling back ------------------------------------------------------------------------------

    def _reopen(self, *, damaged: bool = False) -> None:
        with self._lock:
            self._drop_cache()
            if self._closed:
                return
            try:
                _private_folder(self.folder)
                with _alone(self.folder / ".lock"):
                    self._secret = self._given_secret or _read_or_make_secret(self.folder / "store.key")
                    self._cache = self._open_entries(damaged)
                    self._identity = _identity(Path(self._cache.directory))
            except (OSError, sqlite3.Error, diskcache.Timeout) as error:
                log.warning("The store can't use %s (%s: %s).", self.folder, type(error).__name__, error)
                self._go_to_memory(error)
            else:
                self._mode = "disk"
                if "aren't being saved" in self._notice:
                    self._notice = ""

    def _open_entries(self, damaged: bool) -> _Cache:
        entries = self.folder / "entries"
        reason = "it reported damage while in use" if damaged else _why_unusable(entries)
        if reason:
            self._set_aside(entries, reason)
        _private_folder(entries)
        _sweep_orphans(entries)
        try:
            return self._new_cache(entries)
        except sqlite3.DatabaseError as error:
            if _trouble(error) != "damage":
                raise
            self._set_aside(entries, str(error))
            _private_folder(entries)
            return self._new_cache(entries)

    def _new_cache(self, entries: Path) -> _Cache:
        cache = _Cache(str(entries), timeout=1, disk=SafeBytesDisk, size_limit=self.size_limit, **_SETTINGS)
        cache.disk.max_value_size = self.size_limit
        return cache

    def _set_aside(self, entries: Path, reason: str) -> None:
        """Rename the damaged entries and keep the newest few, in case somebody wants to look."""
        # The time leads the name, so the names sort by age; a suffix keeps two in one second apart.
        target = self.folder / f"corrupt-{time.strftime('%Y%m%dT%H%M%S')}-{time.time_ns() % 10**9:09d}"
        os.rename(entries, target)
        log.warning("Set the stored results aside as %s: %s.", target.name, reason)
        self._notice = f"The stored results were damaged and set aside as {target.name}; new ones are being saved."
        kept = sorted(path for path in self.folder.iterdir() if path.name.startswith("corrupt-"))
        for old in kept[:-KEPT_CORRUPT]:
            if old.is_symlink() or not old.is_dir():
                old.unlink(missing_ok=True)
            else:
                shutil.rmtree(old, ignore_errors=True)

    def _repair(self, cache: _Cache) -> None:
        with self._lock:
            if self._cache is cache:
                self._reopen(damaged=True)

    def _go_to_memory(self, error: BaseException) -> None:
        with self._lock:
            self._mode = "memory"
            self._retry_at = time.monotonic() + RETRY_SECONDS
            self._notice = (
                f"New results aren't being saved: {_in_words(error)}. They are kept in memory until the app stops."
            )
            if self._cache is not None:
                # Reads that note when an entry was used need to write; without that they go on working on a full disk.
                self._cache.reset("eviction_policy", "none", update=False)

    def _retry_if_due(self) -> None:
        """In memory mode, look now and then whether the disk works again, and move there what is held in memory."""
        with self._lock:
            if self._mode == "disk" or self._closed or time.monotonic() < self._retry_at:
                return
            self._reopen()
            if self._mode != "disk":
                return
            for key, value in list(self._memory.rows.items()):
                if not self._attempt(lambda cache, k=key, v=value: self._write(cache, k, self._seal(k, v))):  # type: ignore[misc]
                    return
                self._memory.drop(key)

    def _drop_cache(self) -> None:
        if self._cache is not None:
            with suppress(sqlite3.Error):
                self._cache.close()
        self._cache = self._identity = None


_KEY_CHECK = SafeBytesDisk("")


def _trouble(error: BaseException) -> str:
    """What an error means: "damage" (start afresh), "refusal" (the disk takes no writes), "contention" (try later)."""
    # A Timeout hides its cause: no lock within the time, or a database that can't be written at all.
    seen = error.__context__ if isinstance(error, diskcache.Timeout) else error
    message = str(seen)
    if seen is None or "locked" in message or "busy" in message:
        return "contention"
    if isinstance(seen, sqlite3.OperationalError):
        return "damage" if any(sign in message for sign in ("no such", "malformed", "decode")) else "refusal"
    if type(seen) in (sqlite3.DatabaseError, sqlite3.IntegrityError, TypeError, ValueError):
        return "damage"
    return "refusal" if isinstance(seen, OSError) else "contention"


def _in_words(error: BaseException) -> str:
    # diskcache's rollback or Timeout covers the first cause, so the whole chain is read.
    seen, link = "", error  # type: str, BaseException | None
    while link is not None:
        seen, link = f"{seen} {link}", link.__context__
    if "full" in seen or "No space" in seen or "quota" in seen.lower():
        return "the disk is full"
    if "readonly" in seen or "Read-only" in seen or "Permission" in seen:
        return "the folder can't be written"
    return "the disk does not work"


def _identity(entries: Path) -> tuple[int, int] | None:
    """Which file the database is, so that a replaced one is noticed."""
    try:
        status = os.lstat(entries / diskcache.core.DBNAME)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _private_folder(folder: Path) -> None:
    """Make a folder for its owner only. Raises OSError when it is something else or can't be made so."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(f"{folder} is not a folder of its own")
    if stat.S_IMODE(status.st_mode) != 0o700:
        os.chmod(folder, 0o700)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a file lock, so that two processes don't make or repair one store together; go on without after 10 s."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        for _ in range(200 if fcntl else 0):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        yield
    finally:
        os.close(handle)


def _read_or_make_secret(path: Path) -> bytes:
    """The 32 bytes of the key file; made atomically, so that no process ever sees half of one."""
    with suppress(FileNotFoundError):
        if path.is_symlink():
            path.unlink()
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(handle, "rb") as reader:
            secret = reader.read(64)
        if len(secret) == 32:
            os.chmod(path, 0o600)
            return secret
        log.warning("The store's key file was damaged; a new one is made and older entries no longer count.")
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(handle, "wb") as writer:
            writer.write(secret := secrets.token_bytes(32))
            writer.flush()
            os.fsync(writer.fileno())
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    return secret


def _why_unusable(entries: Path) -> str:
    """Why the database must not be opened by diskcache; empty when it may.

    diskcache turns every row of its settings table into an attribute or a PRAGMA, so names are checked before it looks.
    """
    if not os.path.lexists(entries):
        return ""
    if entries.is_symlink() or not entries.is_dir():
        return "it is not a folder of its own"
    database = entries / diskcache.core.DBNAME
    for name in ("", "-wal", "-shm"):
        part = Path(f"{database}{name}")
        if os.path.lexists(part) and not stat.S_ISREG(os.lstat(part).st_mode):
            return f"{part.name} is not a regular file"
    if not database.exists() or not database.stat().st_size:
        return ""
    connection = sqlite3.connect(database, timeout=5, isolation_level=None)
    try:
        connection.execute("BEGIN")  # one snapshot: another process may be writing
        if (found := connection.execute("PRAGMA quick_check(1)").fetchone()) != ("ok",):
            return f"its check says {found}"
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "Settings" not in tables:
            return ""  # never finished being made; diskcache completes it
        settings = dict(connection.execute("SELECT key, value FROM Settings"))
        if unknown := sorted(str(key) for key in settings if key not in _KNOWN_SETTINGS):
            return f"it has the unknown settings {unknown}"
        counted = (0, 0)
        if "Cache" in tables:
            odd = "SELECT COUNT(*) FROM Cache WHERE typeof(size) != 'integer' OR size < 0"
            if connection.execute(odd).fetchone() != (0,):
                return "an entry has an impossible size"
            counted = connection.execute("SELECT COUNT(*), COALESCE(SUM(size), 0) FROM Cache").fetchone()
        if counted != (settings.get("count", 0), settings.get("size", 0)):
            return "its totals don't fit its entries"
    except sqlite3.DatabaseError as error:
        if _trouble(error) != "damage":
            raise
        return str(error)
    finally:
        connection.close()
    return ""


def _sweep_orphans(entries: Path) -> None:
    """Delete value files that no row names: a killed writer leaves them, and nothing would count or evict them."""
    root = Path(os.path.realpath(entries))
    old = []
    for path in root.glob("??/??/*.val"):
        with suppress(OSError):  # deleted by another process meanwhile
            age = time.time() - path.lstat().st_mtime
            ours = _VALUE_FILE.fullmatch(path.relative_to(root).as_posix()) and os.path.realpath(path) == str(path)
            if ours and age > ORPHAN_SECONDS:  # a younger one may be somebody's write in progress
                old.append(path)
    if not old:
        return
    database = entries / diskcache.core.DBNAME
    if not database.exists():
        return
    connection = sqlite3.connect(database, timeout=5)
    try:
        named = {str(name) for (name,) in connection.execute("SELECT filename FROM Cache")}
    except sqlite3.DatabaseError:
        return  # without the list of those in use, none may go
    finally:
        connection.close()
    for path in old:
        if str(path.relative_to(root)) not in named:
            path.unlink(missing_ok=True)
