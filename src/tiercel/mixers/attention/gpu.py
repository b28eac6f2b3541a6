"""`AttentionOp` over states in slots of a device: a step in one kernel, prompts in torch's attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiercel.mixers.attention import sdpa, triton
from tiercel.model.pages import PAGE
from tiercel.ops.triton import FEW

Metadata = tuple[Any, Any]  # `DeviceBatch.metadata_for`: a layer's buffers, and the batch


def attention(
    batch: Metadata,
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
    """As `AttentionOp`."""
    buffers, where = batch
    table = buffers.group.table
    q_THP = triton.store_kv(q_TI, k_TM, v_TM, turn, buffers, table, where.slot_T, where.position_T)
    if where.step:
        return triton.attention_step(
            q_THP,
            buffers,
            table,
            where.slot_T,
            where.slots.length_S,
            scale=scale,
            window=window,
            round=round and len(q_TI) <= FEW,
        )
    rows = []
    for span, slot, start, length in zip(where.spans, where.rows, where.starts, where.lengths, strict=True):
        first = buffers.group.first[slot]  # pages before it are released, and no token here sees them
        held, table_row = start + length - first * PAGE, table[slot, first:]
        k, v = (triton.pages_of(buffers[name], table_row, held) for name in ("k", "v"))
        rows.append(sdpa.attention(q_THP[span].transpose(0, 1), k, v, scale=scale, window=window))
    y_HTP = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
    return y_HTP.transpose(0, 1).flatten(1)
