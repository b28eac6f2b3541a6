"""Blocks of 32 values: one float16 scale d, and a float16 minimum m in the `_1` types (ggml-quants.c).

Nibbles lie in halves: the low one of byte j is value j, the high one value j + 16.  The fifth bits
of Q5 are one little-endian 32-bit word, bit j for value j.  Every function takes (n, bytes) uint8
and gives (n, 32) float32, bit-equal to ggml: one rounding for d·q, one more for + m.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiercel.quant.bits import fields, half


def _nibbles(packed: Tensor) -> Tensor:
    """(n, 16) bytes → (n, 32), the low nibbles first."""
    return torch.cat([packed & 15, packed >> 4], dim=1)


def _fifth_bits(word: Tensor) -> Tensor:
    """(n, 4) bytes → (n, 32) with 0 or 16."""
    return fields(word.unsqueeze(-1), 1).flatten(1) << 4


# Q4_0   | d 2 | q 16 |                     value = d · (q − 8)
def q4_0(blocks: Tensor) -> Tensor:
    return (_nibbles(blocks[:, 2:]).float() - 8) * half(blocks, 0)


# Q4_1   | d 2 | m 2 | q 16 |               value = d · q + m
def q4_1(blocks: Tensor) -> Tensor:
    return (_nibbles(blocks[:, 4:]) * half(blocks, 0)).add_(half(blocks, 2))


# Q5_0   | d 2 | fifth bits 4 | q 16 |      value = d · (q − 16)
def q5_0(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return (q.float() - 16) * half(blocks, 0)


# Q5_1   | d 2 | m 2 | fifth bits 4 | q 16 |    value = d · q + m
def q5_1(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return (q * half(blocks, 0)).add_(half(blocks, 2))


# Q8_0   | d 2 | q 32, signed |             value = d · q
def q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8) * half(blocks, 0)
