"""The files of benchmarks: found here or fetched at a pinned commit, and checked by sha256.

Looked for in this order: `--data DIR` or TIERCEL_DATA (and then nowhere else), `../shared/data` beside the project,
what was fetched before (`<home>/data`), the address in the benchmark's file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiercel
from tiercel.errors import FormatError, Offline, RequestError

MAX_FILE_BYTES = 64 << 20  # of one file that is fetched
MAX_ROW_BYTES = 8 << 20


@dataclass(frozen=True)
class File:
    """path: inside a data folder · sha256: of its bytes; empty where the loader checks the content instead
    url: where the same bytes are, at a fixed commit · convert: makes them of what is there"""

    path: str
    sha256: str
    url: str
    convert: Callable[[bytes], bytes] | None = None


@dataclass(frozen=True)
class Found:
    """A file that is here: its rows, and what a report names it by."""

    path: Path
    sha256: str
    rows: list[dict[str, Any]]

    def numbered(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each row with its place, "FILE, row 3", for messages."""
        for number, row in enumerate(self.rows, 1):
            yield f"{self.path}, row {number}", row

    def about(self) -> dict[str, Any]:
        return {"file": "/".join(self.path.parts[-2:]), "sha256": self.sha256, "rows": len(self.rows)}


def open_file(file: File, folder: str | Path | None = None) -> Found:
    """Find, check and read it.  Raises RequestError, Offline, FormatError (which names file and row)."""
    path = _place(file, folder)
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if file.sha256 and digest != file.sha256:
        raise FormatError(f"{path} is not the copy this benchmark is defined by: sha256 {digest[:16]}… "
                          f"instead of {file.sha256[:16]}…; take it from {file.url}")  # fmt: skip
    return Found(path, digest, list(rows_of(data, str(path))))


def open_own(path: Path) -> Found:
    """A user's own JSONL."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from None
    return Found(path, hashlib.sha256(data).hexdigest(), list(rows_of(data, str(path))))


def rows_of(data: bytes, name: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL, line by line (split on newlines only: a text may hold other separators)."""
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        if len(line) > MAX_ROW_BYTES:
            raise FormatError(f"{name}, row {number}: {len(line)} bytes are more than a row may have ({MAX_ROW_BYTES})")
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            why = "not UTF-8" if isinstance(error, UnicodeDecodeError) else f"not JSON ({error})"
            raise FormatError(f"{name}, row {number}: {why}") from None
        if not isinstance(row, dict):
            raise FormatError(f"{name}, row {number}: an object with fields is expected, not {type(row).__name__}")
        yield row


def field(row: dict[str, Any], name: str, kind: type, where: str) -> Any:
    """A field that has to be there, of this type."""
    value = row.get(name)
    if not isinstance(value, kind):
        found = "is missing" if name not in row else f"is {type(value).__name__}, not {kind.__name__}"
        raise FormatError(f"{where}: field {name!r} {found}")
    return value


def _place(file: File, folder: str | Path | None) -> Path:
    chosen = folder or os.environ.get("TIERCEL_DATA")
    if chosen:
        path = Path(chosen) / file.path
        if not path.is_file():
            raise RequestError(f"{path} is not there; it can be had from {file.url}")
        return path
    from tiercel.hub import local_models

    beside = Path(tiercel.__file__).resolve().parents[3] / "shared" / "data" / file.path
    kept = local_models.home() / "data" / file.path
    for path in (beside, kept):
        if path.is_file():
            return path
    return _fetch(file, kept)


def _fetch(file: File, target: Path) -> Path:
    import urllib.error
    import urllib.request

    from tiercel.runtime.atomic import atomic_write

    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        raise Offline(f"{file.path} is not here, and HF_HUB_OFFLINE forbids to fetch it; give a folder with --data")
    try:
        with urllib.request.urlopen(file.url, timeout=30) as response:
            data = response.read(MAX_FILE_BYTES + 1)
    except (urllib.error.URLError, OSError) as error:
        raise Offline(f"{file.path} is not here and could not be fetched from {file.url} ({error}); "
                      "put it into a folder and name that with --data") from None  # fmt: skip
    data = file.convert(data) if file.convert is not None else data
    if file.sha256 and hashlib.sha256(data).hexdigest() != file.sha256:
        raise FormatError(f"what {file.url} gives is not {file.path}: its sha256 is another")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as out:
        out.write(data)
    return target
