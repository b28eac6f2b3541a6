"""The gated delta rule by chunks, in torch: what the native kernel computes, for plain torch.

Inside a chunk that begins with the state S, with a_t = Σ_{s≤t} g_s since its start,

    u_t = β_t (v_t − exp(a_t) Sᵀ k_t − Σ_{j<t} exp(a_t − a_j) (k_t · k_j) u_j)
    o_t =       exp(a_t) Sᵀ q_t + Σ_{j≤t} exp(a_t − a_j) (q_t · k_j) u_j
    S'  =       exp(a_C) S + Σ_j exp(a_C − a_j) k_j ⊗ u_j

so a token needs of the earlier ones of its chunk k, u and g, and S only where the chunk begins.  u of the new tokens
solves a unit lower triangular system.  Decays are exponentials of differences: exp(−a) alone would overflow.
Letters: L inputs since a chunk boundary, Q new ones (the last), G key heads, H value heads, K and V as in `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiercel.mixers.gated_delta.reference import for_value_heads, normalized
from tiercel.mixers.mamba2.chunked import MIN_LOG_DECAY


def gated_delta(
    q_QGK: Tensor,
    k_LGK: Tensor,
    v_QHV: Tensor,
    g_LH: Tensor,
    beta_QH: Tensor,
    u_OHV: Tensor,
    S_HKV: Tensor,
    *,
    chunk: int,
    commit: int = 0,
    tiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs o and pseudo-values u (Q, H, V) float32 of the new tokens, and the state after `commit` inputs.

    Args:
        q_QGK, k_LGK: as the convolution leaves them, not normalised.
        u_OHV: of the O = L − Q inputs before the new ones.
        S_HKV: the state before input 0, which lies on a chunk boundary.
        commit: a multiple of `chunk`, at most L.
        tiled: which key head a value head reads.
    """
    Q, (L, _, K), H = q_QGK.shape[0], k_LGK.shape, v_QHV.shape[1]
    O = L - Q
    q_HQK = for_value_heads(normalized(q_QGK.float()) * K**-0.5, H, tiled).transpose(0, 1)
    k_HLK = for_value_heads(normalized(k_LGK.float()), H, tiled).transpose(0, 1)
    v_HQV, beta_HQ, g_HL = v_QHV.float().transpose(0, 1), beta_QH.float().t(), g_LH.double().t()
    outputs, news, committed, S = [], [u_OHV.float().transpose(0, 1)], S_HKV, S_HKV
    for start in range(0, L, chunk):
        stop = min(start + chunk, L)
        first = max(start, O)  # of the new ones
        k, a = k_HLK[:, start:stop], g_HL[:, start:stop].cumsum(1)
        u = torch.cat(news, 1)[:, start : min(stop, O)] if start < O else v_HQV[:, :0]
        if first < stop:
            new = slice(first - O, stop - O)
            at = a[:, first - start :]
            decay = (at.unsqueeze(2) - a.unsqueeze(1)).float().clamp(MIN_LOG_DECAY, 0.0).exp()  # (H, new, inputs)
            inherited = at.float().exp().unsqueeze(2)
            kk = (k[:, first - start :] @ k.transpose(1, 2)) * decay
            old = first - start
            beta = beta_HQ[:, new].unsqueeze(2)
            right = v_HQV[:, new] - inherited * (k[:, old:] @ S) - kk[:, :, :old] @ u
            lower = beta * kk[:, :, old:].tril(-1)
            fresh = torch.linalg.solve_triangular(lower, beta * right, upper=False, unitriangular=True)
            u = torch.cat((u, fresh), 1)
            qk = ((q_HQK[:, new] @ k.transpose(1, 2)) * decay).tril(old)
            outputs.append(inherited * (q_HQK[:, new] @ S) + qk @ u)
            news.append(fresh)
        if stop - start == chunk and (stop < L or stop == commit):
            last = a[:, -1:]
            S = S * last.float().exp().unsqueeze(2) + (k * (last - a).float().exp().unsqueeze(2)).transpose(1, 2) @ u
        if stop == commit:
            committed = S
    o_HQV, u_HQV = (torch.cat(parts, 1) for parts in (outputs, news[1:]))
    return o_HQV.transpose(0, 1), u_HQV.transpose(0, 1), committed
