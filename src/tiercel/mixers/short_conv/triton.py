"""`ShortConvOp` over states in slots of a device: new tokens of any sequences in one kernel, and their columns kept.

A slot's ring of R columns has B · x of earlier positions, that of position p at p mod R.  Letters: those of `layer.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiercel.ops.triton.launch import early, others_done

SLOT, START, NEXT, END, TOKEN = (tl.constexpr(i) for i in (0, 1, 3, 4, 5))  # rows of `RaggedPlan.rows`
Metadata = tuple[Any, Any]  # `DeviceBatch.metadata_for`: a layer's buffers, and the batch


@triton.jit(do_not_specialize=["T"])
def _mix(
    BCx, columns, weight, bias, slot_T, position_T, y, T, C, R, stride,
    K: tl.constexpr, BIAS: tl.constexpr, STORE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """STORE: the newest column goes into the ring, where no other token of its sequence reads it meanwhile."""
    others_done(EARLY)
    t = (tl.program_id(0) * BT + tl.arange(0, BT))[:, None]
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    slot, position = tl.load(slot_T + t, t < T, -1), tl.load(position_T + t, t < T, 0)
    live = (slot >= 0) & (c < C)
    ring = columns + slot.to(tl.int64) * R * C + c
    row = BCx + t.to(tl.int64) * stride + c
    sum_ = tl.zeros((BT, BC), tl.float32)
    if BIAS:
        sum_ += tl.load(bias + c, c < C, 0.0)
    for k in tl.static_range(K):
        back = K - 1 - k
        same = tl.load(slot_T + t - back, (t < T) & (t >= back), -2) == slot  # a sequence has one run of tokens
        B_TC = tl.load(row - back * stride, live & same, 0.0).to(tl.float32)
        x_TC = tl.load(row - back * stride + 2 * C, live & same, 0.0).to(tl.float32)
        new = (B_TC * x_TC).to(BCx.dtype.element_ty).to(columns.dtype.element_ty)
        before = position - back
        old = tl.load(ring + tl.maximum(before, 0) % R * C, live & (before >= 0) & (same == 0), 0.0)
        sum_ += tl.load(weight + k * C + c, c < C, 0.0) * tl.where(same, new, old).to(tl.float32)
        if STORE and back == 0:
            tl.store(ring + position % R * C, new, live)
    gate = tl.load(row + C, live, 0.0).to(tl.float32)
    tl.store(y + t.to(tl.int64) * C + c, (gate * sum_).to(y.dtype.element_ty), (t < T) & (c < C))


@triton.jit(do_not_specialize=["B"])
def _keep(
    BCx, columns, rows, B, C, R, stride, K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, EARLY: tl.constexpr
):
    """Columns from the next base on, and the K − 1 before them, into a row's ring."""
    others_done(EARLY)
    r = tl.program_id(0)
    slot = tl.load(rows + SLOT * B + r).to(tl.int64)
    if slot >= 0:
        start = tl.load(rows + START * B + r)
        first = tl.maximum(tl.load(rows + NEXT * B + r) - (K - 1), start)
        position = first + (tl.program_id(1) * BT + tl.arange(0, BT))[:, None]
        c = tl.program_id(2) * BC + tl.arange(0, BC)[None, :]
        live = (position < tl.load(rows + END * B + r)) & (c < C)
        row = BCx + (tl.load(rows + TOKEN * B + r) + position - start).to(tl.int64) * stride + c
        column = tl.load(row, live, 0.0).to(tl.float32) * tl.load(row + 2 * C, live, 0.0).to(tl.float32)
        column = column.to(BCx.dtype.element_ty).to(columns.dtype.element_ty)
        tl.store(columns + (slot * R + position % R) * C + c, column, live)


def short_conv(batch: Metadata, BCx: Tensor, weight_KC: Tensor, bias_C: Tensor | None, *, chunk: int) -> Tensor:
    """As `ShortConvOp`, in the dtype of its inputs."""
    buffers, where = batch
    columns, (K, C), T = buffers["conv_state"], weight_KC.shape, len(BCx)
    R, stride, BC = columns.shape[1], BCx.stride(0), 128
    y_TC = torch.empty(T, C, dtype=BCx.dtype, device=BCx.device)
    BT = 1 if where.step else 16
    _mix[(triton.cdiv(T, BT), triton.cdiv(C, BC))](
        BCx, columns, weight_KC, weight_KC if bias_C is None else bias_C, where.slot_T, where.position_T, y_TC,
        T, C, R, stride, K=K, BIAS=bias_C is not None, STORE=where.step, BT=BT, BC=BC, **early(),
    )  # fmt: skip
    if not where.step:
        plan = where.plan
        _keep[(plan.capacity.rows, triton.cdiv(chunk + K - 1, 16), triton.cdiv(C, BC))](
            BCx, columns, plan.rows, plan.capacity.rows, C, R, stride, K=K, BT=16, BC=BC, **early()
        )
    return y_TC
