"""One new token of each sequence through convolution and scan, at the bytes of the committed states.

    S (slots, H, N, P) before token `base`; where that is 0 the state is zero, whatever the slot holds
    rings of R pending inputs: x (slots, H, R, P), B (slots, G, R, N), dt (slots, R, H) float32; the input of position
    p is number p mod R · a ring of raw columns for the convolution

Two kernels:

    _prepare   convolution of B and C, dt, and what every pending input weighs in this output; where a chunk is full
               its inputs join S, the only time that S is written
    _read      y = decay · C S + Σ weight_j x_j + (dt B · C + D) x: S once, each program all N of some columns P

A sequence's numbers are the same bits in any batch: no tile depends on the number of rows.
Formulas and letters: `mixers/mamba2/chunked.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiercel.ops.triton.launch import early, others_done

MIN_LOG_DECAY = tl.constexpr(-87.0)  # e to the power of less is no normal float32
READ_COLUMNS, READ_ROWS, READ_STAGES, READ_WARPS, PREPARE_WARPS = 64, 16, 4, 2, 4
COMMIT_ROWS, COMMIT_STATES = 2, 32  # rows that a program looks through, numbers N of S that it takes at a time


@triton.jit
def softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def older_columns(ring, weight, bias, c, real, position, size, C, K: tl.constexpr, BIAS: tl.constexpr):
    """What the columns before `position` add to the convolution of channels c."""
    sum_ = tl.load(bias + c, real, 0.0).to(tl.float32) if BIAS else c.to(tl.float32) * 0.0
    for k in tl.static_range(K - 1):
        before = position - (K - 1 - k)
        old = tl.load(ring + tl.maximum(before, 0) % size * C + c, real & (before >= 0), 0.0).to(tl.float32)
        sum_ += tl.load(weight + k * C + c, real, 0.0).to(tl.float32) * old
    return sum_


@triton.jit
def convolved(row, ring, weight, older, c, real, C, K: tl.constexpr):
    """silu of the convolution of the newest column, and that column as the ring holds it."""
    new = tl.load(row + c, real, 0.0).to(ring.dtype.element_ty)
    sum_ = older + tl.load(weight + (K - 1) * C + c, real, 0.0).to(tl.float32) * new.to(tl.float32)
    return (sum_ * tl.sigmoid(sum_)).to(ring.dtype.element_ty).to(tl.float32), new


@triton.jit
def _commit(
    S, x_ring, B_ring, dt_ring, A, slot, h, base, H, P, N, G, R,
    CHUNK: tl.constexpr, BJ: tl.constexpr, CN: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The CHUNK inputs from `base` on join S of a head."""
    j, p = tl.arange(0, BJ), tl.arange(0, BP)
    number, kept = (base + j) % R, j < CHUNK
    head, group = slot * H + h, slot * G + h // (H // G)
    dt_J = tl.load(dt_ring + (slot * R + number) * H + h, kept, 0.0)
    log_J = dt_J * tl.load(A + h)
    last = tl.sum(log_J, 0)
    w_J = tl.exp(tl.maximum(last - tl.cumsum(log_J, 0), MIN_LOG_DECAY)) * dt_J
    x_JP = tl.load(x_ring + (head * R + number)[:, None] * P + p[None, :], kept[:, None] & (p < P)[None, :], 0.0)
    x_JP = x_JP.to(tl.float32)
    for n0 in range(0, N, CN):
        n = n0 + tl.arange(0, CN)
        B_NJ = tl.load(
            B_ring + (group * R + number)[None, :] * N + n[:, None], kept[None, :] & (n < N)[:, None], 0.0
        ).to(tl.float32)  # fmt: skip
        at = S + (head * N + n)[:, None] * P + p[None, :]
        there = (n < N)[:, None] & (p < P)[None, :]
        S_NP = tl.load(at, there & (base > 0), 0.0).to(tl.float32) * tl.exp(last)
        S_NP += tl.dot(B_NJ * w_J[None, :], x_JP, input_precision=PRECISION)
        tl.store(at, S_NP.to(S.dtype.element_ty), there)


