"""Rotary positions and the cache of keys and values in pages; attention of one new token of each sequence.

    k, v (pages, K, PAGE, P) · table (slots, most pages of one) int32: page i has a sequence's tokens i · PAGE …

The attention of prompts is PyTorch's; formulas: `mixers/attention/sdpa.py`, `mixers/attention/rotary.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiercel.ops.triton.activation import store_rounded
from tiercel.ops.triton.launch import early, others_done
from tiercel.ops.triton.rounded import Rounded, keep_rounded

PROGRAMS = 264  # as many pieces are made of the work where there are few sequences: two for each processor of an H100


@triton.jit(do_not_specialize=["T"])
def _store_kv(
    q, k, v, cos, sin, q_out, k_pages, v_pages, table, slot_T, position_T, T,
    stride_q, stride_k, stride_v, stride_table, H, K, P, R, PAGE: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    others_done(EARLY)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = tl.program_id(1)
    p = tl.arange(0, BP)[None, :]
    slot = tl.load(slot_T + t, t < T, -1).to(tl.int64)
    position = tl.load(position_T + t, t < T, 0)
    live = (slot >= 0)[:, None] & (p < P)
    t = t[:, None].to(tl.int64)
    if n < H:
        source = q + t * stride_q + n * P
    elif n < H + K:
        source = k + t * stride_k + (n - H) * P
    else:
        source = v + t * stride_v + (n - H - K) * P
    x = tl.load(source + p, live, 0.0).to(tl.float32)
    if n < H + K:
        turned = live & (p < 2 * R)
        other = tl.load(source + tl.where(p < R, p + R, p - R), turned, 0.0).to(tl.float32)
        angle = t * R + p % tl.maximum(R, 1)
        c, s = tl.load(cos + angle, turned, 1.0), tl.load(sin + angle, turned, 0.0)
        x = x * c + tl.where(p < R, -other, other) * s
    if n < H:
        tl.store(q_out + (t * H + n) * P + p, x.to(q_out.dtype.element_ty), (t < T) & (p < P))
    else:
        page = tl.load(table + slot * stride_table + position // PAGE, slot >= 0, 0).to(tl.int64)
        head = tl.where(n < H + K, n - H, n - H - K)
        at = ((page * K + head) * PAGE + position % PAGE)[:, None] * P + p
        if n < H + K:
            tl.store(k_pages + at, x.to(k_pages.dtype.element_ty), live)
        else:
            tl.store(v_pages + at, x.to(v_pages.dtype.element_ty), live)


def store_kv(
    q_TI: Tensor,
    k_TM: Tensor,
    v_TM: Tensor,
    turn: tuple[Tensor, Tensor] | None,
    memory: Any,
    table: Tensor,
    slot_T: Tensor,
    position_T: Tensor,
) -> Tensor:
    """Turn q and k, put k and v into their pages, → turned q (T, H, P) in the pages' dtype.

    memory: `mixers.paged.PagedSlots` · rows of q, k and v may lie apart · slot −1: no sequence.
    """
    k_pages, v_pages = memory["k"], memory["v"]
    _, K, page, P = k_pages.shape
    T, H = q_TI.shape[0], q_TI.shape[1] // P
    q_THP = torch.empty(T, H, P, dtype=k_pages.dtype, device=q_TI.device)
    R = 0 if turn is None else turn[0].shape[1]
    cos, sin = (q_TI, q_TI) if turn is None else turn
    BT = 1 if T <= 64 else 16
    _store_kv[(triton.cdiv(T, BT), H + 2 * K)](
        q_TI, k_TM, v_TM, cos, sin, q_THP, k_pages, v_pages, table, slot_T, position_T, T, q_TI.stride(0),
        k_TM.stride(0), v_TM.stride(0), table.stride(0), H, K, P, R, PAGE=page, BT=BT,
        BP=triton.next_power_of_2(P), num_warps=1 if BT == 1 else 4, **early(),
    )  # fmt: skip
    return q_THP


@triton.jit
def _attend(
    q, k_pages, v_pages, table, slot_T, length_S, sums, most, total, y, stride_table, scale, window, H, K, P,
    SPLITS: tl.constexpr, WHOLE: tl.constexpr, PAGE: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A stretch of one sequence's keys against the queries that share them.  WHOLE: it is all of them, for y."""
    others_done(EARLY)
    t, kv, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slot_T + t).to(tl.int64)
    r, p = tl.arange(0, BR), tl.arange(0, BP)
    group = H // K
    heads = (t * H + kv * group + r)[:, None]
    mine, inside = (r < group)[:, None], (p < P)[None, :]
    if slot >= 0:
        stop = tl.load(length_S + slot) + 1  # the new token's key is there already
        oldest = tl.maximum(stop - window, 0)
        first = oldest // PAGE
        pages = tl.cdiv(stop, PAGE) - first
        each = tl.cdiv(pages, SPLITS)
        start, end = first + split * each, first + tl.minimum(split * each + each, pages)
        q_RP = tl.load(q + heads * P + p[None, :], mine & inside, 0.0)
        top, sum_ = tl.full((BR,), -1e30, tl.float32), tl.zeros((BR,), tl.float32)
        y_RP = tl.zeros((BR, BP), tl.float32)
        i = tl.arange(0, PAGE)
        for number in range(start, end):
            page = tl.load(table + slot * stride_table + number).to(tl.int64)
            token = number * PAGE + i
            known = (token < stop) & (token >= oldest)
            at = ((page * K + kv) * PAGE + i) * P
            k_PT = tl.load(k_pages + at[None, :] + p[:, None], known[None, :] & (p < P)[:, None], 0.0)
            v_TP = tl.load(v_pages + at[:, None] + p[None, :], known[:, None] & inside, 0.0)
            s_RT = tl.dot(q_RP, k_PT, input_precision=PRECISION) * (scale * 1.4426950408889634)
            s_RT = tl.where(known[None, :], s_RT, -1e30)
            higher = tl.maximum(top, tl.max(s_RT, 1))
            w_RT = tl.where(known[None, :], tl.exp2(s_RT - higher[:, None]), 0.0)
            shrink = tl.exp2(top - higher)
            sum_ = sum_ * shrink + tl.sum(w_RT, 1)
            y_RP = y_RP * shrink[:, None] + tl.dot(w_RT.to(v_TP.dtype), v_TP, input_precision=PRECISION)
            top = higher
        if WHOLE:
            tl.store(y + heads * P + p[None, :], (y_RP / sum_[:, None]).to(y.dtype.element_ty), mine & inside)
        else:
            part = heads * SPLITS + split
            tl.store(sums + part * P + p[None, :], y_RP, mine & inside)
            tl.store(most + part, top[:, None], mine)
            tl.store(total + part, sum_[:, None], mine)
    elif WHOLE:
        tl.store(y + heads * P + p[None, :], tl.zeros((BR, BP), y.dtype.element_ty), mine & inside)


