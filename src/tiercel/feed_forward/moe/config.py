"""Mixture of experts, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tiercel.mixers.checks import check, check_sizes


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Softmax over all experts, the `active` largest, weights renormalised to sum 1 or not."""

    kind: ClassVar[str] = "moe"
    width: int
    experts: int
    active: int
    renormalize: bool = True
    activation: str = "silu"

    def __post_init__(self) -> None:
        check_sizes(self, "width", "experts", "active")
        check(self.active <= self.experts, f"{self.active} active experts of {self.experts}")
        check(self.activation in ("silu", "gelu", "gelu_tanh", "relu"), f"unknown activation {self.activation!r}")
