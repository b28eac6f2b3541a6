"""Causal grouped-query attention of the newest L positions over all T.

    y_i = Σ_{j≤i, i−j<window} softmax_j(scale · q_i · k_j) v_j

Query i stands at position T − L + i.  Softmax sums are float32 whatever the dtype of q, k and v.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 512  # queries per mask, so that a long prompt over a longer past needs no L × T mask


def attention(q_HLD: Tensor, k_KTD: Tensor, v_KTD: Tensor, *, scale: float, window: int | None = None) -> Tensor:
    """q: (H, L, D), k and v: (K, T, D) with K dividing H → (H, L, D) in the dtype of q."""
    H, L, D = q_HLD.shape
    K, T, _ = k_KTD.shape
    if L == 1:  # the queries of a group share their keys: let them be rows of one product, nothing is repeated
        if window is not None:
            k_KTD, v_KTD = k_KTD[:, -window:], v_KTD[:, -window:]
        return _sdpa(q_HLD.view(K, H // K, D), k_KTD, v_KTD, scale=scale).reshape(H, 1, D)
    if L == T and (window is None or window >= T):
        return _sdpa(q_HLD, k_KTD, v_KTD, scale=scale, is_causal=True)
    blocks = []
    for start in range(0, L, BLOCK):
        stop = min(start + BLOCK, L)
        first, last = T - L + start, T - L + stop  # positions of these queries
        oldest = 0 if window is None else max(0, first - window + 1)
        i, j = torch.arange(first, last, device=q_HLD.device), torch.arange(oldest, last, device=q_HLD.device)
        lag_LT = i.unsqueeze(1) - j
        seen_LT = (lag_LT >= 0) if window is None else (lag_LT >= 0) & (lag_LT < window)
        k, v = k_KTD[:, oldest:last], v_KTD[:, oldest:last]
        blocks.append(_sdpa(q_HLD[:, start:stop], k, v, scale=scale, mask=seen_LT))
    return torch.cat(blocks, 1)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    grouped = q.shape[0] != k.shape[0]
    return F.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )[0]


def attention_reference(
    q_HLD: Tensor, k_KTD: Tensor, v_KTD: Tensor, *, scale: float, window: int | None = None
) -> Tensor:
    """One query and one head at a time, in float64."""
    H, L, _ = q_HLD.shape
    K, T, _ = k_KTD.shape
    out = torch.empty_like(q_HLD, dtype=torch.float64)
    for h in range(H):
        k_TD, v_TD = k_KTD[h * K // H].double(), v_KTD[h * K // H].double()
        for i in range(L):
            now = T - L + i
            seen = slice(0 if window is None else max(0, now - window + 1), now + 1)
            out[h, i] = torch.softmax(scale * (k_TD[seen] @ q_HLD[h, i].double()), 0) @ v_TD[seen]
    return out
