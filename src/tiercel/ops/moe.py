"""Mixture of experts: every token goes to its `active` best experts, whose outputs are summed.

    p = softmax(router · x);  chosen = top-k(p);  y = Σ_{e∈chosen} w_e · down_e(act(gate_e x) ∘ up_e x)

w are the chosen probabilities, renormalised to sum 1 (Mixtral) or as they are (Jamba).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tiercel.ops.linear import linear
from tiercel.ops.pointwise import gate, gate_reference
from tiercel.ops.qtensor import QTensor

Experts = Tensor | Sequence[QTensor]  # one matrix for each


def route(scores_LE: Tensor, active: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Weights (L, active) float32 and expert numbers (L, active) int64 from router scores (L, E)."""
    weights, chosen = torch.topk(torch.softmax(scores_LE.float(), -1), active)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), chosen


def moe(
    x_LD: Tensor,
    weights_LK: Tensor,
    chosen_LK: Tensor,
    gate_EFD: Experts,
    up_EFD: Experts,
    down_EDF: Experts,
    activation: str,
) -> Tensor:
    """Each expert sees its own tokens in one product; sums in float32 → (L, D) float32."""
    y_LD = torch.zeros(x_LD.shape, dtype=torch.float32, device=x_LD.device)
    for expert in chosen_LK.unique().tolist():
        rows, slots = torch.nonzero(chosen_LK == expert, as_tuple=True)
        x = x_LD[rows]
        h = gate(linear(x, gate_EFD[expert]), linear(x, up_EFD[expert]), activation)
        out = linear(h, down_EDF[expert]).float() * weights_LK[rows, slots].unsqueeze(1)
        y_LD = y_LD.index_add(0, rows, out)
    return y_LD


def moe_reference(
    x_LD: Tensor,
    weights_LK: Tensor,
    chosen_LK: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    activation: str,
) -> Tensor:
    """One token and one expert at a time, in float64."""
    y_LD = torch.zeros(x_LD.shape, dtype=torch.float64)
    for t, x_D in enumerate(x_LD.double()):
        for weight, e in zip(weights_LK[t].double(), chosen_LK[t].tolist(), strict=True):
            h_F = gate_reference(gate_EFD[e].double() @ x_D, up_EFD[e].double() @ x_D, activation)
            y_LD[t] += weight * (down_EDF[e].double() @ h_F)
    return y_LD
