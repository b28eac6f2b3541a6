"""Mixture of MLPs: a router sends every token to a few experts, a shared one sees them all.  Formula: `ops.moe`.

y = up_L(Σ_e w_e expert_e(down_L x)) + σ(gate x) · shared(x)          without latent experts y = Σ_e w_e expert_e(x) + …
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tiercel.feed_forward.moe.config import MoEConfig
from tiercel.model.layers import Linear
from tiercel.ops.moe import routed
from tiercel.ops.pointwise import add, add_gated


class MoE(nn.Module):
    def __init__(self, config: MoEConfig, width: int, eps: float) -> None:
        super().__init__()
        self.config = config
        E, F, D = config.experts, config.width, config.latent or width
        self.router = Linear(width, E, bias=False)
        self.correction = nn.Parameter(torch.empty(E)) if config.correction else None
        self.gate = nn.Parameter(torch.empty(E, F, D)) if config.gated else None
        self.up = nn.Parameter(torch.empty(E, F, D))
        self.down = nn.Parameter(torch.empty(E, D, F))
        self.latent_down = Linear(width, D, config.latent_bias) if config.latent else None
        self.latent_up = Linear(D, width, config.latent_bias) if config.latent else None
        self.shared = None if config.shared is None else config.shared.build(width, 0.0)
        self.shared_gate = Linear(width, 1, bias=False) if config.shared_gate else None

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) → (T, D), in the dtype of x."""
        y_TD = self._routed(x_TD)
        if self.shared is None:
            return y_TD
        shared_TD = self.shared(x_TD)
        if self.shared_gate is None:
            return add(y_TD, shared_TD.to(y_TD.dtype))
        return add_gated(y_TD, shared_TD, self.shared_gate(x_TD))

    def _routed(self, x_TD: Tensor) -> Tensor:
        scores_TE, h_TD = self.router(x_TD), x_TD if self.latent_down is None else self.latent_down(x_TD)
        y_TD = routed(
            h_TD, scores_TE, self.config, self.correction, self.gate, self.up, self.down, self.config.activation
        )
        return y_TD if self.latent_up is None else self.latent_up(y_TD)
