"""The log of a training run: `out/log.jsonl`, one JSON object per line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiercel.errors import TiercelError
from tiercel.runtime.atomic import atomic_write

LINES_PER_WRITE = 10

Line = dict[str, Any]


class TrainingLog:
    """Append lines to `out/log.jsonl`; with out None keep them in memory only.

    Attributes:
        lines: every line of the run, those before a resume included.
    """

    def __init__(self, out: Path | None) -> None:
        self.path = None if out is None else out / "log.jsonl"
        self.lines: list[Line] = []
        self._unwritten: list[Line] = []

    def clear(self) -> None:
        """Begin an empty file."""
        self._replace([])

    def rewind(self, step: int) -> None:
        """Drop the lines after a checkpoint's step."""
        if self.path is not None:
            self._replace([line for line in read_log(self.path) if line["step"] <= step])

    def write(self, line: Line) -> None:
        """Add a line; it reaches the file with the next `sync`, or after ten lines."""
        self.lines.append(line)
        self._unwritten.append(line)
        if len(self._unwritten) >= LINES_PER_WRITE:
            self.sync()

    def sync(self) -> None:
        """Append the lines that are not in the file yet.

        Raises:
            TiercelError: the system refuses the write; it names the file.
        """
        if self.path is not None and self._unwritten:
            try:
                with self.path.open("a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in self._unwritten)
            except OSError as error:
                raise TiercelError(
                    f"could not write {self.path}: {error.strerror or error}; the last checkpoint is kept: "
                    "make room and go on with --resume"
                ) from None
        self._unwritten = []

    def _replace(self, lines: list[Line]) -> None:
        self.lines = lines
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def read_log(path: Path) -> list[Line]:
    """Return the whole lines of a log; a process that was killed may have left half of the last one."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
