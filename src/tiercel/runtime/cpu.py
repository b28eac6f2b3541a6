"""The processor that this process runs on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def cores() -> int:
    """Return the physical cores this process may use: a second thread on a core reads no faster."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo(), re.MULTILINE)
    return names[0] if names else platform.processor() or platform.machine()


def cpuinfo() -> str:
    """Return /proc/cpuinfo; nothing where there is none."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
