"""Few rows of eight-bit inputs times a packed matrix: what decoding one text spends its time on.

Inputs are rounded to eight bits, one scale for 32 of them (about 0.5 % of the norm of y), and meet the weights four at
a time as integers.  Weights lie in planes of 32-bit words, nothing of the file is rounded:

    Q4_K   q (N, K / 2) · scale and minimum of 32 values, a byte each (N, K / 32, 2) · d, dmin float16 (N, K / 256, 2)
    Q6_K   q (N, K / 2) low nibbles · top (N, K / 4) · scales int8 (N, K / 16) · d float16 (N, K / 256)
    Q8_0   q (N, K) int8 · d float16 (N, K / 32)
    INT8   q (N, K) int8 · scale float32 (N)
    NF4    q (N, K / 2) · absmax float32 (N, K / 64)

Of 64 four-bit values the first 32 are the low nibbles of 32 bytes, the others the high ones.  `top` of Q6_K: byte c of
word m of 64 values holds, two bits each, the top of value c of words 2m and 2m + 1: low nibble, high nibble, low, high.
The sixteen levels of NF4 are rounded to 1 / 112.03, as on the CPU (`ops/cpu/formats.h`): about 0.6 % of the norm of y.

Letters: T rows of x, N outputs, K inputs; a group is 64 inputs.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiercel.ops.triton import interpreted
from tiercel.ops.triton.activation import activated, store_rounded
from tiercel.ops.triton.launch import early, others_done
from tiercel.quant.nf4 import LEVELS

TYPES = ("Q4_K", "Q6_K", "Q8_0", "INT8", "NF4")
# outputs and groups that a program takes at a time, the fastest of a dozen on an H100 (docs/gpu.md): two matrices with
# a gate; rows longer than 64 groups; others
GATED_TILE, LONG_TILE, TILE = (1, 64), (1, 32), (2, 16)
NF4_UNIT = tl.constexpr(1 / 112.03)
_BYTES = b"".join(round(level * 112.03).to_bytes(1, "little", signed=True) for level in LEVELS)
_WORDS = struct.unpack("<4i", _BYTES)
LOW_LEVELS, HIGH_LEVELS = (tl.constexpr(int.from_bytes(b, "little", signed=True)) for b in (_BYTES[:8], _BYTES[8:]))
# a nibble's three low bits choose a byte of eight, of the low and of the high levels; its top bit chooses between them.
# Four nibbles at a time, so the answers are those of two low and two high nibbles in turn, and are put in order last
LOOK_UP = f"""
    .reg .b32 l0, l1, h0, h1, three, top, a, b, c;
    mov.b32 l0, {_WORDS[0]}; mov.b32 l1, {_WORDS[1]}; mov.b32 h0, {_WORDS[2]}; mov.b32 h1, {_WORDS[3]};
    and.b32 three, $bits, 0x77777777;
    shr.u32 top, $bits, 1;
    and.b32 top, top, 0x44444444;
    or.b32 top, top, 0x32103210;
    prmt.b32 a, l0, l1, three;
    prmt.b32 b, h0, h1, three;
    prmt.b32 c, a, b, top;
    shr.u32 three, three, 16;
    shr.u32 top, top, 16;
    prmt.b32 a, l0, l1, three;
    prmt.b32 b, h0, h1, three;
    prmt.b32 a, a, b, top;
    prmt.b32 $low, c, a, 0x6420;
    prmt.b32 $high, c, a, 0x7531;
