"""Elementwise operations: the residual sum, and the gate of a gated MLP.

add    y = a + b
gate   y = act(g) · u            act: silu, gelu (exact or by tanh), relu and its square, sigmoid
activate   y = act(x)
add_gated  y = a + σ(s) · b      one s for every row
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tiercel.ops import triton
from tiercel.ops.cpu import native, training

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
}


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b, tensors of one shape."""
    if native.takes(a, b) and a.shape == b.shape:
        return native.add(a, b)
    if torch.is_grad_enabled() and a.dtype != b.dtype and a.shape == b.shape and a.dim() > 1 and training.takes(a, b):
        y: Tensor = Add.apply(a, b)
        return y
    return a + b


def gate(g: Tensor, u: Tensor, activation: str) -> Tensor:
    """act(g) · u, tensors of one shape; `activation` is a key of ACTIVATIONS."""
    if native.takes(g, u):
        return native.gate(g, u, activation)
    if triton.takes(g, u):
        from tiercel.ops.triton import norm

        return norm.gate(g, u, activation)
    if torch.is_grad_enabled() and g.device.type == "cpu":
        y: Tensor = Gate.apply(g, u, activation)
        return y
    return gate_reference(g, u, activation)


def activate(x: Tensor, activation: str) -> Tensor:
    """act(x); `activation` is a key of ACTIVATIONS."""
    return native.activate(x, activation) if native.takes(x) else ACTIVATIONS[activation](x)


def add_gated(a_TD: Tensor, b_TD: Tensor, scores_T1: Tensor) -> Tensor:
    """a + σ(scores) · b, in the dtype of a."""
    if native.takes(a_TD, b_TD, scores_T1):
        return native.add_gated(a_TD, b_TD, scores_T1)
    return (a_TD + torch.sigmoid(scores_T1.float()) * b_TD).to(a_TD.dtype)


def gate_reference(g: Tensor, u: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](g) * u


class Add(torch.autograd.Function):
    """a + b of two dtypes, in the wider one, faster than torch, which converts one value at a time."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.types = a.dtype, b.dtype
        return training.add_mixed(training.rows(a), training.rows(b), torch.promote_types(a.dtype, b.dtype)).view(
            a.shape
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy.to(ctx.types[0]), dy.to(ctx.types[1])


class Gate(torch.autograd.Function):
    """`gate` and its gradient, which recomputes act(g); silu runs in kernels, in the dtype of autocast."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(g, u)
        ctx.activation, ctx.native = activation, activation == "silu" and training.takes(g, u)
        if not ctx.native:
            return gate_reference(g.to(torch.promote_types(g.dtype, u.dtype)), u, activation)
        half = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if half else torch.promote_types(g.dtype, u.dtype)
        return training.silu_gate(training.rows(g), training.rows(u), dtype).view(g.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        g, u = ctx.saved_tensors
        if ctx.native:
            dg, du = training.silu_gate_backward(training.rows(g), training.rows(u), training.rows(dy))
            return dg.view(g.shape), du.view(u.shape), None
        with torch.enable_grad():
            g = g.detach().requires_grad_()
            a = ACTIVATIONS[ctx.activation](g)
        (dg,) = torch.autograd.grad(a, g, dy * u)
        return dg, dy * a.detach(), None
