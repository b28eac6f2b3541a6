"""Large tensors that go again soon, and what is left where they were.

torch asks for aligned memory, and the C library, before version 2.39, does not find what it got back of that when it
is asked again (glibc bugs 14581, 30723): reading a 7B left a new hole with every layer, 600 MB of them, and prompts
left more.  So what passes comes from a pool of ours, and holes are given back to the system where there must be some.
"""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

from tiercel.runtime.allocator import CachingAllocator

LARGE = 1 << 20  # bytes: below this everything is as torch does it
KEPT = 192 << 20  # what a layer of a 7B takes for a prompt's 512 tokens

_passing = CachingAllocator(KEPT)


def passing(nbytes: int) -> Tensor:
    """Uninitialised bytes (uint8) for what goes again soon: rows on their way from a file, what a layer computes."""
    if nbytes < LARGE:
        return torch.empty(nbytes, dtype=torch.uint8)
    return _passing.take(nbytes, torch.device("cpu"))


def give_back() -> None:
    """To the system, what nobody uses: when much was read, or let go of, that will not be again."""
    _passing.give_back()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