"""
_LOOK_UP = tl.constexpr("{" + LOOK_UP.replace("$low", "$0").replace("$high", "$1").replace("$bits", "$2") + "}")


@triton.jit
def _four_products(a, b, ASM: tl.constexpr):
    """Σ of the products of four signed bytes."""
    if ASM:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, 0;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )  # fmt: skip
    sum_ = ((a << 24) >> 24) * ((b << 24) >> 24) + ((a << 16) >> 24) * ((b << 16) >> 24)
    return sum_ + ((a << 8) >> 24) * ((b << 8) >> 24) + (a >> 24) * (b >> 24)


@triton.jit
def level(nibble):
    """The byte of a nibble 0 … 15 of NF4, as an int64."""
    return (tl.where(nibble < 8, LOW_LEVELS, HIGH_LEVELS) << ((7 - nibble % 8) * 8)) >> 56


@triton.jit
def _levels(bits, ASM: tl.constexpr):
    """The levels of NF4 that eight nibbles mean, as signed bytes: of the four low nibbles and of the four high ones."""
    if ASM:
        return tl.inline_asm_elementwise(
            _LOOK_UP, "=&r,=&r,r", [bits], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )  # fmt: skip
    low, high = bits * 0, bits * 0
    for i in tl.static_range(4):
        low |= (level((bits >> (8 * i)) & 15) & 255).to(tl.int32) << (8 * i)
        high |= (level((bits >> (8 * i + 4)) & 15) & 255).to(tl.int32) << (8 * i)
    return low, high


@triton.jit
def halves(word):
    """The two float16 in 32 bits."""
    low = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _words(q, top, scales, d, n, g, here, K, TYPE: tl.constexpr):
    """What the memory holds of some groups of some outputs: five tensors, the last again where a type has fewer."""
    j = tl.arange(0, 8)[None, None, :]
    each = here[:, :, None]
    if TYPE == "Q8_0" or TYPE == "INT8":
        at = q + n[:, None, None] * (K // 4) + g[None, :, None] * 16 + j
        w0, w1 = tl.load(at, each, 0), tl.load(at + 8, each, 0)
        if TYPE == "INT8":
            return w0, w1, w1, w1, w1
        else:
            ends = tl.load(d + n[:, None] * (K // 64) + g[None, :], here, 0)
            return w0, w1, ends, ends, ends
    else:
        bits = tl.load(q + n[:, None, None] * (K // 8) + g[None, :, None] * 8 + j, each, 0)
        if TYPE == "Q4_K":
            four = tl.load(scales + n[:, None] * (K // 64) + g[None, :], here, 0)
            ends = tl.load(d + n[:, None] * (K // 256) + g[None, :] // 4, here, 0)
            return bits, four, ends, ends, ends
        elif TYPE == "NF4":
            absmax = tl.load(scales + n[:, None] * (K // 64) + g[None, :], here, 0.0)
            return bits, absmax, absmax, absmax, absmax
        else:
            tops = tl.load(top + n[:, None, None] * (K // 16) + g[None, :, None] * 4 + j // 2, each, 0)
            i = tl.arange(0, 2)[None, None, :]
            at = scales + n[:, None, None] * (K // 16) + g[None, :, None] * 4 + i
            s0, s1 = tl.load(at, each, 0), tl.load(at + 2, each, 0)
            return bits, tops, s0, s1, tl.load(d + n[:, None] * (K // 256) + g[None, :] // 4, here, 0.0)


@triton.jit
def _groups(
    words0, words1, words2, words3, words4, x0, x1, xs0, xs1, X0, X1,
    TYPE: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """What some groups, given as `_words`, add to some outputs, (outputs, groups); INT8 without its scale."""
    if TYPE == "Q8_0" or TYPE == "INT8":
        w0, w1 = words0, words1
        p0 = tl.sum(_four_products(w0, x0 + w0 * 0, ASM), 2).to(tl.float32) * xs0
        p1 = tl.sum(_four_products(w1, x1 + w1 * 0, ASM), 2).to(tl.float32) * xs1
        if TYPE == "INT8":
            return p0 + p1
        else:
            d0, d1 = halves(words2)
            return p0 * d0 + p1 * d1
    else:
        bits = words0
        if TYPE == "Q4_K":
            p0 = tl.sum(_four_products(bits & 0x0F0F0F0F, x0 + bits * 0, ASM), 2).to(tl.float32)
            p1 = tl.sum(_four_products((bits >> 4) & 0x0F0F0F0F, x1 + bits * 0, ASM), 2).to(tl.float32)
            four = words1
            d_, dmin = halves(words2)
            s0, m0 = (four & 255).to(tl.float32), ((four >> 8) & 255).to(tl.float32)
            s1, m1 = ((four >> 16) & 255).to(tl.float32), ((four >> 24) & 255).to(tl.float32)
            return d_ * (s0 * (p0 * xs0) + s1 * (p1 * xs1)) - dmin * (m0 * X0 + m1 * X1)
        elif TYPE == "NF4":
            w0, w1 = _levels(bits, ASM)
            p0 = tl.sum(_four_products(w0, x0 + w0 * 0, ASM), 2).to(tl.float32)
            p1 = tl.sum(_four_products(w1, x1 + w1 * 0, ASM), 2).to(tl.float32)
            return words1 * NF4_UNIT * (p0 * xs0 + p1 * xs1)
        else:
            tops = words1 >> (tl.arange(0, 8) % 2 * 4)[None, None, :]
            w0 = (bits & 0x0F0F0F0F) | ((tops & 0x03030303) << 4)
            w1 = ((bits >> 4) & 0x0F0F0F0F) | (((tops >> 2) & 0x03030303) << 4)
            # 0 … 63 less 32, times 4: six bits become a signed byte
            w0, w1 = (w0 ^ 0x20202020) << 2, (w1 ^ 0x20202020) << 2
            p0 = tl.sum(tl.reshape(_four_products(w0, x0 + w0 * 0, ASM), (BN, BG, 2, 4)), 3).to(tl.float32)
            p1 = tl.sum(tl.reshape(_four_products(w1, x1 + w1 * 0, ASM), (BN, BG, 2, 4)), 3).to(tl.float32)
            s0, s1 = words2.to(tl.float32), words3.to(tl.float32)
            d_ = words4.to(tl.float32) * 0.25
            return d_ * (tl.sum(p0 * s0, 2) * xs0 + tl.sum(p1 * s1, 2) * xs1)


@triton.jit
def _product(
    x, x_scales, x_sums, q, top, scales, d, q_up, top_up, scales_up, d_up, bias, base, y, N, K, scale,
    TYPE: tl.constexpr, BIAS: tl.constexpr, BASE: tl.constexpr, ACTIVATION: tl.constexpr,
    PASSES: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr, ASM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """PASSES times BG groups; the words of the first are asked for before the inputs are there."""
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    t = tl.program_id(1)
    j = tl.arange(0, 8)[None, None, :]
    sums, others = tl.zeros((BN, BG), tl.float32), tl.zeros((BN, BG), tl.float32)
    g = tl.arange(0, BG)
    here = (n < N)[:, None] & (g < K // 64)[None, :]
    a, b, c, e, f = _words(q, top, scales, d, n, g, here, K, TYPE)
    if ACTIVATION is not None:
        a_up, b_up, c_up, e_up, f_up = _words(q_up, top_up, scales_up, d_up, n, g, here, K, TYPE)
    others_done(EARLY)
    for i in tl.static_range(PASSES):
        g = i * BG + tl.arange(0, BG)
        inside = g < K // 64
        if i > 0:
            here = (n < N)[:, None] & inside[None, :]
            a, b, c, e, f = _words(q, top, scales, d, n, g, here, K, TYPE)
            if ACTIVATION is not None:
                a_up, b_up, c_up, e_up, f_up = _words(q_up, top_up, scales_up, d_up, n, g, here, K, TYPE)
        at = x + t * (K // 4) + g[None, :, None] * 16 + j
        seen = inside[None, :, None]
        x0, x1 = tl.load(at, seen, 0), tl.load(at + 8, seen, 0)
        block = t * (K // 32) + g * 2
        xs0, xs1 = tl.load(x_scales + block, inside, 0.0)[None, :], tl.load(x_scales + block + 1, inside, 0.0)[None, :]
        X0, X1 = tl.load(x_sums + block, inside, 0.0)[None, :], tl.load(x_sums + block + 1, inside, 0.0)[None, :]
        sums += _groups(a, b, c, e, f, x0, x1, xs0, xs1, X0, X1, TYPE, BN, BG, ASM)
        if ACTIVATION is not None:
            others += _groups(a_up, b_up, c_up, e_up, f_up, x0, x1, xs0, xs1, X0, X1, TYPE, BN, BG, ASM)
    out, other = tl.sum(sums, 1), tl.sum(others, 1)
    if TYPE == "INT8":
        out = out * tl.load(scales + n, n < N, 0.0)
        if ACTIVATION is not None:
            other = other * tl.load(scales_up + n, n < N, 0.0)
    out = out * scale
    if BIAS:
        out += tl.load(bias + n, n < N, 0.0).to(tl.float32)
    if ACTIVATION is not None:
        out = activated(out, ACTIVATION) * other
    if BASE:
        out += tl.load(base + t * N + n, n < N, 0.0).to(tl.float32)
    tl.store(y + t * N + n, out.to(y.dtype.element_ty), n < N)


@triton.jit
def _round(x, q, scales, sums, K, stride_x, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    others_done(EARLY)
    t, k = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(x + t * stride_x + k, k < K, 0.0).to(tl.float32)
    store_rounded(h, t, tl.program_id(1) * (BLOCK // 32), q, scales, sums, K, BLOCK)


class Rounded:
    """Rows of inputs in eight bits: q (T, K) int8, the scales of 32 and the sums these leave (T, K / 32) float32."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.q = torch.empty(rows, width, dtype=torch.int8, device=device)
        self.scales, self.sums = (torch.empty(rows, width // 32, device=device) for _ in range(2))

    @property
    def planes(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.scales, self.sums


def rounded(x: Tensor) -> Rounded:
    """(…, K) in eight bits; kept with x, as several matrices meet it.

    Each stream makes its own: none would wait for what another made.
    """
    kept: tuple[Rounded, int | None] | None = getattr(x, "_rounded", None)
    stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else 0
    if kept is not None and kept[1] in (None, stream):
        return kept[0]
    K = x.shape[-1]
    x_TK = x.reshape(-1, K)
    r = Rounded(len(x_TK), K, x.device)
    _round[(len(x_TK), triton.cdiv(K, 1024))](x_TK, *r.planes, K, x_TK.stride(0), BLOCK=1024, **early())
    x._rounded = r, stream  # type: ignore[attr-defined]
    return r


def keep_rounded(x: Tensor, r: Rounded) -> None:
    """x was rounded where it was made, for whoever comes after that."""
    x._rounded = r, None  # type: ignore[attr-defined]


def product(
    r: Rounded,
    type: str,
    shape: tuple[int, int],
    planes: tuple[Tensor, ...],
    dtype: torch.dtype,
    *,
    bias_N: Tensor | None = None,
    scale: float = 1.0,
    up: tuple[Tensor, ...] | None = None,
    activation: str | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """scale · x Wᵀ + b + base, or act(x Wᵀ) · (x Uᵀ), (T, N); planes: q, top, scales, d as the kernel reads them.

    A program is one warp and one or two outputs, which keeps the most loads under way.
    """
    N, K = shape
    T = len(r.q)
    y_TN = torch.empty(T, N, dtype=dtype, device=r.q.device)
    groups = K // 64
    BN, BG = GATED_TILE if up else LONG_TILE if groups > 64 else TILE
    BN, BG = 64 if interpreted else BN, min(BG, triton.next_power_of_2(groups))
    _product[(triton.cdiv(N, BN), T)](
        r.q.view(torch.int32), r.scales, r.sums, *planes, *(up or planes), y_TN if bias_N is None else bias_N,
        y_TN if base is None else base, y_TN, N, K, scale,
        TYPE=type, BIAS=bias_N is not None, BASE=base is not None, ACTIVATION=activation,
        PASSES=triton.cdiv(groups, BG), BN=BN, BG=BG, ASM=not interpreted, num_warps=1, **early(),
    )  # fmt: skip
    return y_TN
