"""float32 → packed blocks: the ten block types of GGUF files, each function the inverse of its namesake in
`legacy.py` and `kquants.py`, where the bytes are drawn.

x: (n, values) float32, n blocks; w: the weights of their squared errors, None for all alike; → (n, bytes) uint8.
Blocks of 32 without weights are the format's plain rounding, byte for byte what the `gguf` package writes; with
weights, and for all blocks of 256, scales are searched (`search.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiercel.quant.bits import half_bytes, joined
from tiercel.quant.search import affine, affine_block, half, inverse, nearest, symmetric, symmetric_block

# ── blocks of 32


def q4_0(x: Tensor, w: Tensor | None) -> Tensor:
    d, q = _symmetric(x, w, 8)
    return torch.cat([half_bytes(d), _nibbles(q)], dim=1)


def q4_1(x: Tensor, w: Tensor | None) -> Tensor:
    d, m, q = _affine(x, w, 15)
    return torch.cat([half_bytes(d), half_bytes(m), _nibbles(q)], dim=1)


def q5_0(x: Tensor, w: Tensor | None) -> Tensor:
    d, q = _symmetric(x, w, 16)
    return torch.cat([half_bytes(d), _fifth_bits(q), _nibbles(q & 15)], dim=1)


def q5_1(x: Tensor, w: Tensor | None) -> Tensor:
    d, m, q = _affine(x, w, 31)
    return torch.cat([half_bytes(d), half_bytes(m), _fifth_bits(q), _nibbles(q & 15)], dim=1)


def q8_0(x: Tensor, w: Tensor | None) -> Tensor:
    """Weights change nothing at this width."""
    d = x.abs().amax(1) / 127
    y = x * inverse(d).unsqueeze(1)
    q = (y.abs() + 0.5).floor() * y.sign()  # halves away from zero
    return torch.cat([half_bytes(d), q.to(torch.int8).view(torch.uint8)], dim=1)


def _symmetric(x: Tensor, w: Tensor | None, top: int) -> tuple[Tensor, Tensor]:
    """d (n) and q + top (n, 32)."""
    if w is None:
        farthest = x.gather(1, x.abs().argmax(1, keepdim=True)).squeeze(1)
        d = farthest / -top
        q = (x * inverse(d).unsqueeze(1) + (top + 0.5)).to(torch.uint8).clamp(max=2 * top - 1)
        return d, q
    y, v = (t.T.unsqueeze(0).contiguous() for t in (x, w))  # (1, V, n)
    d = half(symmetric(y, v, top))
    q = nearest(y * inverse(d).unsqueeze(1), -top, top - 1) + top
    return d[0], q[0].T.to(torch.uint8)


def _affine(x: Tensor, w: Tensor | None, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """d (n), m (n) and q (n, 32)."""
    if w is None:
        m = x.amin(1)
        d = (x.amax(1) - m) / top
        q = ((x - m.unsqueeze(1)) * inverse(d).unsqueeze(1) + 0.5).to(torch.uint8).clamp(max=top)
        return d, m, q
    y, v = (t.T.unsqueeze(0).contiguous() for t in (x, w))
    d, m = map(half, affine(y, v, top))
    q = nearest((y - m.unsqueeze(1)) * inverse(d).unsqueeze(1), 0, top)
    return d[0], m[0], q[0].T.to(torch.uint8)


def _nibbles(q: Tensor) -> Tensor:
    return joined(q.unflatten(1, (2, 16)), 4)


def _fifth_bits(q: Tensor) -> Tensor:
    return joined((q >> 4).unflatten(1, (4, 8)).mT.contiguous(), 1).view(-1, 4)


# ── blocks of 256


def q2_k(x: Tensor, w: Tensor | None) -> Tensor:
    block = affine_block(*_sub_blocks(x, w, 16), 3, 15)
    scales = joined(torch.stack([_bytes(block.scales), _bytes(block.mins)], dim=1), 4)
    q = joined(_levels(block.q).unflatten(1, (2, 4, 32)), 2).flatten(1)
    return torch.cat([scales, q, half_bytes(block.d), half_bytes(block.dmin)], dim=1)


def q3_k(x: Tensor, w: Tensor | None) -> Tensor:
    block = symmetric_block(*_sub_blocks(x, w, 16), 4, 32)
    q, scales = _levels(block.q + 4), _bytes(block.scales + 32)
    low = joined((q & 3).unflatten(1, (2, 4, 32)), 2).flatten(1)
    third = joined((q >> 2).unflatten(1, (8, 32)), 1)
    scale_low = joined((scales & 15).unflatten(1, (2, 8)), 4)
    scale_top = joined((scales >> 4).unflatten(1, (4, 4)), 2)
    return torch.cat([third, low, scale_low, scale_top, half_bytes(block.d)], dim=1)


def q4_k(x: Tensor, w: Tensor | None) -> Tensor:
    block = affine_block(*_sub_blocks(x, w, 32), 15, 63)
    q = joined(_levels(block.q).unflatten(1, (4, 2, 32)), 4).flatten(1)
    return torch.cat(
        [half_bytes(block.d), half_bytes(block.dmin), _scales_and_mins(block.scales, block.mins), q], dim=1
    )


def q5_k(x: Tensor, w: Tensor | None) -> Tensor:
    block = affine_block(*_sub_blocks(x, w, 32), 31, 63)
    q = _levels(block.q)
    low = joined((q & 15).unflatten(1, (4, 2, 32)), 4).flatten(1)
    fifth = joined((q >> 4).unflatten(1, (8, 32)), 1)
    scales = _scales_and_mins(block.scales, block.mins)
    return torch.cat([half_bytes(block.d), half_bytes(block.dmin), scales, fifth, low], dim=1)


def q6_k(x: Tensor, w: Tensor | None) -> Tensor:
    block = symmetric_block(*_sub_blocks(x, w, 16), 32, 128)
    q = _levels(block.q + 32)
    low = joined((q & 15).unflatten(1, (2, 2, 64)), 4).flatten(1)
    top = joined((q >> 4).unflatten(1, (2, 4, 32)), 2).flatten(1)
    scales = block.scales.T.to(torch.int8).view(torch.uint8)
    return torch.cat([low, top, scales, half_bytes(block.d)], dim=1)


def _sub_blocks(x: Tensor, w: Tensor | None, values: int) -> tuple[Tensor, Tensor]:
    """(n, 256) → (S, V, n) for the search."""
    w = torch.ones_like(x) if w is None else w
    x_SVN, w_SVN = (t.unflatten(1, (-1, values)).permute(1, 2, 0).contiguous() for t in (x, w))
    return x_SVN, w_SVN


def _levels(q: Tensor) -> Tensor:
    """(S, V, n) whole numbers → (n, 256) uint8."""
    return q.flatten(0, 1).T.to(torch.uint8)


def _bytes(scales: Tensor) -> Tensor:
    """(S, n) → (n, S) uint8."""
    return scales.T.to(torch.uint8)


def _scales_and_mins(scales: Tensor, mins: Tensor) -> Tensor:
    """Six bits each → 12 bytes; see kquants._scales_and_mins."""
    s, m = _bytes(scales), _bytes(mins)
    low = s[:, :4] | ((s[:, 4:] >> 4) << 6)
    high = m[:, :4] | ((m[:, 4:] >> 4) << 6)
    return torch.cat([low, high, (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)], dim=1)
