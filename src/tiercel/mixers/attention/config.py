"""Grouped-query attention, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from tiercel.errors import RequestError
from tiercel.mixers.attention.rope import RopeConfig
from tiercel.mixers.checks import check, check_sizes
from tiercel.mixers.spec import Buffer, Cost, MixerSpec, Param, linear


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerSpec):
    """Grouped-query attention; causal always, windowed when `window` is given."""

    kind: ClassVar[str] = "attention"
    layer: ClassVar[str] = "tiercel.mixers.attention.layer:Attention"
    has_gpu_kernels: ClassVar[bool] = True
    word: ClassVar[str | None] = "attention"
    tables: ClassVar[dict[str, type]] = {"rope": RopeConfig}
    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeConfig | None = None
    window: int | None = None  # a token sees itself and window − 1 before it
    qkv_bias: bool = False
    out_bias: bool = False
    scale: float | None = None  # None: head_dim^-0.5
    qk_norm: bool = False  # RMS norms on each head of q and k, before the rotation
    norm_all_heads: bool = False  # these norms are over all heads together
    output_gate: bool = False  # σ of a projection of the input times the output, before o
    gate_heads: bool = False  # one number for each head instead, where there is an output gate
    joined: bool = False  # files hold q, k and v in one matrix: quantized alike

    def __post_init__(self) -> None:
        check_sizes(self, "heads", "kv_heads", "head_dim")
        check(self.heads % self.kv_heads == 0, f"{self.heads} heads cannot share {self.kv_heads} key/value heads")
        check(self.rope is None or self.head_dim % 2 == 0, f"rotary needs an even head_dim, not {self.head_dim}")
        if self.window is not None:
            check_sizes(self, "window")

    def params(self, width: int) -> tuple[Param, ...]:
        out: list[Param] = []
        for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
            out += linear(
                name, (heads * self.head_dim, width), f"{name}_proj", f"attn_{name}", bias=self.qkv_bias,
                shard="column", reads_input=True, lora=True, role="attn_qkv" if self.joined else f"attn_{name}",
            )  # fmt: skip
        if self.output_gate:
            rows = self.heads * (1 if self.gate_heads else self.head_dim)
            out += linear(
                "gate", (rows, width), "gate_proj", "attn_gate", bias=self.qkv_bias and not self.gate_heads,
                shard="column", reads_input=True, lora=True, role="attn_q",
            )  # fmt: skip
        out += linear(
            "o", (width, self.heads * self.head_dim), "o_proj", "attn_output", bias=self.out_bias,
            init="residual", shard="row", lora=True, role="attn_output",
        )  # fmt: skip
        for name, heads in (("q_norm", self.heads), ("k_norm", self.kv_heads)) if self.qk_norm else ():
            size = self.head_dim * (heads if self.norm_all_heads else 1)
            out.append(Param(name=f"{name}.weight", shape=(size,), hf=f"{name}.weight",
                             gguf=f"attn_{name}.weight", init="ones", keep_fp32=True, decay=False))  # fmt: skip
        return tuple(out)

    def buffers(self) -> tuple[Buffer, ...]:
        shape = self.kv_heads, self.head_dim
        return tuple(Buffer(name=name, shape=shape, dtype="model", lifetime="page") for name in ("k", "v"))

    @property
    def segment_values(self) -> int:
        """For each head a vector, its sum and its largest score."""
        return self.heads * (self.head_dim + 2)

    def cost(self, tokens: int, context: int) -> Cost:
        """Pairs of a window W over n tokens: W n − W² / 2, four operations for each head and dim."""

        def pairs(n: int) -> float:
            window = min(self.window or n, n)
            return window * n - window * window / 2

        width = (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        return Cost(
            ops={"attend": 4 * self.heads * self.head_dim * (pairs(context + tokens) - pairs(context))},
            reads={"attend_read": 2 * self.kv_heads * self.head_dim * min(context, self.window or context)},
            width=width,
            between=width,
        )

    def describe(self) -> str:
        window = f", window {self.window}" if self.window else ""
        return f"attention {self.heads} × {self.head_dim}, {self.kv_heads} key/value{window}"

    def shard(self, size: int) -> Self:
        if self.qk_norm and self.norm_all_heads and size > 1:
            raise RequestError(f"norms over all heads cannot be split over {size} processes")
        heads = self._divided("heads", self.heads, size)
        return replace(self, heads=heads, kv_heads=self._divided("key/value heads", self.kv_heads, size))

    @classmethod
    def from_pattern(cls, width: int, **sizes: Any) -> Self:
        head_dim = sizes.get("head_dim") or min(64, width)
        heads = sizes.get("heads") or max(1, width // head_dim)
        theta = sizes.get("rope_theta", 10_000.0)
        return cls(
            heads=heads,
            kv_heads=sizes.get("kv_heads") or heads,
            head_dim=head_dim,
            rope=None if theta is None else RopeConfig(theta=float(theta)),
            window=sizes.get("window"),
        )
