"""Kernels of a step that begin while the one before them ends: programmatic dependent launch (compute capability 9).

A step is some four hundred short kernels in a row, and between two of them the memory would stand still.  A kernel
launched `early` asks for what no kernel of this step writes (weights, older states) at once, then calls `others_done`:
from there on everything before it is complete, and the next kernel may begin the same way.  As all of them let the
next begin only after they waited themselves, a kernel that begins early finds complete what lies two or more before it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from tiercel.ops.triton import interpreted


@triton.jit
def others_done(EARLY: tl.constexpr):
    """Wait for the kernels before this one; nothing that they write may be read, and nothing written, before."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@functools.cache
def early() -> dict[str, Any]:
    """What to give a launch whose kernel calls `others_done`."""
    there = not interpreted and torch.cuda.get_device_capability() >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if there else {"EARLY": False}


def output(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device) -> torch.Tensor:
    """A tensor for results, of which padding rows are not written; zero in the interpreter, as NumPy warns of overflow
    in what they hold."""
    return (torch.zeros if interpreted else torch.empty)(*shape, dtype=dtype, device=device)
