"""Gated MLP, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tiercel.mixers.checks import check, check_sizes


@dataclass(frozen=True, kw_only=True)
class GatedMLPConfig:
    """down(act(gate(x)) · up(x))."""

    kind: ClassVar[str] = "gated_mlp"
    width: int
    activation: str = "silu"
    bias: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, "width")
        check(self.activation in ("silu", "gelu", "gelu_tanh", "relu"), f"unknown activation {self.activation!r}")
