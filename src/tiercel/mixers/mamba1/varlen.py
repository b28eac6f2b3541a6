"""The selective scan of rows full of documents, for training: `reference.py` for all documents at once, with gradients.

Letters: B rows, L their length, T = B · L, I inner, N state.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiercel.model.varlen import VarlenBatch
from tiercel.ops.conv1d_varlen import at_least_fp32


def selective_scan_varlen(
    C_TN: Tensor, x_TI: Tensor, dt_TI: Tensor, A_IN: Tensor, B_TN: Tensor, batch: VarlenBatch
) -> Tensor:
    """y (T, I), float32 or wider; the state is zero before each document."""
    C_BLN, x_BLI, dt_BLI, B_BLN = (at_least_fp32(t).unflatten(0, batch.shape) for t in (C_TN, x_TI, dt_TI, B_TN))
    log_BLIN = dt_BLI.unsqueeze(-1) * A_IN
    decay_BLIN = log_BLIN.exp() * ~batch.starts_BL.unsqueeze(-1).unsqueeze(-1)
    added_BLIN = (dt_BLI * x_BLI).unsqueeze(-1) * B_BLN.unsqueeze(2)
    S_BLIN: Tensor = LinearScan.apply(decay_BLIN, added_BLIN)
    y_TI: Tensor = (S_BLIN @ C_BLN.unsqueeze(-1)).squeeze(-1).flatten(0, 1)
    return y_TI


class LinearScan(torch.autograd.Function):
    """S_t = decay_t ∘ S_{t−1} + added_t along axis 1, from zero."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, added: Tensor) -> Tensor:
        S = linear_scan(decay, added)
        ctx.save_for_backward(decay, S)
        return S

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        decay, S = ctx.saved_tensors
        # g_t = grad_t + decay_{t+1} g_{t+1}: the same scan, from the other end
        later = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], 1)
        g = linear_scan(later.flip(1), grad.flip(1)).flip(1)
        before = torch.cat([torch.zeros_like(S[:, :1]), S[:, :-1]], 1)
        return g * before, g


def linear_scan(decay: Tensor, added: Tensor) -> Tensor:
    """The recurrence in 2 √L steps: inside all blocks at once, then from block to block."""
    L = added.shape[1]
    Q = max(1, round(L**0.5))
    count = -(-L // Q)
    spare = (0, 0) * (added.dim() - 2) + (0, count * Q - L)
    decay, added = (F.pad(t, spare).unflatten(1, (count, Q)) for t in (decay, added))
    inside, through = torch.empty_like(added), torch.empty_like(added)
    inside[:, :, 0], through[:, :, 0] = added[:, :, 0], decay[:, :, 0]
    for t in range(1, Q):
        torch.addcmul(added[:, :, t], decay[:, :, t], inside[:, :, t - 1], out=inside[:, :, t])
        torch.mul(decay[:, :, t], through[:, :, t - 1], out=through[:, :, t])
    for c in range(1, count):
        inside[:, c] += through[:, c] * inside[:, c - 1, -1:]
    return inside.flatten(1, 2)[:, :L]
