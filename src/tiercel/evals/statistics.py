"""How sure a mean is.

wilson(right, n)      one yes or no per item
bootstrap(scores)     scores per item that are themselves means of several samples: items are drawn again
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Z_95_PERCENT = 1.959963984540054


def mean(values: Sequence[float]) -> float:
    """Return the mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def wilson(right: float, n: int, z: float = Z_95_PERCENT) -> tuple[float, float]:
    """Interval of a share, honest at 0, at 1 and for few items."""
    if n == 0:
        return 0.0, 1.0
    p, zz = right / n, z * z
    middle = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap(scores: Sequence[float], times: int = 10_000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean over items; the same for the same scores."""
    import numpy as np

    if not scores:
        return 0.0, 1.0
    values, draw = np.asarray(scores, dtype=np.float64), np.random.default_rng(seed)
    block = max(1, 2_000_000 // len(values))
    means = np.concatenate([
        values[draw.integers(0, len(values), (min(block, times - done), len(values)))].mean(axis=1)
        for done in range(0, times, block)
    ])  # fmt: skip
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
