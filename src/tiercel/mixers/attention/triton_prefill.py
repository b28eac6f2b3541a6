"""Attention of new tokens of several sequences over their pages of keys and values: prompts, and more of them.

A program has QUERIES tokens of a row and a head, and reads the row's pages from the first on, so that a sequence's
numbers are the same bits in any company.  Tables: `model/ragged.py`; pages: `triton.py`; formulas: `sdpa.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiercel.model.ragged import QUERIES, RaggedPlan
from tiercel.ops.triton.launch import early, others_done, output

SLOT, START, END, TOKEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(4), tl.constexpr(5)
EXACT_QUERIES = 32  # that a program has where float32 counts in full: larger products take minutes to compile
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _add_page(
    q_QP, top, sum_, y_QP, k_pages, v_pages, table_row, number, kv, position, oldest, scale, K, P,
    MASKED: tl.constexpr, PAGE: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A page of keys joins the running softmax of each query."""
    i, p = tl.arange(0, PAGE), tl.arange(0, BP)
    page = tl.load(table_row + number).to(tl.int64)
    at = ((page * K + kv) * PAGE + i) * P
    token = number * PAGE + i
    inside = (p < P)[None, :]
    if MASKED:  # keys beyond the last query may never have been written
        written = (token <= tl.max(position, 0))[:, None]
        k_IP = tl.load(k_pages + at[:, None] + p[None, :], written & inside, 0.0)
        v_IP = tl.load(v_pages + at[:, None] + p[None, :], written & inside, 0.0)
    else:
        k_IP = tl.load(k_pages + at[:, None] + p[None, :], inside, 0.0)
        v_IP = tl.load(v_pages + at[:, None] + p[None, :], inside, 0.0)
    s_QI = tl.dot(q_QP, tl.trans(k_IP), input_precision=PRECISION) * (scale * LOG2_E)
    if MASKED:
        seen = (token[None, :] <= position[:, None]) & (token[None, :] >= oldest[:, None])
        s_QI = tl.where(seen, s_QI, -1e30)
    higher = tl.maximum(top, tl.max(s_QI, 1))
    w_QI = tl.exp2(s_QI - higher[:, None])
    if MASKED:
        w_QI = tl.where(seen, w_QI, 0.0)
    shrink = tl.exp2(top - higher)
    y_QP = y_QP * shrink[:, None] + tl.dot(w_QI.to(v_IP.dtype), v_IP, input_precision=PRECISION)
    return higher, sum_ * shrink + tl.sum(w_QI, 1), y_QP


@triton.jit(do_not_specialize=["M", "B"])
def _attend(
    q, k_pages, v_pages, table, tiles, rows, y, M, B, stride_table, scale, window, H, K, P,
    WINDOW: tl.constexpr, PAGE: tl.constexpr, BQ: tl.constexpr, BP: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    others_done(EARLY)
    tile, h = tl.program_id(1), tl.program_id(0)
    r = tl.load(tiles + tile)
    start, end = tl.load(rows + START * B + tl.maximum(r, 0)), tl.load(rows + END * B + tl.maximum(r, 0))
    if (r >= 0) & (tl.load(tiles + M + tile) + tl.program_id(2) * BQ < end - start):
        slot = tl.load(rows + SLOT * B + r).to(tl.int64)
        first = tl.load(tiles + M + tile) + tl.program_id(2) * BQ
        o, p = first + tl.arange(0, BQ), tl.arange(0, BP)
        real = start + o < end
        position = tl.minimum(start + o, end - 1)
        token = (tl.load(rows + TOKEN * B + r) + o).to(tl.int64)
        both = real[:, None] & (p < P)[None, :]
        q_QP = tl.load(q + (token[:, None] * H + h) * P + p[None, :], both, 0.0)
        kv, table_row = h // (H // K), table + slot * stride_table
        oldest = tl.maximum(position - window + 1, 0)
        top, sum_ = tl.full((BQ,), -1e30, tl.float32), tl.zeros((BQ,), tl.float32)
        y_QP = tl.zeros((BQ, BP), tl.float32)
        begin = tl.maximum(start + first - window + 1, 0) // PAGE if WINDOW else 0
        whole = begin if WINDOW else (start + first + 1) // PAGE  # pages that every query sees whole
        for number in tl.range(begin, whole, num_stages=STAGES):
            top, sum_, y_QP = _add_page(
                q_QP, top, sum_, y_QP, k_pages, v_pages, table_row, number, kv, position, oldest, scale, K, P,
                False, PAGE, BP, PRECISION,
            )  # fmt: skip
        for number in range(whole, tl.max(position, 0) // PAGE + 1):
            top, sum_, y_QP = _add_page(
                q_QP, top, sum_, y_QP, k_pages, v_pages, table_row, number, kv, position, oldest, scale, K, P,
                True, PAGE, BP, PRECISION,
            )  # fmt: skip
        y_QP = y_QP / sum_[:, None]
        tl.store(y + (token[:, None] * H + h) * P + p[None, :], y_QP.to(y.dtype.element_ty), both)


def attention_prefill(
    q_THP: Tensor, memory: Any, table: Tensor, plan: RaggedPlan, *, scale: float, window: int | None
) -> Tensor:
    """(T, H · P) of a plan's tokens, whose keys are in their pages; rows without a sequence are left as they are."""
    k_pages, v_pages = memory["k"], memory["v"]
    T, H, P = q_THP.shape
    K, page = k_pages.shape[1:3]
    y_TI = output(T, H * P, dtype=q_THP.dtype, device=q_THP.device)
    c, exact = plan.capacity, k_pages.dtype == torch.float32
    queries = EXACT_QUERIES if exact else QUERIES
    _attend[(H, c.tiles, QUERIES // queries)](
        q_THP, k_pages, v_pages, table, plan.tiles, plan.rows, y_TI, c.tiles, c.rows, table.stride(0), scale,
        (1 << 30) if window is None else window, H, K, P, WINDOW=window is not None, PAGE=page, BQ=queries,
        BP=max(16, triton.next_power_of_2(P)), STAGES=2, PRECISION="ieee" if exact else "tf32", num_warps=8, **early(),
    )  # fmt: skip
    return y_TI
