"""One new token of each sequence through convolution and gated delta rule, at the bytes of the committed states.

    S (slots, H, K, V) before token `base`; where that is 0 the state is zero, whatever the slot holds
    rings of R pending inputs: k (slots, G, R, K), u (slots, H, R, V) float32, g (slots, R, H) float32 · a ring of raw
    columns for the convolution; the input of position p is number p mod R

Two kernels:

    _prepare   convolution of q and k, g, β, and what every pending u weighs in Sᵀ k and in the output; where a chunk is
               full its inputs join S, the only time that S is written
    _read      u = β (v − decay Sᵀ k − Σ weight_j u_j), o = decay Sᵀ q + Σ weight'_j u_j + (q · k) u: S once

A sequence's numbers are the same bits in any batch: no tile depends on the number of rows.
Formulas and letters: `mixers/gated_delta/chunked.py`; J pending inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiercel.mixers.mamba2.triton_step import MIN_LOG_DECAY, convolved, older_columns, precision, softplus
from tiercel.ops.triton.launch import early, others_done

L2_EPS = tl.constexpr(1e-6)  # under the root of a key's or query's norm
READ_COLUMNS, READ_ROWS, READ_STAGES, READ_WARPS, PREPARE_WARPS = 64, 16, 4, 2, 2
COMMIT_ROWS, COMMIT_STATES = 2, 32  # rows that a program looks through, rows K of S that it takes at a time


@triton.jit
def key_head(h, H, G, TILED: tl.constexpr):
    """The key head that value head h reads."""
    if TILED:
        return h % G
    else:
        return h // (H // G)


@triton.jit
def _commit(
    S, k_ring, u_ring, g_ring, slot, h, base, H, G, K, V, R,
    TILED: tl.constexpr, CHUNK: tl.constexpr, BJ: tl.constexpr, CK: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The CHUNK inputs from `base` on join S of a head."""
    j, v, n = tl.arange(0, BJ), tl.arange(0, BV), tl.arange(0, BK)
    number, kept = (base + j) % R, j < CHUNK
    head, group = slot * H + h, slot * G + key_head(h, H, G, TILED)
    g_J = tl.load(g_ring + (slot * R + number) * H + h, kept, 0.0)
    last = tl.sum(g_J, 0)
    k_row = k_ring + (group * R + number) * K
    whole_JK = tl.load(k_row[:, None] + n[None, :], kept[:, None] & (n < K)[None, :], 0.0).to(tl.float32)
    norm_J = tl.rsqrt(tl.sum(whole_JK * whole_JK, 1) + L2_EPS)
    w_J = tl.exp(tl.maximum(last - tl.cumsum(g_J, 0), MIN_LOG_DECAY)) * norm_J
    u_JV = tl.load(u_ring + (head * R + number)[:, None] * V + v[None, :], kept[:, None] & (v < V)[None, :], 0.0)
    for k0 in range(0, K, CK):
        k = k0 + tl.arange(0, CK)
        k_KJ = tl.load(k_row[None, :] + k[:, None], kept[None, :] & (k < K)[:, None], 0.0).to(tl.float32)
        at = S + (head * K + k)[:, None] * V + v[None, :]
        there = (k < K)[:, None] & (v < V)[None, :]
        S_KV = tl.load(at, there & (base > 0), 0.0) * tl.exp(last)
        S_KV += tl.dot(k_KJ * w_J[None, :], u_JV, input_precision=PRECISION)
        tl.store(at, S_KV, there)


