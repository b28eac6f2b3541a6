"""The Mamba-2 scan of rows full of documents, forwards and backwards.

Formulas and letters: `mixers/mamba2/varlen.py`.  A program has one chunk of one head (for dB and dC: of one group),
whose Q × Q matrices never leave it; between the kernels go

    Z (K, H, N, P) float32    the state that a chunk begins with; backward dS, the gradient of what it leaves
    through (K, H) float32    the decay of a whole chunk, zero where a document begins in it

Both recurrences over chunks are the same one, from either end:  now ← through · now + added.  Rows need not be a
multiple of Q.  Sums over heads and chunks have a fixed order: the same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tiercel.mixers.mamba2.triton_step import MIN_LOG_DECAY

CHUNK = 64
WIDEST = 128  # head_dim, of which a program holds all
NARROWEST = 32  # Triton 3.6 reads beyond its shared memory where eight warps share a product 16 wide
WARPS, STAGES = 8, 1  # a chunk's matrices fill the registers of eight warps; loads under way would cost shared memory
_HALVES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _dot(a, b, HALF: tl.constexpr):
    """a b in float32.  HALF: the type that autocast rounds factors to; otherwise float32 counts in full."""
    if HALF is None:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32x3")
    else:
        return tl.dot(a.to(HALF), b.to(HALF))


@triton.jit
def _span(k, L, Q: tl.constexpr):
    """Chunk k of all rows: its first token, how many it has, and its number in its row."""
    of_row = tl.cdiv(L, Q)
    c = k % of_row
    return (k // of_row).to(tl.int64) * L + c * Q, tl.minimum(Q, L - c * Q), c


@triton.jit
def _decays(dt, A, document, first, count, c, h, H, Q: tl.constexpr):
    """dt and a of a chunk's tokens, their documents, and the decays e, l (Q) and through."""
    q = tl.arange(0, Q)
    dt_Q = tl.load(dt + (first + q) * H + h, q < count, 0.0).to(tl.float32)
    log_Q = dt_Q.to(tl.float64) * tl.load(A + h).to(tl.float64)
    a_Q, a_last = tl.cumsum(log_Q, 0), tl.sum(log_Q, 0)
    document_Q = tl.load(document + first + q, q < count, -1)
    last, before = tl.load(document + first + count - 1), tl.load(document + first - 1, c > 0, -2)
    into_Q = tl.exp(tl.maximum(a_Q.to(tl.float32), MIN_LOG_DECAY))
    left_Q = tl.exp(tl.maximum((a_last - a_Q).to(tl.float32), MIN_LOG_DECAY))
    through = tl.exp(tl.maximum(a_last.to(tl.float32), MIN_LOG_DECAY))
    into_Q = tl.where(document_Q == before, into_Q, 0.0)
    left_Q = tl.where(document_Q == last, left_Q, 0.0)
    return dt_Q, a_Q, document_Q, into_Q, left_Q, tl.where(last == before, through, 0.0)


@triton.jit
def _inside(a_Q, document_Q, Q: tl.constexpr):
    """exp(a_t − a_j) (Q, Q), zero where t does not see j."""
    q = tl.arange(0, Q)
    seen = (document_Q[:, None] == document_Q[None, :]) & (q[:, None] >= q[None, :])
    lag = tl.where(seen, (a_Q[:, None] - a_Q[None, :]).to(tl.float32), 0.0)
    return tl.where(seen, tl.exp(tl.maximum(lag, MIN_LOG_DECAY)), 0.0)


@triton.jit
def _rows_of(x, first, count, stride, column, width, Q: tl.constexpr, W: tl.constexpr):
    """Columns `column` … of a chunk's tokens (Q, W), as many as there are within `width`."""
    q = tl.arange(0, Q)
    return tl.load(x + (first + q)[:, None] * stride + column[None, :], (q < count)[:, None] & width[None, :], 0.0)