@triton.jit
def _prepare(
    xBC, dt_in, dt_bias, A, D, S, x_ring, B_ring, dt_ring, columns, weight, bias, slot_T, length_S, base_S,
    C_out, weight_out, decay_out, new_out,
    stride_xBC, stride_dt, low, high, T, H, P, N, G, R, size,
    K: tl.constexpr, BIAS: tl.constexpr, CHUNK: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
    CN: tl.constexpr, BP: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program has a group of a row; those after all groups commit the full chunks of a head of ROWS rows."""
    job = tl.program_id(0)
    j = tl.arange(0, BJ)
    if job < T * G:
        t, g = (job // G).to(tl.int64), job % G
        slot = tl.load(slot_T + t).to(tl.int64)
        if slot >= 0:
            length, base = tl.load(length_S + slot), tl.load(base_S + slot)
            pending = tl.where(length - base >= CHUNK, 0, length - base)
            number = (base + j) % R
            n = tl.arange(0, BN)
            real = n < N
            C = H * P + 2 * G * N
            ring = columns + slot * size * C
            of_B, of_C = H * P + g * N + n, H * P + (G + g) * N + n
            B_JN = tl.load(
                B_ring + ((slot * G + g) * R + number)[:, None] * N + n[None, :],
                (j < pending)[:, None] & real[None, :], 0.0,
            ).to(tl.float32)  # fmt: skip
            heads = H // G
            r = tl.arange(0, BH)
            h = g * heads + r
            mine = r < heads
            dt_HJ = tl.load(
                dt_ring + (slot * R + number)[None, :] * H + h[:, None], mine[:, None] & (j < pending)[None, :], 0.0
            )
            a_H = tl.load(A + h, mine, 0.0)
            if K > 0:
                older_B = older_columns(ring, weight, bias, of_B, real, length, size, C, K, BIAS)
                older_C = older_columns(ring, weight, bias, of_C, real, length, size, C, K, BIAS)
            others_done(EARLY)
            row = xBC + t * stride_xBC
            if K > 0:
                B_N, raw_B = convolved(row, ring, weight, older_B, of_B, real, C, K)
                C_N, raw_C = convolved(row, ring, weight, older_C, of_C, real, C, K)
                newest = ring + (length % size) * C
                tl.store(newest + of_B, raw_B, real)
                tl.store(newest + of_C, raw_C, real)
            else:
                B_N = tl.load(row + of_B, real, 0.0).to(tl.float32)
                C_N = tl.load(row + of_C, real, 0.0).to(tl.float32)
            tl.store(B_ring + ((slot * G + g) * R + length % R) * N + n, B_N.to(B_ring.dtype.element_ty), real)
            tl.store(C_out + (t * G + g) * N + n, C_N, real)
            scores_J, score = tl.sum(B_JN * C_N[None, :], 1), tl.sum(B_N * C_N, 0)
            raw = tl.load(dt_in + t * stride_dt + h, mine, 0.0).to(tl.float32) + tl.load(dt_bias + h, mine, 0.0)
            dt_H = tl.minimum(tl.maximum(softplus(raw), low), high)
            tl.store(dt_ring + (slot * R + length % R) * H + h, dt_H, mine)
            log_HJ = dt_HJ * a_H[:, None]
            last_H = tl.sum(log_HJ, 1)
            lag_HJ = tl.maximum(last_H[:, None] - tl.cumsum(log_HJ, 1), MIN_LOG_DECAY)
            newest_H = tl.exp(dt_H * a_H)
            w_HJ = tl.exp(lag_HJ) * dt_HJ * scores_J[None, :] * newest_H[:, None]
            tl.store(weight_out + (t * H + h)[:, None] * BJ + j[None, :], w_HJ, mine[:, None] & (j < BJ)[None, :])
            tl.store(decay_out + t * H + h, tl.exp(last_H) * newest_H, mine)
            tl.store(new_out + t * H + h, dt_H * score + tl.load(D + h, mine, 0.0), mine)
        else:
            others_done(EARLY)
    else:
        h, first = (job - T * G) % H, (job - T * G) // H * ROWS
        rows = first + tl.arange(0, ROWS)
        slots = tl.load(slot_T + rows, rows < T, -1)
        there = slots >= 0
        counts = tl.load(length_S + slots, there, 0) - tl.load(base_S + slots, there, 0)
        if tl.max(counts, 0) >= CHUNK:
            others_done(EARLY)
            for t in range(first, tl.minimum(first + ROWS, T)):
                slot = tl.load(slot_T + t).to(tl.int64)
                if slot >= 0:
                    length, base = tl.load(length_S + slot), tl.load(base_S + slot)
                    if length - base >= CHUNK:
                        _commit(
                            S, x_ring, B_ring, dt_ring, A, slot, h, base, H, P, N, G, R, CHUNK, BJ, CN, BP, PRECISION
                        )


@triton.jit
def _read(
    xBC, S, x_ring, columns, weight, bias, slot_T, length_S, base_S, C_in, weight_in, decay_in, new_in, y,
    stride_xBC, stride_y, H, P, N, G, R, size,
    K: tl.constexpr, BIAS: tl.constexpr, CHUNK: tl.constexpr, BJ: tl.constexpr, BN: tl.constexpr, CN: tl.constexpr,
    BP: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """S is read CN rows at a time, some of them asked for ahead; before the first commit it is zero."""
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p = tl.program_id(2) * BP + tl.arange(0, BP)
    inside = p < P
    slot = tl.load(slot_T + t).to(tl.int64)
    if slot >= 0:
        length, base = tl.load(length_S + slot), tl.load(base_S + slot)
        full = length - base >= CHUNK
        pending = tl.where(full, 0, length - base)
        j, head = tl.arange(0, BJ), slot * H + h
        number = (base + j) % R
        x_JP = tl.load(
            x_ring + (head * R + number)[:, None] * P + p[None, :], (j < pending)[:, None] & inside[None, :], 0.0
        ).to(tl.float32)  # fmt: skip
        C = H * P + 2 * G * N
        ring, c = columns + slot * size * C, h * P + p
        if K > 0:
            older = older_columns(ring, weight, bias, c, inside, length, size, C, K, BIAS)
        others_done(EARLY)
        C_row = C_in + (t * G + h // (H // G)) * N
        sum_NP = tl.zeros((CN, BP), tl.float32)
        rows = tl.where(full | (base > 0), N, 0)
        for n0 in tl.range(0, rows, CN, num_stages=STAGES):
            n = n0 + tl.arange(0, CN)
            S_NP = tl.load(S + (head * N + n)[:, None] * P + p[None, :], (n < N)[:, None] & inside[None, :], 0.0)
            sum_NP += S_NP.to(tl.float32) * tl.load(C_row + n, n < N, 0.0)[:, None]
        row = xBC + t * stride_xBC
        if K > 0:
            x_P, raw = convolved(row, ring, weight, older, c, inside, C, K)
            tl.store(ring + (length % size) * C + c, raw, inside)
        else:
            x_P = tl.load(row + c, inside, 0.0).to(tl.float32)
        tl.store(x_ring + (head * R + length % R) * P + p, x_P.to(x_ring.dtype.element_ty), inside)
        w_J = tl.load(weight_in + (t * H + h) * BJ + j)
        y_P = tl.sum(sum_NP, 0) * tl.load(decay_in + t * H + h)
        y_P += tl.sum(x_JP * w_J[:, None], 0) + tl.load(new_in + t * H + h) * x_P
        tl.store(y + t * stride_y + h * P + p, y_P.to(y.dtype.element_ty), inside)
    else:
        others_done(EARLY)
        tl.store(y + t * stride_y + h * P + p, tl.zeros((BP,), y.dtype.element_ty), inside)


def ssd_step(
    xBC_TC: Tensor,
    dt_TH: Tensor,
    dt_bias_H: Tensor,
    A_H: Tensor,
    D_H: Tensor,
    memory: Any,
    slot_T: Tensor,
    length_S: Tensor,
    base_S: Tensor,
    *,
    dt_limit: tuple[float, float],
    conv: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """y + D x (T, H · P) float32 of one new token of each sequence; its input joins the rings, and where a chunk is
    full S is rewritten (its base and all lengths are the caller's to move on).

    memory: `mixers.recurrent.RecurrentSlots`, with at most a chunk of pending inputs.
    slot_T: −1 for rows without a sequence (y = 0).
    conv: weight (K, C) and bias, where xBC is not convolved yet.
    """
    weight_KC, bias_C = (A_H, None) if conv is None else conv
    T, device = xBC_TC.shape[0], xBC_TC.device
    columns, x, dt, B, S = (memory[name] for name in ("conv_state", "x", "dt", "B", "ssm_state"))
    _, H, N, P = S.shape
    G, R = B.shape[1:3]
    BJ, BN = (max(16, triton.next_power_of_2(n)) for n in (memory.chunk, N))
    CN, BP = (max(16, min(most, triton.next_power_of_2(n))) for most, n in ((COMMIT_STATES, N), (READ_COLUMNS, P)))
    C_TGN, w_THJ = torch.empty(T, G, N, device=device), torch.empty(T, H, BJ, device=device)
    decay_TH, new_TH = torch.empty(T, H, device=device), torch.empty(T, H, device=device)
    y_TI = torch.empty(T, H * P, dtype=torch.float32, device=device)
    bias, K = weight_KC if bias_C is None else bias_C, 0 if conv is None else len(weight_KC)
    size = columns.shape[1]
    same = dict(K=K, BIAS=bias_C is not None, CHUNK=memory.chunk, BJ=BJ, BN=BN, **early())
    _prepare[(T * G + triton.cdiv(T, COMMIT_ROWS) * H,)](
        xBC_TC, dt_TH, dt_bias_H, A_H, D_H, S, x, B, dt, columns, weight_KC, bias,
        slot_T, length_S, base_S, C_TGN, w_THJ, decay_TH, new_TH, xBC_TC.stride(0), dt_TH.stride(0), *dt_limit,
        T, H, P, N, G, R, size, BH=triton.next_power_of_2(H // G), CN=CN, BP=max(16, triton.next_power_of_2(P)),
        ROWS=COMMIT_ROWS, PRECISION=precision(x),
        num_warps=PREPARE_WARPS, **same,
    )  # fmt: skip
    _read[(T, H, triton.cdiv(P, BP))](
        xBC_TC, S, x, columns, weight_KC, bias, slot_T, length_S, base_S, C_TGN, w_THJ, decay_TH,
        new_TH, y_TI, xBC_TC.stride(0), y_TI.stride(0), H, P, N, G, R, size,
        CN=min(READ_ROWS, BN), BP=BP, STAGES=READ_STAGES, num_warps=READ_WARPS, **same,
    )  # fmt: skip
    return y_TI


def precision(t: Tensor) -> str:
    """How a product of float32 values beside tensors like this one sees them."""
    return "ieee" if t.dtype == torch.float32 else "tf32"
