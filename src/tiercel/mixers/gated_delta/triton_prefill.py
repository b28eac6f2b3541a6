"""Convolution and gated delta rule of new tokens of several sequences in one forward: prompts, and more of them.

    _gather    inputs q | k | v after convolution and silu, g and β: k and g of pending ones from the rings
    _solve     of TILE inputs and a head: (1 + A)⁻¹, and what u is for any state S that the tile
               begins with: u = W − Y S
    _carry     tile after tile: u, and the states that tiles begin with; u of what stays pending into its ring
    _outputs   o of the new tokens
    _keep      k and g from the next base on, and raw columns, into the rings

A chunk of the plan is read in tiles of TILE inputs.  u of a pending input is known: its row of A is zero.  Keys lie as
the convolution leaves them and are normalised where they are used.  Where tensors are bfloat16 so are the factors of
products, but for the solution, in TF32; sums are float32.  A sequence's numbers are the same bits in any company.
Tables: `model/ragged.py`; formulas and letters: `chunked.py`; I inputs, c a chunk, r a row, n 1 / |k|.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiercel.mixers.gated_delta.triton_step import L2_EPS, key_head
from tiercel.mixers.mamba2.triton_prefill import BASE, END, FIRST, INPUT, NEXT, SLOT, START, TOKEN, WHOLE, counted, dot
from tiercel.mixers.mamba2.triton_step import MIN_LOG_DECAY, softplus
from tiercel.model.ragged import CHUNK, RaggedPlan
from tiercel.ops.triton import interpreted
from tiercel.ops.triton.launch import early, others_done, output

# with four or more the products become wgmma, and Triton 3.6 gives wrong sums or reads outside for some of these tiles
WARPS = {False: 2, True: 8}
TILE = 64  # inputs whose system is solved at once


@counted
def _gather(
    qkv, b_in, dt_in, dt_bias, A, k_ring, g_ring, columns, weight, row_I, rows, out, g_out, beta_out,
    stride_qkv, stride_b, stride_dt, beta_max, I, B, H, G, K, V, R, size, C,
    TAPS: tl.constexpr, BI: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    others_done(EARLY)
    i = (tl.program_id(0) * BI + tl.arange(0, BI))[:, None]
    r = tl.load(row_I + i, i < I, -1)
    live = r >= 0
    slot = tl.load(rows + SLOT * B + r, live, 0).to(tl.int64)
    start, base = tl.load(rows + START * B + r, live, 0), tl.load(rows + BASE * B + r, live, 0)
    position = base + i - tl.load(rows + INPUT * B + r, live, 0)
    token = (tl.load(rows + TOKEN * B + r, live, 0) + position - start).to(tl.int64)
    new, pending = live & (position >= start), live & (position < start)
    if tl.program_id(1) == tl.num_programs(1) - 1:
        h = tl.arange(0, BH)[None, :]
        ours, place = h < H, i.to(tl.int64) * H + h
        raw = tl.load(dt_in + token * stride_dt + h, new & ours, 0.0).to(tl.float32)
        g = tl.load(A + h, ours, 0.0) * softplus(raw + tl.load(dt_bias + h, ours, 0.0))
        kept = tl.load(g_ring + (slot * R + position % R) * H + h, pending & ours, 0.0)
        tl.store(g_out + place, tl.where(new, g, kept), live & ours)
        beta = beta_max * tl.sigmoid(tl.load(b_in + token * stride_b + h, new & ours, 0.0).to(tl.float32))
        tl.store(beta_out + place, beta, live & ours)
    else:
        c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
        real = c < C
        ring = columns + slot * size * C + c
        sum_ = tl.zeros((BI, BC), tl.float32)
        for tap in tl.static_range(TAPS):
            before = position - (TAPS - 1 - tap)
            at = qkv + (token - (TAPS - 1 - tap)) * stride_qkv + c
            fresh = tl.load(at, new & (before >= start) & real, 0.0).to(columns.dtype.element_ty)
            held = new & (before < start) & (before >= 0)
            old = tl.load(ring + (tl.maximum(before, 0) % size) * C, held & real, 0.0)
            w = tl.load(weight + tap * C + c, real, 0.0).to(tl.float32)
            sum_ += w * tl.where(before >= start, fresh, old).to(tl.float32)
        y = (sum_ * tl.sigmoid(sum_)).to(out.dtype.element_ty)
        key = tl.maximum(c - G * K, 0)
        of_k = (c >= G * K) & (c < 2 * G * K)
        at_k = k_ring + ((slot * G + key // K) * R + position % R) * K + key % K
        old_k = tl.load(at_k, pending & of_k, 0.0)
        tl.store(out + i.to(tl.int64) * C + c, tl.where(new, y, old_k), live & real)


@triton.jit
def _bounds(chunks, rows, M, B, CH: tl.constexpr, TILE: tl.constexpr):
    """A tile's row (−1: none), first input and the one after its last, and the first input that is not pending."""
    tiles: tl.constexpr = CH // TILE
    c = tl.program_id(0) // tiles
    r = tl.load(chunks + c)
    row = tl.maximum(r, 0)
    start = tl.load(chunks + M + c) + tl.program_id(0) % tiles * TILE
    stop = tl.minimum(tl.load(chunks + 2 * M + c), start + TILE)
    first_new = tl.load(rows + INPUT * B + row) + tl.load(rows + START * B + row) - tl.load(rows + BASE * B + row)
    return tl.where(start < stop, r, -1), start, stop, first_new


