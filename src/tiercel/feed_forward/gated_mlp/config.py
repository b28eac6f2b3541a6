"""Gated MLP, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from tiercel.mixers.checks import check, check_sizes
from tiercel.mixers.spec import Cost, FeedForwardSpec, Param, linear

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")  # relu2: relu(x)²


@dataclass(frozen=True, kw_only=True)
class GatedMLPConfig(FeedForwardSpec):
    """down(act(gate(x)) · up(x)); gated False: down(act(up(x)))."""

    kind: ClassVar[str] = "gated_mlp"
    layer: ClassVar[str] = "tiercel.feed_forward.gated_mlp.layer:GatedMLP"
    word: ClassVar[str | None] = "mlp"
    width: int
    activation: str = "silu"
    bias: bool = False
    gated: bool = True

    def __post_init__(self) -> None:
        check_sizes(self, "width")
        check(self.activation in ACTIVATIONS, f"unknown activation {self.activation!r}")

    def params(self, width: int) -> tuple[Param, ...]:
        out: list[Param] = []
        for name in matrices(self.gated):
            down = name == "down"
            out += linear(
                name, (width, self.width) if down else (self.width, width), f"{name}_proj", f"ffn_{name}",
                bias=self.bias, shard="row" if down else "column", init="residual" if down else "linear",
                reads_input=not down, lora=True, role=f"ffn_{name}",
            )  # fmt: skip
        return tuple(out)

    def cost(self, tokens: int) -> Cost:
        count = len(matrices(self.gated))
        return Cost(width=count * self.width, between=count * self.width)

    def describe(self) -> str:
        return f"gated_mlp {self.width}, {self.activation}" + ("" if self.gated else ", no gate")

    def shard(self, size: int) -> Self:
        return replace(self, width=self._divided("columns of an MLP", self.width, size))

    @classmethod
    def from_pattern(cls, width: int, **sizes: Any) -> Self:
        return cls(width=sizes.get("ffn_width") or 4 * width)


def matrices(gated: bool) -> tuple[str, ...]:
    """The matrices of an MLP, in the order of files."""
    return ("gate", "up", "down") if gated else ("up", "down")
