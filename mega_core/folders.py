"""Folders and files that are there whole or not at all: made under another name, renamed when they are complete."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mega_core.errors import BadInput, Busy, StoreError

try:
    import fcntl
except ImportError:  # where there are no such locks
    fcntl = None  # type: ignore[assignment]


def check_new(target: Path, field: str) -> None:
    """Raises BadInput unless `target` can become a new folder: nothing is there, or an empty folder."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise BadInput(field, f"{target} is there and is not a folder.", "Name a new folder.")
    if target.is_dir() and any(target.iterdir()):
        raise BadInput(field, f"{target} is not empty.", "Name a new folder, or empty that one.")
    parent = target.absolute().parent
    if not parent.is_dir():
        raise BadInput(field, f"there is no folder {parent}.", "Make it first.")
    if not os.access(parent, os.W_OK):
        raise BadInput(field, f"{parent} can't be written to.", "Choose another place.")


@contextmanager
def new_folder(target: Path, field: str) -> Iterator[Path]:
    """Yield an empty folder that takes the name `target` when the block ends well, and is gone when it doesn't.

    Raises BadInput as check_new() does, StoreError when the disk refuses.
    """
    check_new(target, field)
    target = target.absolute()
    making = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        making.mkdir()
        yield making
        for path in (*making.rglob("*"), making):
            sync(path)
        if target.is_dir():
            target.rmdir()  # raises when somebody has put something there meanwhile
        making.rename(target)
        sync(target.parent)
    except OSError as error:
        raise StoreError(
            f"{target} could not be written ({error.strerror or type(error).__name__}).",
            "Free some space, or choose another place.",
        ) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Put a file in the place of whatever has its name. Raises OSError; then the old one stays."""
    making = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with making.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(making, path)
    finally:
        making.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Be the only one who changes this folder inside the block, among those who ask. Raises Busy when another one is.

    The operating system frees the lock however the process ends. A folder that isn't there needs none: of two who make
    it only one can give it its name.
    """
    if fcntl is None or not folder.is_dir():
        yield
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise BadInput(what, f"{folder} can't be read.", "Choose another one.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Busy(f"{folder} is being changed by another process.", "Wait for it, then try again.") from error
        yield
    finally:
        os.close(handle)
