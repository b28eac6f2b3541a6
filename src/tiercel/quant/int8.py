"""INT8: one scale for a whole row of a matrix, that is for one output channel.

    row    | scale, float32 4 | q n, signed |      value = scale · q,  q in −127 … 127

The scale maps the row's largest magnitude to 127; an importance changes nothing at this width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiercel.quant.search import inverse


def quantize(x: Tensor) -> Tensor:
    """(rows, n) float32 → (rows, 4 + n) uint8."""
    scale = x.abs().amax(1) / 127
    q = (x * inverse(scale).unsqueeze(1)).clamp_(-127, 127).round_().to(torch.int8)
    return torch.cat([scale.view(torch.uint8).view(-1, 4), q.view(torch.uint8)], dim=1)


def dequantize(raw: Tensor) -> Tensor:
    """(rows, 4 + n) uint8 → (rows, n) float32."""
    return raw[:, 4:].view(torch.int8) * raw[:, :4].clone(memory_format=torch.contiguous_format).view(torch.float32)
