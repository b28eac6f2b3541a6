"""NF4, the four-bit type of QLoRA (Dettmers et al. 2023, arXiv 2305.14314): levels at quantiles of a normal.

    block of 64    | absmax, float32 4 | q 32, first value of a pair in the high nibble |    value = absmax · LEVELS[q]

The levels, the order of the nibbles and the rounding are bitsandbytes' (functional.py), whose checkpoints differ in
that all absmax lie in a tensor of their own (`weights.bitsandbytes`).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tiercel.quant.search import inverse

BLOCK = 64
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
EDGES = [(low + high) / 2 for low, high in itertools.pairwise(LEVELS)]


def quantize(x: Tensor) -> Tensor:
    """(n, 64) float32 → (n, 36) uint8."""
    absmax = x.abs().amax(1)
    unit = x * inverse(absmax).unsqueeze(1)
    q = torch.zeros(x.shape, dtype=torch.uint8)
    for edge in EDGES:  # three times as fast as a search
        q += unit > edge
    return torch.cat([absmax.view(torch.uint8).view(-1, 4), (q[:, ::2] << 4) | q[:, 1::2]], dim=1)


def dequantize(blocks: Tensor) -> Tensor:
    """(n, 36) uint8 → (n, 64) float32."""
    absmax = blocks[:, :4].contiguous().view(torch.float32)
    return nibbles(blocks[:, 4:]) * absmax


def nibbles(packed: Tensor) -> Tensor:
    """(n, w) bytes → (n, 2 w) levels."""
    q = torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1)
    return torch.tensor(LEVELS)[q.int()]
