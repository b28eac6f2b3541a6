"""Mixture of experts, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from tiercel.errors import RequestError
from tiercel.mixers.checks import check, check_sizes
from tiercel.mixers.spec import Cost, FeedForwardSpec, Param


@dataclass(frozen=True, kw_only=True)
class MoEConfig(FeedForwardSpec):
    """Softmax over all experts, the `active` largest, weights renormalised to sum 1 or not."""

    kind: ClassVar[str] = "moe"
    layer: ClassVar[str] = "tiercel.feed_forward.moe.layer:MoE"
    word: ClassVar[str | None] = "moe"
    captured: ClassVar[bool] = False  # the choice of experts is read by the host
    width: int
    experts: int
    active: int
    renormalize: bool = True
    activation: str = "silu"

    def __post_init__(self) -> None:
        check_sizes(self, "width", "experts", "active")
        check(self.active <= self.experts, f"{self.active} active experts of {self.experts}")
        check(self.activation in ("silu", "gelu", "gelu_tanh", "relu"), f"unknown activation {self.activation!r}")

    def params(self, width: int) -> tuple[Param, ...]:
        E, F, D = self.experts, self.width, width
        router = Param(name="router.weight", shape=(E, D), hf="gate.weight", gguf="ffn_gate_inp.weight", keep_fp32=True)
        shapes = {"gate": (E, F, D), "up": (E, F, D), "down": (E, D, F)}
        return router, *(
            Param(
                name=name, shape=shape, hf=f"experts.{{e}}.{name}_proj.weight", gguf=f"ffn_{name}_exps.weight",
                init="residual" if name == "down" else "linear", role=f"ffn_{name}", reads_input=name != "down",
            )
            for name, shape in shapes.items()
        )  # fmt: skip

    def cost(self, tokens: int) -> Cost:
        return Cost(width=3 * self.width * self.active, between=3 * self.width * self.active)

    def routing(self) -> tuple[int, int]:
        return self.active, self.experts

    @property
    def label(self) -> str:
        return f"moe {self.active} of {self.experts}"

    def describe(self) -> str:
        return f"moe {self.active} of {self.experts} experts of {self.width}, {self.activation}"

    def shard(self, size: int) -> Self:
        raise RequestError(f"layers of experts cannot be split over {size} processes yet")

    @classmethod
    def from_pattern(cls, width: int, **sizes: Any) -> Self:
        return cls(
            width=sizes.get("ffn_width") or 4 * width, experts=sizes.get("experts", 8), active=sizes.get("active", 2)
        )
