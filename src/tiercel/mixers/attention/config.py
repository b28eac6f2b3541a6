"""Grouped-query attention, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tiercel.mixers.attention.rope import RopeConfig
from tiercel.mixers.checks import check, check_sizes


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention; causal always, windowed when `window` is given."""

    kind: ClassVar[str] = "attention"
    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeConfig | None = None
    window: int | None = None  # a token sees itself and window − 1 before it
    qkv_bias: bool = False
    out_bias: bool = False
    scale: float | None = None  # None: head_dim^-0.5

    def __post_init__(self) -> None:
        check_sizes(self, "heads", "kv_heads", "head_dim")
        check(self.heads % self.kv_heads == 0, f"{self.heads} heads cannot share {self.kv_heads} key/value heads")
        check(self.rope is None or self.head_dim % 2 == 0, f"rotary needs an even head_dim, not {self.head_dim}")
        if self.window is not None:
            check_sizes(self, "window")
