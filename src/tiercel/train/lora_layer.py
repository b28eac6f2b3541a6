"""PEFT's LoRA layer over our Linear, with a multiplier: y = s W x + s · (alpha / r) B A x, A and B in the
checkpoint's values."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners import lora
from torch import Tensor, nn

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
                A, B = self.lora_A[name], self.lora_B[name]
                dtype = cast(Tensor, A.weight).dtype
                added = B(A(self.lora_dropout[name](x.to(dtype)))) * (self.scaling[name] * scale)
                y = y + (added if self.multiplier is None else added * self.multiplier).to(y.dtype)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if isinstance(self.get_base_layer().weight, QTensor):
            raise RequestError("these weights are packed to be run: write the merged model with `tiercel merge`")
        super().merge(safe_merge, adapter_names)

    def get_delta_weight(self, adapter: str) -> Tensor:
        delta = super().get_delta_weight(adapter)
        return delta if self.multiplier is None else delta * self.multiplier.view(-1, 1)
