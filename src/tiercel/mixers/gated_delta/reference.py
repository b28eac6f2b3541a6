"""The gated delta rule, one token at a time, in float64: the judge of every other form.

    S_t = exp(g_t) S_{t−1} + k_t ⊗ u_t        u_t = β_t (v_t − (exp(g_t) S_{t−1})ᵀ k_t)        o_t = S_tᵀ q_t

The decay comes first, the erase reads the decayed state, the output the updated one (arXiv 2412.06464, eq. 10).
Letters: L tokens, G key heads, H value heads (head h reads key head h // (H / G); tiled: h mod G), K key and V value
width.
"""

from __future__ import annotations

import torch
from torch import Tensor

L2_EPS = 1e-6  # under the root of a key's or query's norm


def normalized(x: Tensor) -> Tensor:
    """x / √(Σ x² + 1e-6) over the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def for_value_heads(x: Tensor, heads: int, tiled: bool, dim: int = 1) -> Tensor:
    """Keys or queries (…, G, …) as the `heads` value heads read them."""
    copies = heads // x.shape[dim]
    return torch.cat([x] * copies, dim) if tiled else x.repeat_interleave(copies, dim)


def gated_delta_reference(
    q_LGK: Tensor, k_LGK: Tensor, v_LHV: Tensor, g_LH: Tensor, beta_LH: Tensor, S_HKV: Tensor, *, tiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Outputs (L, H, V) and the last state (H, K, V), float64.

    Args:
        q_LGK, k_LGK: as the convolution leaves them; both are normalised here, q then scaled by K^-0.5.
        g_LH: log decay, at most 0.
        beta_LH: strength of the write, 0 to `beta_max`.
        S_HKV: the state before the first token.
    """
    H, K = v_LHV.shape[1], k_LGK.shape[2]
    q = for_value_heads(normalized(q_LGK.double()), H, tiled) * K**-0.5
    k = for_value_heads(normalized(k_LGK.double()), H, tiled)
    S, outputs = S_HKV.double(), []
    for q_HK, k_HK, v_HV, g_H, beta_H in zip(q, k, v_LHV.double(), g_LH.double(), beta_LH.double(), strict=True):
        S = S * g_H.exp().view(-1, 1, 1)
        u_HV = beta_H.unsqueeze(1) * (v_HV - (k_HK.unsqueeze(1) @ S).squeeze(1))
        S = S + k_HK.unsqueeze(2) * u_HV.unsqueeze(1)
        outputs.append((q_HK.unsqueeze(1) @ S).squeeze(1))
    return torch.stack(outputs), S
