"""Products with plain and packed matrices; `qtensor.py` has what a packed matrix is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiercel.ops import triton
from tiercel.ops.pointwise import add, gate
from tiercel.ops.qtensor import QTensor


def gated(x: Tensor, gate_: nn.Linear, up: nn.Linear, activation: str) -> Tensor:
    """act(gate x) · up x"""
    bare = all(getattr(m, "bare", False) for m in (gate_, up))  # nothing is added to these products
    if bare and _one_row(x) and gate_.bias is None and all(isinstance(m.weight, Tensor) for m in (gate_, up)):
        from tiercel.ops.triton import linear as kernels

        return kernels.plain(x, gate_.weight, None, up.weight, activation)
    few = min(_fused_rows(m.weight) for m in (gate_, up)) * x.shape[-1]
    if bare and x.is_cuda and x.numel() <= few and gate_.bias is None:
        from tiercel.ops.triton import linear as kernels

        return kernels.gated(x, gate_.weight, up.weight, activation)
    return gate(gate_(x), up(x), activation)


def _fused_rows(weight: Tensor | QTensor) -> int:
    return weight.fused_rows if isinstance(weight, QTensor) else 0


def _one_row(x: Tensor) -> bool:
    """On a GPU, where a kernel of ours reads a plain matrix faster than PyTorch's."""
    return x.is_cuda and triton.there and x.numel() == x.shape[-1] and not torch.is_grad_enabled()


def linear_onto(base: Tensor, x: Tensor, weight: Tensor | QTensor, bias_N: Tensor | None = None) -> Tensor:
    """base + x Wᵀ + b, in the dtype of `base`; on a GPU few rows are added where they are made."""
    if isinstance(weight, QTensor) and x.numel() <= weight.fused_rows * x.shape[-1] and base.is_contiguous():
        return weight.fused(x, bias_N, base=base)
    if _one_row(x) and isinstance(weight, Tensor) and base.is_contiguous():
        from tiercel.ops.triton import linear as kernels

        return kernels.plain(x, weight, bias_N, base=base)
    return add(base, linear(x, weight, bias_N))


def linear(x: Tensor, weight: Tensor | QTensor, bias_N: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """scale · x Wᵀ + b: a plain W computes in its own dtype, a QTensor answers in float32."""
    if isinstance(weight, QTensor):
        return weight.multiply(x, bias_N, scale)
    if _one_row(x):
        from tiercel.ops.triton import linear as kernels

        y = kernels.plain(x, weight, bias_N if scale == 1.0 else None)
    else:
        y = F.linear(x.to(weight.dtype), weight, bias_N if scale == 1.0 else None)
    if scale != 1.0:
        y = y.float() * scale
        y = y if bias_N is None else y + bias_N.float()
    return y
