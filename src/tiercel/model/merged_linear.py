"""Matrices that read one input, as one (vLLM's MergedColumnParallelLinear)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tiercel.model.layers import Linear, set_weight
from tiercel.ops.linear import linear


class MergedLinear:
    """Linears without bias that read the same input, and their rows one below the other."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self.linears = list(linears)
        weights = [m.weight for m in linears]
        if isinstance(weights[0], Tensor):
            self.weight = torch.cat(weights).detach()
            parts = [nn.Parameter(w, requires_grad=False) for w in self.weight.split([len(w) for w in weights])]
        else:
            self.weight = type(weights[0]).joined(weights)
            parts = self.weight.split([w.shape[0] for w in weights])
        for m, part in zip(linears, parts, strict=True):
            set_weight(m, "weight", part)

    def holds(self) -> bool:
        """Whether the weights are still these rows, and no part has a forward hook."""
        return all(not m._forward_hooks for m in self.linears)

    def __call__(self, h_TD: Tensor) -> dict[nn.Module, Tensor]:
        widths = [m.weight.shape[0] for m in self.linears]
        return dict(zip(self.linears, linear(h_TD, self.weight).split(widths, -1), strict=True))
