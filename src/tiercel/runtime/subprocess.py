"""Calls to a child process that may hang or die of its input: with a time limit, after which it is killed.

Jobs and answers are frames: their length in eight bytes (little-endian), then that many bytes; an answer is a JSON
object.  Children with another protocol use `kill_after` and `terminate` alone.
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
def kill_after(process: subprocess.Popen[Any], seconds: float) -> Iterator[None]:
    """Kill the process when the block takes longer: reads from it are then empty, writes raise OSError."""
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def terminate(process: subprocess.Popen[Any]) -> None:
    """Kill the process, wait for it, close its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # bytes of a job that were not sent meet a closed pipe
            if pipe is not None:
                pipe.close()


def call(process: subprocess.Popen[bytes], job: bytes, timeout: float, max_bytes: int) -> dict[str, Any] | None:
    """Send a job and read one answer.

    job: b"" sends nothing; the answer is then the child's first.  timeout: seconds, after which the child is killed.
    Returns None when the child died or was killed, or its answer is no JSON object or longer than `max_bytes`.
    """
    assert process.stdin is not None and process.stdout is not None
    with kill_after(process, timeout):
        try:
            if job:
                process.stdin.write(struct.pack("<Q", len(job)) + job)
                process.stdin.flush()
            return _read(process.stdout, max_bytes)
        except OSError:  # the pipe closed: the process is gone
            return None


def _read(pipe: IO[bytes], max_bytes: int) -> dict[str, Any] | None:
    header = pipe.read(8)
    if len(header) < 8:
        return None
    (length,) = struct.unpack("<Q", header)
    data = pipe.read(length) if length <= max_bytes else b""
    if not data or len(data) < length:
        return None
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None
