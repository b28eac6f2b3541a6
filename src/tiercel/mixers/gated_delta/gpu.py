"""`GatedDeltaOp` over states in slots of a device: a step in two kernels, prompts of any rows chunk by chunk."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tiercel.mixers.gated_delta.triton_prefill import gated_delta_prefill
from tiercel.mixers.gated_delta.triton_step import gated_delta_step

Metadata = tuple[Any, Any]  # `DeviceBatch.metadata_for`: a layer's buffers, and the batch


def gated_delta(
    batch: Metadata,
    qkv_TC: Tensor,
    b_TH: Tensor,
    dt_TH: Tensor,
    weight_JC: Tensor,
    dt_bias_H: Tensor,
    A_H: Tensor,
    *,
    key_heads: int,
    key_dim: int,
    value_dim: int,
    chunk: int,
    beta_max: float,
    tiled: bool = False,
) -> Tensor:
    """As `GatedDeltaOp`."""
    buffers, where = batch
    given = qkv_TC, b_TH, dt_TH, weight_JC, dt_bias_H, A_H, buffers
    if where.step:
        slots = where.slots
        return gated_delta_step(*given, where.slot_T, slots.length_S, slots.committed_S, beta_max=beta_max, tiled=tiled)
    return gated_delta_prefill(*given, where.plan, beta_max=beta_max, tiled=tiled)
