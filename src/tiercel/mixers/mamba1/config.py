"""Mamba-1, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from tiercel.errors import RequestError
from tiercel.mixers.checks import check, check_sizes
from tiercel.mixers.spec import Buffer, Cost, MixerSpec, Param, Transform, linear


@dataclass(frozen=True, kw_only=True)
class Mamba1Config(MixerSpec):
    """Selective scan (Gu & Dao 2023).

    inner_norms   RMS norms on dt, B and C after x_proj (Jamba); norm_weights: with weights (Falcon-Mamba: without)
    norm_eps      of these norms; None: the model's
    """

    kind: ClassVar[str] = "mamba1"
    layer: ClassVar[str] = "tiercel.mixers.mamba1.layer:Mamba1"
    word: ClassVar[str | None] = "mamba1"
    report_class: ClassVar[str | None] = "mamba"
    inner: int
    state: int
    conv: int = 4
    dt_rank: int
    conv_bias: bool = True
    proj_bias: bool = False  # on in_proj and out_proj
    inner_norms: bool = False
    norm_weights: bool = True
    norm_eps: float | None = None
    chunk: int = 128

    def __post_init__(self) -> None:
        check_sizes(self, "inner", "state", "conv", "dt_rank", "chunk")
        eps = self.norm_eps
        check(eps is None or 0 <= eps < 1, f"norm_eps must be small, not {eps!r}")

    def params(self, width: int) -> tuple[Param, ...]:
        I, N, R = self.inner, self.state, self.dt_rank
        out = list(linear(
            "in_proj", (2 * I, width), "in_proj", "ssm_in", bias=self.proj_bias, bias_gguf=None, lora=True
        ))  # fmt: skip
        out.append(Param(
            name="conv", shape=(I, self.conv), hf="conv1d.weight", gguf="ssm_conv1d.weight",
            hf_form=Transform("conv"), keep_fp32=True, decay=False,
        ))  # fmt: skip
        if self.conv_bias:
            out.append(Param(name="conv_bias", shape=(I,), hf="conv1d.bias", gguf="ssm_conv1d.bias", init="zeros",
                             keep_fp32=True, decay=False))  # fmt: skip
        out += linear("x_proj", (R + 2 * N, I), "x_proj", "ssm_x", bias=False)
        out += linear("dt", (I, R), "dt_proj", "ssm_dt", bias=False)
        out += [
            Param(name="dt_bias", shape=(I,), hf="dt_proj.bias", gguf="ssm_dt.bias", init="dt_bias", **_EXACT),
            Param(name="A_log", shape=(I, N), hf="A_log", gguf="ssm_a", gguf_forms=(Transform("neg_exp"),),
                  init="A_log", **_EXACT),
            Param(name="D", shape=(I,), hf="D", gguf="ssm_d", init="ones", **_EXACT),
        ]  # fmt: skip
        for name, size in (("dt", R), ("B", N), ("C", N)) if self.inner_norms and self.norm_weights else ():
            out.append(Param(
                name=f"{name}_norm.weight", shape=(size,), hf=f"{name.lower()}_layernorm.weight",
                gguf=f"ssm_{name.lower()}_norm.weight", init="ones", keep_fp32=True, decay=False,
            ))  # fmt: skip
        out += linear(
            "out_proj", (width, I), "out_proj", "ssm_out", bias=self.proj_bias, bias_gguf=None, init="residual",
            lora=True,
        )  # fmt: skip
        return tuple(out)

    def buffers(self) -> tuple[Buffer, ...]:
        I, N = self.inner, self.state
        return (
            Buffer(name="conv_state", shape=(I,), dtype="model", lifetime="pending", history=self.conv - 1),
            Buffer(name="x", shape=(I,), dtype="model", lifetime="pending"),
            Buffer(name="dt", shape=(I,), dtype="float32", lifetime="pending"),
            Buffer(name="B", shape=(N,), dtype="model", lifetime="pending"),
            Buffer(name="ssm_state", shape=(N, I), dtype="float32", lifetime="sequence"),
            Buffer(name="running", shape=(N, I), dtype="float32", lifetime="scratch"),
        )

    def cost(self, tokens: int, context: int) -> Cost:
        cells = self.inner * self.state
        return Cost(ops={"scan1": tokens * cells}, reads={"scan1_read": cells}, width=5 * self.inner)

    def describe(self) -> str:
        return f"mamba1 {self.inner} channels, state {self.state}"

    def shard(self, size: int) -> Self:
        raise RequestError(f"{self.kind} layers cannot be split over {size} processes yet")

    @classmethod
    def from_pattern(cls, width: int, **sizes: Any) -> Self:
        inner = int(sizes.get("expand", 2.0) * width)
        rank = math.ceil(width / 16)
        return cls(inner=inner, state=sizes.get("state") or 16, dt_rank=rank, chunk=sizes.get("chunk", 128))


_EXACT: dict[str, Any] = {"keep_fp32": True, "fp32_on_gpu": True, "decay": False}
