"""What kernels of norms, gates and products share: activations, and rows quantized to int8 where they are made."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "sigmoid":
        x = tl.sigmoid(x)
    elif ACTIVATION == "relu2":
        x = tl.where(x > 0, x * x, 0.0 * x)
    else:
        x = tl.where(x > 0, x, 0.0 * x)  # NaN stays NaN
    return x


@triton.jit
def store_rounded(h, t, first, q, scales, sums, D, BLOCK: tl.constexpr):
    """BLOCK values of row t, from the block of 32 number `first` on, in eight bits: `rounded.Rounded`."""
    h = tl.reshape(h, (BLOCK // 32, 32))
    b = first + tl.arange(0, BLOCK // 32)
    seen = b < D // 32
    scale = tl.max(tl.abs(h), 1) / 127
    level = tl.floor(h / tl.where(scale > 0, scale, 1.0)[:, None] + 0.5)
    tl.store(q + t * D + b[:, None] * 32 + tl.arange(0, 32)[None, :], level.to(tl.int8), seen[:, None])
    tl.store(scales + t * (D // 32) + b, scale, seen)
    tl.store(sums + t * (D // 32) + b, scale * tl.sum(level, 1), seen)
