"""Ending this process at once."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def hard_exit(status: int = 0) -> NoReturn:
    """End the process now: run the atexit handlers, but not the interpreter's shutdown.

    Python would wait for every thread, also for one that loads a model or waits for a silent hub; and a thread of C++
    that lets go of a tensor meanwhile, as gloo's do, asks a finalizing Python for its lock and aborts the process
    (pytorch issue 190489).
    """
    atexit._run_exitfuncs()  # files of the cache, the log's last lines, the group of ranks
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
