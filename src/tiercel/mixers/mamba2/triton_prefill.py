"""Convolution and scan of new tokens of several sequences in one forward: prompts, and more of them.

    _gather    inputs x | B | C after convolution and silu, and dt: the pending ones from the rings, the new ones made
    _scores    C_i · B_j of a chunk and group; _decays: sums of dt A from a chunk's start, float64, as differences of
               long sums are taken
    _states    what each chunk adds to a committed state
    _carry     the states that chunks begin with; a sequence's own becomes the one before its next base
    _outputs   y + D x of the new tokens
    _keep      inputs from the next base on, and raw columns, into the rings

Where tensors are bfloat16 so are the factors of products, their sums float32; otherwise all is float32.  A sequence's
numbers are the same bits in any company: chunks are cut at its own positions.  Tables: `model/ragged.py`.
Formulas and letters: `mixers/mamba2/chunked.py`; I inputs, c a chunk, r a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiercel.mixers.mamba2.triton_step import MIN_LOG_DECAY, softplus
from tiercel.model.ragged import CHUNK, Piece, RaggedPlan
from tiercel.ops.triton import interpreted
from tiercel.ops.triton.launch import early, others_done, output

counted = triton.jit(do_not_specialize=["M", "I", "B"])  # they differ from forward to forward
STATES_TILE = 128, 128, 32, 8, 3  # of N, P and inputs, warps, loads under way
OUTPUTS_TILE = 64, 64, 128, 64, 4, 3  # of outputs, inputs, P and N, warps, loads under way
# of float32 values, which count in full
EXACT_STATES_TILE, EXACT_OUTPUTS_TILE = (64, 64, 32, 4, 2), (64, 32, 64, 32, 4, 2)

SLOT, START, BASE, NEXT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
END, TOKEN, INPUT, FIRST, WHOLE = (tl.constexpr(i) for i in range(4, 9))


@triton.jit
def dot(a, b, HALF: tl.constexpr):
    if HALF:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")


@counted
def _gather(
    xBC, dt_in, dt_bias, x_ring, B_ring, dt_ring, columns, weight, bias, row_I, rows, out, dt_out,
    stride_xBC, stride_dt, low, high, I, B, H, P, N, G, R, size, C,
    K: tl.constexpr, BIAS: tl.constexpr, BI: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    others_done(EARLY)
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    r = tl.load(row_I + i, i < I, -1)
    live = r >= 0
    slot = tl.load(rows + SLOT * B + r, live, 0).to(tl.int64)
    start, base = tl.load(rows + START * B + r, live, 0), tl.load(rows + BASE * B + r, live, 0)
    position = base + i - tl.load(rows + INPUT * B + r, live, 0)
    token = (tl.load(rows + TOKEN * B + r, live, 0) + position - start).to(tl.int64)
    new, pending = live & (position >= start), live & (position < start)
    if tl.program_id(1) == tl.num_programs(1) - 1:
        h = tl.arange(0, BH)[None, :]
        ours = h < H
        raw = tl.load(dt_in + token[:, None] * stride_dt + h, new[:, None] & ours, 0.0).to(tl.float32)
        dt = tl.minimum(tl.maximum(softplus(raw + tl.load(dt_bias + h, ours, 0.0)), low), high)
        kept = tl.load(dt_ring + (slot[:, None] * R + (position % R)[:, None]) * H + h, pending[:, None] & ours, 0.0)
        tl.store(dt_out + i[:, None].to(tl.int64) * H + h, tl.where(new[:, None], dt, kept), live[:, None] & ours)
    else:
        c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
        real = c < C
        both = live[:, None] & real
        sum_ = tl.zeros((BI, BC), tl.float32)
        if BIAS:
            sum_ += tl.load(bias + c, real, 0.0).to(tl.float32)
        at_out = out + i[:, None].to(tl.int64) * C + c
        if tl.min(tl.where(live, position - start, K), 0) >= K - 1:  # all columns are new ones
            for k in tl.static_range(K):
                x = tl.load(xBC + (token - (K - 1 - k))[:, None] * stride_xBC + c, both, 0.0)
                w = tl.load(weight + k * C + c, real, 0.0).to(tl.float32)
                sum_ += w * x.to(columns.dtype.element_ty).to(tl.float32)
            tl.store(at_out, (sum_ * tl.sigmoid(sum_)).to(out.dtype.element_ty), both)
        else:
            ring = columns + slot[:, None] * size * C + c
            for k in tl.static_range(K):
                before = position - (K - 1 - k)
                here = new & (before >= start)
                there = new & (before < start) & (before >= 0)
                at = xBC + (token - (K - 1 - k))[:, None] * stride_xBC + c
                fresh = tl.load(at, here[:, None] & real, 0.0).to(columns.dtype.element_ty)
                old = tl.load(ring + (tl.maximum(before, 0) % size)[:, None] * C, there[:, None] & real, 0.0)
                w = tl.load(weight + k * C + c, real, 0.0).to(tl.float32)
                sum_ += w * tl.where(here[:, None], fresh, old).to(tl.float32)
            y = (sum_ * tl.sigmoid(sum_)).to(out.dtype.element_ty)
            I_ = H * P
            of_x, of_B = c < I_, (c >= I_) & (c < I_ + G * N)
            head, b, in_ring = c // P, tl.maximum(c - I_, 0), (position % R)[:, None]
            old_x = tl.load(
                x_ring + ((slot[:, None] * H + head) * R + in_ring) * P + c % P, pending[:, None] & of_x, 0.0
            )  # fmt: skip
            old_B = tl.load(
                B_ring + ((slot[:, None] * G + b // N) * R + in_ring) * N + b % N, pending[:, None] & of_B, 0.0
            )  # fmt: skip
            tl.store(at_out, tl.where(new[:, None], y, tl.where(of_x, old_x, old_B)), both)


@counted
def _scores(
    xBC, dt, A, chunks, scores, a, stride, M, I, H, P, N, G,
    CH: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr, HALF: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """scores (chunks, G, CH, CH): C_i · B_j; a (H, I)."""
    others_done(EARLY)
    c, job = tl.program_id(0), tl.program_id(1)
    if tl.load(chunks + c) >= 0:
        start, stop = tl.load(chunks + M + c), tl.load(chunks + 2 * M + c)
        if job < H:
            i = start + tl.arange(0, CH)
            d = tl.load(dt + i * H + job, i < stop, 0.0).to(tl.float64) * tl.load(A + job).to(tl.float64)
            tl.store(a + job.to(tl.int64) * I + i, tl.cumsum(d, 0), i < stop)
        else:
            tiles: tl.constexpr = CH // BI
            g, tile = (job - H) // (tiles * tiles), (job - H) % (tiles * tiles)
            row, column = tile // tiles * BI, tile % tiles * BI
            if (column <= row) & (start + row < stop):
                i, j = start + row + tl.arange(0, BI), start + column + tl.arange(0, BI)
                sum_ = tl.zeros((BI, BI), tl.float32)
                for n0 in range(0, N, BN):
                    n = n0 + tl.arange(0, BN)
                    real = n < N
                    C_IN = tl.load(
                        xBC + i[:, None].to(tl.int64) * stride + H * P + (G + g) * N + n[None, :],
                        (i < stop)[:, None] & real[None, :], 0.0,
                    )  # fmt: skip
                    B_JN = tl.load(
                        xBC + j[:, None].to(tl.int64) * stride + H * P + g * N + n[None, :],
                        (j < stop)[:, None] & real[None, :], 0.0,
                    )  # fmt: skip
                    sum_ += dot(C_IN, tl.trans(B_JN), HALF)
                q, s = row + tl.arange(0, BI), column + tl.arange(0, BI)
                at = scores + ((c * G + g).to(tl.int64) * CH + q[:, None]) * CH + s[None, :]
                tl.store(at, sum_.to(scores.dtype.element_ty))


@counted
def _states(
    xBC, dt, a, chunks, rows, out, stride, M, I, B, H, P, N, G,
    BJ: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, HALF: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out (chunks, H, N, P): what each chunk but a row's last adds to the state."""
    others_done(EARLY)
    c, h = tl.program_id(0), tl.program_id(1)
    r = tl.load(chunks + c)
    whole = tl.load(rows + FIRST * B + tl.maximum(r, 0)) + tl.load(rows + WHOLE * B + tl.maximum(r, 0))
    if (r >= 0) & (c < whole):
        start, stop = tl.load(chunks + M + c), tl.load(chunks + 2 * M + c)
        tiles = tl.cdiv(P, BP)
        n = tl.program_id(2) // tiles * BN + tl.arange(0, BN)
        p = tl.program_id(2) % tiles * BP + tl.arange(0, BP)
        g = h // (H // G)
        a_h = a + h.to(tl.int64) * I
        last = tl.load(a_h + stop - 1)
        sum_ = tl.zeros((BN, BP), tl.float32)
        for j0 in range(start, stop, BJ):
            j = j0 + tl.arange(0, BJ)
            real = j < stop
            lag = tl.where(real, last - tl.load(a_h + j, real, 0.0), 0.0).to(tl.float32)
            w = tl.exp(tl.maximum(lag, MIN_LOG_DECAY)) * tl.load(dt + j * H + h, real, 0.0)
            row = xBC + j.to(tl.int64) * stride
            B_JN = tl.load(row[:, None] + H * P + g * N + n[None, :], real[:, None] & (n < N)[None, :], 0.0)
            x_JP = tl.load(row[:, None] + h * P + p[None, :], real[:, None] & (p < P)[None, :], 0.0)
            sum_ += dot(tl.trans(B_JN), x_JP.to(tl.float32) * w[:, None], HALF)
        at = out + ((c * H + h).to(tl.int64) * N + n[:, None]) * P + p[None, :]
        tl.store(at, sum_, (n < N)[:, None] & (p < P)[None, :])


