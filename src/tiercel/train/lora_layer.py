"""PEFT's LoRA layer over our Linear, with a multiplier: y = s W x + s · (alpha / r) B A x, A and B in the
checkpoint's values."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tiercel.errors import RequestError
from tiercel.families.family import Runs
from tiercel.ops.cpu import training
from tiercel.ops.qtensor import QTensor


class LoraLinear(lora.Linear):
    multiplier: Tensor | None

    @classmethod
    def of(cls, layer: nn.Module, scale: float | Runs) -> LoraLinear:
        """PEFT makes the layer and hands it over; it becomes one of these, as it is."""
        layer.__class__ = cls
        assert isinstance(layer, LoraLinear)
        per_row = None
        if isinstance(scale, tuple):
            per_row = torch.cat([torch.full((count,), value) for count, value in scale])
        elif scale != 1.0:
            per_row = torch.tensor(scale)
        layer.register_buffer("multiplier", per_row, persistent=False)
        return layer

    def forward(self, x: Tensor, scale: float = 1.0, **more: Any) -> Tensor:
        """scale: as of our Linear, for the logits."""
        if more.get("adapter_names") is not None:
            raise RequestError("rows of several adapters are served, not trained: see Model.load_adapter")
        if self.disable_adapters and self.merged:
            self.unmerge()
        y: Tensor = self.base_layer(x, scale)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if name in self.lora_A:
                A, B = (cast(Tensor, part[name].weight) for part in (self.lora_A, self.lora_B))
                dropout = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
                y = LowRank.apply(y, x, A, B, self.scaling[name] * scale, self.multiplier, dropout)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if isinstance(self.get_base_layer().weight, QTensor):
            raise RequestError("these weights are packed to be run: write the merged model with `tiercel merge`")
        super().merge(safe_merge, adapter_names)

    def get_delta_weight(self, adapter: str) -> Tensor:
        delta = super().get_delta_weight(adapter)
        return delta if self.multiplier is None else delta * self.multiplier.view(-1, 1)


class LowRank(torch.autograd.Function):
    """y + multiplier · scale · B A dropout(x) in the dtype of y, the two products in float32; A, B and x have
    gradients, and x is kept as it came."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A_RK: Tensor, B_NR: Tensor, scale: float, multiplier: Tensor | None, p: float
    ) -> Tensor:
        factor = scale / (1 - p) * (1.0 if multiplier is None else multiplier.view(-1, 1))
        ctx.factor, ctx.native = factor, training.takes(y, x) and A_RK.dtype == torch.float32
        with torch.autocast(x.device.type, enabled=False):
            if ctx.native:
                ctx.dropout = training.Dropout.of(p)
                a_TR = training.lora_a(training.rows(x), A_RK.t().contiguous(), ctx.dropout)
                added = training.lora_b(a_TR, (B_NR * factor).t().contiguous(), training.rows(y), y.dtype)
            else:
                ctx.dropout = None if p == 0 else kept(x, p)
                a_TR = _dropped(x, ctx.dropout, A_RK.dtype) @ A_RK.t()
                added = torch.addmm(y.flatten(0, -2).to(A_RK.dtype), a_TR, (B_NR * factor).t()).to(y.dtype)
        ctx.save_for_backward(x, A_RK, B_NR, a_TR)
        return added.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A_RK, B_NR, a_TR = ctx.saved_tensors
        scaled_NR, dx = B_NR * ctx.factor, None
        if ctx.native:
            dy_TN, x_TK = training.rows(dy), training.rows(x)
            da_TR = training.lora_a(dy_TN, scaled_NR)
            dB_NR, dA_RK = training.lora_grad_rows(dy_TN, a_TR), training.lora_grad(da_TR, x_TK, ctx.dropout)
            if ctx.needs_input_grad[1]:
                dx = training.lora_b(da_TR, A_RK, None, x.dtype, ctx.dropout).view(x.shape)
        else:
            dy_TN = dy.flatten(0, -2).to(scaled_NR.dtype)
            da_TR = dy_TN @ scaled_NR
            dB_NR, dA_RK = dy_TN.t() @ a_TR, da_TR.t() @ _dropped(x, ctx.dropout, da_TR.dtype)
            if ctx.needs_input_grad[1]:
                dx_TK = da_TR @ A_RK
                dx = (dx_TK if ctx.dropout is None else dx_TK.mul_(ctx.dropout)).view(x.shape).to(x.dtype)
        return dy, dx, dA_RK, dB_NR * ctx.factor, None, None, None


def _dropped(x: Tensor, kept_TK: Tensor | None, dtype: torch.dtype) -> Tensor:
    x_TK = x.flatten(0, -2)
    return x_TK.to(dtype) if kept_TK is None else torch.where(kept_TK, x_TK, 0).to(dtype)


def kept(x: Tensor, p: float) -> Tensor:
    """What dropout leaves of x, (T, K) bool."""
    return torch.rand(x.numel() // x.shape[-1], x.shape[-1], device=x.device) >= p
