"""What was read from files, kept until they change."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from tiercel.errors import FormatError

T = TypeVar("T")
MAX_ENTRIES = 4096


class StatCache(Generic[T]):
    """Calls `read` once for each state of a file or folder: its path, sizes, inodes and times.

    Results are shared and must not be changed.  A FormatError is kept as well.
    """

    def __init__(self, read: Callable[[Path], T]) -> None:
        self.read = read
        self._kept: dict[Path, tuple[object, T | FormatError]] = {}

    def __call__(self, path: Path) -> T:
        """Raises what `read` raises, and OSError where the path is gone."""
        stamp = stat_stamp(path)
        kept = self._kept.get(path)
        if kept is None or kept[0] != stamp:
            try:
                found: T | FormatError = self.read(path)
            except FormatError as error:
                found = error
            while len(self._kept) >= MAX_ENTRIES:
                self._kept.pop(next(iter(self._kept)), None)
            kept = self._kept[path] = stamp, found
        if isinstance(kept[1], FormatError):
            raise kept[1]
        return kept[1]


def stat_stamp(path: Path) -> object:
    """What changes with a file, or with the files of a folder (not with those of folders in it).  Raises OSError."""
    stat = path.stat()
    if not path.is_dir():
        return stat.st_ino, stat.st_size, stat.st_mtime_ns
    files = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_file():
                inner = entry.stat()
                files.append((entry.name, inner.st_ino, inner.st_size, inner.st_mtime_ns))
    return stat.st_mtime_ns, sorted(files)
