"""The parts that hold parameters: Linear, Embedding, RMSNorm.

None of them initialises itself: weights come from a checkpoint, or from `initialize` for a new network.
A matrix is a plain Parameter, to be trained, or a QTensor, to be run (ops/qtensor.py); who multiplies with it does not
ask which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiercel.model.lora import LoRADelta
from tiercel.ops.cpu import native
from tiercel.ops.linear import linear
from tiercel.ops.norm import add_rms_norm, rms_norm
from tiercel.ops.qtensor import QStack, QTensor

if TYPE_CHECKING:
    pass

Matrix = Tensor | QTensor
Precomputed = Mapping[nn.Module, Tensor]  # answers of Linears that were computed together with others
NONE_PRECOMPUTED: Precomputed = MappingProxyType({})


def quantizes_input(after: nn.Module) -> bool:
    """Whether a kernel whose output goes to this Linear also quantizes it, on a GPU."""
    return getattr(after.weight, "takes_q8", False)


class Linear(nn.Linear):
    """y = W x + b,  W: (out, in), plain or packed; see `ops.linear`.  adapters: what some rows add to it."""

    adapters: LoRADelta | None = None

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, scale: float = 1.0) -> Tensor: ...

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """scale · W x + b"""
        y = linear(x, self.weight, self.bias, scale)
        return y if self.adapters is None else self.adapters.add(y, x, scale)

    @property
    def bare(self) -> bool:
        """Whether the product is all there is, so that it may be fused with others."""
        return self.adapters is None

    def reset_parameters(self) -> None:
        """Left as allocated; see the module's note."""


class Embedding(nn.Module):
    """Token ids (…) → rows (…, D) of a (V, D) table, times `scale`."""

    def __init__(self, vocab_size: int, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight: Any = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, tokens: Tensor) -> Tensor:
        if isinstance(self.weight, QTensor):
            return self.weight.rows(tokens, self.scale)
        y = F.embedding(tokens, self.weight)
        return y if self.scale == 1.0 else y * self.scale


class RMSNorm(nn.Module):
    """(…, D) → (…, D), see `ops.norm`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps
        self.feeds_packed = False  # on a GPU: see `model.gpu_layout`

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, round=self.feeds_packed)

    def after(self, x: Tensor, added: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """x + all of `added`, and its norm."""
        return add_rms_norm(x, added, self.weight, self.eps, round=self.feeds_packed)


def set_weight(module: nn.Module, name: str, weight: nn.Parameter | QTensor | QStack) -> None:
    """Put a weight in place of another kind of weight."""
    module._parameters.pop(name, None)
    module.__dict__.pop(name, None)
    setattr(module, name, weight)


def named_weights(network: nn.Module) -> Iterator[tuple[str, nn.Parameter | QTensor | QStack]]:
    """Everything a checkpoint holds: parameters, packed matrices, and lists of these for experts; shared ones once."""
    yield from network.named_parameters()
    seen: set[int] = set()
    for owner, module in network.named_modules():
        for name, value in vars(module).items():
            packed = isinstance(value, QTensor) or (isinstance(value, list) and value and isinstance(value[0], QTensor))
            if packed and id(value) not in seen:
                seen.add(id(value))
                yield f"{owner}.{name}", value


def pack(weight: Tensor) -> QTensor | QStack | None:
    """The same numbers in the order the kernels read, a stack as a list; None for what they do not take."""
    kinds = {torch.bfloat16: "BF16", torch.float32: "F32"}
    if not native.available or weight.dtype not in kinds or weight.device.type != "cpu" or weight.dim() < 2:
        return None
    if weight.dim() == 3:
        return QStack(q for matrix in weight if isinstance(q := pack(matrix), QTensor))
    q = QTensor(kinds[weight.dtype], (weight.shape[0], weight.shape[1]))
    q.put(0, weight.detach())
    q.complete()
    return q


def fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 at full speed, by our kernels or torch's; otherwise float32 is faster."""
    return native.available or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
