"""Search for scales that make Σ w (value − x)² small.

Letters: S sub-blocks of a block, V values of a sub-block, N blocks; x and weights w are (S, V, N), so that every
operation runs along the blocks.

Best scales cannot be computed, for the levels q depend on them; but for given levels they are a least-squares
solution, and for given scales the best levels are the nearest ones.  So:

    1. per sub-block, a dozen ways to spread the levels over the values, each with the scale (and minimum) that fits
       it best, then twice: nearest levels, fitting scales again
    2. these scales become small integers times a float16 of the whole block, and the nearest levels are taken
    3. three times: the integers, then the float16s, are fitted to the levels, and the levels to them
    4. whichever step had the least error wins

llama.cpp (ggml-quants.c) searches finer in step 1, and does not fit the float16s to the levels that came out.

Nothing is fused and sums have one order, so that `ops/cpu/quantize.cpp` gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SPREADS = tuple(i / 4 for i in range(-6, 5))  # offsets to the number of levels over the range of the values
FITS, ROUNDS = 2, 3


class AffineBlock(NamedTuple):
    """value = d · scale · q − dmin · min"""

    d: Tensor  # (N)
    dmin: Tensor  # (N)
    scales: Tensor  # (S, N) whole numbers in float32
    mins: Tensor  # (S, N) likewise
    q: Tensor  # (S, V, N) likewise


class SymmetricBlock(NamedTuple):
    """value = d · scale · q"""

    d: Tensor
    scales: Tensor
    q: Tensor


# ── sub-blocks


def affine(x: Tensor, w: Tensor, top: int, *, below_zero: bool = False) -> tuple[Tensor, Tensor]:
    """Scales s and minima m (S, N) of x ≈ s q + m with q in 0 … top.  below_zero: m may not be positive."""
    low = x.amin(1)
    low = low.clamp(max=0) if below_zero else low
    y, step = x - low.unsqueeze(1), inverse(x.amax(1) - low)
    fit = _AffineFit(y, w, -low if below_zero else None)
    for spread in SPREADS:
        fit.consider(nearest(y * (step * (top + spread)).unsqueeze(1), 0, top))
    for _ in range(FITS):
        fit.consider(nearest((y - fit.m.unsqueeze(1)) * inverse(fit.s).unsqueeze(1), 0, top))
    return fit.s, fit.m + low


class _AffineFit:
    """The best s, m yet of y ≈ s q + m, m ≤ limit.  gain is Σ w y² less the error."""

    def __init__(self, y: Tensor, w: Tensor, limit: Tensor | None) -> None:
        self.y, self.w, self.limit = y, w, limit
        self.W, self.Y = total(w), total(w * y)
        self.s, self.m, self.gain = torch.zeros_like(self.W), torch.zeros_like(self.W), torch.zeros_like(self.W)

    def consider(self, q: Tensor) -> None:
        wq = self.w * q
        Q, QQ, QY = total(wq), total(wq * q), total(wq * self.y)
        determinant = self.W * QQ - Q * Q
        apart = determinant > 1e-6 * (self.W * QQ)  # with all levels alike, only s can be fitted
        divisor = torch.where(apart, determinant, 1)
        m = torch.where(apart, (QQ * self.Y - Q * QY) / divisor, 0)
        if self.limit is not None:
            m = torch.minimum(m, self.limit)
        free = apart & (m < self.limit) if self.limit is not None else apart
        s = torch.where(free, (self.W * QY - self.Y * Q) / divisor, (QY - m * Q) * inverse(QQ))
        gain = 2 * (s * QY + m * self.Y) - (s * s * QQ + 2 * (s * m) * Q + m * m * self.W)
        better = (s > 0) & (gain > self.gain)
        self.s, self.m = torch.where(better, s, self.s), torch.where(better, m, self.m)
        self.gain = torch.where(better, gain, self.gain)


def symmetric(x: Tensor, w: Tensor, top: int) -> Tensor:
    """Scales s (S, N) of x ≈ s q with q in −top … top − 1.  The sign is free: the farthest value may take −top."""
    high, low = x.amax(1), x.amin(1)
    step = inverse(torch.where(-low > high, low, high))
    best, gain = torch.zeros_like(step), torch.zeros_like(step)

    def consider(q: Tensor) -> None:
        nonlocal best, gain
        wq = w * q
        QQ, QX = total(wq * q), total(wq * x)
        s = QX * inverse(QQ)
        better = s * QX > gain
        best, gain = torch.where(better, s, best), torch.where(better, s * QX, gain)

    for spread in SPREADS:
        consider(nearest(x * (step * -(top + spread)).unsqueeze(1), -top, top - 1))
        consider(nearest(x * (step * (top - 1 + spread)).unsqueeze(1), -top, top - 1))
    for _ in range(FITS):
        consider(nearest(x * inverse(best).unsqueeze(1), -top, top - 1))
    return best


# ── blocks


def affine_block(x: Tensor, w: Tensor, top: int, max_scale: int) -> AffineBlock:
    """Levels 0 … top, scales and mins 0 … max_scale."""
    s, m = affine(x, w, top, below_zero=True)
    d, dmin = half(s.amax(0) / max_scale), half((-m).amax(0) / max_scale)
    scales = nearest(s * inverse(d), 0, max_scale)
    mins = nearest(-m * inverse(dmin), 0, max_scale)
    W, X = total(w), total(w * x)
    best, lowest_error = None, None
    for round in range(ROUNDS + 1):
        step, low = (d * scales).unsqueeze(1), (dmin * mins).unsqueeze(1)
        q = nearest((x + low) * inverse(step), 0, top)
        off = step * q - low - x
        error = across(total(w * (off * off)))
        block = AffineBlock(d, dmin, scales, mins, q)
        if best is None or lowest_error is None:
            best, lowest_error = block, error
        else:
            better = error < lowest_error
            best, lowest_error = (
                AffineBlock(*map(torch.where, [better] * 5, block, best)),
                torch.where(better, error, lowest_error),
            )
        if round == ROUNDS:
            break
        wq = w * q
        Q, QQ, QX = total(wq), total(wq * q), total(wq * x)
        scales, mins = _affine_integers(d, dmin, scales, W, X, Q, QQ, QX, max_scale)
        d, dmin = _affine_halves(d, dmin, scales, mins, W, X, Q, QQ, QX)
    assert best is not None
    return best


def _affine_integers(
    d: Tensor, dmin: Tensor, scales: Tensor, W: Tensor, X: Tensor, Q: Tensor, QQ: Tensor, QX: Tensor, max_scale: int
) -> tuple[Tensor, Tensor]:
    """The scale one lower, as it is, or one higher, each with the min that suits it: what fits the levels best."""
    ratio = inverse(W) * inverse(dmin)
    best = None
    for change in (-1, 0, 1):
        trial = (scales + change).clamp(0, max_scale)
        s = d * trial
        mins = nearest((s * Q - X) * ratio, 0, max_scale)
        m = dmin * mins
        error = s * s * QQ - 2 * (s * m) * Q + m * m * W - 2 * (s * QX) + 2 * (m * X)
        if best is None:
            best = (trial, mins, error)
        else:
            better = error < best[2]
            best = tuple(map(torch.where, [better] * 3, (trial, mins, error), best))  # type: ignore[assignment]
    assert best is not None
    return best[0], best[1]


def _affine_halves(
    d: Tensor, dmin: Tensor, scales: Tensor, mins: Tensor, W: Tensor, X: Tensor, Q: Tensor, QQ: Tensor, QX: Tensor
) -> tuple[Tensor, Tensor]:
    """d and dmin by least squares over all sub-blocks; d alone where the two cannot be distinguished."""
    A, B, C = across(scales * scales * QQ), across(scales * mins * Q), across(mins * mins * W)
    P, R = across(scales * QX), across(mins * X)
    determinant = A * C - B * B
    divisor = torch.where(determinant > 0, determinant, 1)
    both_d, both_dmin = (P * C - R * B) / divisor, (P * B - R * A) / divisor
    both = (determinant > 1e-6 * (A * C)) & (both_d > 0) & (both_dmin > 0)
    d_only = (P + dmin * B) * inverse(A)
    d = torch.where(both, both_d, torch.where(d_only > 0, d_only, d))
    return half(d), half(torch.where(both, both_dmin, dmin))


def symmetric_block(x: Tensor, w: Tensor, top: int, max_scale: int) -> SymmetricBlock:
    """Levels −top … top − 1, scales −max_scale … max_scale − 1."""
    s = symmetric(x, w, top)
    high, low = s.amax(0), s.amin(0)
    d = half(torch.where(-low > high, low, high) / -max_scale)
    scales = nearest(s * inverse(d), -max_scale, max_scale - 1)
    best, lowest_error = None, None
    for round in range(ROUNDS + 1):
        step = (d * scales).unsqueeze(1)
        q = nearest(x * inverse(step), -top, top - 1)
        off = step * q - x
        error = across(total(w * (off * off)))
        block = SymmetricBlock(d, scales, q)
        if best is None or lowest_error is None:
            best, lowest_error = block, error
        else:
            better = error < lowest_error
            best = SymmetricBlock(*map(torch.where, [better] * 3, block, best))
            lowest_error = torch.where(better, error, lowest_error)
        if round == ROUNDS:
            break
        wq = w * q
        QQ, QX = total(wq * q), total(wq * x)
        scales = nearest(QX * inverse(QQ) * inverse(d), -max_scale, max_scale - 1)
        fitted = across(scales * QX) * inverse(across(scales * scales * QQ))
        d = half(torch.where(fitted != 0, fitted, d))
    assert best is not None
    return best


# ── arithmetic


def inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0 or so near that products with 1 / x could overflow."""
    r = 1 / x
    return torch.where(r.abs() < 1e30, r, 0)


def nearest(x: Tensor, low: int, high: int) -> Tensor:
    """The nearest whole number in low … high, halves to even."""
    return x.clamp_(low, high).round_()


def half(x: Tensor) -> Tensor:
    """Rounded to float16; there is one zero."""
    return (x + 0.0).half().float()


def total(v: Tensor) -> Tensor:
    """(S, V, N) → (S, N): four running sums, then these."""
    first, *rest = v.unflatten(1, (-1, 4)).unbind(1)
    four = first.clone()
    for part in rest:
        four += part
    two = four[:, :2] + four[:, 2:]
    return torch.add(two[:, 0], two[:, 1])


def across(v: Tensor) -> Tensor:
    """(S, N) → (N), one after the other."""
    out = v[0].clone()
    for part in v[1:]:
        out += part
    return out
