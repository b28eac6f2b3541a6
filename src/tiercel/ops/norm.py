"""Root-mean-square norms (Zhang & Sennrich 2019), statistics and products in float32.

rms_norm        y = w · x / √(mean(x²) + eps)
gated_rms_norm  the Mamba-2 output norm, over groups of channels, with the gate silu(z) before or after
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tiercel.ops import triton
from tiercel.ops.cpu import native, training
from tiercel.ops.pointwise import add


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, round: bool = False) -> Tensor:
    """x: (…, D) any float dtype → (…, D) in the dtype of x; in that of the weight on a GPU, where a matrix follows, and
    in that of autocast on the way to a gradient on the CPU.

    round: on a GPU few rows also in eight bits, for a packed matrix.
    """
    if native.takes(x, weight_D):
        return native.rms_norm(x, weight_D, eps)
    if triton.takes(x, weight_D):
        from tiercel.ops.triton import norm

        return norm.rms_norm(x, weight_D, eps, round=round and _few(x))
    if torch.is_grad_enabled() and x.device.type == "cpu":
        y: Tensor = Normed.apply(x, weight_D, eps)
        return y
    return rms_norm_reference(x, weight_D, eps)


def add_rms_norm(
    x: Tensor, added: Sequence[Tensor], weight_D: Tensor, eps: float, *, round: bool = False
) -> tuple[Tensor, Tensor]:
    """x + all of `added`, one after another, and its norm."""
    if len(added) <= 2 and triton.takes(x, *added, weight_D):
        from tiercel.ops.triton import norm

        return norm.add_rms_norm(x, list(added), weight_D, eps, round=round and _few(x))
    x = reduce(add, added, x)
    return x, rms_norm(x, weight_D, eps)


def _few(x: Tensor) -> bool:
    return x.numel() <= triton.FEW * x.shape[-1] and x.shape[-1] % 64 == 0


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The formula in torch."""
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (h * weight_D).to(x.dtype)


class Normed(torch.autograd.Function):
    """`rms_norm` and its gradient: keeps x and one number a row, where autograd would keep four tensors of x's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        ctx.native = training.takes(x, weight_D)
        if ctx.native:
            y_TD, r_T1 = training.rms_norm_train(training.rows(x), weight_D.float().contiguous(), eps, dtype)
            y, r = y_TD.view(x.shape), r_T1.view(*x.shape[:-1], 1)
        else:
            h = x.float()
            r = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
            y = (h * r).mul_(weight_D).to(dtype)
        ctx.save_for_backward(x, weight_D, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_D, r = ctx.saved_tensors
        dx = dweight_D = None
        if ctx.needs_input_grad[1]:
            dweight_D = (dy.float() * (x.float() * r)).flatten(0, -2).sum(0).to(weight_D.dtype)
        if ctx.needs_input_grad[0] and ctx.native:
            dx = training.rms_norm_train_backward(
                training.rows(x), weight_D.float().contiguous(), r.view(-1, 1), training.rows(dy)
            ).view(x.shape)
        elif ctx.needs_input_grad[0]:
            dh, h = dy.float() * weight_D, x.float() * r
            dx = dh.sub_(h * (dh * h).mean(-1, keepdim=True)).mul_(r).to(x.dtype)
        return dx, dweight_D, None


def gated_rms_norm(y_LI: Tensor, z_LI: Tensor, weight_I: Tensor, eps: float, groups: int, gate_first: bool) -> Tensor:
    """Statistics over each of `groups` runs of I / groups channels → (L, I) float32.

    gate_first: norm(y · silu(z)), as every published hybrid; otherwise norm(y) · silu(z).
    Source: state-spaces/mamba `layernorm_gated.py`, `rms_norm_ref`.
    """
    gate_LI = F.silu(z_LI.float())
    h_LI = y_LI.float() * gate_LI if gate_first else y_LI.float()
    h_LGD = h_LI.unflatten(-1, (groups, -1))
    h_LGD = h_LGD * torch.rsqrt(h_LGD.square().mean(-1, keepdim=True) + eps)
    h_LI = torch.mul(h_LGD.flatten(-2), weight_I)
    return h_LI if gate_first else h_LI * gate_LI
