"""`Mamba2Op` over states in slots of a device: a step in two kernels, prompts of any rows chunk by chunk."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tiercel.mixers.mamba2.triton_prefill import mamba2_prefill
from tiercel.mixers.mamba2.triton_step import ssd_step

Metadata = tuple[Any, Any]  # `DeviceBatch.metadata_for`: a layer's buffers, and the batch


def mamba2(
    batch: Metadata,
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
    """As `Mamba2Op`."""
    buffers, where = batch
    H, C = A_H.shape[0], weight_KC.shape[1]
    I = H * head_dim
    xBC_TC, dt_TH = zxBCdt_TD[:, I : I + C], zxBCdt_TD[:, I + C :]
    if where.step:
        return ssd_step(
            xBC_TC, dt_TH, dt_bias_H, A_H, D_H, buffers, where.slot_T, where.slots.length_S, where.slots.committed_S,
            dt_limit=dt_limit, conv=(weight_KC, bias_C),
        )  # fmt: skip
    return mamba2_prefill(
        xBC_TC, dt_TH, dt_bias_H, A_H, D_H, buffers, where.plan, dt_limit=dt_limit, conv=(weight_KC, bias_C)
    )
