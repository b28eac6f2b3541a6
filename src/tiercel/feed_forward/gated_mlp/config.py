"""Gated MLP, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from tiercel.mixers.checks import check, check_sizes
from tiercel.mixers.spec import Cost, FeedForwardSpec, Param, linear


@dataclass(frozen=True, kw_only=True)
class GatedMLPConfig(FeedForwardSpec):
    """down(act(gate(x)) · up(x))."""

    kind: ClassVar[str] = "gated_mlp"
    layer: ClassVar[str] = "tiercel.feed_forward.gated_mlp.layer:GatedMLP"
    word: ClassVar[str | None] = "mlp"
    width: int
    activation: str = "silu"
    bias: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, "width")
        check(self.activation in ("silu", "gelu", "gelu_tanh", "relu"), f"unknown activation {self.activation!r}")

    def params(self, width: int) -> tuple[Param, ...]:
        out: list[Param] = []
        for name, shape in (("gate", (self.width, width)), ("up", (self.width, width)), ("down", (width, self.width))):
            down = name == "down"
            out += linear(
                name, shape, f"{name}_proj", f"ffn_{name}", bias=self.bias, shard="row" if down else "column",
                init="residual" if down else "linear", reads_input=not down, lora=True, role=f"ffn_{name}",
            )  # fmt: skip
        return tuple(out)

    def cost(self, tokens: int) -> Cost:
        return Cost(width=3 * self.width, between=3 * self.width)

    def describe(self) -> str:
        return f"gated_mlp {self.width}, {self.activation}"

    def shard(self, size: int) -> Self:
        return replace(self, width=self._divided("columns of an MLP", self.width, size))

    @classmethod
    def from_pattern(cls, width: int, **sizes: Any) -> Self:
        return cls(width=sizes.get("ffn_width") or 4 * width)