@triton.jit
def _prepare(
    qkv, b_in, dt_in, dt_bias, A, S, k_ring, u_ring, g_ring, columns, weight, slot_T, length_S, base_S,
    k_out, q_out, weight_k, weight_q, decay_out, beta_out, score_out,
    stride_qkv, stride_b, stride_dt, beta_max, scale, T, H, G, K, V, R, size,
    TILED: tl.constexpr, TAPS: tl.constexpr, CHUNK: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr,
    BK: tl.constexpr, CK: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program has a key head of a row; those after all of them commit the full chunks of a head of ROWS rows."""
    job = tl.program_id(0)
    j = tl.arange(0, BJ)
    if job < T * G:
        t, g = (job // G).to(tl.int64), job % G
        slot = tl.load(slot_T + t).to(tl.int64)
        if slot >= 0:
            length, base = tl.load(length_S + slot), tl.load(base_S + slot)
            pending = tl.where(length - base >= CHUNK, 0, length - base)
            number, known = (base + j) % R, j < pending
            n = tl.arange(0, BK)
            real = n < K
            C = 2 * G * K + H * V
            ring = columns + slot * size * C
            of_q, of_k = g * K + n, (G + g) * K + n
            k_JK = tl.load(
                k_ring + ((slot * G + g) * R + number)[:, None] * K + n[None, :], known[:, None] & real[None, :], 0.0
            ).to(tl.float32)  # fmt: skip
            heads = H // G
            r = tl.arange(0, BH)
            h = r * G + g if TILED else g * heads + r
            mine = r < heads
            g_HJ = tl.load(g_ring + (slot * R + number)[None, :] * H + h[:, None], mine[:, None] & known[None, :], 0.0)
            a_H, bias_H = tl.load(A + h, mine, 0.0), tl.load(dt_bias + h, mine, 0.0)
            older_q = older_columns(ring, weight, weight, of_q, real, length, size, C, TAPS, False)
            older_k = older_columns(ring, weight, weight, of_k, real, length, size, C, TAPS, False)
            others_done(EARLY)
            row = qkv + t * stride_qkv
            q_K, raw_q = convolved(row, ring, weight, older_q, of_q, real, C, TAPS)
            k_K, raw_k = convolved(row, ring, weight, older_k, of_k, real, C, TAPS)
            newest = ring + (length % size) * C
            tl.store(newest + of_q, raw_q, real)
            tl.store(newest + of_k, raw_k, real)
            tl.store(k_ring + ((slot * G + g) * R + length % R) * K + n, k_K.to(k_ring.dtype.element_ty), real)
            q_K = q_K * (tl.rsqrt(tl.sum(q_K * q_K, 0) + L2_EPS) * scale)
            k_K = k_K * tl.rsqrt(tl.sum(k_K * k_K, 0) + L2_EPS)
            tl.store(q_out + (t * G + g) * K + n, q_K, real)
            tl.store(k_out + (t * G + g) * K + n, k_K, real)
            tl.store(score_out + t * G + g, tl.sum(q_K * k_K, 0))
            norm_J = tl.rsqrt(tl.sum(k_JK * k_JK, 1) + L2_EPS)
            kk_J, qk_J = tl.sum(k_JK * k_K[None, :], 1) * norm_J, tl.sum(k_JK * q_K[None, :], 1) * norm_J
            raw_H = tl.load(dt_in + t * stride_dt + h, mine, 0.0).to(tl.float32) + bias_H
            g_H = a_H * softplus(raw_H)
            tl.store(g_ring + (slot * R + length % R) * H + h, g_H, mine)
            beta_H = beta_max * tl.sigmoid(tl.load(b_in + t * stride_b + h, mine, 0.0).to(tl.float32))
            last_H = tl.sum(g_HJ, 1)
            lag_HJ = last_H[:, None] - tl.cumsum(g_HJ, 1) + g_H[:, None]
            decay_HJ = tl.where(known[None, :], tl.exp(tl.maximum(lag_HJ, MIN_LOG_DECAY)), 0.0)
            at, there = (t * H + h)[:, None] * BJ + j[None, :], mine[:, None] & (j < BJ)[None, :]
            tl.store(weight_k + at, decay_HJ * kk_J[None, :], there)
            tl.store(weight_q + at, decay_HJ * qk_J[None, :], there)
            tl.store(decay_out + t * H + h, tl.exp(tl.maximum(last_H + g_H, MIN_LOG_DECAY)), mine)
            tl.store(beta_out + t * H + h, beta_H, mine)
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
                            S,
                            k_ring,
                            u_ring,
                            g_ring,
                            slot,
                            h,
                            base,
                            H,
                            G,
                            K,
                            V,
                            R,
                            TILED,
                            CHUNK,
                            BJ,
                            CK,
                            BK,
                            BV,
                            PRECISION,
                        )


@triton.jit
def _read(
    qkv, S, u_ring, columns, weight, slot_T, length_S, base_S, k_in, q_in, weight_k, weight_q, decay_in, beta_in,
    score_in, o, stride_qkv, stride_o, H, G, K, V, R, size,
    TILED: tl.constexpr, TAPS: tl.constexpr, CHUNK: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
    CK: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """S is read CK rows at a time, some of them asked for ahead; before the first commit it is zero."""
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = tl.program_id(2) * BV + tl.arange(0, BV)
    inside = v < V
    slot = tl.load(slot_T + t).to(tl.int64)
    if slot >= 0:
        length, base = tl.load(length_S + slot), tl.load(base_S + slot)
        full = length - base >= CHUNK
        pending = tl.where(full, 0, length - base)
        j, head = tl.arange(0, BJ), slot * H + h
        number = (base + j) % R
        u_JV = tl.load(
            u_ring + (head * R + number)[:, None] * V + v[None, :], (j < pending)[:, None] & inside[None, :], 0.0
        )  # fmt: skip
        C = 2 * G * K + H * V
        ring, c = columns + slot * size * C, 2 * G * K + h * V + v
        older = older_columns(ring, weight, weight, c, inside, length, size, C, TAPS, False)
        others_done(EARLY)
        group = t * G + key_head(h, H, G, TILED)
        Sk_KV, Sq_KV = tl.zeros((CK, BV), tl.float32), tl.zeros((CK, BV), tl.float32)
        rows = tl.where(full | (base > 0), K, 0)
        for k0 in tl.range(0, rows, CK, num_stages=STAGES):
            k = k0 + tl.arange(0, CK)
            S_KV = tl.load(S + (head * K + k)[:, None] * V + v[None, :], (k < K)[:, None] & inside[None, :], 0.0)
            Sk_KV += S_KV * tl.load(k_in + group * K + k, k < K, 0.0)[:, None]
            Sq_KV += S_KV * tl.load(q_in + group * K + k, k < K, 0.0)[:, None]
        v_V, raw = convolved(qkv + t * stride_qkv, ring, weight, older, c, inside, C, TAPS)
        tl.store(ring + (length % size) * C + c, raw, inside)
        wk_J, wq_J = tl.load(weight_k + (t * H + h) * BJ + j), tl.load(weight_q + (t * H + h) * BJ + j)
        decay = tl.load(decay_in + t * H + h)
        held_V = tl.sum(Sk_KV, 0) * decay + tl.sum(u_JV * wk_J[:, None], 0)
        u_V = tl.load(beta_in + t * H + h) * (v_V - held_V)
        tl.store(u_ring + (head * R + length % R) * V + v, u_V, inside)
        o_V = tl.sum(Sq_KV, 0) * decay + tl.sum(u_JV * wq_J[:, None], 0)
        tl.store(o + t * stride_o + h * V + v, o_V + tl.load(score_in + group) * u_V, inside)
    else:
        others_done(EARLY)
        tl.store(o + t * stride_o + h * V + v, tl.zeros((BV,), o.dtype.element_ty), inside)


def gated_delta_step(
    qkv_TC: Tensor,
    b_TH: Tensor,
    dt_TH: Tensor,
    weight_JC: Tensor,
    dt_bias_H: Tensor,
    A_H: Tensor,
    memory: Any,
    slot_T: Tensor,
    length_S: Tensor,
    base_S: Tensor,
    *,
    beta_max: float,
    tiled: bool = False,
) -> Tensor:
    """o (T, H · V) float32 of one new token of each sequence; its input joins the rings, and where a chunk is full S
    is rewritten (its base and all lengths are the caller's to move on).

    memory: `mixers.recurrent.RecurrentSlots`, with at most a chunk of pending inputs.
    slot_T: −1 for rows without a sequence (o = 0).
    """
    T, device = qkv_TC.shape[0], qkv_TC.device
    columns, k, g, u, S = (memory[name] for name in ("conv_state", "k", "g", "u", "ssm_state"))
    _, H, K, V = S.shape
    G, R = k.shape[1:3]
    BJ, BK = (max(16, triton.next_power_of_2(n)) for n in (memory.chunk, K))
    BV, CK = max(16, triton.next_power_of_2(V)), min(COMMIT_STATES, BK)
    k_TGK, q_TGK = (torch.empty(T, G, K, device=device) for _ in range(2))
    wk_THJ, wq_THJ = (torch.empty(T, H, BJ, device=device) for _ in range(2))
    decay_TH, beta_TH, score_TG = (torch.empty(T, n, device=device) for n in (H, H, G))
    o_TI = torch.empty(T, H * V, device=device)
    between = k_TGK, q_TGK, wk_THJ, wq_THJ, decay_TH, beta_TH, score_TG
    same = dict(TILED=tiled, TAPS=len(weight_JC), CHUNK=memory.chunk, BJ=BJ, BK=BK, **early())
    _prepare[(T * G + triton.cdiv(T, COMMIT_ROWS) * H,)](
        qkv_TC, b_TH, dt_TH, dt_bias_H, A_H, S, k, u, g, columns, weight_JC, slot_T, length_S, base_S, *between,
        qkv_TC.stride(0), b_TH.stride(0), dt_TH.stride(0), beta_max, K**-0.5, T, H, G, K, V, R, columns.shape[1],
        BH=triton.next_power_of_2(H // G), CK=CK, BV=BV, ROWS=COMMIT_ROWS, PRECISION=precision(k),
        num_warps=PREPARE_WARPS, **same,
    )  # fmt: skip
    BV = min(READ_COLUMNS, BV)
    _read[(T, H, triton.cdiv(V, BV))](
        qkv_TC, S, u, columns, weight_JC, slot_T, length_S, base_S, *between, o_TI, qkv_TC.stride(0), o_TI.stride(0),
        H, G, K, V, R, columns.shape[1], CK=min(READ_ROWS, BK), BV=BV, STAGES=READ_STAGES, num_warps=READ_WARPS, **same,
    )  # fmt: skip
    return o_TI
