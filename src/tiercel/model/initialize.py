"""Fresh weights for training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiercel.mixers.spec import Param
from tiercel.model.decoder import Decoder
from tiercel.model.parameters import parameters


@torch.no_grad()
def initialize(network: Decoder, seed: int = 0) -> None:
    """Draw fresh weights for training, in place: the same seed gives the same network."""
    g = torch.Generator().manual_seed(seed)
    depth, table = len(network.config.layers), parameters(network.config)
    for name, p in network.named_parameters():
        p.copy_(fresh(table[name], depth, g))


def fresh(param: Param, depth: int, g: torch.Generator) -> Tensor:
    """A new parameter of a network of `depth` layers, float32.

    Matrices N(0, `deviation`²); Mamba parameters as the papers draw them: A uniform in 1 … 16 per head (Mamba-2)
    or 1 … N per state (Mamba-1), D = 1, dt log-uniform in [0.001, 0.1] stored through the inverse of softplus.
    """
    shape = param.shape
    if param.init == "dt_bias":
        dt = torch.exp(torch.rand(shape, generator=g) * math.log(100.0) + math.log(0.001))
        return dt + torch.log(-torch.expm1(-dt))
    if param.init == "A_log" and len(shape) == 1:
        return torch.log(1 + 15 * torch.rand(shape, generator=g))
    if param.init == "A_log":
        return torch.log(torch.arange(1, shape[1] + 1)).expand(*shape)
    if param.init in ("ones", "zeros"):
        return torch.full(shape, float(param.init == "ones"))
    return torch.randn(shape, generator=g) * deviation(param, depth)


def deviation(param: Param, depth: int) -> float:
    """The spread of a fresh matrix, convolution or stack of expert matrices: fan-in^−½, fan-in being the last axis.

    Smaller by √(2 · depth) where it writes into the residual stream; 0.02 for the embedding.
    """
    if param.init == "embedding":
        return 0.02
    std = float(param.shape[-1] ** -0.5)
    return std / math.sqrt(2 * depth) if param.init == "residual" else std
