"""The Mamba-2 scan: a prompt in chunks, and a step of many texts over their committed states and open chunks.

    committed S (slots, H, N, P) float32, before token `base` · rings of R open inputs: x (slots, H, R, P),
    B (slots, G, R, N), dt (slots, H, R) float32; the input of position p is number p mod R

Formulas and letters: `mixers/mamba2/chunked.py`.  Decays are float64 sums, as differences of long sums are taken.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiercel.ops.triton.launch import early, others_done

SMALLEST = tl.constexpr(-87.0)


FEW_TILE, MANY_TILE = (256, 32, 8), (64, 64, 4)  # of a step's state, (N, P), and warps: for few texts and many


@triton.jit
def _softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


# ── a step: one new token of each text


@triton.jit
def _convolved(row, ring, weight, bias, c, real, position, size, C, K: tl.constexpr, BIAS: tl.constexpr):
    """Channels c of the newest token: silu of their convolution as the ring would hold it; what goes into it."""
    new = tl.load(row + c, real, 0.0).to(ring.dtype.element_ty)
    sum_ = tl.load(bias + c, real, 0.0).to(tl.float32) if BIAS else new.to(tl.float32) * 0.0
    for k in tl.static_range(K - 1):
        before = position - (K - 1 - k)
        at = tl.maximum(before, 0) % size * C
        old = tl.load(ring + at + c, real & (before >= 0), 0.0).to(tl.float32)
        sum_ += tl.load(weight + k * C + c, real, 0.0).to(tl.float32) * old
    sum_ += tl.load(weight + (K - 1) * C + c, real, 0.0).to(tl.float32) * new.to(tl.float32)
    return (sum_ * tl.sigmoid(sum_)).to(ring.dtype.element_ty).to(tl.float32), new


@triton.jit
def _step(
    xBC, dt_in, dt_bias, A, D, S, x_ring, B_ring, dt_ring, columns, weight, bias, slot_T, length_S, base_S, y,
    stride_xBC, stride_dt, stride_y, low, high, H, P, N, G, R, size,
    CONV: tl.constexpr, BIAS: tl.constexpr, CHUNK: tl.constexpr, BJ: tl.constexpr,
    TILES: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """TILES of BN numbers of the state; those of the first are asked for before the new token is there."""
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_T + t).to(tl.int64)
    if slot >= 0:
        length, base = tl.load(length_S + slot), tl.load(base_S + slot)
        open_ = length - base  # at most CHUNK
        g = h // (H // G)
        head, group = slot * H + h, slot * G + g
        j = tl.arange(0, BJ)
        p = tl.program_id(2) * BP + tl.arange(0, BP)
        kept, inside = j < open_, p < P
        number = (base + j) % R
        a = tl.load(A + h)
        dt = tl.load(dt_ring + head * R + number, kept, 0.0)
        decay_J = tl.cumsum(dt * a, 0)
        last = tl.sum(dt * a, 0)
        weight_J = tl.exp(tl.maximum(last - decay_J, SMALLEST)) * dt  # into the state after the open inputs
        both = kept[:, None] & inside[None, :]
        n = tl.arange(0, BN)
        S_NP = tl.load(S + (head * N + n)[:, None] * P + p[None, :], (n < N)[:, None] & inside[None, :], 0.0)
        B_JN = tl.load(
            B_ring + (group * R + number)[:, None] * N + n[None, :], kept[:, None] & (n < N)[None, :], 0.0
        ).to(tl.float32)  # fmt: skip
        x_JP = tl.load(x_ring + (head * R + number)[:, None] * P + p[None, :], both, 0.0).to(tl.float32)
        others_done(EARLY)
        row = xBC + t * stride_xBC
        C = H * P + 2 * G * N
        ring = columns + slot * size * C
        newest = ring + (length % size) * C  # nobody reads there in this step
        if CONV > 0:
            x_P, raw = _convolved(row, ring, weight, bias, h * P + p, inside, length, size, C, CONV, BIAS)
            tl.store(newest + h * P + p, raw, inside)
        else:
            x_P = tl.load(row + h * P + p, inside, 0.0).to(tl.float32)
        keeps = (h % (H // G) == 0) & (tl.program_id(2) == 0)
        commit = open_ >= CHUNK
        y_P, scores_J, score = tl.zeros((BP,), tl.float32), tl.zeros((BJ,), tl.float32), 0.0
        for i in tl.static_range(TILES):
            n = i * BN + tl.arange(0, BN)
            real = n < N
            of_B, of_C = H * P + g * N + n, H * P + (G + g) * N + n
            if CONV > 0:
                B_new, raw_B = _convolved(row, ring, weight, bias, of_B, real, length, size, C, CONV, BIAS)
                C_N, raw_C = _convolved(row, ring, weight, bias, of_C, real, length, size, C, CONV, BIAS)
                tl.store(newest + of_B, raw_B, real & keeps)
                tl.store(newest + of_C, raw_C, real & keeps)
            else:
                B_new = tl.load(row + of_B, real, 0.0).to(tl.float32)
                C_N = tl.load(row + of_C, real, 0.0).to(tl.float32)
            at = S + (head * N + n)[:, None] * P + p[None, :]
            there = real[:, None] & inside[None, :]
            if i > 0:
                S_NP = tl.load(at, there, 0.0)
                B_JN = tl.load(
                    B_ring + (group * R + number)[:, None] * N + n[None, :], kept[:, None] & real[None, :], 0.0
                ).to(tl.float32)  # fmt: skip
            y_P += tl.sum(S_NP * C_N[:, None], 0)
            scores_J += tl.sum(B_JN * C_N[None, :], 1)
            score += tl.sum(B_new * C_N, 0)
            if commit:
                added = tl.dot(tl.trans(B_JN * weight_J[:, None]), x_JP, input_precision=PRECISION)
                tl.store(at, S_NP * tl.exp(last) + added, there)
            if keeps:
                tl.store(B_ring + (group * R + length % R) * N + n, B_new.to(B_ring.dtype.element_ty), real)
        raw = tl.load(dt_in + t * stride_dt + h).to(tl.float32) + tl.load(dt_bias + h)
        dt_new = tl.minimum(tl.maximum(_softplus(raw), low), high)
        y_P = y_P * tl.exp(last) + tl.sum(x_JP * (weight_J * scores_J)[:, None], 0)
        y_P = y_P * tl.exp(dt_new * a) + (dt_new * score + tl.load(D + h)) * x_P
        tl.store(y + t * stride_y + h * P + p, y_P.to(y.dtype.element_ty), inside)
        here = head * R + length % R
        tl.store(x_ring + here * P + p, x_P.to(x_ring.dtype.element_ty), inside)
        if tl.program_id(2) == 0:
            tl.store(dt_ring + here, dt_new)
    else:
        others_done(EARLY)
        p = tl.program_id(2) * BP + tl.arange(0, BP)
        tl.store(y + t * stride_y + h * P + p, tl.zeros((BP,), y.dtype.element_ty), p < P)


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
    """y + D x (T, H · P) float32 of one new token of each text; its input joins the ring, and where a chunk is full S
    is rewritten (its base and all lengths are the caller's to move on).

    memory: `model.slots.Mamba2Slots`, with at most a chunk of open inputs.  slot_T: −1 for nobody's rows, whose y is 0.
    conv: weight (K, C) and bias, where xBC is not convolved yet: for few rows, as every head makes B and C anew.
    """
    weight_KC, bias_C = (A_H, None) if conv is None else conv
    T = xBC_TC.shape[0]
    _, H, N, P = memory.S.shape
    G, R = memory.B.shape[1:3]
    y_TI = torch.empty(T, H * P, dtype=torch.float32, device=xBC_TC.device)
    most_N, most_P, warps = FEW_TILE if T < 8 else MANY_TILE
    BN, BP = (max(16, min(most, triton.next_power_of_2(n))) for most, n in ((most_N, N), (most_P, P)))
    _step[(T, H, triton.cdiv(P, BP))](
        xBC_TC, dt_TH, dt_bias_H, A_H, D_H, memory.S, memory.x, memory.B, memory.dt, memory.columns, weight_KC,
        weight_KC if bias_C is None else bias_C, slot_T, length_S, base_S, y_TI,
        xBC_TC.stride(0), dt_TH.stride(0), y_TI.stride(0), *dt_limit, H, P, N, G, R,
        memory.columns.shape[1], CONV=0 if conv is None else len(weight_KC), BIAS=bias_C is not None,
        CHUNK=memory.chunk, BJ=max(16, triton.next_power_of_2(memory.chunk)),
        TILES=triton.cdiv(N, BN), BN=BN, BP=BP, PRECISION=_precision(memory.x), num_warps=warps, **early(),
    )  # fmt: skip
    return y_TI


def _precision(t: Tensor) -> str:
    return "ieee" if t.dtype == torch.float32 else "tf32"


# ── a prompt, or more of one: L inputs from a chunk's start, outputs of all but the first `skip` of them.  Chunks of CH
#    cover the inputs up to `commit`, the last of these is cut there; one more chunk holds the rest.


@triton.jit
def _start(c, whole, commit, CH: tl.constexpr):
    return tl.where(c < whole, c * CH, commit)


@triton.jit
def _stop(c, whole, commit, L, CH: tl.constexpr):
    return tl.where(c < whole, tl.minimum(c * CH + CH, commit), L)


@triton.jit
def _decays(dt, A, a, H, L, whole, commit, CH: tl.constexpr):
    """a (H, L): sums of dt A from each chunk's start."""
    c, h = tl.program_id(0), tl.program_id(1)
    start, stop = _start(c, whole, commit, CH), _stop(c, whole, commit, L, CH)
    i = start + tl.arange(0, CH)
    d = tl.load(dt + i * H + h, i < stop, 0.0).to(tl.float64) * tl.load(A + h).to(tl.float64)
    tl.store(a + h * L + i, tl.cumsum(d, 0), i < stop)


@triton.jit
def _scores(
    xBC, out, stride, I, N, G, L, skip, whole, commit,
    CH: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (chunks, G, CH, CH): C_i · B_j."""
    c, g = tl.program_id(0), tl.program_id(1)
    tiles = CH // BI
    row, column = tl.program_id(2) // tiles * BI, tl.program_id(2) % tiles * BI
    start, stop = _start(c, whole, commit, CH), _stop(c, whole, commit, L, CH)
    if (column <= row) & (start + row < stop):
        i, j = start + row + tl.arange(0, BI), start + column + tl.arange(0, BI)
        sum_ = tl.zeros((BI, BI), tl.float32)
        for n0 in range(0, N, BN):
            n = n0 + tl.arange(0, BN)
            C_IN = tl.load(
                xBC + i[:, None].to(tl.int64) * stride + I + (G + g) * N + n[None, :],
                ((i >= skip) & (i < stop))[:, None] & (n < N)[None, :], 0.0,
            )  # fmt: skip
            B_NJ = tl.load(
                xBC + j[None, :].to(tl.int64) * stride + I + g * N + n[:, None],
                (j < stop)[None, :] & (n < N)[:, None], 0.0,
            )  # fmt: skip
            sum_ += tl.dot(C_IN, B_NJ, input_precision=PRECISION)
        r, q = row + tl.arange(0, BI), column + tl.arange(0, BI)
        tl.store(out + ((c * G + g) * CH + r[:, None]) * CH + q[None, :], sum_)


@triton.jit
def _states(
    xBC, dt, a, out, stride, H, P, N, G, L, whole, commit,
    CH: tl.constexpr, BJ: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (chunks, H, N, P): what each whole chunk adds to the state."""
    c, h = tl.program_id(0), tl.program_id(1)
    tiles = tl.cdiv(P, BP)
    n = tl.program_id(2) // tiles * BN + tl.arange(0, BN)
    p = tl.program_id(2) % tiles * BP + tl.arange(0, BP)
    g = h // (H // G)
    start, stop = _start(c, whole, commit, CH), _stop(c, whole, commit, L, CH)
    last = tl.load(a + h * L + stop - 1)
    sum_ = tl.zeros((BN, BP), tl.float32)
    for j0 in range(start, stop, BJ):
        j = j0 + tl.arange(0, BJ)
        real = j < stop
        lag = (last - tl.load(a + h * L + j, real, 0.0)).to(tl.float32)
        w = tl.exp(tl.maximum(tl.where(real, lag, 0.0), SMALLEST)) * tl.load(dt + j * H + h, real, 0.0)
        row = xBC + j.to(tl.int64) * stride
        B_NJ = tl.load(row[None, :] + H * P + g * N + n[:, None], real[None, :] & (n < N)[:, None], 0.0)
        x_JP = tl.load(row[:, None] + h * P + p[None, :], real[:, None] & (p < P)[None, :], 0.0)
        sum_ += tl.dot(B_NJ.to(tl.float32) * w[None, :], x_JP.to(tl.float32), input_precision=PRECISION)
    at = out + ((c * H + h).to(tl.int64) * N + n[:, None]) * P + p[None, :]
    tl.store(at, sum_, (n < N)[:, None] & (p < P)[None, :])


@triton.jit
def _pass_on(states, a, S, H, size, L, whole, commit, CH: tl.constexpr, BLOCK: tl.constexpr):
    """states[c] becomes the state before chunk c; S the one before the rest."""
    h = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = i < size
    now = tl.load(S + h * size + i, real, 0.0)
    for c in range(0, whole):
        at = states + (c * H + h).to(tl.int64) * size + i
        decay = tl.exp(tl.load(a + h * L + _stop(c, whole, commit, L, CH) - 1).to(tl.float32))
        added = tl.load(at, real, 0.0)
        tl.store(at, now, real)
        now = now * decay + added
    tl.store(states + (whole * H + h).to(tl.int64) * size + i, now, real)
    tl.store(S + h * size + i, now, real)


@triton.jit
def _outputs(
    xBC, dt, a, scores, states, D, y, stride, stride_y, H, P, N, G, L, skip, whole, commit,
    CH: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = CH // BI
    c, row = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BI
    h, p = tl.program_id(1), tl.program_id(2) * BP + tl.arange(0, BP)
    g = h // (H // G)
    start, stop = _start(c, whole, commit, CH), _stop(c, whole, commit, L, CH)
    r = row + tl.arange(0, BI)
    i = start + r
    if (start + row < stop) & (start + row + BI > skip):
        real, inside = i < stop, (p < P)[None, :]
        a_I = tl.load(a + h * L + i, real, 0.0)
        sum_ = tl.zeros((BI, BP), tl.float32)
        for n0 in range(0, N, BN):
            n = n0 + tl.arange(0, BN)
            C_IN = tl.load(
                xBC + i[:, None].to(tl.int64) * stride + H * P + (G + g) * N + n[None, :],
                (real & (i >= skip))[:, None] & (n < N)[None, :], 0.0,
            )  # fmt: skip
            S_NP = tl.load(
                states + ((c * H + h).to(tl.int64) * N + n[:, None]) * P + p[None, :], (n < N)[:, None] & inside, 0.0
            )  # fmt: skip
            sum_ += tl.dot(C_IN.to(tl.float32), S_NP, input_precision=PRECISION)
        sum_ = sum_ * tl.exp(a_I.to(tl.float32))[:, None]
        for q0 in range(0, row + BI, BI):
            q = q0 + tl.arange(0, BI)
            j = start + q
            known = j < stop
            lag = (a_I[:, None] - tl.load(a + h * L + j, known, 0.0)[None, :]).to(tl.float32)
            seen = (q[None, :] <= r[:, None]) & known[None, :] & real[:, None]
            w = tl.load(scores + ((c * G + g) * CH + r[:, None]) * CH + q[None, :], seen, 0.0)
            w = w * tl.exp(tl.maximum(tl.where(seen, lag, 0.0), SMALLEST))
            w = tl.where(seen, w * tl.load(dt + j * H + h, known, 0.0)[None, :], 0.0)
            x_JP = tl.load(
                xBC + j[:, None].to(tl.int64) * stride + h * P + p[None, :], known[:, None] & inside, 0.0
            )  # fmt: skip
            sum_ += tl.dot(w, x_JP.to(tl.float32), input_precision=PRECISION)
        x_IP = tl.load(xBC + i[:, None].to(tl.int64) * stride + h * P + p[None, :], real[:, None] & inside, 0.0)
        sum_ += tl.load(D + h) * x_IP.to(tl.float32)
        at = y + (i - skip)[:, None].to(tl.int64) * stride_y + h * P + p[None, :]
        tl.store(at, sum_.to(y.dtype.element_ty), (real & (i >= skip))[:, None] & inside)


def ssd(
    xBC_LC: Tensor, dt_LH: Tensor, A_H: Tensor, D_H: Tensor, S_HNP: Tensor, *, groups: int, skip: int, commit: int
) -> Tensor:
    """y + D x (L − skip, H · P) float32 of inputs that begin where a chunk does, after softplus and convolution.

    xBC: x | B | C of each, its rows may lie apart (C of the first `skip`, whose outputs are not asked for, is not
    read).  S, contiguous: the state before input 0; after the call the one after the first `commit` inputs, which
    leaves fewer than 256.
    """
    L, G = xBC_LC.shape[0], groups
    H, N, P = S_HNP.shape
    device, BI = xBC_LC.device, 64
    CH = 256 if L > 128 else max(BI, triton.next_power_of_2(L))
    assert L - commit <= CH and S_HNP.is_contiguous() and dt_LH.is_contiguous()
    whole = triton.cdiv(commit, CH)
    chunks = whole + 1
    BN, BP = (max(16, min(64, triton.next_power_of_2(n))) for n in (N, P))
    precision = _precision(xBC_LC)
    a_HL = torch.empty(H, L, dtype=torch.float64, device=device)
    scores = torch.empty(chunks, G, CH, CH, device=device)
    states = torch.empty(chunks, H, N, P, device=device)
    y_LI = torch.empty(L - skip, H * P, device=device)
    stride, ends = xBC_LC.stride(0), (whole, commit)
    _decays[(chunks, H)](dt_LH, A_H, a_HL, H, L, *ends, CH=CH)
    _scores[(chunks, G, (CH // BI) ** 2)](
        xBC_LC, scores, stride, H * P, N, G, L, skip, *ends, CH=CH, BI=BI, BN=BN, PRECISION=precision
    )  # fmt: skip
    if whole:
        _states[(whole, H, triton.cdiv(N, BN) * triton.cdiv(P, BP))](
            xBC_LC, dt_LH, a_HL, states, stride, H, P, N, G, L, *ends, CH=CH, BJ=32, BN=BN, BP=BP, PRECISION=precision
        )  # fmt: skip
    _pass_on[(H, triton.cdiv(N * P, 1024))](states, a_HL, S_HNP, H, N * P, L, *ends, CH=CH, BLOCK=1024)
    _outputs[(chunks * (CH // BI), H, triton.cdiv(P, BP))](
        xBC_LC, dt_LH, a_HL, scores, states, D_H, y_LI, stride, y_LI.stride(0), H, P, N, G, L, skip, *ends,
        CH=CH, BI=BI, BN=BN, BP=BP, PRECISION=precision,
    )  # fmt: skip
    return y_LI
