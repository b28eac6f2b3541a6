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
from tiercel.ops.linear import QTensor


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
        y = self.base_layer(x, scale)
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
    """y + multiplier · scale · B A dropout(x) in float32; A, B and x have gradients, and x is kept as it came."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A_RK: Tensor, B_NR: Tensor, scale: float, multiplier: Tensor | None, p: float
    ) -> Tensor:
        out = 1.0 if multiplier is None else multiplier.view(-1, 1)
        ctx.kept, ctx.factor, ctx.types = None if p == 0 else kept(x, p), out * scale / (1 - p), (y.dtype, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            a_TR = _dropped(x, ctx.kept, A_RK.dtype) @ A_RK.t()
            added = torch.addmm(y.flatten(0, -2).to(A_RK.dtype), a_TR, (B_NR * ctx.factor).t())
        ctx.save_for_backward(x, A_RK, B_NR, a_TR)
        return added.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A_RK, B_NR, a_TR = ctx.saved_tensors
        dy_TN = dy.flatten(0, -2)
        da_TR = dy_TN @ (B_NR * ctx.factor)
        dB_NR, dA_RK, dx = (dy_TN.t() @ a_TR) * ctx.factor, da_TR.t() @ _dropped(x, ctx.kept, da_TR.dtype), None
        if ctx.needs_input_grad[1]:
            dx_TK = da_TR @ A_RK
            dx = (dx_TK if ctx.kept is None else dx_TK.mul_(ctx.kept)).view(x.shape).to(ctx.types[1])
        return dy.to(ctx.types[0]), dx, dA_RK, dB_NR, None, None, None


def _dropped(x: Tensor, kept_TK: Tensor | None, dtype: torch.dtype) -> Tensor:
    x_TK = x.flatten(0, -2)
    return x_TK.to(dtype) if kept_TK is None else torch.where(kept_TK, x_TK, 0).to(dtype)


def kept(x: Tensor, p: float) -> Tensor:
    """What dropout leaves of x, (T, K) bool.  Four chances from one random number: drawing each costs the CPU as much
    as a product with a matrix."""
    count = x.numel()
    random = torch.empty(-(-count // 4), dtype=torch.int64, device=x.device).random_(-(1 << 63), None)
    return (random.view(torch.int16)[:count] >= round(p * 65536) - 32768).view(-1, x.shape[-1])
