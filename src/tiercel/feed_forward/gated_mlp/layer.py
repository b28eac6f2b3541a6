"""Gated MLP (Shazeer 2020): down(act(gate x) · up x); and without a gate: down(act(up x))."""

from __future__ import annotations

from torch import Tensor, nn

from tiercel.feed_forward.gated_mlp.config import GatedMLPConfig
from tiercel.model.layers import Linear
from tiercel.ops.linear import gated, linear_onto
from tiercel.ops.pointwise import activate, add


class GatedMLP(nn.Module):
    def __init__(self, config: GatedMLPConfig, width: int, eps: float) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate = Linear(width, config.width, config.bias) if config.gated else None
        self.up = Linear(width, config.width, config.bias)
        self.down = Linear(config.width, width, config.bias)

    def hidden(self, x_TD: Tensor) -> Tensor:
        """What `down` multiplies."""
        if self.gate is None:
            return activate(self.up(x_TD), self.activation)
        return gated(x_TD, self.gate, self.up, self.activation)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(self.hidden(x_TD))

    def add_to(self, base_TD: Tensor, x_TD: Tensor) -> Tensor:
        """base + forward(x), in one product where `down` has neither hooks nor an adapter."""
        if type(self.down) is not Linear or self.down._forward_hooks:
            return add(base_TD, self(x_TD))
        return linear_onto(base_TD, self.hidden(x_TD), self.down.weight, self.down.bias)
