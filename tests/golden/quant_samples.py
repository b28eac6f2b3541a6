"""Matrices whose packing is compared with llama.cpp's: made the same on both sides of the comparison."""

from __future__ import annotations

import numpy as np

ROWS, WIDTH = 24, 1024


def samples() -> dict[str, np.ndarray]:
    """Name → (ROWS, WIDTH) float32, from well-behaved to heavy-tailed."""
    rng = np.random.default_rng(5)
    shape = (ROWS, WIDTH)
    loud = np.where(rng.random(WIDTH) < 0.02, 8.0, 1.0)  # a few columns larger than the rest, as trained models have
    made = {
        "normal": rng.standard_normal(shape) * 0.02,
        "laplace": rng.laplace(size=shape) * 0.02,
        "student3": rng.standard_t(3, size=shape) * 0.02,
        "loud columns": rng.standard_normal(shape) * 0.02 * loud,
        "shifted": rng.standard_normal(shape) * 0.01 + 0.03,
    }
    return {name: x.astype(np.float32) for name, x in made.items()}


def importance() -> np.ndarray:
    """(WIDTH) float32: mean squares of inputs, a few channels far above the rest."""
    return np.random.default_rng(6).lognormal(0.0, 1.5, WIDTH).astype(np.float32)


def squared_error(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None) -> float:
    """Σ w (y − x)², relative to Σ w x²."""
    w = np.ones(x.shape[1]) if weights is None else weights.astype(np.float64)
    x, y = x.astype(np.float64), y.astype(np.float64)
    return float((w * (y - x) ** 2).sum() / (w * x**2).sum())
