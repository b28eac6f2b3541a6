"""Locks that end with the process that holds them."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tiercel.errors import RequestError, TiercelError


def try_lock(file: IO[Any]) -> bool:
    """Lock an open file for this process; return whether that worked or the system has no such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


@contextlib.contextmanager
def lock_folder(folder: Path, owner: str) -> Iterator[None]:
    """Hold `folder/.lock`, which has the process id of its holder.

    Args:
        folder: made where it is missing.
        owner: what the other process is, for the message: "another training run".

    Raises:
        RequestError: another process holds it.
        TiercelError: the folder cannot be written.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise TiercelError(f"could not write {path}: {error.strerror or error}") from error
    with file:
        if not try_lock(file):
            file.seek(0)
            pid = file.read(20).strip() or "unknown"
            raise RequestError(f"{folder} is in use by {owner}, process {pid}: wait for it, or choose another folder")
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its number
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        yield
