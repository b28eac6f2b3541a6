"""Fields inside packed blocks: n blocks lie as the rows of a (n, bytes) uint8 tensor, little endian."""

from __future__ import annotations

import torch
from torch import Tensor


def half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of every block, as float32 (n, 1)."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def fields(packed: Tensor, bits: int) -> Tensor:
    """(…, w) bytes → (…, 8 / bits, w): the lowest `bits` of every byte first, then the next, …"""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).unsqueeze(-1)
    return (packed.unsqueeze(-2) >> shifts) & (2**bits - 1)
