"""Gated short convolution, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from tiercel.mixers.checks import check_sizes
from tiercel.mixers.spec import Buffer, Cost, MixerSpec, Param, Transform, linear


@dataclass(frozen=True, kw_only=True)
class ShortConvConfig(MixerSpec):
    """Gated short convolution (LFM2, arXiv 2511.23404): C · conv(B · x), without an activation.

    bias: of both projections and of the convolution.
    """

    kind: ClassVar[str] = "short_conv"
    has_gpu_kernels: ClassVar[bool] = True
    layer: ClassVar[str] = "tiercel.mixers.short_conv.layer:ShortConv"
    word: ClassVar[str | None] = "short_conv"
    report_class: ClassVar[str | None] = "short_conv"
    channels: int
    conv: int = 3
    bias: bool = False
    chunk: int = 64

    def __post_init__(self) -> None:
        check_sizes(self, "channels", "conv", "chunk")

    def params(self, width: int) -> tuple[Param, ...]:
        C, runs = self.channels, (self.channels,) * 3  # B, C, x
        exact: dict[str, Any] = {"keep_fp32": True, "decay": False, "shard": "column"}
        out = list(linear(
            "in_proj", (3 * C, width), "in_proj", "shortconv.in_proj", bias=self.bias, bias_gguf=None, shard="column",
            parts=runs, reads_input=True, lora=True,
        ))  # fmt: skip
        out.append(Param(name="conv", shape=(C, self.conv), hf="conv.weight", gguf="shortconv.conv.weight",
                         hf_form=Transform("conv"), **exact))  # fmt: skip
        if self.bias:
            out.append(Param(name="conv_bias", shape=(C,), hf="conv.bias", gguf=None, init="zeros", **exact))
        out += linear(
            "out_proj", (width, C), "out_proj", "shortconv.out_proj", bias=self.bias, bias_gguf=None, init="residual",
            shard="row", lora=True,
        )  # fmt: skip
        return tuple(out)

    def buffers(self) -> tuple[Buffer, ...]:
        return (
            Buffer(name="conv_state", shape=(self.channels,), dtype="model", lifetime="pending", history=self.conv - 1),
        )

    def cost(self, tokens: int, context: int) -> Cost:
        return Cost(width=4 * self.channels, between=4 * self.channels)

    def describe(self) -> str:
        return f"short_conv {self.channels} channels, {self.conv} taps"

    def shard(self, size: int) -> Self:
        return replace(self, channels=self._divided("channels", self.channels, size))

    @classmethod
    def from_pattern(cls, width: int, **sizes: Any) -> Self:
        return cls(channels=width)
