"""The parts that hold parameters: Linear, Embedding, RMSNorm.

None of them initialises itself: weights come from a checkpoint, or from `initialize` for a new network.
Linear is the one place where a packed or an adapted weight will be met.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiercel.ops.norm import rms_norm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class Linear(nn.Linear):
    """y = W x + b,  W: (out, in), computed in the dtype of W (a wider residual stream is narrowed here).

    `pack` lays W out in the blocks oneDNN multiplies, in place: the same numbers, and a product of one row reads
    them at the speed of the memory, twice that of the plain layout (docs/log.md).  For running, not for training.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if not self.weight.is_mkldnn:
            return F.linear(x, self.weight, self.bias)
        if x.requires_grad and torch.is_grad_enabled():  # the blocked product has no derivative
            return F.linear(x, self.weight.to_dense(), self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def pack(self) -> None:
        """W in oneDNN's blocks, where this machine has them for its dtype."""
        if not self.weight.is_mkldnn and packs(self.weight):
            blocks = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None)
            self.weight = nn.Parameter(blocks, requires_grad=False)

    def unpack(self) -> None:
        """W as a plain (out, in) tensor again."""
        if self.weight.is_mkldnn:
            self.weight = nn.Parameter(self.weight.to_dense(), requires_grad=False)

    def reset_parameters(self) -> None:
        """Left as allocated; see the module's note."""


class Embedding(nn.Module):
    """Token ids (…) → rows (…, D) of a (V, D) table."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class RMSNorm(nn.Module):
    """(…, D) → (…, D), see `ops.norm`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def packs(weight: Tensor) -> bool:
    """Whether oneDNN multiplies this kind of matrix faster from its own blocks."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and fast_bf16())


def fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 at full speed; otherwise float32 is the faster home of packed weights."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def dense(weight: Tensor) -> Tensor:
    """A weight as a plain tensor, whichever way it is laid out."""
    return weight.to_dense() if weight.is_mkldnn else weight


@torch.no_grad()
def initialize(network: nn.Module, seed: int = 0) -> None:
    """Fresh weights for training, in place: the same seed gives the same network.  The rules are those of `fresh`."""
    g = torch.Generator().manual_seed(seed)
    depth = sum(1 for name, _ in network.named_modules() if name.endswith("mixer_norm"))
    for name, p in network.named_parameters():
        p.copy_(fresh(name, p.shape, depth, g))


def fresh(name: str, shape: Sequence[int], depth: int, g: torch.Generator) -> Tensor:
    """A new parameter of a network of `depth` layers, float32.

    Matrices N(0, `deviation`²); Mamba parameters as the papers draw them: A uniform in 1 … 16 per head (Mamba-2)
    or 1 … N per state (Mamba-1), D = 1, dt log-uniform in [0.001, 0.1] stored through the inverse of softplus.
    """
    owner, _, leaf = name.rpartition(".")
    if leaf == "dt_bias":
        dt = torch.exp(torch.rand(shape, generator=g) * math.log(100.0) + math.log(0.001))
        return dt + torch.log(-torch.expm1(-dt))
    if leaf == "A_log" and len(shape) == 1:
        return torch.log(1 + 15 * torch.rand(shape, generator=g))
    if leaf == "A_log":
        return torch.log(torch.arange(1, shape[1] + 1)).expand(*shape)
    if leaf in ("D", "out_norm") or owner.endswith("norm"):
        return torch.ones(shape)
    if leaf == "bias" or leaf == "conv_bias":
        return torch.zeros(shape)
    return torch.randn(shape, generator=g) * deviation(name, shape, depth)


def deviation(name: str, shape: Sequence[int], depth: int) -> float:
    """The spread of a fresh matrix, convolution or stack of expert matrices: fan-in^−½, fan-in being the last axis.

    Smaller by √(2 · depth) where it writes into the residual stream; 0.02 for the embedding.
    """
    owner, _, leaf = name.rpartition(".")
    part = owner.rpartition(".")[2]
    if part == "embed":
        return 0.02
    std = shape[-1] ** -0.5
    return std / math.sqrt(2 * depth) if part in ("o", "out_proj", "down") or leaf == "down" else std
