"""Mamba-2, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from tiercel.mixers.checks import check, check_sizes


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """State space duality (Dao & Gu 2024): scalar decay per head, B and C shared within a group.

    gated_norm: "none"        y · silu(z)
                "gate_first"  norm(y · silu(z)), statistics over each group of inner / groups channels
                "norm_first"  norm(y) · silu(z)
    """

    kind: ClassVar[str] = "mamba2"
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
