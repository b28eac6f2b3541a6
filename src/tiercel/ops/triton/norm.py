"""RMS norms, alone, after a residual sum, and gated; a row of the tensor is one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(x, a, b, weight, total, y, D, eps, ADDED: tl.constexpr, BLOCK: tl.constexpr):
    """total = x + a + b (as many as ADDED), y = norm(total)."""
    row = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, BLOCK)
    seen = d < D
    h = tl.load(x + row + d, seen, 0.0).to(tl.float32)
    if ADDED > 0:
        h += tl.load(a + row + d, seen, 0.0).to(tl.float32)
    if ADDED > 1:
        h += tl.load(b + row + d, seen, 0.0).to(tl.float32)
    if ADDED > 0:
        tl.store(total + row + d, h.to(total.dtype.element_ty), seen)
        h = h.to(total.dtype.element_ty).to(tl.float32)
    scale = tl.rsqrt(tl.sum(h * h) / D + eps)
    w = tl.load(weight + d, seen, 0.0).to(tl.float32)
    tl.store(y + row + d, (h * scale * w).to(y.dtype.element_ty), seen)


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """(…, D) → (…, D) in the dtype of the weight."""
    y, D = torch.empty(x.shape, dtype=weight_D.dtype, device=x.device), x.shape[-1]
    block = triton.next_power_of_2(D)
    _rms_norm[(x.numel() // D,)](x, x, x, weight_D, x, y, D, eps, ADDED=0, BLOCK=block, num_warps=_warps(block))
    return y


def add_rms_norm(x: Tensor, added: list[Tensor], weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + one or two more, in the dtype of x, and its norm in the dtype of the weight; all contiguous."""
    total, D = torch.empty_like(x), x.shape[-1]
    y, block = torch.empty(x.shape, dtype=weight_D.dtype, device=x.device), triton.next_power_of_2(D)
    _rms_norm[(x.numel() // D,)](
        x, added[0], added[-1], weight_D, total, y, D, eps, ADDED=len(added), BLOCK=block, num_warps=_warps(block)
    )  # fmt: skip
    return total, y


@triton.jit
def _gated_norm(
    y, z, weight, out, D, stride_z, eps, NORM: tl.constexpr, GATE_FIRST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    t, g, groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    d = tl.arange(0, BLOCK)
    seen = d < D
    c = g * D + d
    at = t * groups * D + c
    h = tl.load(y + at, seen, 0.0).to(tl.float32)
    gate = tl.load(z + t * stride_z + c, seen, 0.0).to(tl.float32)
    gate = gate * tl.sigmoid(gate)
    if GATE_FIRST or not NORM:
        h = h * gate
    if NORM:
        h = h * tl.rsqrt(tl.sum(h * h) / D + eps) * tl.load(weight + c, seen, 0.0).to(tl.float32)
        if not GATE_FIRST:
            h = h * gate
    tl.store(out + at, h.to(out.dtype.element_ty), seen)


def gated_norm(
    y_TI: Tensor, z_TI: Tensor, weight_I: Tensor | None, eps: float, groups: int, gate_first: bool
) -> Tensor:
    """norm(y · silu(z)), norm(y) · silu(z) or, without a weight, y · silu(z), in the dtype of z, whose rows may lie
    apart."""
    T, I = y_TI.shape
    out_TI = torch.empty(T, I, dtype=z_TI.dtype, device=y_TI.device)
    block = triton.next_power_of_2(I // groups)
    _gated_norm[(T, groups)](
        y_TI, z_TI, y_TI if weight_I is None else weight_I, out_TI, I // groups, z_TI.stride(0), eps,
        NORM=weight_I is not None, GATE_FIRST=gate_first, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out_TI


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        x = tl.where(x > 0, x, 0.0 * x)  # NaN stays NaN
    return x


@triton.jit
def _gate(g, u, y, width, stride_g, stride_u, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = i < width
    x = tl.load(g + t * stride_g + i, seen, 0.0).to(tl.float32)
    other = tl.load(u + t * stride_u + i, seen, 0.0).to(tl.float32)
    x = activated(x, ACTIVATION)
    tl.store(y + t * width + i, (x * other).to(y.dtype.element_ty), seen)


def gate(g: Tensor, u: Tensor, activation: str) -> Tensor:
    """act(g) · u; both (T, F), whose rows may lie apart."""
    T, F = g.shape
    y = torch.empty(T, F, dtype=g.dtype, device=g.device)
    _gate[(T, triton.cdiv(F, 1024))](g, u, y, F, g.stride(0), u.stride(0), ACTIVATION=activation, BLOCK=1024)
    return y
