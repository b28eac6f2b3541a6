"""Rotary position embedding, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tiercel.mixers.checks import check


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021), rotate-half pairing.

    scaling: none · linear · dynamic · llama3 · yarn · longrope · proportional  (as in transformers)
    factors: per-frequency divisors where the file gives them (longrope, GGUF `rope_freqs.weight`)
    """

    theta: float = 10_000.0
    fraction: float = 1.0  # share of the head dim that is rotated, from the front; proportional: of its frequencies
    scaling: str = "none"
    factor: float = 1.0
    original_length: int | None = None
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # scales cos and sin; None: 1, or yarn's own
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    factors: tuple[float, ...] | None = None
    long_factors: tuple[float, ...] | None = None  # longrope, beyond original_length

    def __post_init__(self) -> None:
        check(math.isfinite(self.theta) and self.theta > 0, f"rope theta must be positive, not {self.theta!r}")
        check(0 < self.fraction <= 1, f"rope fraction must be in (0, 1], not {self.fraction!r}")
        check(math.isfinite(self.factor) and self.factor > 0, f"rope factor must be positive, not {self.factor!r}")
