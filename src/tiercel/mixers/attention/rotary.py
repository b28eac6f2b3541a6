"""Rotary position embedding (Su et al. 2021), rotate-half pairing, with the scalings checkpoints use.

    angle(p, i) = p · f_i,  f_i = theta^(−2i/R)      R rotated dims, i < R/2
    (u, w) → (u cos − w sin, w cos + u sin)          u, w: the first and second half of the rotated dims

Scalings change f (formulas: transformers `modeling_rope_utils.py`; llama3: Meta's `apply_scaling`; yarn:
Peng et al. 2023, arXiv 2309.00071).  `dynamic` and `longrope` change f with the length, that is,
they would rewrite the past at every token: they run here inside their original length, where f is fixed.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from tiercel.mixers.attention.rope import RopeConfig


def frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Angles per position (R / 2,) float32, and the factor on cos and sin."""
    R = rotated_dims(rope, head_dim)
    f = rope.theta ** -(torch.arange(0, R, 2, dtype=torch.float64) / R)
    scale = 1.0 if rope.attention_factor is None else rope.attention_factor
    if rope.factors is not None:
        f = f / torch.tensor(rope.factors, dtype=torch.float64)
    if rope.scaling == "proportional":  # pairs across the whole head, of which the slower ones stay
        f = f / rope.factor
        f[int(rope.fraction * head_dim // 2) :] = 0
    elif rope.scaling == "linear":
        f = f / rope.factor
    elif rope.scaling == "llama3":
        f = _llama3(f, rope)
    elif rope.scaling == "yarn":
        f, scale = _yarn(f, rope, R)
    return f.float(), scale


frequencies_of = lru_cache(maxsize=None)(frequencies)  # also keeps alive what a captured step points to


def rotated_dims(rope: RopeConfig, head_dim: int) -> int:
    """How many dims of a head turn, from the front; an even number."""
    if rope.scaling == "proportional":
        return head_dim // 2 * 2
    return int(head_dim * rope.fraction) // 2 * 2


def _llama3(f: Tensor, rope: RopeConfig) -> Tensor:
    """High frequencies stay, low ones are divided by factor, those between are blended."""
    assert rope.original_length is not None
    turns = rope.original_length * f / (2 * math.pi)  # over the original context
    blend = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - blend) * f / rope.factor + blend * f


def _yarn(f: Tensor, rope: RopeConfig, R: int) -> tuple[Tensor, float]:
    """Interpolate slow dims, keep fast ones, ramp between; cos and sin grow by the attention factor."""
    assert rope.original_length is not None
    length = rope.original_length

    def dim_of(turns: float) -> float:
        return R * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    ramp = ((torch.arange(R // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    scale = rope.attention_factor
    if scale is None and rope.mscale and rope.mscale_all_dim:
        scale = mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    elif scale is None:
        scale = mscale(1.0)
    return f / rope.factor * ramp + f * (1 - ramp), scale


def rotate(x_HLD: Tensor, cos_LR: Tensor, sin_LR: Tensor) -> Tensor:
    """Turn the first 2·R dims of every head; cos and sin: (L, R) float32."""
    R = cos_LR.shape[-1]
    u, w = x_HLD[..., :R].float(), x_HLD[..., R : 2 * R].float()
    turned = torch.cat((u * cos_LR - w * sin_LR, w * cos_LR + u * sin_LR), -1).to(x_HLD.dtype)
    return turned if x_HLD.shape[-1] == 2 * R else torch.cat((turned, x_HLD[..., 2 * R :]), -1)
