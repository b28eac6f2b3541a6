"""Matrices in eight-bit floats, e4m3: one scale for an output of W, one for a row of x, products on tensor cores.

    y[t, n] = s_t s_n Σ_k q_t[k] w_n[k]        s = amax / 448, of a row each

Both are rounded to e4m3, about 2.6 % a value.

Every number of rows rounds x the same way.  Made when a model is loaded (`load(quantize="fp8")`); for a GPU alone.
Letters: T rows of x, N outputs, K inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiercel.ops.triton.activation import activated
from tiercel.ops.triton.launch import early, others_done

LARGEST_E4M3 = 448.0
FUSED_ROWS = 2  # rows that meet W at the speed of the memory, with a gate or a sum beside it
FEW_TILE = 2, 1024, 4, 2  # outputs and inputs that a program takes at a time, its warps, loads under way


@triton.jit
def _to_e4m3(x):
    """To the nearest, ties to even; rounded before the cast, where Triton 3.7's interpreter loses a carry."""
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 121)  # of 2^-6, the least normal number
    large = ((exponent - 3) << 23).to(tl.float32, bitcast=True) * 12582912.0
    return ((x + large) - large).to(tl.float8e4nv)


@triton.jit
def _quantize(x, q, scales, K, stride_x, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    others_done(EARLY)
    t, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    h = tl.load(x + t * stride_x + k, k < K, 0.0).to(tl.float32)
    scale = tl.max(tl.abs(h), 0) / 448.0
    scale = tl.where(scale > 0, scale, 1.0)
    tl.store(q + t * K + k, _to_e4m3(h / scale).to(tl.uint8, bitcast=True), k < K)
    tl.store(scales + t, scale)


def quantize_rows(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes of rows in e4m3 and their scales (T) float32; rows may lie apart."""
    T, K = x_TK.shape
    q_TK = torch.empty(T, K, dtype=torch.uint8, device=x_TK.device)
    scale_T, block = torch.empty(T, device=x_TK.device), triton.next_power_of_2(K)
    warps = min(16, max(1, block // 512))
    _quantize[(T,)](x_TK, q_TK, scale_T, K, x_TK.stride(0), BLOCK=block, num_warps=warps, **early())
    return q_TK, scale_T


def rounded(x_TK: Tensor) -> Tensor:
    """Rows as they are rounded, float32."""
    q_TK, scale_T = quantize_rows(x_TK)
    return q_TK.view(torch.float8_e4m3fn).float() * scale_T[:, None]


def quantize_matrix(W_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes of W in e4m3 and the scales of its outputs (N) float32."""
    scale_N = W_NK.float().abs().amax(1) / LARGEST_E4M3
    scale_N = torch.where(scale_N > 0, scale_N, 1.0)
    return (W_NK.float() / scale_N[:, None]).to(torch.float8_e4m3fn).view(torch.uint8), scale_N


@triton.jit
def _value(byte):
    return byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def _few(
    x, x_scales, w, w_scales, up, up_scales, bias, base, y, N, K, scale,
    T: tl.constexpr, BIAS: tl.constexpr, BASE: tl.constexpr, ACTIVATION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    rows = tl.arange(0, T)
    sums, others = tl.zeros((T, BN, BK), tl.float32), tl.zeros((T, BN, BK), tl.float32)
    others_done(EARLY)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        k = k0 + tl.arange(0, BK)
        seen = (n < N)[:, None] & (k < K)[None, :]
        x_TK = _value(tl.load(x + rows[:, None] * K + k[None, :], (k < K)[None, :], 0))
        sums += x_TK[:, None, :] * _value(tl.load(w + n[:, None] * K + k[None, :], seen, 0))[None, :, :]
        if ACTIVATION is not None:
            others += x_TK[:, None, :] * _value(tl.load(up + n[:, None] * K + k[None, :], seen, 0))[None, :, :]
    s_T = tl.load(x_scales + rows)[:, None]
    out = tl.sum(sums, 2) * (s_T * tl.load(w_scales + n, n < N, 0.0)[None, :]) * scale
    if BIAS:
        out += tl.load(bias + n, n < N, 0.0).to(tl.float32)[None, :]
    if ACTIVATION is not None:
        out = activated(out, ACTIVATION) * (tl.sum(others, 2) * (s_T * tl.load(up_scales + n, n < N, 0.0)[None, :]))
    if BASE:
        out += tl.load(base + rows[:, None] * N + n[None, :], (n < N)[None, :], 0.0).to(tl.float32)
    tl.store(y + rows[:, None] * N + n[None, :], out.to(y.dtype.element_ty), (n < N)[None, :])


def few(
    x_TK: Tensor,
    W: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    *,
    bias_N: Tensor | None = None,
    scale: float = 1.0,
    up: tuple[Tensor, Tensor] | None = None,
    activation: str | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """scale · x Wᵀ + b + base, or act(x Wᵀ) · (x Uᵀ), (T, N) of FUSED_ROWS at most; W, up: e4m3 and scales."""
    q_TK, scale_T = quantize_rows(x_TK)
    (N, K), T = W[0].shape, len(q_TK)
    y_TN = torch.empty(T, N, dtype=dtype, device=x_TK.device)
    BN, BK, warps, stages = FEW_TILE
    _few[(triton.cdiv(N, BN),)](
        q_TK, scale_T, *W, *(up or W), y_TN if bias_N is None else bias_N, y_TN if base is None else base, y_TN,
        N, K, scale, T=T, BIAS=bias_N is not None, BASE=base is not None, ACTIVATION=activation,
        BN=BN, BK=min(BK, triton.next_power_of_2(K)), STAGES=stages, num_warps=warps, **early(),
    )  # fmt: skip
    return y_TN


def many(x_TK: Tensor, W: tuple[Tensor, Tensor], bias_N: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """scale · x Wᵀ + b of many rows, bfloat16, by PyTorch; N and K are multiples of 16."""
    q_TK, scale_T = quantize_rows(x_TK)
    x_8, W_8 = q_TK.view(torch.float8_e4m3fn), W[0].view(torch.float8_e4m3fn)
    y_TN = torch._scaled_mm(
        x_8, W_8.t(), scale_a=scale_T[:, None] * scale, scale_b=W[1][None, :],
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
    return y_TN if bias_N is None else y_TN + bias_N.to(y_TN.dtype)