@triton.jit
def _lags(a_I, seen, EXACT: tl.constexpr):
    """a_i − a_j where seen, float32; its sums are float64, as differences of long ones are taken."""
    if EXACT:
        return tl.where(seen, a_I[:, None] - a_I[None, :], 0.0).to(tl.float32)
    else:
        a = a_I.to(tl.float32)
        return tl.where(seen, a[:, None] - a[None, :], 0.0)


@triton.jit
def _wide(a, b, EXACT: tl.constexpr):
    if EXACT:
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="tf32")


@triton.jit
def _inverse(A, TILE: tl.constexpr, EXACT: tl.constexpr):
    """(1 + A)⁻¹ of a strictly lower triangular A: blocks of sixteen on the diagonal row by row; then, with these as T
    and the rest of A as B, N = T B has no fourth power, and (1 + N)⁻¹ T = (1 − N)(1 + N²) T."""
    n: tl.constexpr = TILE // 16
    b, p = tl.arange(0, n), tl.arange(0, 16)
    same = b[:, None, None, None] == b[None, None, :, None]
    blocks = tl.sum(tl.where(same, tl.reshape(A, (n, 16, n, 16)), 0.0), 2)
    T = tl.where(p[None, :, None] == p[None, None, :], 1.0, 0.0) + tl.zeros((n, 16, 16), tl.float32)
    for row in range(1, 16):
        here = (p == row)[None, :, None]
        A_BJ = tl.sum(tl.where(here, blocks, 0.0), 1)
        T = tl.where(here, T - tl.sum(A_BJ[:, :, None] * T, 1)[:, None, :], T)
    T = tl.reshape(tl.where(same, T[:, :, None, :], 0.0), (TILE, TILE))
    q = tl.arange(0, TILE) // 16
    N = _wide(T, tl.where(q[:, None] == q[None, :], 0.0, A), EXACT)
    T += _wide(_wide(N, N, EXACT), T, EXACT)
    return T - _wide(N, T, EXACT)


