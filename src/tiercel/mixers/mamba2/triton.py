"""The Mamba-2 scan of a prompt in chunks; a step is `mixers/mamba2/triton_step.py`'s.

Formulas and letters: `mixers/mamba2/chunked.py`.  Decays are float64 sums, as differences of long sums are taken.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiercel.mixers.mamba2.triton_step import precision

MIN_LOG_DECAY = tl.constexpr(-87.0)


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
        w = tl.exp(tl.maximum(tl.where(real, lag, 0.0), MIN_LOG_DECAY)) * tl.load(dt + j * H + h, real, 0.0)
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
            w = w * tl.exp(tl.maximum(tl.where(seen, lag, 0.0), MIN_LOG_DECAY))
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
    by = precision(xBC_LC)
    a_HL = torch.empty(H, L, dtype=torch.float64, device=device)
    scores = torch.empty(chunks, G, CH, CH, device=device)
    states = torch.empty(chunks, H, N, P, device=device)
    y_LI = torch.empty(L - skip, H * P, device=device)
    stride, ends = xBC_LC.stride(0), (whole, commit)
    _decays[(chunks, H)](dt_LH, A_H, a_HL, H, L, *ends, CH=CH)
    _scores[(chunks, G, (CH // BI) ** 2)](
        xBC_LC, scores, stride, H * P, N, G, L, skip, *ends, CH=CH, BI=BI, BN=BN, PRECISION=by
    )  # fmt: skip
    if whole:
        _states[(whole, H, triton.cdiv(N, BN) * triton.cdiv(P, BP))](
            xBC_LC, dt_LH, a_HL, states, stride, H, P, N, G, L, *ends, CH=CH, BJ=32, BN=BN, BP=BP, PRECISION=by
        )  # fmt: skip
    _pass_on[(H, triton.cdiv(N * P, 1024))](states, a_HL, S_HNP, H, N * P, L, *ends, CH=CH, BLOCK=1024)
    _outputs[(chunks * (CH // BI), H, triton.cdiv(P, BP))](
        xBC_LC, dt_LH, a_HL, scores, states, D_H, y_LI, stride, y_LI.stride(0), H, P, N, G, L, skip, *ends,
        CH=CH, BI=BI, BN=BN, BP=BP, PRECISION=by,
    )  # fmt: skip
    return y_LI
