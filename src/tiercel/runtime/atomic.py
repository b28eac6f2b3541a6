"""Writes that happen whole or not at all: a temporary file in the same folder, synced, then renamed.

A temporary file is `.NAME.<8 hex>.part`, locked by its writer.  One whose writer was killed is not locked: the first
write into its folder by the next process removes it, and so does `remove_leftovers`.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tiercel.errors import TiercelError
from tiercel.runtime.lock import try_lock

LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.part")
_swept: set[Path] = set()  # folders from which this process has removed leftovers


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write; `path` becomes it when the block ends well, and is untouched when it does not.

    Raises:
        TiercelError: the system refuses (no space, no permission); it names the file.
    """
    temporary: Path | None = None
    try:
        with contextlib.ExitStack() as stack:
            temporary, file = open_part(path)
            stack.enter_context(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise TiercelError(f"could not write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def open_part(path: Path) -> tuple[Path, BinaryIO]:
    """Open a temporary file beside `path`, which the caller renames or unlinks; it is locked while it is open."""
    if path.parent not in _swept and path.parent.is_dir():
        _swept.add(path.parent)
        remove_leftovers(path.parent)
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        file = temporary.open("xb")
        if try_lock(file) and os.fstat(file.fileno()).st_nlink:  # not taken for a leftover before it was locked
            return temporary, file
        file.close()


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that were killed."""
    with contextlib.suppress(OSError):  # a folder that cannot be listed has nothing to clear
        for path in folder.iterdir():
            if LEFTOVER.fullmatch(path.name) and path.is_file():
                with contextlib.suppress(OSError), path.open("r+b") as file:
                    if try_lock(file):
                        path.unlink()


def sync_folder(folder: Path) -> None:
    """Bring a new name in a folder to the disk; systems that cannot open a folder have no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