@counted
def _carry(
    states, before, a, S, chunks, rows, M, I, B, H, NP, FROM_S: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """before (chunks, H, N · P): the state that each chunk begins with."""
    others_done(EARLY)
    r, h = tl.program_id(0), tl.program_id(1)
    slot = tl.load(rows + SLOT * B + r).to(tl.int64)
    if slot >= 0:
        i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        real = i < NP
        first, whole = tl.load(rows + FIRST * B + r), tl.load(rows + WHOLE * B + r)
        at_S = S + (slot * H + h) * NP + i
        begun = tl.load(rows + BASE * B + r) > 0  # else the state is zero, whatever the slot holds
        now = tl.load(at_S, real & (begun | FROM_S), 0.0).to(tl.float32)
        for c in range(first, first + whole):
            at = (c * H + h).to(tl.int64) * NP + i
            added = tl.load(states + at, real, 0.0)
            stop = tl.load(chunks + 2 * M + c)
            tl.store(before + at, now.to(before.dtype.element_ty), real)
            now = now * tl.exp(tl.load(a + h.to(tl.int64) * I + stop - 1).to(tl.float32)) + added
        at = ((first + whole) * H + h).to(tl.int64) * NP + i
        tl.store(before + at, now.to(before.dtype.element_ty), real)
        tl.store(at_S, now.to(S.dtype.element_ty), real & (whole > 0))


@counted
def _outputs(
    xBC, dt, a, scores, before, D, chunks, rows, y, stride, stride_y, M, I, B, H, P, N, G,
    CH: tl.constexpr, BI: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, HALF: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Decays to inputs before a tile's first are a factor of the tile's row and one of the input."""
    others_done(EARLY)
    tiles: tl.constexpr = CH // BI
    c, row = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BI
    r = tl.load(chunks + c)
    if r >= 0:
        start, stop = tl.load(chunks + M + c), tl.load(chunks + 2 * M + c)
        old = tl.load(rows + INPUT * B + r) + tl.load(rows + START * B + r) - tl.load(rows + BASE * B + r)
        if (start + row < stop) & (start + row + BI > old):  # not all of them pending
            h, p = tl.program_id(1), tl.program_id(2) * BP + tl.arange(0, BP)
            g = h // (H // G)
            q = row + tl.arange(0, BI)
            i = start + q
            real, inside = i < stop, (p < P)[None, :]
            a_h = a + h.to(tl.int64) * I
            a_I = tl.load(a_h + i, real, 0.0)
            first = tl.load(a_h + start + row)
            since_I = tl.where(real, (a_I - first).to(tl.float32), 0.0)  # from the tile's first input on
            since_start = tl.exp(tl.maximum(first.to(tl.float32), MIN_LOG_DECAY))
            sum_ = tl.zeros((BI, BP), tl.float32)
            for n0 in range(0, N, BN):
                n = n0 + tl.arange(0, BN)
                C_IN = tl.load(
                    xBC + i[:, None].to(tl.int64) * stride + H * P + (G + g) * N + n[None, :],
                    real[:, None] & (n < N)[None, :], 0.0,
                )  # fmt: skip
                S_NP = tl.load(
                    before + ((c * H + h).to(tl.int64) * N + n[:, None]) * P + p[None, :],
                    (n < N)[:, None] & inside, 0.0,
                )  # fmt: skip
                sum_ += dot(C_IN, S_NP, HALF)
            sum_ = sum_ * since_start
            w_row = scores + ((c * G + g).to(tl.int64) * CH + q[:, None]) * CH
            for s0 in range(0, row, BQ):
                s = s0 + tl.arange(0, BQ)
                j = start + s
                lag = (first - tl.load(a_h + j)).to(tl.float32)
                w_J = tl.exp(tl.maximum(lag, MIN_LOG_DECAY)) * tl.load(dt + j * H + h)
                w = tl.load(w_row + s[None, :]).to(tl.float32) * w_J[None, :]
                x_JP = tl.load(xBC + j[:, None].to(tl.int64) * stride + h * P + p[None, :], inside, 0.0)
                sum_ += dot(w, x_JP, HALF)
            sum_ = sum_ * tl.exp(tl.maximum(since_I, MIN_LOG_DECAY))[:, None]
            for s0 in range(row, row + BI, BQ):
                s = s0 + tl.arange(0, BQ)
                j = start + s
                known = j < stop
                since_J = tl.where(known, (tl.load(a_h + j, known, 0.0) - first).to(tl.float32), 0.0)
                seen = (s[None, :] <= q[:, None]) & known[None, :] & real[:, None]
                w = tl.load(w_row + s[None, :], seen, 0.0).to(tl.float32)
                w = w * tl.exp(tl.maximum(tl.where(seen, since_I[:, None] - since_J[None, :], 0.0), MIN_LOG_DECAY))
                w = tl.where(seen, w * tl.load(dt + j * H + h, known, 0.0)[None, :], 0.0)
                x_JP = tl.load(
                    xBC + j[:, None].to(tl.int64) * stride + h * P + p[None, :], known[:, None] & inside, 0.0
                )  # fmt: skip
                sum_ += dot(w, x_JP, HALF)
            x_IP = tl.load(xBC + i[:, None].to(tl.int64) * stride + h * P + p[None, :], real[:, None] & inside, 0.0)
            sum_ += tl.load(D + h) * x_IP.to(tl.float32)
            token = (tl.load(rows + TOKEN * B + r) + i - old).to(tl.int64)
            at = y + token[:, None] * stride_y + h * P + p[None, :]
            tl.store(at, sum_.to(y.dtype.element_ty), (real & (i >= old))[:, None] & inside)


@counted
def _keep(
    xBC, out, dt, x_ring, B_ring, dt_ring, columns, rows, stride_xBC, B, H, P, N, G, R, size, C,
    K: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    others_done(EARLY)
    r = tl.program_id(0)
    slot = tl.load(rows + SLOT * B + r).to(tl.int64)
    if slot >= 0:
        start, base = tl.load(rows + START * B + r), tl.load(rows + BASE * B + r)
        next_, end = tl.load(rows + NEXT * B + r), tl.load(rows + END * B + r)
        position = tl.maximum(next_ - (K - 1), start) + tl.program_id(1) * BK + tl.arange(0, BK)
        i = (tl.load(rows + INPUT * B + r) + position - base).to(tl.int64)[:, None]
        token = (tl.load(rows + TOKEN * B + r) + position - start).to(tl.int64)[:, None]
        new, pending = (position < end)[:, None], ((position < end) & (position >= next_))[:, None]
        in_ring = (position % R)[:, None]
        if tl.program_id(2) == tl.num_programs(2) - 1:
            h = tl.arange(0, BH)[None, :]
            tl.store(
                dt_ring + (slot * R + in_ring) * H + h, tl.load(dt + i * H + h, pending & (h < H), 0.0),
                pending & (h < H),
            )  # fmt: skip
        else:
            c = tl.program_id(2) * BC + tl.arange(0, BC)[None, :]
            raw = tl.load(xBC + token * stride_xBC + c, new & (c < C), 0.0)
            tl.store(
                columns + (slot * size + (position % size)[:, None]) * C + c, raw.to(columns.dtype.element_ty),
                new & (c < C),
            )  # fmt: skip
            I_ = H * P
            value = tl.load(out + i * C + c, pending & (c < C), 0.0)
            b = tl.maximum(c - I_, 0)
            tl.store(x_ring + ((slot * H + c // P) * R + in_ring) * P + c % P, value, pending & (c < I_))
            tl.store(
                B_ring + ((slot * G + b // N) * R + in_ring) * N + b % N, value, pending & (c >= I_) & (b < G * N)
            )  # fmt: skip


def scan(
    xBC_IC: Tensor, dt_IH: Tensor, A_H: Tensor, D_H: Tensor, S: Tensor, plan: RaggedPlan, groups: int,
    *, from_S: bool = False,
) -> Tensor:  # fmt: skip
    """y + D x (T, H · P) float32 of a plan's tokens, from all its inputs after convolution, softplus and clamp.

    S (slots, H, N, P): committed states; those of the plan's rows are moved on to their next base.  from_S: S counts
    also where a row's base is 0.
    """
    _, H, N, P = S.shape
    c, G, device = plan.capacity, groups, S.device
    half = xBC_IC.dtype == torch.bfloat16 and not interpreted
    width = {n: max(16, triton.next_power_of_2(n)) for n in (N, P)}
    a_HI = torch.empty(H, c.inputs, dtype=torch.float64, device=device)
    scores = torch.empty(c.chunks, G, CHUNK, CHUNK, dtype=xBC_IC.dtype, device=device)
    states = torch.empty(c.chunks, H, N, P, device=device)
    before = torch.empty(c.chunks, H, N, P, dtype=xBC_IC.dtype, device=device)
    y_TI = output(c.tokens, H * P, device=device)
    stride, tables, same = xBC_IC.stride(0), (plan.chunks, plan.rows), dict(HALF=half, **early())
    _scores[(c.chunks, H + G * (CHUNK // 64) ** 2)](
        xBC_IC, dt_IH, A_H, plan.chunks, scores, a_HI, stride, c.chunks, c.inputs, H, P, N, G,
        CH=CHUNK, BI=64, BN=min(64, width[N]), **same,
    )  # fmt: skip
    BN, BP, BJ, warps, stages = STATES_TILE if half else EXACT_STATES_TILE
    BN, BP = min(BN, width[N]), min(BP, width[P])
    _states[(c.chunks, H, triton.cdiv(N, BN) * triton.cdiv(P, BP))](
        xBC_IC, dt_IH, a_HI, *tables, states, stride, c.chunks, c.inputs, c.rows, H, P, N, G,
        BJ=BJ, BN=BN, BP=BP, num_warps=warps, num_stages=stages, **same,
    )  # fmt: skip
    _carry[(c.rows, H, triton.cdiv(N * P, 1024))](
        states, before, a_HI, S, *tables, c.chunks, c.inputs, c.rows, H, N * P, FROM_S=from_S, BLOCK=1024, **early()
    )
    BI, BQ, BP, BN, warps, stages = OUTPUTS_TILE if half else EXACT_OUTPUTS_TILE
    BP, BN = min(BP, width[P]), min(BN, width[N])
    _outputs[(c.chunks * (CHUNK // BI), H, triton.cdiv(P, BP))](
        xBC_IC, dt_IH, a_HI, scores, before, D_H, *tables, y_TI, stride, y_TI.stride(0), c.chunks, c.inputs, c.rows, H,
        P, N, G, CH=CHUNK, BI=BI, BQ=BQ, BN=BN, BP=BP, num_warps=warps, num_stages=stages, **same,
    )  # fmt: skip
    return y_TI


def ssd(
    xBC_LC: Tensor, dt_LH: Tensor, A_H: Tensor, D_H: Tensor, S_HNP: Tensor, *, groups: int, skip: int, commit: int
) -> Tensor:
    """`scan` of one sequence whose first input is at position 0; S becomes the state after `commit` inputs."""
    L = len(xBC_LC)
    plan = RaggedPlan.exact([Piece(0, skip, L, 0, commit)], xBC_LC.device)
    return scan(xBC_LC, dt_LH, A_H, D_H, S_HNP.unsqueeze(0), plan, groups, from_S=True)


def mamba2_prefill(
    xBC_TC: Tensor,
    dt_TH: Tensor,
    dt_bias_H: Tensor,
    A_H: Tensor,
    D_H: Tensor,
    memory: Any,
    plan: RaggedPlan,
    *,
    dt_limit: tuple[float, float],
    conv: tuple[Tensor, Tensor | None],
) -> Tensor:
    """y + D x (T, H · P) float32 of a plan's new tokens; rings and states of its slots move on.

    memory: `mixers.recurrent.RecurrentSlots` · xBC and dt raw, as the projection made them; their rows may lie apart.
    """
    weight_KC, bias_C = conv
    columns, x, dt, B, S = (memory[name] for name in ("conv_state", "x", "dt", "B", "ssm_state"))
    _, H, N, P = S.shape
    G, R = B.shape[1:3]
    K, C = weight_KC.shape
    size, c, device = columns.shape[1], plan.capacity, xBC_TC.device
    xBC_IC = torch.empty(c.inputs, C, dtype=x.dtype, device=device)
    dt_IH = torch.empty(c.inputs, H, device=device)
    BC, BH, BI, BK = 128, triton.next_power_of_2(H), 32, 16
    rings = x, B, dt, columns
    _gather[(triton.cdiv(c.inputs, BI), triton.cdiv(C, BC) + 1)](
        xBC_TC, dt_TH, dt_bias_H, *rings, weight_KC, weight_KC if bias_C is None else bias_C, plan.row_I, plan.rows,
        xBC_IC, dt_IH, xBC_TC.stride(0), dt_TH.stride(0), *dt_limit, c.inputs, c.rows, H, P, N, G, R, size, C,
        K=K, BIAS=bias_C is not None, BI=BI, BC=BC, BH=BH, **early(),
    )  # fmt: skip
    y_TI = scan(xBC_IC, dt_IH, A_H, D_H, S, plan, G)
    kept = memory.chunk + K - 1
    _keep[(c.rows, triton.cdiv(kept, BK), triton.cdiv(C, BC) + 1)](
        xBC_TC, xBC_IC, dt_IH, *rings, plan.rows, xBC_TC.stride(0), c.rows, H, P, N, G, R, size, C,
        K=K, BK=BK, BC=BC, BH=BH, **early(),
    )  # fmt: skip
    return y_TI