@counted
def _solve(
    qkv, g, beta, u_ring, chunks, rows, a, norm, W, Y, stride, M, I, B, H, G, K, V, R,
    TILED: tl.constexpr,
    CH: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """a (H, I) float64: Σ g since the tile's start · norm (H, I): n · W (I, H, V), Y (I, H, K)."""
    others_done(EARLY)
    r, start, stop, first_new = _bounds(chunks, rows, M, B, CH, TILE)
    if r >= 0:
        h = tl.program_id(1)
        q, b = tl.arange(0, TILE), tl.arange(0, BK)
        i = start + q
        real, new = i < stop, (i < stop) & (i >= first_new)
        key = (G + key_head(h, H, G, TILED)) * K
        x = qkv + i[:, None].to(tl.int64) * stride
        kk = tl.zeros((TILE, TILE), tl.float32)
        for k0 in range(0, K, BK):
            k = k0 + b
            k_IK = tl.load(x + key + k[None, :], real[:, None] & (k < K)[None, :], 0.0)
            kk += dot(k_IK, tl.trans(k_IK), not EXACT)
        n_I = tl.rsqrt(tl.sum(tl.where(q[:, None] == q[None, :], kk, 0.0), 1) + L2_EPS)
        a_I = tl.cumsum(tl.load(g + i.to(tl.int64) * H + h, real, 0.0).to(tl.float64), 0)
        tl.store(a + h.to(tl.int64) * I + i, a_I, real)
        tl.store(norm + h.to(tl.int64) * I + i, n_I, real)
        beta_I = tl.load(beta + i.to(tl.int64) * H + h, new, 0.0)
        below = (q[:, None] > q[None, :]) & new[:, None] & real[None, :]
        lag = _lags(a_I, below, EXACT)
        A = tl.where(below, kk * (beta_I * n_I)[:, None] * n_I[None, :] * tl.exp(tl.maximum(lag, MIN_LOG_DECAY)), 0.0)
        T = _inverse(A, TILE, EXACT)
        slot = tl.load(rows + SLOT * B + r).to(tl.int64)
        position = tl.load(rows + BASE * B + r) + i - tl.load(rows + INPUT * B + r)
        for v0 in range(0, V, BK):
            v = v0 + b
            v_IV = tl.load(x + 2 * G * K + h * V + v[None, :], new[:, None] & (v < V)[None, :], 0.0).to(tl.float32)
            held = (real & (i < first_new))[:, None] & (v < V)[None, :]
            u_IV = tl.load(u_ring + ((slot * H + h) * R + position % R)[:, None] * V + v[None, :], held, 0.0)
            right = v_IV * beta_I[:, None] + u_IV
            W_IV = tl.where(held, u_IV, _wide(T, right, EXACT))
            tl.store(W + (i[:, None].to(tl.int64) * H + h) * V + v[None, :], W_IV, real[:, None] & (v < V)[None, :])
        w_I = tl.where(new, beta_I * n_I * tl.exp(tl.maximum(a_I.to(tl.float32), MIN_LOG_DECAY)), 0.0)
        for k0 in range(0, K, BK):
            k = k0 + b
            inside = real[:, None] & (k < K)[None, :]
            right = tl.load(x + key + k[None, :], inside, 0.0).to(tl.float32) * w_I[:, None]
            Y_IK = _wide(T, right, EXACT)
            tl.store(Y + (i[:, None].to(tl.int64) * H + h) * K + k[None, :], Y_IK.to(Y.dtype.element_ty), inside)


@counted
def _carry(
    qkv, a, norm, W, Y, S, u_ring, chunks, rows, u_out, before, stride, M, I, B, H, G, K, V, R,
    TILED: tl.constexpr,
    CH: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
    EXACT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """before (tiles, H, K, V): the state that each tile begins with · u_out (I, H, V).  S and u are transposed here."""
    others_done(EARLY)
    r, h = tl.program_id(2), tl.program_id(1)
    slot = tl.load(rows + SLOT * B + r).to(tl.int64)
    if slot >= 0:
        v, k = (tl.program_id(0) * BV + tl.arange(0, BV))[:, None], tl.arange(0, BK)[None, :]
        q = tl.arange(0, TILE)
        first, whole = tl.load(rows + FIRST * B + r), tl.load(rows + WHOLE * B + r)
        first_input, base = tl.load(rows + INPUT * B + r), tl.load(rows + BASE * B + r)
        at_S = S + ((slot * H + h) * K + k) * V + v
        there = (k < K) & (v < V)
        S_VK = tl.load(at_S, there & (base > 0), 0.0)  # at 0 the state is zero, whatever the slot holds
        key = (G + key_head(h, H, G, TILED)) * K
        tiles: tl.constexpr = CH // TILE
        a_h, norm_h = a + h.to(tl.int64) * I, norm + h.to(tl.int64) * I
        for number in tl.range(first * tiles, (first + whole + 1) * tiles, num_stages=STAGES):
            c = number // tiles
            start = tl.load(chunks + M + c) + number % tiles * TILE
            end = tl.minimum(tl.load(chunks + 2 * M + c), start + TILE)  # not after start: nothing is left of the chunk
            stays = c == first + whole
            i = start + q
            real, token = i < end, i.to(tl.int64)
            ik, vi = real[:, None] & (k < K), (v < V) & real[None, :]
            Y_IK = tl.load(Y + (token[:, None] * H + h) * K + k, ik, 0.0)
            k_IK = tl.load(qkv + token[:, None] * stride + key + k, ik, 0.0)
            at_VI = (token[None, :] * H + h) * V + v
            W_VI = tl.load(W + at_VI, vi, 0.0)
            last = tl.load(a_h + end - 1, (start < end) & (end > 0), 0.0)
            a_I, n_I = tl.load(a_h + i, real, 0.0), tl.load(norm_h + i, real, 0.0)
            at = before + ((number * H + h.to(tl.int64)) * K + k) * V + v
            tl.store(at, S_VK.to(before.dtype.element_ty), there & (start < end))
            u_VI = W_VI - dot(S_VK, tl.trans(Y_IK), not EXACT)
            tl.store(u_out + at_VI, u_VI.to(u_out.dtype.element_ty), vi)
            position = base + i - first_input
            tl.store(u_ring + ((slot * H + h) * R + position % R)[None, :] * V + v, u_VI, vi & stays)
            lag = tl.where(real, last - a_I, 0.0).to(tl.float32)
            w_I = tl.where(stays, 0.0, tl.exp(tl.maximum(lag, MIN_LOG_DECAY)) * n_I)
            S_VK = S_VK * tl.where(stays, 1.0, tl.exp(tl.maximum(last.to(tl.float32), MIN_LOG_DECAY)))
            S_VK += dot(u_VI * w_I[None, :], k_IK, not EXACT)
        tl.store(at_S, S_VK, there & (whole > 0))


@counted
def _outputs(
    qkv, a, norm, u, before, chunks, rows, o, stride, stride_o, scale, M, I, B, H, G, K, V,
    TILED: tl.constexpr,
    CH: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, EXACT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    others_done(EARLY)
    r, start, stop, first_new = _bounds(chunks, rows, M, B, CH, TILE)
    if (r >= 0) & (stop > first_new):
        h, v = tl.program_id(1), tl.program_id(2) * BV + tl.arange(0, BV)
        t, b = tl.arange(0, TILE), tl.arange(0, BK)
        i = start + t
        real, inside = i < stop, (v < V)[None, :]
        g = key_head(h, H, G, TILED)
        x = qkv + i[:, None].to(tl.int64) * stride
        state = before + (tl.program_id(0).to(tl.int64) * H + h) * K * V
        qk, squares = tl.zeros((TILE, TILE), tl.float32), tl.zeros((TILE,), tl.float32)
        sum_ = tl.zeros((TILE, BV), tl.float32)
        for k0 in range(0, K, BK):
            k = k0 + b
            ik = real[:, None] & (k < K)[None, :]
            q_IK = tl.load(x + g * K + k[None, :], ik, 0.0)
            k_IK = tl.load(x + (G + g) * K + k[None, :], ik, 0.0)
            S_KV = tl.load(state + k[:, None] * V + v[None, :], (k < K)[:, None] & inside, 0.0)
            squares += tl.sum(q_IK.to(tl.float32) * q_IK.to(tl.float32), 1)
            qk += dot(q_IK, tl.trans(k_IK), not EXACT)
            sum_ += dot(q_IK, S_KV, not EXACT)
        a_I = tl.load(a + h.to(tl.int64) * I + i, real, 0.0)
        n_I = tl.load(norm + h.to(tl.int64) * I + i, real, 0.0)
        sum_ = sum_ * tl.exp(tl.maximum(a_I.to(tl.float32), MIN_LOG_DECAY))[:, None]
        seen = (t[:, None] >= t[None, :]) & real[:, None] & real[None, :]
        lag = _lags(a_I, seen, EXACT)
        w = tl.where(seen, qk * n_I[None, :] * tl.exp(tl.maximum(lag, MIN_LOG_DECAY)), 0.0)
        u_IV = tl.load(u + (i[:, None].to(tl.int64) * H + h) * V + v[None, :], real[:, None] & inside, 0.0)
        sum_ += dot(w, u_IV, not EXACT)
        sum_ = sum_ * (tl.rsqrt(squares + L2_EPS) * scale)[:, None]
        token = (tl.load(rows + TOKEN * B + r) + i - first_new).to(tl.int64)
        at = o + token[:, None] * stride_o + h * V + v[None, :]
        tl.store(at, sum_, (real & (i >= first_new))[:, None] & inside)


@counted
def _keep(
    qkv, out, g, k_ring, g_ring, columns, rows, stride_qkv, B, H, G, K, R, size, C,
    TAPS: tl.constexpr, BI: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    others_done(EARLY)
    r = tl.program_id(0)
    slot = tl.load(rows + SLOT * B + r).to(tl.int64)
    if slot >= 0:
        start, base = tl.load(rows + START * B + r), tl.load(rows + BASE * B + r)
        next_, end = tl.load(rows + NEXT * B + r), tl.load(rows + END * B + r)
        # raw columns are new ones; pending inputs may be old ones too, which are in the rings already
        position = tl.maximum(next_ - (TAPS - 1), start) + tl.program_id(1) * BI + tl.arange(0, BI)
        i = (tl.load(rows + INPUT * B + r) + position - base).to(tl.int64)[:, None]
        token = (tl.load(rows + TOKEN * B + r) + position - start).to(tl.int64)[:, None]
        new, pending = (position < end)[:, None], ((position < end) & (position >= next_))[:, None]
        in_ring = (position % R)[:, None]
        if tl.program_id(2) == tl.num_programs(2) - 1:
            h = tl.arange(0, BH)[None, :]
            both = pending & (h < H)
            tl.store(g_ring + (slot * R + in_ring) * H + h, tl.load(g + i * H + h, both, 0.0), both)
        else:
            c = tl.program_id(2) * BC + tl.arange(0, BC)[None, :]
            raw = tl.load(qkv + token * stride_qkv + c, new & (c < C), 0.0)
            at = columns + (slot * size + (position % size)[:, None]) * C + c
            tl.store(at, raw.to(columns.dtype.element_ty), new & (c < C))
            key = tl.maximum(c - G * K, 0)
            of_k = pending & (c >= G * K) & (c < 2 * G * K)
            at_k = k_ring + ((slot * G + key // K) * R + in_ring) * K + key % K
            tl.store(at_k, tl.load(out + i * C + c, of_k, 0.0), of_k)


def rule(
    qkv_IC: Tensor, g_IH: Tensor, beta_IH: Tensor, u_ring: Tensor, S: Tensor, plan: RaggedPlan, groups: int,
    *, tiled: bool = False,
) -> Tensor:  # fmt: skip
    """o (T, H · V) float32 of a plan's tokens, from all its inputs after convolution and activations.

    S (slots, H, K, V): committed states; those of the plan's rows are moved on to their next base.
    u_ring (slots, H, R, V): u of pending inputs, and afterwards of those that stay pending.
    """
    _, H, K, V = S.shape
    c, G, R, device = plan.capacity, groups, u_ring.shape[2], S.device
    exact = qkv_IC.dtype != torch.bfloat16 or interpreted
    tiles = c.chunks * (CHUNK // TILE)
    a_HI = torch.empty(H, c.inputs, dtype=torch.float64, device=device)
    norm_HI, W_IHV = torch.empty(H, c.inputs, device=device), torch.empty(c.inputs, H, V, device=device)
    Y_IHK = torch.empty(c.inputs, H, K, dtype=qkv_IC.dtype, device=device)
    u_IHV = torch.empty(c.inputs, H, V, dtype=qkv_IC.dtype, device=device)
    before = torch.empty(tiles, H, K, V, dtype=qkv_IC.dtype, device=device)
    o_TI = output(c.tokens, H * V, device=device)
    BK, BV, whole = (max(16, triton.next_power_of_2(n)) for n in (K, V, K))
    stride, tables, sizes = qkv_IC.stride(0), (plan.chunks, plan.rows), (c.chunks, c.inputs, c.rows, H, G, K, V)
    same = dict(TILED=tiled, CH=CHUNK, TILE=TILE, EXACT=exact, **early())
    _solve[(tiles, H)](
        qkv_IC, g_IH, beta_IH, u_ring, *tables, a_HI, norm_HI, W_IHV, Y_IHK, stride, *sizes, R,
        BK=min(32, BK), num_warps=WARPS[exact], **same,
    )  # fmt: skip
    BV = min(32, BV)  # rows of a product: of fewer than 64 there is no wgmma
    _carry[(triton.cdiv(V, BV), H, c.rows)](
        qkv_IC, a_HI, norm_HI, W_IHV, Y_IHK, S, u_ring, *tables, u_IHV, before, stride, *sizes, R,
        BK=whole, BV=BV, STAGES=2, num_warps=4, **same,
    )  # fmt: skip
    _outputs[(tiles, H, triton.cdiv(V, BV))](
        qkv_IC, a_HI, norm_HI, u_IHV, before, *tables, o_TI, stride, o_TI.stride(0), K**-0.5, *sizes,
        BK=min(64, BK), BV=BV, num_warps=WARPS[exact], **same,
    )  # fmt: skip
    return o_TI


def gated_delta_prefill(
    qkv_TC: Tensor,
    b_TH: Tensor,
    dt_TH: Tensor,
    weight_JC: Tensor,
    dt_bias_H: Tensor,
    A_H: Tensor,
    memory: Any,
    plan: RaggedPlan,
    *,
    beta_max: float,
    tiled: bool = False,
) -> Tensor:
    """o (T, H · V) float32 of a plan's new tokens; rings and states of its slots move on.

    memory: `mixers.recurrent.RecurrentSlots` · qkv, b and dt raw, as the projections made them; rows may lie apart.
    """
    columns, k, g, u, S = (memory[name] for name in ("conv_state", "k", "g", "u", "ssm_state"))
    _, H, K, V = S.shape
    G, R = k.shape[1:3]
    taps, C = weight_JC.shape
    size, c, device = columns.shape[1], plan.capacity, qkv_TC.device
    qkv_IC = torch.empty(c.inputs, C, dtype=k.dtype, device=device)
    g_IH, beta_IH = (torch.empty(c.inputs, H, device=device) for _ in range(2))
    BC, BH, BI = 128, max(16, triton.next_power_of_2(H)), 32
    _gather[(triton.cdiv(c.inputs, BI), triton.cdiv(C, BC) + 1)](
        qkv_TC, b_TH, dt_TH, dt_bias_H, A_H, k, g, columns, weight_JC, plan.row_I, plan.rows, qkv_IC, g_IH, beta_IH,
        qkv_TC.stride(0), b_TH.stride(0), dt_TH.stride(0), beta_max, c.inputs, c.rows, H, G, K, V, R, size, C,
        TAPS=taps, BI=BI, BC=BC, BH=BH, **early(),
    )  # fmt: skip
    o_TI = rule(qkv_IC, g_IH, beta_IH, u, S, plan, G, tiled=tiled)
    _keep[(c.rows, triton.cdiv(memory.chunk + taps - 1, 16), triton.cdiv(C, BC) + 1)](
        qkv_TC, qkv_IC, g_IH, k, g, columns, plan.rows, qkv_TC.stride(0), c.rows, H, G, K, R, size, C,
        TAPS=taps, BI=16, BC=BC, BH=BH, **early(),
    )  # fmt: skip
    return o_TI
