"""The folder of a run: what was asked, and a line for each finished item."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from tiercel.errors import FormatError, RequestError, TiercelError
from tiercel.evals.ask import Record
from tiercel.runtime.atomic import atomic_write
from tiercel.runtime.lock import try_lock


class RunLog:
    """The folder of a run: `run.json` (what was asked), `items.jsonl` (a line for each finished item).

    records: by id; those of an earlier run with the same model, data and settings included.  Raises RequestError when
    the folder holds another run, and FormatError when a line other than the last is broken.
    """

    def __init__(self, folder: Path | None, about: dict[str, Any], fresh: bool) -> None:
        self.folder, self.records = folder, dict[str, Record]()
        self._file: Any = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            head, lines = folder / "run.json", folder / "items.jsonl"
            if fresh:
                head.unlink(missing_ok=True)
                lines.unlink(missing_ok=True)
            if head.exists():
                self._check(head, about)
            else:
                lines.unlink(missing_ok=True)
                with atomic_write(head) as file:
                    file.write((json.dumps(about, ensure_ascii=False, indent=1) + "\n").encode())
            self._file = lines.open("a+b")
            try:
                self._lock()
                self._read(lines)
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise TiercelError(f"{folder} cannot hold the run: {error.strerror or error}") from None

    def write(self, record: Record) -> None:
        """On the disk when this returns."""
        self.records[record["id"]] = record
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise TiercelError(f"{self._file.name}: {error.strerror or error}; the items before are kept") from None

    def _check(self, head: Path, about: dict[str, Any]) -> None:
        try:
            before = json.loads(head.read_text())
        except ValueError:
            raise FormatError(f"{head} is damaged; start over with --fresh") from None
        now = json.loads(json.dumps(about))
        for part in ("format", "model", "task", "settings"):
            then = before.get(part) if isinstance(before, dict) else None
            if then != now[part]:
                what = part
                if isinstance(then, dict) and isinstance(now[part], dict):
                    names = [name for name in now[part] if then.get(name) != now[part][name]]
                    what = (
                        f"{part} ({names[0]}: {then.get(names[0])!r}, now {now[part][names[0]]!r})" if names else part
                    )
                raise RequestError(f"{head.parent} holds a run with another {what}; "
                                   "name another folder with --out, or start over with --fresh")  # fmt: skip

    def _lock(self) -> None:
        """Refuse a file that another run writes: two at once would ruin it."""
        if not try_lock(self._file):
            raise RequestError(f"{self.folder} is being written by another run")

    def _read(self, path: Path) -> None:
        """Take over what is there; a last line that was not finished is cut off."""
        self._file.seek(0)
        data = self._file.read()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            self._file.truncate(end)
        for number, line in enumerate(data[:end].split(b"\n")[:-1], 1):
            try:
                record = json.loads(line.decode("utf-8", "surrogatepass"))
                self.records[record["id"]] = record
            except (ValueError, TypeError, KeyError):
                raise FormatError(
                    f"{path}, row {number} is damaged; remove the line, or start over with --fresh"
                ) from None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be written was reported by `write`
                self._file.close()
