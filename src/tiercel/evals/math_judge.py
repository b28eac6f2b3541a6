"""Asks math-verify whether two answers are the same mathematics, in a process that may hang or die of it.

An answer is a text that a model wrote: `9^{9^{9^9}}` is short, and never evaluated to the end.  Each question has
`ANSWER_SECONDS`; a process that does not answer in time is ended, the answer counts as different, and the next question
gets a new process.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

from tiercel.errors import RequestError
from tiercel.runtime.subprocess import kill_after, terminate

ANSWER_SECONDS, START_SECONDS = 5.0, 60.0
WORKER = Path(__file__).with_name("math_worker.py")


class Judge:
    def __init__(self, seconds: float = ANSWER_SECONDS) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise RequestError("grading mathematics needs math-verify; type: pip install 'tiercel[eval]'")
        self.seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def same(self, answer: str, gold: str) -> bool:
        with self._lock:
            if self._process is None:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL, text=True, encoding="utf-8", errors="surrogatepass", bufsize=1,
                )  # fmt: skip
                if self._line(START_SECONDS) != "ready":
                    self.close()
                    raise RequestError("math-verify does not start; try: python -c 'import math_verify'")
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(json.dumps([answer, gold]) + "\n")
            except OSError:
                found = None
            else:
                found = self._line(self.seconds)
            if found is None:
                self.close()
            return found == "same"

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            terminate(process)

    def _line(self, seconds: float) -> str | None:
        """The next line, or None when none came in time or the process is gone."""
        process = self._process
        assert process is not None and process.stdout is not None
        with kill_after(process, seconds):
            return process.stdout.readline().strip() or None


@lru_cache(maxsize=1)
def judge() -> Judge:
    return Judge()
