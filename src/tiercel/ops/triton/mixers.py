"""The ops of `ops/cpu/mixers.py` over memories that live on a device in slots, in the same words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiercel.mixers.attention import triton as steps
from tiercel.mixers.mamba2.triton import ssd
from tiercel.mixers.mamba2.triton_step import ssd_step
from tiercel.ops import attention as prompts
from tiercel.ops.triton import FEW
from tiercel.ops.triton.conv1d import conv1d, remember_columns
from tiercel.ops.triton.norm import gated_norm

Texts = tuple[Any, Any]  # what `model.slots.DeviceBatch.metadata_for` returns: one part's memory, and the batch

__all__ = ["attention", "gated_norm", "mamba2"]


def attention(
    texts: Texts,
    q_TI: Tensor,
    k_TM: Tensor,
    v_TM: Tensor,
    turn: tuple[Tensor, Tensor] | None,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int | None,
    round: bool = False,
) -> Tensor:
    """Turn q (T, H · P) and k (T, K · P), remember k and v, attend → (T, H · P)."""
    memory, batch = texts
    q_THP = steps.remember(q_TI, k_TM, v_TM, turn, memory, batch.slots.table, batch.slot_T, batch.position_T)
    if batch.step:
        return steps.attention_step(
            q_THP,
            memory,
            batch.slots.table,
            batch.slot_T,
            batch.slots.length_S,
            scale=scale,
            window=window,
            round=round and len(q_TI) <= FEW,
        )
    rows = []
    for span, slot, start, length in zip(batch.spans, batch.rows, batch.starts, batch.lengths, strict=True):
        table_row = batch.slots.table[slot]
        k, v = (steps.pages_of(pages, table_row, start + length) for pages in (memory.k, memory.v))
        rows.append(prompts.attention(q_THP[span].transpose(0, 1), k, v, scale=scale, window=window))
    y_HTP = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
    return y_HTP.transpose(0, 1).flatten(1)


def mamba2(
    texts: Texts,
    zxBCdt_TD: Tensor,
    weight_KC: Tensor,
    bias_C: Tensor | None,
    dt_bias_H: Tensor,
    A_H: Tensor,
    D_H: Tensor,
    *,
    head_dim: int,
    groups: int,
    state: int,
    chunk: int,
    dt_limit: tuple[float, float],
) -> Tensor:
    """From z | x B C | dt, one row per token: convolution, dt, scan, D x → (T, H · P)."""
    memory, batch = texts
    H, C = A_H.shape[0], weight_KC.shape[1]
    I = H * head_dim
    xBC_TC, dt_TH = zxBCdt_TD[:, I : I + C], zxBCdt_TD[:, I + C :]
    if batch.step:
        return ssd_step(
            xBC_TC, dt_TH, dt_bias_H, A_H, D_H, memory, batch.slot_T, batch.slots.length_S, batch.slots.base_S,
            dt_limit=dt_limit, conv=(weight_KC, bias_C),
        )  # fmt: skip
    dt_TH = torch.nn.functional.softplus(dt_TH.float() + dt_bias_H).clamp(*dt_limit)
    rows = []
    for i, (span, slot, start) in enumerate(zip(batch.spans, batch.rows, batch.starts, strict=True)):
        new_LC, base, next_base = xBC_TC[span], batch.slots.base[slot], batch.next_bases[i]
        open_ = start - base
        out_LC = torch.empty(open_ + len(new_LC), C, dtype=memory.x.dtype, device=new_LC.device)
        dt_LH = torch.cat((torch.empty(open_, H, device=dt_TH.device), dt_TH[span]))
        if open_:
            memory.recall(slot, base, start, out_LC, dt_LH)
        conv1d(
            new_LC, memory.columns, weight_KC, bias_C, batch.slot_T[span], batch.position_T[span],
            batch.first_T[span], out_LC[open_:], store=False,
        )  # fmt: skip
        y_LI = ssd(
            out_LC, dt_LH, A_H, D_H, memory.S[slot], groups=groups, skip=open_, commit=next_base - base
        )  # fmt: skip
        remember_columns(new_LC, memory.columns[slot], start)
        memory.remember(slot, base, next_base, out_LC, dt_LH)
        rows.append(y_LI)
    return rows[0] if len(rows) == 1 else torch.cat(rows)
