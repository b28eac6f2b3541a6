"""Large pieces of memory, so that those which go leave no holes between those which stay.

torch asks for aligned memory, and the C library, before version 2.39, does not find what it got back of that when it
is asked again (glibc bugs 14581, 30723): reading a 7B left a new hole with every layer, 600 MB of them.  So what stays
is mapped, and what goes is taken unaligned, with some bytes more.
"""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import torch
from torch import Tensor

LARGE = 1 << 20  # bytes: below this everything is as torch does it
ALIGN = 64  # bytes of a cache line


def mapped(nbytes: int, *, huge: bool = False) -> np.ndarray:
    """So many bytes straight from the system, zeros until they are written; they go back to it whole.

    huge: in its large pages, where it has some.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return np.frombuffer(mmap.mmap(-1, nbytes), dtype=np.uint8)
    # private: what Python maps by default is shared, and gets no large pages
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)


def lasting(nbytes: int) -> Tensor:
    """Uninitialised bytes (uint8) for what stays, such as weights."""
    return torch.empty(nbytes, dtype=torch.uint8) if nbytes < LARGE else torch.from_numpy(mapped(nbytes))


def passing(nbytes: int) -> Tensor:
    """Uninitialised bytes (uint8) for what goes again soon, such as rows on their way from a file."""
    if nbytes < LARGE:
        return torch.empty(nbytes, dtype=torch.uint8)
    bytes_ = np.empty(nbytes + ALIGN, dtype=np.uint8)
    begin = -bytes_.ctypes.data % ALIGN
    return torch.from_numpy(bytes_[begin : begin + nbytes])
