"""Mixture of gated MLPs: a router sends every token to a few experts.  Formula: `ops.moe`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tiercel.feed_forward.moe.config import MoEConfig
from tiercel.model.layers import Linear
from tiercel.ops.moe import moe, route


class MoE(nn.Module):
    def __init__(self, config: MoEConfig, width: int, eps: float) -> None:
        super().__init__()
        self.config = config
        E, F, D = config.experts, config.width, width
        self.router = Linear(D, E, bias=False)
        self.gate = nn.Parameter(torch.empty(E, F, D))
        self.up = nn.Parameter(torch.empty(E, F, D))
        self.down = nn.Parameter(torch.empty(E, D, F))

    def forward(self, x_TD: Tensor) -> Tensor:
        weights, chosen = route(self.router(x_TD), self.config.active, self.config.renormalize)
        if isinstance(self.gate, Tensor):
            x_TD = x_TD.to(self.gate.dtype)
        return moe(x_TD, weights, chosen, self.gate, self.up, self.down, self.config.activation).to(x_TD.dtype)
