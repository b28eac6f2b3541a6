"""Mamba-1, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tiercel.mixers.checks import check_sizes


@dataclass(frozen=True, kw_only=True)
class Mamba1Config:
    """Selective scan (Gu & Dao 2023).  inner_norms: RMS norms on dt, B and C after x_proj (Jamba)."""

    kind: ClassVar[str] = "mamba1"
    inner: int
    state: int
    conv: int = 4
    dt_rank: int
    conv_bias: bool = True
    proj_bias: bool = False  # on in_proj and out_proj
    inner_norms: bool = False
    chunk: int = 128

    def __post_init__(self) -> None:
        check_sizes(self, "inner", "state", "conv", "dt_rank", "chunk")
