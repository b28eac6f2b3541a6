"""Up to SOME rows times a packed matrix, on tensor cores: what decoding many sequences at once spends its time on.

Every weight is read once, whatever the rows.  Four bytes of the planes of `rounded.py` become four or eight bfloat16
in registers without a conversion: under an exponent byte of 0x43 the low bits of a number are that number plus 128.
They meet their scale, rounded to bfloat16 (about 0.2 %), before the product, W (outputs, inputs) first, as tensor cores
want at least sixteen rows there and eight on the other side; NF4's levels are bytes as in `rounded.py`.  Where outputs
are few, K is cut in pieces whose sums meet in a second pass, in order.

Letters: T rows of x, N outputs, K inputs; a group is 64 inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiercel.ops.triton import interpreted
from tiercel.ops.triton.launch import early, others_done
from tiercel.ops.triton.rounded import LOOK_UP, NF4_UNIT, halves, level


class Tile(NamedTuple):
    """Outputs and groups of inputs that a program takes at a time, its warps, loads under way, pieces of K, and whether
    W goes through shared memory."""

    outputs: int
    groups: int
    warps: int
    stages: int
    pieces: int = 1
    rows: int = 256  # of x, at most
    wide: bool = False


# by the most rows; the fastest of a sweep on an H200.  More rows are faster with a matrix that is unpacked
TILES = {8: Tile(64, 4, 4, 3), 32: Tile(128, 2, 4, 3), 64: Tile(128, 2, 4, 3, rows=64, wide=True)}
MANY = Tile(64, 2, 8, 3, rows=128, wide=True)
Q4_K_TILE = Tile(128, 1, 4, 4)  # up to 64 rows
BYTES_TILE = Tile(64, 4, 4, 3)  # of Q6_K, Q8_0 and INT8 up to 32 rows
PROGRAMS, STEPS, PIECES = 396, 3, 8  # three programs on each of its processors; a piece of K is not shorter; of those


def tile(T: int, N: int, K: int, type: str = "Q4_K") -> Tile:
    by = next((tile for most, tile in TILES.items() if most >= T), MANY)
    if type == "Q4_K" and 32 < T <= 64:
        by = Q4_K_TILE
    elif type in ("Q6_K", "Q8_0", "INT8") and T <= 32:
        by = BYTES_TILE
    programs, steps = triton.cdiv(N, by.outputs), K // 64 // by.groups
    pieces = [p for p in range(2, 1 + min(PIECES, PROGRAMS // programs)) if steps % p == 0 and steps // p >= STEPS]
    return by._replace(pieces=max(pieces, default=1))


def _asm(body: str, *registers: str) -> tl.constexpr:
    """registers: the names of outputs and inputs, in order."""
    for i, name in reversed(list(enumerate(registers))):
        body = body.replace(f"${name};", f"${i};").replace(f"${name},", f"${i},")
    return tl.constexpr("{" + body + "}")


def _below_128(word: str, to: tuple[str, str]) -> str:
    """Four bytes below 128, less what 128 + `less` holds, as two pairs of bfloat16."""
    return f"""
    prmt.b32 t, {word}, 0x43434343, 0x4140; fma.rn.bf16x2 {to[0]}, t, one, less;
    prmt.b32 t, {word}, 0x43434343, 0x4342; fma.rn.bf16x2 {to[1]}, t, one, less;"""


def _signed(word: str, to: tuple[str, str]) -> str:
    """Four signed bytes: 128 + seven bits, less 128 or, under the sign, 256."""
    return f"""
    and.b32 a, {word}, 0x7F7F7F7F; and.b32 b, {word}, 0x80808080;
    prmt.b32 t, a, 0x43434343, 0x4140; prmt.b32 u, b, 0x43434343, 0x4140; fma.rn.bf16x2 {to[0]}, u, minus, t;
    prmt.b32 t, a, 0x43434343, 0x4342; prmt.b32 u, b, 0x43434343, 0x4342; fma.rn.bf16x2 {to[1]}, u, minus, t;"""


def _scaled(scales: tuple[str, str], added: tuple[str, str], to: tuple[str, str]) -> str:
    return "".join(
        f"\n    fma.rn.bf16x2 {y}, {v}, {s}, {m};" for v, s, m, y in zip(("v0", "v1"), scales, added, to, strict=True)
    )


_LOW, _HIGH, _V = ("$w0", "$w1"), ("$w2", "$w3"), ("v0", "v1")
_S, _S1, _ZERO = ("$s0", "$s1"), ("$s2", "$s3"), ("zero", "zero")
_NIBBLES = """
    .reg .b32 l, h, t, v0, v1, one, less, zero;
    mov.b32 one, 0x3F803F80; mov.b32 zero, 0x80008000;
    and.b32 l, $q, 0x0F0F0F0F; shr.u32 h, $q, 4; and.b32 h, h, 0x0F0F0F0F;"""
_BYTES = """
    .reg .b32 l, h, a, b, t, u, v0, v1, minus, zero;
    mov.b32 minus, 0xBF80BF80; mov.b32 zero, 0x80008000;"""
_Q4_K = _asm(
    _NIBBLES + "mov.b32 less, 0xC308C308;"  # less 128 + 8
    + _below_128("l", _V) + _scaled(_S, ("$m0", "$m1"), _LOW)
    + _below_128("h", _V) + _scaled(_S1, ("$m2", "$m3"), _HIGH),
    "w0", "w1", "w2", "w3", "q", "s0", "s1", "m0", "m1", "s2", "s3", "m2", "m3",
)  # fmt: skip
_Q6_K = _asm(  # of each byte of top two bits belong to the low nibble, the next two to the high one; less 128 + 32
    _NIBBLES + """mov.b32 less, 0xC320C320;
    and.b32 t, $top, 0x03030303; shl.b32 t, t, 4; or.b32 l, l, t;
    and.b32 t, $top, 0x0C0C0C0C; shl.b32 t, t, 2; or.b32 h, h, t;"""
    + _below_128("l", _V) + _scaled(_S, _ZERO, _LOW)
    + _below_128("h", _V) + _scaled(_S1, _ZERO, _HIGH),
    "w0", "w1", "w2", "w3", "q", "top", "s0", "s1", "s2", "s3",
)  # fmt: skip
_NF4 = _asm(
    _BYTES + "{" + LOOK_UP.replace("$low", "l").replace("$high", "h").replace("$bits", "$q") + "}"
    + _signed("l", _V) + _scaled(_S, _ZERO, _LOW) + _signed("h", _V) + _scaled(_S, _ZERO, _HIGH),
    "w0", "w1", "w2", "w3", "q", "s0", "s1",
)  # fmt: skip
_Q8_0 = _asm(_BYTES + _signed("$q", _V) + _scaled(_S, _ZERO, _LOW), "w0", "w1", "q", "s0", "s1")
_INT8 = _asm(_BYTES + _signed("$q", _LOW), "w0", "w1", "q")


@triton.jit
def _each(s, BN: tl.constexpr, BG: tl.constexpr, WIDTH: tl.constexpr, ASM: tl.constexpr):
    """(BN, BG) → (BN, BG · WIDTH), each WIDTH times; bfloat16 for the tensor cores."""
    s = s.to(tl.bfloat16 if ASM else tl.float32)
    return tl.reshape(tl.broadcast_to(s[:, :, None], (BN, BG, WIDTH)), (BN, BG * WIDTH))


@triton.jit
def _four_bits(
    q, top, scales, d, n, g0, stop, G,
    TYPE: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The first and the other 32 weights of BG groups, (BN, 32 BG) each."""
    j, g = g0 * 32 + tl.arange(0, 32 * BG)[None, :], g0 + tl.arange(0, BG)[None, :]
    inside, known = (j < stop * 32) | EVEN, (g < stop) | EVEN
    bytes_ = tl.load(q + n * (G * 32) + j, inside, 0)
    low, high = bytes_ & 15, bytes_ >> 4
    if TYPE == "Q4_K":  # four bytes: scale, minimum, scale, minimum; d and dmin are two halves of a word
        four = tl.load(scales + n * G + g, known, 0)
        d_, dmin = halves(tl.load(d + n * (G // 4) + g // 4, known, 0))
        s0, s1 = d_ * (four & 255).to(tl.float32), d_ * ((four >> 16) & 255).to(tl.float32)
        # seen from the middle of the sixteen levels, where what is added is small, and so is its rounding
        m0 = _each(8 * s0 - dmin * ((four >> 8) & 255).to(tl.float32), BN, BG, 32, ASM)
        m1 = _each(8 * s1 - dmin * ((four >> 24) & 255).to(tl.float32), BN, BG, 32, ASM)
        s0, s1 = _each(s0, BN, BG, 32, ASM), _each(s1, BN, BG, 32, ASM)
        if ASM:
            return tl.inline_asm_elementwise(
                _Q4_K, "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r", [bytes_, s0, m0, s1, m1],
                dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            return (low.to(tl.float32) - 8) * s0 + m0, (high.to(tl.float32) - 8) * s1 + m1
    elif TYPE == "NF4":
        absmax = tl.load(scales + n * G + g, known, 0.0)
        s0 = _each(absmax * NF4_UNIT, BN, BG, 32, ASM)
        if ASM:
            return tl.inline_asm_elementwise(
                _NF4, "=&r,=&r,=&r,=&r,r,r,r", [bytes_, s0], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )  # fmt: skip
        else:
            return level(low).to(tl.float32) * s0, level(high).to(tl.float32) * s0
    else:
        i = tl.arange(0, 2 * BG)[None, :]
        ends = tl.load(d + n * (G // 4) + (g0 + i // 2) // 4, (g0 + i // 2 < stop) | EVEN, 0.0).to(tl.float32)
        at = scales + n * (G * 4) + (g0 + i // 2) * 4 + i % 2
        s0 = _each(ends * tl.load(at, (g0 + i // 2 < stop) | EVEN, 0).to(tl.float32), BN, 2 * BG, 16, ASM)
        s1 = _each(ends * tl.load(at + 2, (g0 + i // 2 < stop) | EVEN, 0).to(tl.float32), BN, 2 * BG, 16, ASM)
        tops = tl.load(top + n * (G * 16) + j // 8 * 4 + j % 4, inside, 0) >> (j % 8 // 4 * 4).to(tl.uint8)
        if ASM:
            return tl.inline_asm_elementwise(
                _Q6_K, "=&r,=&r,=&r,=&r,r,r,r,r,r,r", [bytes_, tops, s0, s1],
                dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            low, high = low | ((tops & 3) << 4), high | ((tops & 12) << 2)
            return (low.to(tl.float32) - 32) * s0, (high.to(tl.float32) - 32) * s1


@triton.jit
def _eight_bits(
    q, d, n, g0, stop, G,
    TYPE: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The weights of BG groups, (BN, 64 BG); INT8 without its scale."""
    j = g0 * 64 + tl.arange(0, 64 * BG)[None, :]
    bytes_ = tl.load(q + n * (G * 64) + j, (j < stop * 64) | EVEN, 0)
    if TYPE == "Q8_0":
        b = g0 * 2 + tl.arange(0, 2 * BG)[None, :]
        s = _each(tl.load(d + n * (G * 2) + b, (b < stop * 2) | EVEN, 0.0), BN, 2 * BG, 32, ASM)
        if ASM:
            return tl.inline_asm_elementwise(
                _Q8_0, "=&r,=&r,r,r,r", [bytes_, s], dtype=tl.bfloat16, is_pure=True, pack=4
            )  # fmt: skip
        else:
            return bytes_.to(tl.float32) * s
    else:
        if ASM:
            return tl.inline_asm_elementwise(_INT8, "=&r,=&r,r", [bytes_], dtype=tl.bfloat16, is_pure=True, pack=4)
        else:
            return bytes_.to(tl.float32)


@triton.jit
def _tile(
    x, q, top, scales, d, bias, y, T, N, G, scale, stride_x,
    TYPE: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr,
    STAGES: tl.constexpr, ASM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    others_done(EARLY)
    FOUR: tl.constexpr = TYPE == "Q4_K" or TYPE == "Q6_K" or TYPE == "NF4"
    DTYPE: tl.constexpr = tl.bfloat16 if ASM else tl.float32
    piece, t = tl.program_id(1), tl.program_id(2) * BT + tl.arange(0, BT)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None]  # rows beyond the last are the last: their sums go nowhere
    each = tl.cdiv(G, tl.num_programs(1) * BG) * BG
    start, stop = piece * each, tl.minimum(piece * each + each, G)
    sum_ = tl.zeros((BN, BT), tl.float32)
    for g0 in tl.range(start, stop, BG, num_stages=STAGES):
        if FOUR:
            w0, w1 = _four_bits(q, top, scales, d, row, g0, stop, G, TYPE, EVEN, BN, BG, ASM)
            j = tl.arange(0, 32 * BG)[:, None]
            seen = (t < T)[None, :] & ((g0 + j // 32 < stop) | EVEN)
            at = x + t[None, :] * stride_x + g0 * 64 + j // 32 * 64 + j % 32
            sum_ = tl.dot(w0, tl.load(at, seen, 0.0).to(DTYPE), sum_, input_precision="ieee")
            sum_ = tl.dot(w1, tl.load(at + 32, seen, 0.0).to(DTYPE), sum_, input_precision="ieee")
        else:
            w = _eight_bits(q, d, row, g0, stop, G, TYPE, EVEN, BN, BG, ASM)
            j = tl.arange(0, 64 * BG)[:, None]
            seen = (t < T)[None, :] & ((g0 + j // 64 < stop) | EVEN)
            at = x + t[None, :] * stride_x + g0 * 64 + j
            sum_ = tl.dot(w, tl.load(at, seen, 0.0).to(DTYPE), sum_, input_precision="ieee")
    if TYPE == "INT8":
        sum_ = sum_ * tl.load(scales + row)
    sum_ = sum_ * scale
    if BIAS:
        sum_ += tl.load(bias + row).to(tl.float32)
    at = y + (piece * T + t[None, :]) * N + n[:, None]
    tl.store(at, sum_.to(y.dtype.element_ty), (t < T)[None, :] & (n < N)[:, None])


@triton.jit
def _wide_tile(
    x, q, top, scales, d, bias, y, T, N, G, scale, stride_x,
    TYPE: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr,
    STAGES: tl.constexpr, ASM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`_tile` with x first: unpacked weights go through shared memory, as matrix instructions whose operands lie in
    registers wait for each other."""
    others_done(EARLY)
    FOUR: tl.constexpr = TYPE == "Q4_K" or TYPE == "Q6_K" or TYPE == "NF4"
    DTYPE: tl.constexpr = tl.bfloat16 if ASM else tl.float32
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n, piece = tl.program_id(1) * BN + tl.arange(0, BN), tl.program_id(2)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    each = tl.cdiv(G, tl.num_programs(2) * BG) * BG
    start, stop = piece * each, tl.minimum(piece * each + each, G)
    x_row = x + tl.minimum(t, T - 1).to(tl.int64)[:, None] * stride_x  # sums of rows beyond the last go nowhere
    sum_ = tl.zeros((BT, BN), tl.float32)
    for g0 in tl.range(start, stop, BG, num_stages=STAGES):
        if FOUR:
            w0, w1 = _four_bits(q, top, scales, d, row, g0, stop, G, TYPE, EVEN, BN, BG, ASM)
            j = tl.arange(0, 32 * BG)
            inside = (g0 + j // 32 < stop)[None, :] | EVEN
            at = x_row + (g0 * 64 + j // 32 * 64 + j % 32)[None, :]
            x0, x1 = tl.load(at, inside, 0.0).to(DTYPE), tl.load(at + 32, inside, 0.0).to(DTYPE)
            sum_ = tl.dot(x0, tl.trans(w0), sum_, input_precision="ieee")
            sum_ = tl.dot(x1, tl.trans(w1), sum_, input_precision="ieee")
        else:
            w = _eight_bits(q, d, row, g0, stop, G, TYPE, EVEN, BN, BG, ASM)
            j = tl.arange(0, 64 * BG)
            x_TK = tl.load(x_row + (g0 * 64 + j)[None, :], (g0 + j // 64 < stop)[None, :] | EVEN, 0.0).to(DTYPE)
            sum_ = tl.dot(x_TK, tl.trans(w), sum_, input_precision="ieee")
    n_ = tl.minimum(n, N - 1)
    if TYPE == "INT8":
        sum_ = sum_ * tl.load(scales + n_)[None, :]
    sum_ = sum_ * scale
    if BIAS:
        sum_ += tl.load(bias + n_).to(tl.float32)[None, :]
    at = y + (piece * T + t[:, None]).to(tl.int64) * N + n[None, :]
    tl.store(at, sum_.to(y.dtype.element_ty), (t < T)[:, None] & (n < N)[None, :])


@triton.jit
def _total(
    parts, bias, y, size, N, PIECES: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    others_done(EARLY)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sum_ = tl.load(parts + i, i < size, 0.0)
    for piece in tl.static_range(1, PIECES):
        sum_ += tl.load(parts + piece * size + i, i < size, 0.0)
    if BIAS:
        sum_ += tl.load(bias + i % N, i < size, 0.0).to(tl.float32)
    tl.store(y + i, sum_.to(y.dtype.element_ty), i < size)


def product(
    x_TK: Tensor,
    type: str,
    shape: tuple[int, int],
    planes: tuple[Tensor, ...],
    *,
    bias_N: Tensor | None = None,
    scale: float = 1.0,
    by: Tile | None = None,
) -> Tensor:
    """scale · x Wᵀ + b in the dtype of x, (T, N), for a K that 64 divides; planes: q (bytes), top, scales, d."""
    (N, K), T = shape, len(x_TK)
    by = by or tile(T, N, K, type)
    BT = max(64 if by.wide else 8, min(by.rows, triton.next_power_of_2(T)))
    y_TN = torch.empty(T, N, dtype=x_TK.dtype, device=x_TK.device)
    parts = y_TN if by.pieces == 1 else torch.empty(by.pieces, T, N, device=x_TK.device)
    bias, once = y_TN if bias_N is None else bias_N, bias_N is not None and by.pieces == 1
    grid = triton.cdiv(N, by.outputs), by.pieces, triton.cdiv(T, BT)
    kernel, grid = (_wide_tile, (grid[2], grid[0], grid[1])) if by.wide else (_tile, grid)
    kernel[grid](
        x_TK, *planes, bias, parts, T, N, K // 64, scale, x_TK.stride(0),
        TYPE=type, BIAS=once, EVEN=K // 64 % (by.groups * by.pieces) == 0,
        BT=BT, BN=by.outputs, BG=by.groups, STAGES=by.stages, ASM=not interpreted,
        num_warps=by.warps, **early(),
    )  # fmt: skip
    if by.pieces > 1:
        _total[(triton.cdiv(T * N, 1024),)](
            parts, bias, y_TN, T * N, N, PIECES=by.pieces, BIAS=bias_N is not None, BLOCK=1024, **early()
        )
    return y_TN
