"""Products with packed matrices on a GPU, y = x Wᵀ + b.

    few rows     (up to FEW) every weight is unpacked in registers and meets the rows at once; Q4_K meets inputs rounded
                 to eight bits, one scale for 32 of them (about 0.5 % of the norm of y), four at a time
    some rows    (up to SOME) tiles are unpacked to bfloat16 for the tensor cores
    many rows    the whole matrix is unpacked to bfloat16 first; that is little beside the product

The bits of a file's blocks lie in planes, nothing is rounded:

    Q4_K   q (N, K / 2) · scale and minimum of 32 values, a byte each (N, K / 32, 2) · d, dmin float16 (N, K / 256, 2)
    NF4    q (N, K / 2) · absmax float32 (N, K / 64)
    Q8_0   q (N, K) int8 · d float16 (N, K / 32)
    INT8   q (N, K) int8 · scale float32 (N)

Four-bit values in Q4_K's order: of 64 values the first 32 are the low nibbles of 32 bytes, the others the high ones.
Other types are unpacked when they come to the device.

Letters: T rows of x, N outputs, K inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tiercel import quant
from tiercel.ops.linear import QTensor
from tiercel.ops.triton import interpreted
from tiercel.ops.triton.norm import activated
from tiercel.quant.nf4 import LEVELS

TYPES = ("Q4_K", "NF4", "Q8_0", "INT8")
FEW, SOME = 4, 64
PLAIN = 4, 512, 4, 3  # outputs and inputs that a program takes at a time, its warps, loads under way
FEW_SHAPE = 1, 64, 2, 1  # the same, inputs in groups of 64 or 32
ROUNDED_SHAPE = 1, 64, 1  # the same for Q4_K


@triton.jit
def _values(q, scales, d, levels, n, k, K, seen, TYPE: tl.constexpr):
    """W[n, k] float32 for index tensors that broadcast."""
    if TYPE == "Q4_K" or TYPE == "NF4":
        byte = tl.load(q + n * (K // 2) + k // 64 * 32 + k % 32, seen, 0).to(tl.int32)
        bits = (byte >> (k % 64 // 32 * 4)) & 15
        if TYPE == "NF4":
            return tl.load(levels + bits) * tl.load(scales + n * (K // 64) + k // 64, seen, 0.0)
        pair, ends = scales + (n * (K // 32) + k // 32) * 2, d + (n * (K // 256) + k // 256) * 2
        scale = tl.load(ends, seen, 0.0).to(tl.float32) * tl.load(pair, seen, 0).to(tl.float32)
        least = tl.load(ends + 1, seen, 0.0).to(tl.float32) * tl.load(pair + 1, seen, 0).to(tl.float32)
        return bits.to(tl.float32) * scale - least
    else:
        number = tl.load(q + n * K + k, seen, 0).to(tl.float32)
        if TYPE == "INT8":
            return number * tl.load(scales + n)
        return number * tl.load(scales + n * (K // 32) + k // 32, seen, 0.0).to(tl.float32)


@triton.jit
def _few(
    x, q, scales, d, levels, bias, y, N, K, scale, stride_x,
    TYPE: tl.constexpr, T: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """BG groups of 64 values (four bits) or 32 (eight) at a time, each summed before it meets its scale."""
    FOUR: tl.constexpr = TYPE == "Q4_K" or TYPE == "NF4"
    WIDTH: tl.constexpr = 64 if FOUR else 32
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    rows = tl.arange(0, T)
    j = tl.arange(0, 32)[None, None, :]
    sums = tl.zeros((T, BN, BG), tl.float32)
    for g0 in tl.range(0, K // WIDTH, BG, num_stages=STAGES):
        g = g0 + tl.arange(0, BG)
        inside = g < K // WIDTH
        here = (n < N)[:, None] & inside[None, :]
        packed = tl.load(
            q + n[:, None, None] * (K // 2 if FOUR else K) + g[None, :, None] * 32 + j, here[:, :, None], 0
        )  # fmt: skip
        if TYPE == "Q4_K":  # four bytes: scale, minimum, scale, minimum; d and dmin are two halves of a word
            four = tl.load(scales + n[:, None] * (K // 64) + g[None, :], here, 0)
            ends = tl.load(d + n[:, None] * (K // 256) + g[None, :] // 4, here, 0)
            d_ = (ends & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            dmin = (ends >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            s0, m0 = (four & 255).to(tl.float32) * d_, ((four >> 8) & 255).to(tl.float32) * dmin
            s1, m1 = ((four >> 16) & 255).to(tl.float32) * d_, ((four >> 24) & 255).to(tl.float32) * dmin
        elif TYPE == "NF4":
            s0 = tl.load(scales + n[:, None] * (K // 64) + g[None, :], here, 0.0)
        elif TYPE == "Q8_0":
            s0 = tl.load(scales + n[:, None] * (K // 32) + g[None, :], here, 0.0).to(tl.float32)
        for t in tl.static_range(T):
            at = x + t * stride_x + g[None, :, None] * WIDTH + j
            x0 = tl.load(at, inside[None, :, None], 0.0).to(tl.float32)
            if FOUR:
                x1 = tl.load(at + 32, inside[None, :, None], 0.0).to(tl.float32)
                low, high = packed & 15, packed >> 4
                if TYPE == "NF4":
                    part = tl.sum(tl.load(levels + low.to(tl.int32)) * x0 + tl.load(levels + high.to(tl.int32)) * x1, 2)
                    part = part * s0
                else:
                    part = tl.sum(low.to(tl.float32) * x0, 2) * s0 + tl.sum(high.to(tl.float32) * x1, 2) * s1
                    part -= tl.sum(x0, 2) * m0 + tl.sum(x1, 2) * m1
            else:
                part = tl.sum(packed.to(tl.float32) * x0, 2)
                if TYPE == "Q8_0":
                    part = part * s0
            sums += tl.where((rows == t)[:, None, None], part[None, :, :], 0.0) if T > 1 else part[None, :, :]
    out = tl.sum(sums, 2) * scale
    if TYPE == "INT8":
        out = out * tl.load(scales + n, n < N, 0.0)[None, :]
    if BIAS:
        out += tl.load(bias + n, n < N, 0.0).to(tl.float32)[None, :]
    tl.store(y + rows[:, None] * N + n[None, :], out.to(y.dtype.element_ty), (n < N)[None, :])


@triton.jit
def _some(
    x, q, scales, d, levels, bias, y, T, N, K, scale, stride_x,
    TYPE: tl.constexpr, BIAS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    sum_ = tl.zeros((BT, BN), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        seen = (k < K)[:, None] & (n < N)[None, :]
        w_KN = _values(q, scales, d, levels, tl.where(n < N, n, 0)[None, :], k[:, None], K, seen, TYPE)
        x_TK = tl.load(x + t[:, None] * stride_x + k[None, :], (t < T)[:, None] & (k < K)[None, :], 0.0)
        if EXACT:
            sum_ += tl.dot(x_TK.to(tl.float32), w_KN, input_precision="ieee")
        else:
            sum_ += tl.dot(x_TK.to(tl.bfloat16), w_KN.to(tl.bfloat16))
    sum_ = sum_ * scale
    if BIAS:
        sum_ += tl.load(bias + n, n < N, 0.0).to(tl.float32)[None, :]
    at = y + t[:, None] * N + n[None, :]
    tl.store(at, sum_.to(y.dtype.element_ty), (t < T)[:, None] & (n < N)[None, :])


@triton.jit
def _rows(q, scales, d, levels, which, out, K, TYPE: tl.constexpr, BK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    n = tl.load(which + t).to(tl.int64)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    w = _values(q, scales, d, levels, n + tl.zeros((BK,), tl.int64), k, K, k < K, TYPE)
    tl.store(out + t * K + k, w.to(out.dtype.element_ty), k < K)


@triton.jit
def _plain(
    x,
    w,
    up,
    bias,
    y,
    N,
    K,
    stride_x,
    stride_w,
    T: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    rows = tl.arange(0, T)
    sums, others = tl.zeros((T, BN, BK), tl.float32), tl.zeros((T, BN, BK), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        k = k0 + tl.arange(0, BK)
        seen = (n < N)[:, None] & (k < K)[None, :]
        w_NK = tl.load(w + n[:, None] * stride_w + k[None, :], seen, 0.0).to(tl.float32)
        x_TK = tl.load(x + rows[:, None] * stride_x + k[None, :], (k < K)[None, :], 0.0).to(tl.float32)
        sums += x_TK[:, None, :] * w_NK[None, :, :]
        if ACTIVATION is not None:
            u_NK = tl.load(up + n[:, None] * stride_w + k[None, :], seen, 0.0).to(tl.float32)
            others += x_TK[:, None, :] * u_NK[None, :, :]
    out = tl.sum(sums, 2)
    if ACTIVATION is not None:
        out = activated(out, ACTIVATION) * tl.sum(others, 2)
    if BIAS:
        out += tl.load(bias + n, n < N, 0.0).to(tl.float32)[None, :]
    tl.store(y + rows[:, None] * N + n[None, :], out.to(y.dtype.element_ty), (n < N)[None, :])


def plain(
    x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, up_NK: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """x Wᵀ + b for one or two rows (…, K) of a plain W, in its dtype: W is read once, at the speed of the memory.

    With `up`, a matrix like W: act(x Wᵀ) · (x Uᵀ).
    """
    N, K = weight_NK.shape
    x_TK = x.reshape(-1, K)
    y_TN = torch.empty(x_TK.shape[0], N, dtype=weight_NK.dtype, device=x.device)
    BN, BK, warps, stages = PLAIN
    _plain[(triton.cdiv(N, BN),)](
        x_TK, weight_NK, weight_NK if up_NK is None else up_NK, x_TK if bias_N is None else bias_N, y_TN, N, K,
        x_TK.stride(0), weight_NK.stride(0), T=x_TK.shape[0], BIAS=bias_N is not None, ACTIVATION=activation,
        BN=BN, BK=BK, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return y_TN.view(*x.shape[:-1], N)


@triton.jit
def _round(x, q, scales, sums, K, stride_x, BLOCK: tl.constexpr):
    """Eight bits for each input, one scale for 32 of them; also the sum of what that leaves."""
    t, b = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = b[:, None] * 32 + tl.arange(0, 32)[None, :]
    seen = b < K // 32
    h = tl.load(x + t * stride_x + at, seen[:, None], 0.0).to(tl.float32)
    scale = tl.max(tl.abs(h), 1) / 127
    level = h / tl.where(scale > 0, scale, 1.0)[:, None]
    level = tl.floor(level + 0.5)
    tl.store(q + t * K + at, level.to(tl.int8), seen[:, None])
    tl.store(scales + t * (K // 32) + b, scale, seen)
    tl.store(sums + t * (K // 32) + b, scale * tl.sum(level, 1), seen)


@triton.jit
def _four_products(a, b, ASM: tl.constexpr):
    """Σ of the products of four bytes, a's 0 … 15, b's signed."""
    if ASM:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, 0;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )  # fmt: skip
    sum_ = (a & 255) * ((b << 24) >> 24) + ((a >> 8) & 255) * ((b << 16) >> 24)
    return sum_ + ((a >> 16) & 255) * ((b << 8) >> 24) + ((a >> 24) & 255) * (b >> 24)


@triton.jit
def _groups(q, scales, d, n, g, here, K, x0, x1, xs0, xs1, X0, X1, ASM: tl.constexpr):
    """What some groups of 64 inputs add to some outputs of a Q4_K matrix, (outputs, groups)."""
    j = tl.arange(0, 8)[None, None, :]
    bits = tl.load(q + n[:, None, None] * (K // 8) + g[None, :, None] * 8 + j, here[:, :, None], 0)
    p0 = tl.sum(_four_products(bits & 0x0F0F0F0F, x0 + bits * 0, ASM), 2).to(tl.float32)
    p1 = tl.sum(_four_products((bits >> 4) & 0x0F0F0F0F, x1 + bits * 0, ASM), 2).to(tl.float32)
    four = tl.load(scales + n[:, None] * (K // 64) + g[None, :], here, 0)
    ends = tl.load(d + n[:, None] * (K // 256) + g[None, :] // 4, here, 0)
    d_ = (ends & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    dmin = (ends >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    s0, m0 = (four & 255).to(tl.float32), ((four >> 8) & 255).to(tl.float32)
    s1, m1 = ((four >> 16) & 255).to(tl.float32), ((four >> 24) & 255).to(tl.float32)
    return d_ * (s0 * (p0 * xs0) + s1 * (p1 * xs1)) - dmin * (m0 * X0 + m1 * X1)


@triton.jit
def _rounded(
    x, x_scales, x_sums, q, scales, d, q_up, scales_up, d_up, bias, y, N, K, scale,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Q4_K times one row of rounded inputs, both as words of four bytes."""
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    t = tl.program_id(1)
    j = tl.arange(0, 8)[None, None, :]
    sums, others = tl.zeros((BN, BG), tl.float32), tl.zeros((BN, BG), tl.float32)
    for g0 in range(0, K // 64, BG):
        g = g0 + tl.arange(0, BG)
        inside = g < K // 64
        here = (n < N)[:, None] & inside[None, :]
        at = x + t * (K // 4) + g[None, :, None] * 16 + j
        x0, x1 = tl.load(at, inside[None, :, None], 0), tl.load(at + 8, inside[None, :, None], 0)
        block = t * (K // 32) + g * 2
        xs0, xs1 = tl.load(x_scales + block, inside, 0.0)[None, :], tl.load(x_scales + block + 1, inside, 0.0)[None, :]
        X0, X1 = tl.load(x_sums + block, inside, 0.0)[None, :], tl.load(x_sums + block + 1, inside, 0.0)[None, :]
        sums += _groups(q, scales, d, n, g, here, K, x0, x1, xs0, xs1, X0, X1, ASM)
        if ACTIVATION is not None:
            others += _groups(q_up, scales_up, d_up, n, g, here, K, x0, x1, xs0, xs1, X0, X1, ASM)
    out = tl.sum(sums, 1) * scale
    if BIAS:
        out += tl.load(bias + n, n < N, 0.0).to(tl.float32)
    if ACTIVATION is not None:
        out = activated(out, ACTIVATION) * tl.sum(others, 1)
    tl.store(y + t * N + n, out.to(y.dtype.element_ty), n < N)


def rounded(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(…, K) → bytes (T, K), their scales and sums (T, K / 32); kept with x, as several matrices meet it.

    Each stream has its own: none would wait for what another made.
    """
    stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else 0
    if getattr(x, "_rounded_on", None) != stream:
        K = x.shape[-1]
        x_TK = x.reshape(-1, K)
        q = torch.empty(x_TK.shape, dtype=torch.int8, device=x.device)
        scales, sums = (torch.empty(len(q), K // 32, device=x.device) for _ in range(2))
        _round[(len(q), triton.cdiv(K, 1024))](x_TK, q, scales, sums, K, x_TK.stride(0), BLOCK=32)
        x._rounded, x._rounded_on = (q, scales, sums), stream  # type: ignore[attr-defined]
    return x._rounded  # type: ignore[attr-defined]


class DeviceQTensor(QTensor):
    """A packed matrix on a GPU: of TYPES, made by `on_device`.  Answers in the dtype of its inputs."""

    in_panels = False

    def __init__(self, type: str, shape: tuple[int, int], q: Tensor, scales: Tensor, d: Tensor | None = None) -> None:
        self.type, self.shape, self.exact = type, torch.Size(shape), False
        self.q, self.scales, self.d = q, scales, scales if d is None else d
        self.device = q.device
        self.levels = torch.tensor(LEVELS, device=q.device) if type == "NF4" else scales
        self.data = q

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.scales.nbytes + (self.d.nbytes if self.d is not self.scales else 0)

    @property
    def meets_rounded(self) -> bool:
        """Whether few rows are rounded to eight bits to be multiplied with it."""
        return self.type == "Q4_K" and not self.exact

    @property
    def planes(self) -> tuple[Tensor, ...]:
        return self.q, self.scales, self.d, self.levels

    def rows(self, which_T: Tensor) -> Tensor:
        return self._unpack(which_T.flatten(), torch.float32).view(*which_T.shape, -1)

    def numbers(self, start: int = 0, stop: int | None = None) -> Tensor:
        which = torch.arange(start, self.shape[0] if stop is None else stop, device=self.device)
        return self._unpack(which, torch.float32)

    def _unpack(self, which: Tensor, dtype: torch.dtype) -> Tensor:
        K = self.shape[1]
        out = torch.empty(len(which), K, dtype=dtype, device=self.device)
        _rows[(len(which), triton.cdiv(K, 1024))](*self.planes, which, out, K, TYPE=self.type, BK=1024)
        return out

    def _meet_rounded(
        self,
        x: Tensor,
        bias_N: Tensor | None,
        scale: float,
        up: DeviceQTensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        N, K = self.shape
        q, scales, sums = rounded(x)
        y_TN = torch.empty(len(q), N, dtype=x.dtype, device=x.device)
        BN, BG, warps = ROUNDED_SHAPE
        planes = [t.flatten().view(torch.int32) for m in (self, up or self) for t in (m.q, m.scales, m.d)]
        _rounded[(triton.cdiv(N, BN), len(q))](
            q.view(torch.int32), scales, sums, *planes, q if bias_N is None else bias_N, y_TN, N, K, scale,
            BIAS=bias_N is not None, ACTIVATION=activation, BN=BN, BG=min(BG, triton.next_power_of_2(K // 64)),
            ASM=not interpreted, num_warps=warps,
        )  # fmt: skip
        return y_TN.view(*x.shape[:-1], N)

    def multiply(self, x: Tensor, bias_N: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """scale · x Wᵀ + b, (…, K) → (…, N).  No gradients."""
        N, K = self.shape
        x_TK = x.reshape(-1, K)
        T = x_TK.shape[0]
        if T > SOME:
            W = self._unpack(torch.arange(N, device=self.device), torch.float32 if self.exact else torch.bfloat16)
            y_TN = F.linear(x_TK.to(W.dtype), W).to(x.dtype)
            y_TN = y_TN * scale if scale != 1.0 else y_TN
            y_TN = y_TN if bias_N is None else y_TN + bias_N.to(y_TN.dtype)
            return y_TN.view(*x.shape[:-1], N)
        y_TN = torch.empty(T, N, dtype=x.dtype, device=x.device)
        bias = x_TK if bias_N is None else bias_N
        if self.meets_rounded and T <= FEW:
            return self._meet_rounded(x, bias_N, scale)
        if T <= FEW and T & (T - 1) == 0:
            groups = K // (64 if self.type in ("Q4_K", "NF4") else 32)
            BN, BG, warps, stages = FEW_SHAPE
            planes = self.planes
            if self.type == "Q4_K":
                planes = (
                    self.q,
                    self.scales.flatten().view(torch.int32),
                    self.d.flatten().view(torch.int32),
                    self.levels,
                )
            _few[(triton.cdiv(N, BN),)](
                x_TK, *planes, bias, y_TN, N, K, scale, x_TK.stride(0), TYPE=self.type, T=T,
                BIAS=bias_N is not None, BN=BN, BG=min(BG, triton.next_power_of_2(groups)), STAGES=stages,
                num_warps=warps,
            )  # fmt: skip
        else:
            BT, BN = max(16, min(64, triton.next_power_of_2(T))), 32
            _some[(triton.cdiv(N, BN), triton.cdiv(T, BT))](
                x_TK, *self.planes, bias, y_TN, T, N, K, scale, x_TK.stride(0), TYPE=self.type,
                BIAS=bias_N is not None, BT=BT, BN=BN, BK=128, EXACT=self.exact or interpreted, num_warps=4,
            )  # fmt: skip
        return y_TN.view(*x.shape[:-1], N)


def gated(x: Tensor, gate: DeviceQTensor, up: DeviceQTensor, activation: str) -> Tensor:
    """act(gate x) · up x of few rows and two matrices of Q4_K."""
    return gate._meet_rounded(x, None, 1.0, up, activation)


def on_device(weight: QTensor, device: torch.device | str) -> DeviceQTensor | Tensor:
    """The same matrix for a GPU; a bfloat16 tensor where its type has no kernel there."""
    if weight.type not in TYPES:
        return weight.numbers().to(torch.bfloat16).to(device)
    parts = planes(weight.type, weight.raw(), weight.shape[1])
    return DeviceQTensor(weight.type, tuple(weight.shape), *(t.to(device) for t in parts))  # type: ignore[arg-type]


def planes(type: str, raw_NB: Tensor, K: int) -> tuple[Tensor, ...]:
    """Rows as a file has them (N, row_bytes) → q, scales and, for Q4_K, d."""
    N = len(raw_NB)
    if type == "INT8":
        return raw_NB[:, 4:].contiguous().view(torch.int8), raw_NB[:, :4].contiguous().view(torch.float32).view(N)
    blocks = raw_NB.view(N, K // quant.BLOCKS[type].values, quant.BLOCKS[type].bytes)
    if type == "Q8_0":
        q, d = blocks[:, :, 2:].contiguous().view(torch.int8), blocks[:, :, :2].contiguous().view(torch.float16)
        return q.view(N, K), d.view(N, -1)
    if type == "NF4":
        absmax, pairs = blocks[:, :, :4].contiguous().view(torch.float32), blocks[:, :, 4:]
        bits = torch.stack((pairs >> 4, pairs & 15), -1).flatten(2)  # 64 values in order
        return (bits[..., :32] | (bits[..., 32:] << 4)).reshape(N, K // 2), absmax.view(N, -1)
    packed = blocks[:, :, 4:16]
    low, high, rest = packed.split(4, -1)
    scales = torch.cat((low & 63, (rest & 15) | ((low >> 6) << 4)), -1)
    least = torch.cat((high & 63, (rest >> 4) | ((high >> 6) << 4)), -1)
    d = blocks[:, :, :4].contiguous().view(torch.float16)
    return blocks[:, :, 16:].contiguous().view(N, K // 2), torch.stack((scales, least), -1).view(N, -1, 2), d
