"""RMS norms, alone, after a residual sum, and gated; a row of the tensor is one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiercel.ops.triton import FEW
from tiercel.ops.triton.activation import activated, store_rounded
from tiercel.ops.triton.launch import early, others_done
from tiercel.ops.triton.rounded import Rounded, keep_rounded


@triton.jit
def _rms_norm(
    x, a, b, weight, total, y, q, scales, sums, D, eps,
    ADDED: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """total = x + a + b (as many as ADDED), y = norm(total)."""
    t = tl.program_id(0).to(tl.int64)
    row = t * D
    d = tl.arange(0, BLOCK)
    seen = d < D
    w = tl.load(weight + d, seen, 0.0).to(tl.float32)
    others_done(EARLY)
    h = tl.load(x + row + d, seen, 0.0).to(tl.float32)
    if ADDED > 0:
        h += tl.load(a + row + d, seen, 0.0).to(tl.float32)
    if ADDED > 1:
        h += tl.load(b + row + d, seen, 0.0).to(tl.float32)
    if ADDED > 0:
        tl.store(total + row + d, h.to(total.dtype.element_ty), seen)
        h = h.to(total.dtype.element_ty).to(tl.float32)
    scale = tl.rsqrt(tl.sum(h * h) / D + eps)
    h = h * scale * w
    tl.store(y + row + d, h.to(y.dtype.element_ty), seen)
    if ROUND:
        store_rounded(h, t, 0, q, scales, sums, D, BLOCK)


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, round: bool = False) -> Tensor:
    """(…, D) → (…, D) in the dtype of the weight.  round: also in eight bits, kept with it (`rounded.rounded`)."""
    return _norm(x, [], weight_D, eps, round)[1]


def add_rms_norm(
    x: Tensor, added: list[Tensor], weight_D: Tensor, eps: float, *, round: bool = False
) -> tuple[Tensor, Tensor]:
    """x + one or two more, in the dtype of x, and its norm in the dtype of the weight; all contiguous."""
    return _norm(x, added, weight_D, eps, round)


def _norm(x: Tensor, added: list[Tensor], weight_D: Tensor, eps: float, round: bool) -> tuple[Tensor, Tensor]:
    D = x.shape[-1]
    total = torch.empty_like(x) if added else x
    y, block = torch.empty(x.shape, dtype=weight_D.dtype, device=x.device), triton.next_power_of_2(D)
    r = Rounded(x.numel() // D, D, x.device) if round else None
    more = added or [x]
    _rms_norm[(x.numel() // D,)](
        x, more[0], more[-1], weight_D, total, y, *(r.planes if r else (y, y, y)), D, eps,
        ADDED=len(added), ROUND=round, BLOCK=block, num_warps=_warps(block), **early(),
    )  # fmt: skip
    if r:
        keep_rounded(y, r)
    return total, y


@triton.jit
def _gated_norm(
    y, z, weight, out, q, scales, sums, D, stride_z, eps,
    NORM: tl.constexpr, GATE_FIRST: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    t, g, groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    d = tl.arange(0, BLOCK)
    seen = d < D
    c = g * D + d
    at = t * groups * D + c
    w = tl.load(weight + c, seen, 0.0).to(tl.float32) if NORM else 0.0
    others_done(EARLY)
    h = tl.load(y + at, seen, 0.0).to(tl.float32)
    gate = tl.load(z + t * stride_z + c, seen, 0.0).to(tl.float32)
    gate = gate * tl.sigmoid(gate)
    if GATE_FIRST or not NORM:
        h = h * gate
    if NORM:
        h = h * tl.rsqrt(tl.sum(h * h) / D + eps) * w
        if not GATE_FIRST:
            h = h * gate
    tl.store(out + at, h.to(out.dtype.element_ty), seen)
    if ROUND:
        row = t * groups * D
        block = t * (groups * D // 32) + g * (D // 32)
        store_rounded(h, 0, 0, q + row + g * D, scales + block, sums + block, D, BLOCK)


def gated_norm(
    y_TI: Tensor, z_TI: Tensor, weight_I: Tensor | None, eps: float, groups: int, gate_first: bool,
    *, round: bool = False,
) -> Tensor:  # fmt: skip
    """norm(y · silu(z)), norm(y) · silu(z) or, without a weight, y · silu(z), in the dtype of z, whose rows may lie
    apart.  round: also in eight bits, where the width of a group is a multiple of 32."""
    T, I = y_TI.shape
    out_TI = torch.empty(T, I, dtype=z_TI.dtype, device=y_TI.device)
    block = triton.next_power_of_2(I // groups)
    r = Rounded(T, I, out_TI.device) if round and T <= FEW and I // groups % 32 == 0 else None
    _gated_norm[(T, groups)](
        y_TI, z_TI, y_TI if weight_I is None else weight_I, out_TI, *(r.planes if r else (out_TI,) * 3),
        I // groups, z_TI.stride(0), eps, NORM=weight_I is not None, GATE_FIRST=gate_first, ROUND=r is not None,
        BLOCK=block, num_warps=_warps(block), **early(),
    )  # fmt: skip
    if r:
        keep_rounded(out_TI, r)
    return out_TI


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
