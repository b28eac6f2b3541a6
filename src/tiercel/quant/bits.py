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
    return torch.bitwise_and(packed.unsqueeze(-2) >> shifts, 2**bits - 1)


# ── packing


def half_bytes(x: Tensor) -> Tensor:
    """(n) → the two bytes (n, 2) of float16."""
    return x.half().view(torch.uint8).view(-1, 2)


def joined(values: Tensor, bits: int) -> Tensor:
    """(…, 8 / bits, w) uint8 below 2^bits → (…, w) bytes: inverse of `fields`."""
    out = values[..., 0, :].clone()
    for i in range(1, 8 // bits):
        out |= values[..., i, :] << (bits * i)
    return out
