"""Causal convolution of the newest tokens of many texts, whose older columns lie in rings.

A ring has R columns; that of position p is number p mod R.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _conv(
    x, columns, weight, bias, slot_T, position_T, first_T, y, T, C, R, stride_x, stride_y,
    K: tl.constexpr, BIAS: tl.constexpr, STORE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    slot = tl.load(slot_T + t, t < T, -1)[:, None].to(tl.int64)
    position = tl.load(position_T + t, t < T, 0)[:, None].to(tl.int64)
    first = tl.load(first_T + t, t < T, 0)[:, None].to(tl.int64)
    t = t[:, None].to(tl.int64)
    live = (slot >= 0) & (c < C)
    ring = columns + slot * R * C + c
    sum_ = tl.zeros((BT, BC), tl.float32)
    if BIAS:
        sum_ += tl.load(bias + c, c < C, 0.0).to(tl.float32)
    for k in tl.static_range(K):
        back = K - 1 - k
        inside = t - back >= first
        before = position - back
        new = tl.load(x + (t - back) * stride_x + c, live & inside, 0.0).to(columns.dtype.element_ty)
        old = tl.load(ring + (before % R) * C, live & (t - back < first) & (before >= 0), 0.0)
        w = tl.load(weight + k * C + c, c < C, 0.0).to(tl.float32)
        sum_ += w * tl.where(inside, new, old).to(tl.float32)
        if STORE and back == 0:
            tl.store(ring + (position % R) * C, new, live)
    tl.store(y + t * stride_y + c, (sum_ * tl.sigmoid(sum_)).to(y.dtype.element_ty), (t < T) & (c < C))


def conv1d(
    x_TC: Tensor,
    columns_SRC: Tensor,
    weight_KC: Tensor,
    bias_C: Tensor | None,
    slot_T: Tensor,
    position_T: Tensor,
    first_T: Tensor,
    y_TC: Tensor,
    *,
    store: bool,
) -> None:
    """y = silu of the convolution, rounded to y's dtype; the rows of x and y may lie apart.

    slot_T: the ring of each token (−1: padding, whose y is any finite number) · position_T: its position ·
    first_T: the number of the first token here of the same sequence.  store: also put x into the rings; only
    for one new token of each sequence, as others might be read meanwhile.
    """
    T, C = x_TC.shape
    few = T <= 64
    BT, BC = (1, 256) if few else (16, 128)
    _conv[(triton.cdiv(T, BT), triton.cdiv(C, BC))](
        x_TC, columns_SRC, weight_KC, weight_KC if bias_C is None else bias_C, slot_T, position_T, first_T, y_TC,
        T, C, columns_SRC.shape[1], x_TC.stride(0), y_TC.stride(0), K=weight_KC.shape[0], BIAS=bias_C is not None,
        STORE=store, BT=BT, BC=BC, num_warps=2 if few else 4,
    )  # fmt: skip
