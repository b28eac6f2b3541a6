"""`AttentionOp` over states in slots of a device: a step in one kernel, prompts of any rows in another."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tiercel.mixers.attention import triton
from tiercel.mixers.attention.triton_prefill import attention_prefill
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
    return attention_prefill(q_THP, buffers, table, where.plan, scale=scale, window=window)