@triton.jit
def _states(
    x, B, dt, A, document, out, through, stride_x, stride_B, L, H, P, N, R,
    BACK: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """out: Σ l dt B ⊗ x; BACK, for dy and C in place of x and B: Σ e C ⊗ dy."""
    k, h = tl.program_id(0), tl.program_id(1)
    tiles = tl.cdiv(P, BP)
    n = tl.program_id(2) // tiles * BN + tl.arange(0, BN)
    p = tl.program_id(2) % tiles * BP + tl.arange(0, BP)
    first, count, c = _span(k, L, Q)
    dt_Q, _, _, into_Q, left_Q, decay = _decays(dt, A, document, first, count, c, h, H, Q)
    w_Q = into_Q if BACK else left_Q * dt_Q
    B_QN = _rows_of(B, first, count, stride_B, h // R * N + n, n < N, Q, BN).to(tl.float32)
    x_QP = _rows_of(x, first, count, stride_x, h * P + p, p < P, Q, BP)
    at = out + ((k * H + h).to(tl.int64) * N + n[:, None]) * P + p[None, :]
    tl.store(at, _dot(tl.trans(B_QN * w_Q[:, None]), x_QP, HALF), (n < N)[:, None] & (p < P)[None, :])
    tl.store(through + k * H + h, decay, tl.program_id(2) == 0)  # the same both times


@triton.jit
def _pass_on(states, through, chunks, H, size, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """What each chunk adds becomes what all before it (BACK: after it) have left."""
    row, h = tl.program_id(0), tl.program_id(1)
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    now = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, chunks):
        k = row * chunks + (chunks - 1 - step if BACK else step)
        at = states + (k * H + h).to(tl.int64) * size + i
        added = tl.load(at, i < size, 0.0)
        tl.store(at, now, i < size)
        now = now * tl.load(through + k * H + h) + added


@triton.jit
def _outputs(
    C, x, dt, A, B, D, document, Z, y, stride_x, stride_B, stride_C, L, H, P, N, R,
    SKIP: tl.constexpr, STATES: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    k, h = tl.program_id(0), tl.program_id(1)
    p = tl.program_id(2) * BP + tl.arange(0, BP)
    first, count, c = _span(k, L, Q)
    dt_Q, a_Q, document_Q, into_Q, _, _ = _decays(dt, A, document, first, count, c, h, H, Q)
    scores_QQ, y_QP = tl.zeros((Q, Q), tl.float32), tl.zeros((Q, BP), tl.float32)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        C_QN = _rows_of(C, first, count, stride_C, h // R * N + n, n < N, Q, BN)
        B_QN = _rows_of(B, first, count, stride_B, h // R * N + n, n < N, Q, BN)
        scores_QQ += _dot(C_QN, tl.trans(B_QN), HALF)
        if STATES:
            at = Z + ((k * H + h).to(tl.int64) * N + n[:, None]) * P + p[None, :]
            y_QP += _dot(C_QN, tl.load(at, (n < N)[:, None] & (p < P)[None, :], 0.0), HALF)
    x_QP = _rows_of(x, first, count, stride_x, h * P + p, p < P, Q, BP).to(tl.float32)
    w_QQ = scores_QQ * _inside(a_Q, document_Q, Q)
    y_QP = y_QP * into_Q[:, None] + _dot(w_QQ, x_QP * dt_Q[:, None], HALF)
    if SKIP:
        y_QP += tl.load(D + h).to(tl.float32) * x_QP
    q = tl.arange(0, Q)
    at = y + ((first + q)[:, None] * H + h) * P + p[None, :]
    tl.store(at, y_QP, (q < count)[:, None] & (p < P)[None, :])


@triton.jit
def _gradients(
    C, x, dt, A, B, D, document, Z, dS, dy, dx, ddt, dA, dD, stride_x, stride_B, stride_C, L, H, P, N, R,
    SKIP: tl.constexpr, STATES: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """dx, ddt; dA and dD (K, H) of each chunk."""
    k, h = tl.program_id(0), tl.program_id(1)
    p, q = tl.arange(0, BP), tl.arange(0, Q)
    first, count, c = _span(k, L, Q)
    dt_Q, a_Q, document_Q, into_Q, left_Q, through = _decays(dt, A, document, first, count, c, h, H, Q)
    scores_QQ = tl.zeros((Q, Q), tl.float32)
    before_QP, du_QP = tl.zeros((Q, BP), tl.float32), tl.zeros((Q, BP), tl.float32)
    carried = 0.0
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        C_QN = _rows_of(C, first, count, stride_C, h // R * N + n, n < N, Q, BN)
        B_QN = _rows_of(B, first, count, stride_B, h // R * N + n, n < N, Q, BN)
        scores_QQ += _dot(C_QN, tl.trans(B_QN), HALF)
        if STATES:
            at = ((k * H + h).to(tl.int64) * N + n[:, None]) * P + p[None, :]
            there = (n < N)[:, None] & (p < P)[None, :]
            Z_NP, dS_NP = tl.load(Z + at, there, 0.0), tl.load(dS + at, there, 0.0)
            before_QP += _dot(C_QN, Z_NP, HALF)
            du_QP += _dot(B_QN, dS_NP, HALF)
            carried += tl.sum(Z_NP * dS_NP)
    x_QP = _rows_of(x, first, count, stride_x, h * P + p, p < P, Q, BP).to(tl.float32)
    dy_QP = _rows_of(dy, first, count, H * P, h * P + p, p < P, Q, BP).to(tl.float32)
    du_QP = du_QP * left_Q[:, None]
    lost_Q = dt_Q * tl.sum(x_QP * du_QP, 1)
    # of a: what stands before a token's decay less what stands behind it, without its product with itself
    w_QQ = scores_QQ * _inside(a_Q, document_Q, Q)
    dw_QQ = _dot(dy_QP, tl.trans(x_QP * dt_Q[:, None]), HALF) * w_QQ
    dw_QQ = tl.where(q[:, None] == q[None, :], 0.0, dw_QQ)
    da_Q = tl.sum(dw_QQ, 1) - tl.sum(dw_QQ, 0) + tl.sum(dy_QP * before_QP, 1) * into_Q - lost_Q
    da_Q += tl.where(q == count - 1, tl.sum(lost_Q, 0) + through * carried, 0.0)
    da_Q = da_Q.to(tl.float64)
    dlog_Q = tl.sum(da_Q, 0) - tl.cumsum(da_Q, 0) + da_Q
    du_QP += _dot(tl.trans(w_QQ), dy_QP, HALF)
    ddt_Q = dlog_Q * tl.load(A + h).to(tl.float64) + tl.sum(du_QP * x_QP, 1)
    tl.store(ddt + (first + q) * H + h, ddt_Q.to(tl.float32), q < count)
    tl.store(dA + k * H + h, tl.sum(dlog_Q * dt_Q, 0))
    dx_QP = du_QP * dt_Q[:, None]
    if SKIP:
        dx_QP += tl.load(D + h).to(tl.float32) * dy_QP
        tl.store(dD + k * H + h, tl.sum(dy_QP * x_QP))
    at = dx + ((first + q)[:, None] * H + h) * P + p[None, :]
    tl.store(at, dx_QP.to(dx.dtype.element_ty), (q < count)[:, None] & (p < P)[None, :])


@triton.jit
def _group_gradients(
    C, x, dt, A, B, document, Z, dS, dy, dC, dB, stride_x, stride_B, stride_C, L, H, P, N, R,
    STATES: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """dB and dC, of all heads of a group."""
    k, g = tl.program_id(0), tl.program_id(1)
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    p, q = tl.arange(0, BP), tl.arange(0, Q)
    first, count, c = _span(k, L, Q)
    dscores_QQ = tl.zeros((Q, Q), tl.float32)
    dC_QN, dB_QN = tl.zeros((Q, BN), tl.float32), tl.zeros((Q, BN), tl.float32)
    for r in range(0, R):
        h = g * R + r
        dt_Q, a_Q, document_Q, into_Q, left_Q, _ = _decays(dt, A, document, first, count, c, h, H, Q)
        u_QP = _rows_of(x, first, count, stride_x, h * P + p, p < P, Q, BP).to(tl.float32) * dt_Q[:, None]
        dy_QP = _rows_of(dy, first, count, H * P, h * P + p, p < P, Q, BP).to(tl.float32)
        dscores_QQ += _dot(dy_QP, tl.trans(u_QP), HALF) * _inside(a_Q, document_Q, Q)
        if STATES:
            at = ((k * H + h).to(tl.int64) * N + n[:, None]) * P + p[None, :]
            there = (n < N)[:, None] & (p < P)[None, :]
            dC_QN += _dot(dy_QP * into_Q[:, None], tl.trans(tl.load(Z + at, there, 0.0)), HALF)
            dB_QN += _dot(u_QP * left_Q[:, None], tl.trans(tl.load(dS + at, there, 0.0)), HALF)
    C_QN = _rows_of(C, first, count, stride_C, g * N + n, n < N, Q, BN)
    B_QN = _rows_of(B, first, count, stride_B, g * N + n, n < N, Q, BN)
    dC_QN += _dot(dscores_QQ, B_QN, HALF)
    dB_QN += _dot(tl.trans(dscores_QQ), C_QN, HALF)
    at = ((first + q)[:, None] * (H // R) + g) * N + n[None, :]
    seen = (q < count)[:, None] & (n < N)[None, :]
    tl.store(dC + at, dC_QN.to(dC.dtype.element_ty), seen)
    tl.store(dB + at, dB_QN.to(dB.dtype.element_ty), seen)


def takes(x_THP: Tensor, dt_TH: Tensor) -> bool:
    """float64 and wider heads are the reference's."""
    return x_THP.shape[2] <= WIDEST and x_THP.dtype != torch.float64 and dt_TH.dtype == torch.float32


def ssd_varlen(
    C_TGN: Tensor, x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TGN: Tensor, D_H: Tensor | None, document_BL: Tensor
) -> Tensor:
    """y (T, H, P) + D x, float32; gradients come in the dtypes of the inputs.  document_BL: the number of each token's
    document.

    Under autocast the products are rounded like others; everything else is not.
    """
    device = x_THP.device.type
    half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    y: Tensor = PackedSSD.apply(C_TGN, x_THP, dt_TH, A_H, B_TGN, D_H, document_BL, half)
    return y


def _rowwise(t: Tensor) -> Tensor:
    """A token's values in one piece; tokens may lie apart."""
    return t if t.stride()[1:] == (t.shape[2], 1) else t.contiguous()


class PackedSSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        C_TGN: Tensor,
        x_THP: Tensor,
        dt_TH: Tensor,
        A_H: Tensor,
        B_TGN: Tensor,
        D_H: Tensor | None,
        document_BL: Tensor,
        half: torch.dtype | None,
    ) -> Tensor:
        (rows, L), (T, H, P), (G, N) = document_BL.shape, x_THP.shape, B_TGN.shape[1:]
        C_TGN, x_THP, B_TGN = _rowwise(C_TGN), _rowwise(x_THP), _rowwise(B_TGN)
        dt_TH, document_BL = dt_TH.contiguous(), document_BL.contiguous()
        Q = max(16, min(CHUNK, triton.next_power_of_2(L)))
        chunks = triton.cdiv(L, Q)
        BN, BP = (max(NARROWEST, min(64, triton.next_power_of_2(n))) for n in (N, P))
        shape = dict(
            Q=Q, BN=BN, BP=BP, HALF=None if half is None else _HALVES[half], num_warps=WARPS, num_stages=STAGES
        )
        y_THP = torch.empty(T, H, P, device=x_THP.device)
        Z = torch.empty((rows * chunks, H, N, P) if chunks > 1 else 0, device=x_THP.device)
        through_KH = torch.empty((rows * chunks, H) if chunks > 1 else 0, device=x_THP.device)
        if chunks > 1:
            _states[(rows * chunks, H, triton.cdiv(N, BN) * triton.cdiv(P, BP))](
                x_THP, B_TGN, dt_TH, A_H, document_BL, Z, through_KH, x_THP.stride(0), B_TGN.stride(0), L, H, P, N,
                H // G, BACK=False, **shape,
            )  # fmt: skip
            _pass_on[(rows, H, triton.cdiv(N * P, 1024))](Z, through_KH, chunks, H, N * P, BACK=False, BLOCK=1024)
        _outputs[(rows * chunks, H, triton.cdiv(P, BP))](
            C_TGN, x_THP, dt_TH, A_H, B_TGN, A_H if D_H is None else D_H, document_BL, Z, y_THP,
            x_THP.stride(0), B_TGN.stride(0), C_TGN.stride(0), L, H, P, N, H // G,
            SKIP=D_H is not None, STATES=chunks > 1, **shape,
        )  # fmt: skip
        ctx.save_for_backward(C_TGN, x_THP, dt_TH, A_H, B_TGN, D_H, document_BL, Z, through_KH)
        ctx.shape, ctx.chunks = shape, chunks
        return y_THP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_THP: Tensor) -> tuple[Tensor | None, ...]:
        C_TGN, x_THP, dt_TH, A_H, B_TGN, D_H, document_BL, Z, through_KH = ctx.saved_tensors
        (rows, L), (H, P), (G, N) = document_BL.shape, x_THP.shape[1:], B_TGN.shape[1:]
        chunks, shape, device = ctx.chunks, ctx.shape, x_THP.device
        K, R, BN, BP = rows * chunks, H // G, shape["BN"], shape["BP"]
        dy_THP = dy_THP.contiguous()
        dS = torch.empty_like(Z)
        strides = x_THP.stride(0), B_TGN.stride(0), C_TGN.stride(0)
        if chunks > 1:
            _states[(K, H, triton.cdiv(N, BN) * triton.cdiv(P, BP))](
                dy_THP, C_TGN, dt_TH, A_H, document_BL, dS, through_KH, H * P, C_TGN.stride(0), L, H, P, N, R,
                BACK=True, **shape,
            )  # fmt: skip
            _pass_on[(rows, H, triton.cdiv(N * P, 1024))](dS, through_KH, chunks, H, N * P, BACK=True, BLOCK=1024)
        whole = shape | dict(BP=max(NARROWEST, triton.next_power_of_2(P)))
        dC, dx, dB = (torch.empty(t.shape, dtype=t.dtype, device=device) for t in (C_TGN, x_THP, B_TGN))
        ddt = torch.empty_like(dt_TH)
        dA_KH = torch.empty(K, H, dtype=torch.float64, device=device)
        dD_KH = None if D_H is None else torch.empty(K, H, device=device)
        _gradients[(K, H)](
            C_TGN, x_THP, dt_TH, A_H, B_TGN, A_H if D_H is None else D_H, document_BL, Z, dS, dy_THP, dx, ddt, dA_KH,
            dA_KH if dD_KH is None else dD_KH, *strides, L, H, P, N, R,
            SKIP=D_H is not None, STATES=chunks > 1, **whole,
        )  # fmt: skip
        _group_gradients[(K, G, triton.cdiv(N, BN))](
            C_TGN, x_THP, dt_TH, A_H, B_TGN, document_BL, Z, dS, dy_THP, dC, dB, *strides, L, H, P, N, R,
            STATES=chunks > 1, **whole,
        )  # fmt: skip
        dD_H = None if D_H is None or dD_KH is None else dD_KH.sum(0).to(D_H.dtype)
        return dC, dx, ddt, dA_KH.sum(0).to(A_H.dtype), dB, dD_H, None, None