@triton.jit
def _join(
    sums, most, total, slot_T, y, q8, scales, sums8, H, P,
    SPLITS: tl.constexpr, ROUND: tl.constexpr, BS: tl.constexpr, BP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    others_done(EARLY)
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(slot_T + t) >= 0:
        s, p = tl.arange(0, BS), tl.arange(0, BP)
        part = (t * H + h) * SPLITS + s
        top = tl.load(most + part, s < SPLITS, -1e30)
        share = tl.exp2(top - tl.max(top, 0))
        sum_ = tl.sum(share * tl.load(total + part, s < SPLITS, 0.0), 0)
        both = (s < SPLITS)[:, None] & (p < P)[None, :]
        y_P = tl.sum(tl.load(sums + part[:, None] * P + p[None, :], both, 0.0) * share[:, None], 0) / sum_
    else:
        p = tl.arange(0, BP)
        y_P = tl.zeros((BP,), tl.float32)
    tl.store(y + (t * H + h) * P + p, y_P.to(y.dtype.element_ty), p < P)
    if ROUND:
        store_rounded(y_P, t * H + h, 0, q8, scales, sums8, P, BP)


def attention_step(
    q_THP: Tensor, memory: Any, table: Tensor, slot_T: Tensor, length_S: Tensor,
    *, scale: float, window: int | None, round: bool = False,
) -> Tensor:  # fmt: skip
    """(T, H · P): the newest token of each sequence, number `length`, whose key is in its page, over all its keys."""
    k_pages, v_pages = memory["k"], memory["v"]
    T, H, P = q_THP.shape
    K, page = k_pages.shape[1:3]
    most_pages = table.shape[1] if window is None else min(table.shape[1], window // page + 2)
    splits = max(1, min(PROGRAMS // (T * K), most_pages, 64))
    device = q_THP.device
    r = Rounded(T, H * P, device) if round and P % 32 == 0 else None
    whole, y_THP, BP = splits == 1 and r is None, torch.empty_like(q_THP), max(16, triton.next_power_of_2(P))
    sums = torch.empty(0 if whole else T, H, splits, P, device=device)
    most, total = (torch.empty(0 if whole else T, H, splits, device=device) for _ in range(2))
    _attend[(T, K, splits)](
        q_THP, k_pages, v_pages, table, slot_T, length_S, sums, most, total, y_THP, table.stride(0), scale,
        (1 << 30) if window is None else window, H, K, P, SPLITS=splits, WHOLE=whole, PAGE=page,
        BR=max(16, triton.next_power_of_2(H // K)), BP=BP, num_stages=3, num_warps=4,
        PRECISION="ieee" if k_pages.dtype == torch.float32 else "tf32", **early(),
    )  # fmt: skip
    if whole:
        return y_THP.flatten(1)
    _join[(T, H)](
        sums, most, total, slot_T, y_THP, *(r.planes if r else (y_THP,) * 3), H, P, SPLITS=splits,
        ROUND=r is not None, BS=triton.next_power_of_2(splits), BP=BP, **early(),
    )  # fmt: skip
    y_TI = y_THP.flatten(1)
    if r:
        keep_rounded(y_TI, r)
    return y_TI
