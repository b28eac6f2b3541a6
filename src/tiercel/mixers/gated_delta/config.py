"""Gated delta rule, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.checks import check, check_sizes
from tiercel.mixers.spec import Buffer, Cost, MixerSpec, Param, Transform, linear


@dataclass(frozen=True, kw_only=True)
class GatedDeltaConfig(MixerSpec):
    """Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): scalar decay per value head.

    Value head h reads key head h // (value_heads / key_heads), or where they are tiled h mod key_heads.
    beta_max: 1, or 2 where eigenvalues may be negative.  norm_eps: of the gated norm; None: the model's.
    """

    kind: ClassVar[str] = "gated_delta"
    has_gpu_kernels: ClassVar[bool] = True
    layer: ClassVar[str] = "tiercel.mixers.gated_delta.layer:GatedDelta"
    word: ClassVar[str | None] = "gated_delta"
    report_class: ClassVar[str | None] = "gated_delta"
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv: int = 4
    beta_max: float = 1.0
    norm_eps: float | None = None
    tiled: bool = False
    chunk: int = 64

    def __post_init__(self) -> None:
        check_sizes(self, "key_heads", "value_heads", "key_dim", "value_dim", "conv", "chunk")
        check(
            self.value_heads % self.key_heads == 0,
            f"{self.value_heads} value heads cannot share {self.key_heads} key heads",
        )
        check(self.beta_max in (1.0, 2.0), f"beta_max must be 1 or 2, not {self.beta_max!r}")

    @property
    def keys(self) -> int:
        """Width of all heads' keys."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Width of all heads' values."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Width of what the convolution sees: q, k and v."""
        return 2 * self.keys + self.values

    def params(self, width: int) -> tuple[Param, ...]:
        H, C, I = self.value_heads, self.channels, self.values
        # of heads that read each key head once: a shard has part of every run
        tiles = (self.key_heads,) * (H // self.key_heads) if self.tiled else (H,)
        values = tuple(count * self.value_dim for count in tiles)
        runs = (self.keys, self.keys, *values)
        reads: dict[str, Any] = {"bias": False, "shard": "column", "reads_input": True}
        exact: dict[str, Any] = {"keep_fp32": True, "decay": False, "shard": "column"}
        return (
            *linear("qkv", (C, width), "in_proj_qkv", "attn_qkv", parts=runs, lora=True, **reads),
            *linear("z", (I, width), "in_proj_z", "attn_gate", parts=values, lora=True, **reads),
            *(
                Param(name=f"{name}.weight", shape=(H, width), hf=f"in_proj_{name}.weight", gguf=gguf, keep_fp32=True,
                      shard="column", parts=tiles, reads_input=True)
                for name, gguf in (("b", "ssm_beta.weight"), ("a", "ssm_alpha.weight"))
            ),
            Param(name="conv", shape=(C, self.conv), hf="conv1d.weight", gguf="ssm_conv1d.weight",
                  hf_form=Transform("conv"), parts=runs, **exact),
            Param(name="dt_bias", shape=(H,), hf="dt_bias", gguf="ssm_dt.bias", init="dt_bias", fp32_on_gpu=True,
                  parts=tiles, **exact),
            Param(name="A_log", shape=(H,), hf="A_log", gguf="ssm_a", gguf_forms=(Transform("neg_exp"),), init="A_log",
                  fp32_on_gpu=True, parts=tiles, **exact),
            Param(name="out_norm", shape=(self.value_dim,), hf="norm.weight", gguf="ssm_norm.weight", init="ones",
                  keep_fp32=True, decay=False),
            *linear("out", (width, I), "out_proj", "ssm_out", bias=False, init="residual", shard="row", parts=values,
                    lora=True),
        )  # fmt: skip

    def buffers(self) -> tuple[Buffer, ...]:
        Hk, H, K, V = self.key_heads, self.value_heads, self.key_dim, self.value_dim
        return (
            Buffer(name="conv_state", shape=(self.channels,), dtype="model", lifetime="pending", history=self.conv - 1),
            Buffer(name="k", shape=(Hk, K), dtype="model", lifetime="pending", token_dim=-2),
            Buffer(name="g", shape=(H,), dtype="float32", lifetime="pending"),
            Buffer(name="u", shape=(H, V), dtype="float32", lifetime="pending", token_dim=-2),
            Buffer(name="ssm_state", shape=(H, K, V), dtype="float32", lifetime="sequence"),
        )

    def cost(self, tokens: int, context: int) -> Cost:
        cells = self.values * self.key_dim
        width = 2 * self.channels + 2 * self.values
        return Cost(ops={"scan": 2 * tokens * cells}, reads={"scan_read": cells}, width=width)

    def describe(self) -> str:
        heads = f"{self.key_heads} key heads × {self.key_dim}, {self.value_heads} value heads × {self.value_dim}"
        return f"gated_delta {heads}"

    def shard(self, size: int) -> Self:
        heads = self._divided("key heads", self.key_heads, size)
        return replace(self, key_heads=heads, value_heads=self._divided("value heads", self.value_heads, size))

    @classmethod
    def in_place_of(cls, mixer: MixerSpec) -> Self:
        if not isinstance(mixer, AttentionConfig):
            return super().in_place_of(mixer)
        H, P = mixer.heads, mixer.head_dim
        return cls(key_heads=H, value_heads=H, key_dim=P, value_dim=P)

    @classmethod
    def from_pattern(cls, width: int, **sizes: Any) -> Self:
        dim = sizes.get("state") or 64
        heads = max(1, int(sizes.get("expand", 1.0) * width) // dim)
        return cls(key_heads=heads, value_heads=heads, key_dim=dim, value_dim=dim, chunk=sizes.get("chunk", 64))
