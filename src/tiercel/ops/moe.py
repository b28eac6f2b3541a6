"""Mixture of experts: every token goes to its `active` best experts, whose outputs are summed.

    s = softmax(scores) or σ(scores);  c = s + correction;  chosen = top-k(c) in the groups with the best c
    w = s of the chosen, / (Σ s + eps) where they are renormalised, · scale
    y = Σ_{e∈chosen} w_e · down_e(act(gate_e x) ∘ up_e x),  or down_e(act(up_e x)) without gates

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): a group's rank is the sum of its two best c, and the correction has no
part in the weights.  Router arithmetic is float32 whatever a model's dtype.

Letters: T tokens, D width, E experts, K active ones, F width of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiercel.ops import triton
from tiercel.ops.cpu import native
from tiercel.ops.linear import linear
from tiercel.ops.pointwise import ACTIVATIONS, activate, gate, gate_reference
from tiercel.ops.qtensor import QStack

Experts = Tensor | QStack  # one matrix for each


def route(scores_TE: Tensor, config: native.Router, correction_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose the experts of every token.

    Args:
        scores_TE: products with the router's matrix.
        config: how they become weights.
        correction_E: what is added to them for the choice alone.

    Returns:
        Weights (T, K) float32 and expert numbers (T, K) int64.
    """
    scores_TE = scores_TE if scores_TE.dtype == torch.float64 else scores_TE.float()
    s_TE = torch.softmax(scores_TE, -1) if config.scores == "softmax" else torch.sigmoid(scores_TE)
    choice_TE = s_TE if correction_E is None else s_TE + correction_E
    if config.active_groups < config.groups:
        by_group = choice_TE.detach().unflatten(-1, (config.groups, -1))
        best = by_group.topk(2, -1).values.sum(-1).topk(config.active_groups, -1).indices
        out = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter(-1, best, False)
        choice_TE = by_group.masked_fill(out.unsqueeze(-1), -torch.inf).flatten(-2)
    chosen_TK = choice_TE.topk(config.active, -1).indices
    weights_TK = s_TE.gather(-1, chosen_TK)
    if config.renormalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + config.renormalize_eps)
    return weights_TK * config.scale, chosen_TK


def routed(
    x_TD: Tensor,
    scores_TE: Tensor,
    config: native.Router,
    correction_E: Tensor | None,
    gate_EFD: Experts | None,
    up_EFD: Experts,
    down_EDF: Experts,
    activation: str,
) -> Tensor:
    """`route`, then `moe`: in kernels on the CPU, which leave the choice of experts to themselves."""
    if isinstance(up_EFD, QStack) and up_EFD[0].repacked and native.takes(x_TD, scores_TE):
        weights_TK, chosen_TK = native.route(scores_TE, config, correction_E)
        stacks = (gate_EFD, up_EFD, down_EDF)
        tables = [stack.table if isinstance(stack, QStack) else None for stack in stacks]
        return native.experts(
            x_TD, weights_TK, chosen_TK, tables, up_EFD.shape, activation, up_EFD[0].exact
        )  # fmt: skip
    weights_TK, chosen_TK = route(scores_TE, config, correction_E)
    x_TD = x_TD.to(up_EFD.dtype) if isinstance(up_EFD, Tensor) else x_TD
    if (
        isinstance(up_EFD, Tensor)
        and isinstance(down_EDF, Tensor)
        and not isinstance(gate_EFD, QStack)
        and triton.takes(x_TD, up_EFD, down_EDF)
    ):
        from tiercel.ops.triton import experts

        return experts.moe(x_TD, weights_TK, chosen_TK, gate_EFD, up_EFD, down_EDF, activation).to(x_TD.dtype)
    return moe(x_TD, weights_TK, chosen_TK, gate_EFD, up_EFD, down_EDF, activation).to(x_TD.dtype)


def moe(
    x_TD: Tensor,
    weights_TK: Tensor,
    chosen_TK: Tensor,
    gate_EFD: Experts | None,
    up_EFD: Experts,
    down_EDF: Experts,
    activation: str,
) -> Tensor:
    """Each expert sees its own tokens in one product; sums in float32 → (T, D) float32."""
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for expert in chosen_TK.unique().tolist():
        rows, slots = torch.nonzero(chosen_TK == expert, as_tuple=True)
        x, up = x_TD[rows], up_EFD[expert]
        if gate_EFD is None:
            h = activate(linear(x, up), activation)
        else:
            h = gate(linear(x, gate_EFD[expert]), linear(x, up), activation)
        out = linear(h, down_EDF[expert]).float() * weights_TK[rows, slots].unsqueeze(1)
        y_TD = y_TD.index_add(0, rows, out)
    return y_TD


def moe_reference(
    x_TD: Tensor,
    weights_TK: Tensor,
    chosen_TK: Tensor,
    gate_EFD: Tensor | None,
    up_EFD: Tensor,
    down_EDF: Tensor,
    activation: str,
) -> Tensor:
    """One token and one expert at a time, in float64."""
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float64)
    for t, x_D in enumerate(x_TD.double()):
        for weight, e in zip(weights_TK[t].double(), chosen_TK[t].tolist(), strict=True):
            up_F = up_EFD[e].double() @ x_D
            if gate_EFD is None:
                h_F = ACTIVATIONS[activation](up_F)
            else:
                h_F = gate_reference(gate_EFD[e].double() @ x_D, up_F, activation)
            y_TD[t] += weight * (down_EDF[e].double() @ h_F)
    return y_TD
