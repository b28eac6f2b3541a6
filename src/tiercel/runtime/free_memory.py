"""Refusing work before memory runs out: what a library in Rust or C++ cannot allocate ends the process."""

from __future__ import annotations

from pathlib import Path

from tiercel.errors import DoesNotFit

CHECKED_BYTES = 64 << 20  # less is not looked up


def check_free(needed: int, what: str) -> None:
    """Raise DoesNotFit where the system, or this process's limit, has less than `needed` bytes left.

    Args:
        what: the subject of the message: "a text of 8000000 characters".
    """
    if needed < CHECKED_BYTES:
        return
    free = free_bytes()
    if needed > free:
        raise DoesNotFit(f"{what} needs about {needed >> 20} MiB and {free >> 20} MiB are free; make it smaller")


def free_bytes() -> int:
    """Bytes of memory that this process may still take."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            free = min(free, limit - pages * resource.getpagesize())
    except (ImportError, OSError):  # another system
        pass
    return max(free, 0)
