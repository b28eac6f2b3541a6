"""Super-blocks of 256 values: small integer scales per 16 or 32 values, float16 scales of these (ggml-quants.c).

    Q4_K, Q5_K   8 sub-blocks of 32    value = d·scale · q − dmin·min       6-bit scales and mins
    Q2_K        16 sub-blocks of 16    value = d·scale · q − dmin·min       4-bit scales and mins
    Q3_K        16 sub-blocks of 16    value = d·scale · q                  6-bit scales − 32
    Q6_K        16 sub-blocks of 16    value = d·scale · q                  8-bit scales, signed

Within a run of bytes the lowest fields of all bytes come first, then the next higher ones: 32 bytes
of four 2-bit fields are 128 values.  Every function takes (n, bytes) uint8 and gives (n, 256)
float32, bit-equal to ggml: the products d·scale and dmin·min are rounded before they meet q.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiercel.quant.bits import fields, half


def _scales_and_mins(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 12 bytes of Q4_K and Q5_K → scales (n, 8) and mins (n, 8), six bits each.

    bytes 0–3: scales 0–3 in the low six bits · 4–7: mins 0–3, likewise
    bytes 8–11: low nibbles of scales 4–7 below, of mins 4–7 above; their two top bits are the top bits of 0–7
    """
    low, high, rest = packed.split(4, dim=1)
    scales = torch.cat([low & 63, (rest & 15) | ((low >> 6) << 4)], dim=1)
    mins = torch.cat([high & 63, (rest >> 4) | ((high >> 6) << 4)], dim=1)
    return scales, mins


def _affine(blocks: Tensor, q: Tensor, scales: Tensor, mins: Tensor, at: int) -> Tensor:
    """d·scales · q − dmin·mins with d and dmin at byte `at`; q is (n, sub-blocks, values)."""
    scale = (half(blocks, at) * scales).unsqueeze(-1)
    low = (half(blocks, at + 2) * mins).unsqueeze(-1)
    return (q * scale).sub_(low).flatten(1)


# Q2_K   | scale and min nibbles 16 | q 64, 2-bit | d 2 | dmin 2 |
def q2_k(blocks: Tensor) -> Tensor:
    scales, q = blocks[:, :16], fields(blocks[:, 16:80].unflatten(1, (2, 32)), 2)
    return _affine(blocks, q.reshape(-1, 16, 16), scales & 15, scales >> 4, 80)


# Q3_K   | third bits 32 | q 64, 2-bit | scales 12 | d 2 |      a third bit of 0 takes 4 off
#        scales: bytes 0–7 low nibbles of 0–7, then of 8–15; bytes 8–11 two top bits, lowest field first
def q3_k(blocks: Tensor) -> Tensor:
    q = fields(blocks[:, 32:96].unflatten(1, (2, 32)), 2).reshape(-1, 256).view(torch.int8)
    q = q + fields(blocks[:, :32], 1).reshape(-1, 256).view(torch.int8) * 4 - 4
    scales = fields(blocks[:, 96:104], 4).flatten(1) | (fields(blocks[:, 104:108], 2).flatten(1) << 4)
    scale = (half(blocks, 108) * (scales.view(torch.int8) - 32)).unsqueeze(-1)
    return (q.view(-1, 16, 16) * scale).flatten(1)


# Q4_K   | d 2 | dmin 2 | scales and mins 12 | q 128, 4-bit |
def q4_k(blocks: Tensor) -> Tensor:
    q = fields(blocks[:, 16:].unflatten(1, (4, 32)), 4)
    return _affine(blocks, q.reshape(-1, 8, 32), *_scales_and_mins(blocks[:, 4:16]), 0)


# Q5_K   | d 2 | dmin 2 | scales and mins 12 | fifth bits 32 | q 128, 4-bit |
def q5_k(blocks: Tensor) -> Tensor:
    q = fields(blocks[:, 48:].unflatten(1, (4, 32)), 4).reshape(-1, 8, 32)
    q = q | (fields(blocks[:, 16:48], 1) << 4)
    return _affine(blocks, q, *_scales_and_mins(blocks[:, 4:16]), 0)


# Q6_K   | low nibbles 128 | top two bits 64 | scales 16, signed | d 2 |      value = d·scale · (q − 32)
def q6_k(blocks: Tensor) -> Tensor:
    low = fields(blocks[:, :128].unflatten(1, (2, 64)), 4).reshape(-1, 256)
    top = fields(blocks[:, 128:192].unflatten(1, (2, 32)), 2).reshape(-1, 256)
    q = (low | (top << 4)).view(torch.int8) - 32
    scale = (half(blocks, 208) * blocks[:, 192:208].view(torch.int8)).unsqueeze(-1)
    return (q.view(-1, 16, 16) * scale).flatten(1)
