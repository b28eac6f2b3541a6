"""Gated MLP (Shazeer 2020): down(act(gate x) · up x)."""

from __future__ import annotations

from torch import Tensor, nn

from tiercel.model.config import GatedMLPConfig
from tiercel.model.layers import Linear
from tiercel.ops.linear import gated


class GatedMLP(nn.Module):
    def __init__(self, config: GatedMLPConfig, width: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate = Linear(width, config.width, config.bias)
        self.up = Linear(width, config.width, config.bias)
        self.down = Linear(config.width, width, config.bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(gated(x_TD, self.gate, self.up, self.activation))
