"""Mamba-2, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.checks import check, check_sizes
from tiercel.mixers.spec import Buffer, Cost, MixerSpec, Param, Transform, linear


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(MixerSpec):
    """State space duality (Dao & Gu 2024): scalar decay per head, B and C shared within a group.

    gated_norm: "none"        y · silu(z)
                "gate_first"  norm(y · silu(z)), statistics over each group of inner / groups channels
                "norm_first"  norm(y) · silu(z)
    """

    kind: ClassVar[str] = "mamba2"
    layer: ClassVar[str] = "tiercel.mixers.mamba2.layer:Mamba2"
    has_gpu_kernels: ClassVar[bool] = True
    word: ClassVar[str | None] = "mamba2"
    report_class: ClassVar[str | None] = "mamba"
    heads: int
    head_dim: int
    state: int
    groups: int = 1
    conv: int = 4
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    gated_norm: str = "gate_first"
    dt_limit: tuple[float, float] = (0.0, math.inf)
    chunk: int = 128

    def __post_init__(self) -> None:
        check_sizes(self, "heads", "head_dim", "state", "groups", "conv", "chunk")
        check(self.heads % self.groups == 0, f"{self.heads} heads cannot share {self.groups} groups")
        check(self.gated_norm in ("none", "gate_first", "norm_first"), f"unknown gated_norm {self.gated_norm!r}")
        check(
            len(self.dt_limit) == 2 and 0 <= self.dt_limit[0] <= self.dt_limit[1],
            f"dt_limit must be two numbers, low ≤ high, not {self.dt_limit!r}",
        )

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Width of what the convolution sees: x, B and C."""
        return self.inner + 2 * self.groups * self.state

    def params(self, width: int) -> tuple[Param, ...]:
        H, I, C, GN = self.heads, self.inner, self.channels, self.groups * self.state
        runs = I, GN, GN  # x, B, C
        out = list(linear(
            "in_proj", (I + C + H, width), "in_proj", "ssm_in", bias=self.in_bias, bias_gguf=None,
            shard="column", parts=(I, *runs, H), reads_input=True, lora=True,
        ))  # fmt: skip
        exact: dict[str, Any] = {"keep_fp32": True, "decay": False, "shard": "column"}
        out.append(Param(name="conv", shape=(C, self.conv), hf="conv1d.weight", gguf="ssm_conv1d.weight",
                         hf_form=Transform("conv"), parts=runs, **exact))  # fmt: skip
        if self.conv_bias:
            out.append(Param(name="conv_bias", shape=(C,), hf="conv1d.bias", gguf="ssm_conv1d.bias", init="zeros",
                             parts=runs, **exact))  # fmt: skip
        column = Transform("column")
        out += [
            Param(name="dt_bias", shape=(H,), hf="dt_bias", gguf="ssm_dt.bias", init="dt_bias", fp32_on_gpu=True,
                  **exact),
            Param(name="A_log", shape=(H,), hf="A_log", gguf="ssm_a", gguf_forms=(Transform("neg_exp"), column),
                  init="A_log", fp32_on_gpu=True, **exact),
            Param(name="D", shape=(H,), hf="D", gguf="ssm_d", gguf_forms=(column,), init="ones", fp32_on_gpu=True,
                  **exact),
        ]  # fmt: skip
        if self.gated_norm != "none":
            out.append(Param(name="out_norm", shape=(I,), hf="norm.weight", gguf="ssm_norm.weight",
                             gguf_forms=(Transform("groups", self.groups),), init="ones", **exact))  # fmt: skip
        out += linear(
            "out_proj", (width, I), "out_proj", "ssm_out", bias=self.out_bias, bias_gguf=None, init="residual",
            shard="row", lora=True,
        )  # fmt: skip
        return tuple(out)

    def buffers(self) -> tuple[Buffer, ...]:
        H, P, N, G = self.heads, self.head_dim, self.state, self.groups
        return (
            Buffer(name="conv_state", shape=(self.channels,), dtype="model", lifetime="pending", history=self.conv - 1),
            Buffer(name="x", shape=(H, P), dtype="model", lifetime="pending", token_dim=-2),
            Buffer(name="dt", shape=(H,), dtype="float32", lifetime="pending"),
            Buffer(name="B", shape=(G, N), dtype="model", lifetime="pending", token_dim=-2),
            Buffer(name="ssm_state", shape=(H, N, P), dtype="float32", lifetime="sequence"),
        )

    def cost(self, tokens: int, context: int) -> Cost:
        cells = self.inner * self.state
        width = 2 * (self.inner + self.channels) + self.heads
        return Cost(ops={"scan": tokens * cells}, reads={"scan_read": cells}, width=width)

    def describe(self) -> str:
        return f"mamba2 {self.heads} × {self.head_dim}, state {self.state}, {self.groups} group(s)"

    def shard(self, size: int) -> Self:
        heads = self._divided("Mamba heads", self.heads, size)
        return replace(self, heads=heads, groups=self._divided("groups", self.groups, size))

    @classmethod
    def in_place_of(cls, mixer: MixerSpec) -> Self:
        if not isinstance(mixer, AttentionConfig):
            return super().in_place_of(mixer)
        H, P, bias = mixer.heads, mixer.head_dim, mixer.qkv_bias
        return cls(heads=H, head_dim=P, state=P, groups=H, in_bias=bias, out_bias=mixer.out_bias, chunk=64)

    @classmethod
    def from_pattern(cls, width: int, **sizes: Any) -> Self:
        inner = int(sizes.get("expand", 2.0) * width)
        head_dim = math.gcd(inner, sizes.get("mamba_head_dim", 64))
        return cls(
            heads=inner // head_dim,
            head_dim=head_dim,
            state=sizes.get("state") or 128,
            groups=sizes.get("groups", 1),
            chunk=sizes.get("chunk", 128),
        )
