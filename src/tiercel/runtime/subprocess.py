"""A process beside ours for work that may hang or die of what it is given: asked with a time limit, ended for good.

Jobs and answers are frames: their length in eight bytes (little-endian), then that many bytes; an answer is a JSON
object.  Whoever speaks another way takes `within` and `end` alone.
"""

from __future__ import annotations

import contextlib
import json
import struct
import subprocess
import threading
from collections.abc import Iterator
from typing import IO, Any


@contextlib.contextmanager
def within(process: subprocess.Popen[Any], seconds: float) -> Iterator[None]:
    """The process is killed when the block takes longer: reads from it come back empty, writes raise OSError."""
    clock = threading.Timer(seconds, process.kill)
    clock.daemon = True
    clock.start()
    try:
        yield
    finally:
        clock.cancel()


def end(process: subprocess.Popen[Any]) -> None:
    """Kill it, wait for it, close its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # unsent bytes of a job meet a closed pipe
            if pipe is not None:
                pipe.close()


def exchange(process: subprocess.Popen[bytes], job: bytes, patience: float, most: int) -> dict[str, Any] | None:
    """Send a job (b"": none, the first word is awaited), read one answer of `most` bytes at most; None when the
    process died, was ended after `patience` seconds, or said something else."""
    assert process.stdin is not None and process.stdout is not None
    with within(process, patience):
        try:
            if job:
                process.stdin.write(struct.pack("<Q", len(job)) + job)
                process.stdin.flush()
            return _read(process.stdout, most)
        except OSError:  # the pipe closed: the process is gone
            return None


def _read(pipe: IO[bytes], most: int) -> dict[str, Any] | None:
    header = pipe.read(8)
    if len(header) < 8:
        return None
    (length,) = struct.unpack("<Q", header)
    data = pipe.read(length) if length <= most else b""
    if not data or len(data) < length:
        return None
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None
