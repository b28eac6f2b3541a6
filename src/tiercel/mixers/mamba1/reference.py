"""Selective scan: the Mamba-1 recurrence (Gu & Dao 2023, arXiv 2312.00752, Algorithm 2).

    S_t = exp(dt_t A) ∘ S_{t−1} + (dt_t x_t) B_t        S, A ∈ R^{I×N};  dt_t, x_t ∈ R^I;  B_t, C_t ∈ R^N
    y_t = S_t C_t

The decay differs per channel *and* state, so a chunk has no matrix form: the recurrence runs token by
token, with everything around it done for a block of tokens at once.  Each state is computed by the same
operations in the same order however a sequence is cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # tokens whose states are held at once: BLOCK · I · N floats


def selective_scan(
    C_LN: Tensor | None, x_LI: Tensor, dt_LI: Tensor, A_IN: Tensor, B_LN: Tensor, S_NI: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs (L, I) float32 and the last state (N, I) float32.  Without C only the state is advanced."""
    outputs, S_IN = [], S_NI.t()
    for start in range(0, x_LI.shape[0], BLOCK):
        block = slice(start, start + BLOCK)
        dt, B_LN_ = dt_LI[block].float(), B_LN[block].float()
        decay_LIN = (dt.unsqueeze(2) * A_IN).exp()
        added_LIN = (dt * x_LI[block].float()).unsqueeze(2) * B_LN_.unsqueeze(1)
        states = []
        for decay_IN, added_IN in zip(decay_LIN, added_LIN, strict=True):
            S_IN = torch.addcmul(added_IN, decay_IN, S_IN)
            states.append(S_IN)
        if C_LN is not None:
            outputs.append((torch.stack(states) * C_LN[block].float().unsqueeze(1)).sum(2))
    y_LI = torch.cat(outputs) if outputs else x_LI.new_zeros(0, x_LI.shape[1], dtype=torch.float32)
    return y_LI, S_IN.t().contiguous()


def selective_scan_reference(
    C_LN: Tensor, x_LI: Tensor, dt_LI: Tensor, A_IN: Tensor, B_LN: Tensor, S_NI: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence as written above, in float64."""
    S, ys = S_NI.double().t(), []
    for C_N, x_I, dt_I, B_N in zip(C_LN.double(), x_LI.double(), dt_LI.double(), B_LN.double(), strict=True):
        S = (dt_I.unsqueeze(1) * A_IN.double()).exp() * S + torch.outer(dt_I * x_I, B_N)
        ys.append(S @ C_N)
    return torch.stack(ys), S.t()
