"""How much memory a process has held."""

from __future__ import annotations

from pathlib import Path

import psutil


def peak_rss(pid: int) -> int:
    """The most resident memory at any one time, in bytes; what it holds now where the system keeps no record.

    0 for a process that has just ended.
    """
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    try:
        info = psutil.Process(pid).memory_info()
        return int(getattr(info, "peak_wset", info.rss))
    except psutil.Error:
        return 0
