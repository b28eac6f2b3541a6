"""Workspace: large tensors that live for a moment, and the holes they would leave.

torch asks for aligned memory, and the C library, before version 2.39, does not reuse what it got back of that (glibc
bugs 14581, 30723): reading a 7B left a new hole with every layer, 600 MB of them, and prompts left more.  So such
tensors come from an allocator of their own, and holes are returned to the system where many were left.
"""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

from tiercel.runtime.allocator import CachingAllocator

MIN_WORKSPACE_BYTES = 1 << 20  # smaller tensors come from torch
MAX_FREE_BYTES = 192 << 20  # kept: what a layer of a 7B needs for 512 tokens of a prompt

_allocator = CachingAllocator(MAX_FREE_BYTES)


def workspace(nbytes: int) -> Tensor:
    """Return uninitialised bytes (uint8) for a short time: rows read from a file, what a layer computes."""
    if nbytes < MIN_WORKSPACE_BYTES:
        return torch.empty(nbytes, dtype=torch.uint8)
    return _allocator.empty_bytes(nbytes, torch.device("cpu"))


def trim() -> None:
    """Return free memory to the system: after much was read or freed that is not needed again."""
    _allocator.trim()
    if sys.platform == "linux" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        malloc_trim(0)
