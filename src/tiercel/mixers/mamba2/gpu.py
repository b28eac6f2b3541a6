"""`Mamba2Op` over states in slots of a device: a step in one kernel, prompts chunk by chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiercel.mixers.mamba2.triton import ssd
from tiercel.mixers.mamba2.triton_step import ssd_step
from tiercel.ops.triton.conv1d import conv1d

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
    dt_TH = torch.nn.functional.softplus(dt_TH.float() + dt_bias_H).clamp(*dt_limit)
    places = {"x": slice(0, I), "B": slice(I, I + groups * state)}  # among the channels
    rows = []
    for i, (span, slot, start) in enumerate(zip(where.spans, where.rows, where.starts, strict=True)):
        new_LC, committed, after = xBC_TC[span], where.slots.committed[slot], where.committed_after[i]
        open_ = start - committed
        out_LC = torch.empty(open_ + len(new_LC), C, dtype=buffers["x"].dtype, device=new_LC.device)
        dt_LH = torch.cat((torch.empty(open_, H, device=dt_TH.device), dt_TH[span]))
        if open_:
            for name, at in places.items():
                out_LC[:open_, at] = buffers.read(name, slot, committed, start).flatten(1)
            dt_LH[:open_] = buffers.read("dt", slot, committed, start)
        conv1d(
            new_LC, buffers["conv_state"], weight_KC, bias_C, where.slot_T[span], where.position_T[span],
            where.first_T[span], out_LC[open_:], store=False,
        )  # fmt: skip
        commit = after - committed
        y_LI = ssd(out_LC, dt_LH, A_H, D_H, buffers["ssm_state"][slot], groups=groups, skip=open_, commit=commit)
        buffers.write("conv_state", slot, start, new_LC)
        for name, at in places.items():
            buffers.write(name, slot, after, out_LC[commit:, at].unflatten(1, buffers.table[name].shape))
        buffers.write("dt", slot, after, dt_LH[commit:])
        rows.append(y_LI)
    return rows[0] if len(rows) == 1 else torch.cat(rows)
