"""State space duality: the Mamba-2 scan (Dao & Gu 2024, arXiv 2405.21060, §6).

    S_t = exp(dt_t A) S_{t−1} + dt_t x_t ⊗ B_t        S ∈ R^{P×N}, one per head;  A < 0, one number per head
    y_t = S_t C_t                                     B and C are shared by the H / G heads of a group

Inside a chunk that begins with the state S the same y is an attention-like sum over the chunk's own inputs:

    y_t = exp(a_t) S C_t  +  Σ_{j≤t} exp(a_t − a_j) (C_t · B_j) dt_j x_j          a_t = Σ_{k≤t} dt_k A

so the state is needed only where a chunk begins.  A step, a chunk of a prompt and a whole prompt are one
call: L inputs that begin on a chunk boundary, and queries for the last Q of them.

Letters: L inputs, Q queries (the last Q inputs), H heads, P head dim, N state, G groups, R = H / G.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = -87.0  # exp of less is a denormal number: no contribution, and twenty times the time


def ssd(
    C_QGN: Tensor,
    x_LHP: Tensor,
    dt_LH: Tensor,
    A_H: Tensor,
    B_LGN: Tensor,
    S_HPN: Tensor,
    *,
    chunk: int,
    commit: int = 0,
) -> tuple[Tensor, Tensor]:
    """Outputs y (Q, H, P) float32 of the last Q inputs, and the state (H, P, N) after the first `commit` inputs.

    S is the state before input 0, which lies on a chunk boundary; dt is positive (after softplus);
    commit is a multiple of `chunk`, at most L.
    """
    L, Q = x_LHP.shape[0], C_QGN.shape[0]
    outputs, committed = [], S_HPN
    for start in range(0, L, chunk):
        stop = min(start + chunk, L)
        x, B = x_LHP[start:stop].float(), B_LGN[start:stop].float()
        dt = dt_LH[start:stop]
        # log decay from the chunk's start through each input; float64, as differences of long sums are taken
        a_HL = (dt.double() * A_H.double()).cumsum(0).t().contiguous()
        first = max(start, L - Q)
        if first < stop:
            C = C_QGN[first - (L - Q) : stop - (L - Q)].float()
            outputs.append(_outputs(C, x, dt, a_HL, B, S_HPN))
        if stop - start == chunk and (stop < L or stop == commit):
            S_HPN = _next_state(x, dt, a_HL, B, S_HPN)
        if stop == commit:
            committed = S_HPN
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)), committed


def _outputs(C_QGN: Tensor, x_LHP: Tensor, dt_LH: Tensor, a_HL: Tensor, B_LGN: Tensor, S_HPN: Tensor) -> Tensor:
    """The last Q outputs of one chunk (or of what is open of it)."""
    Q, G, N = C_QGN.shape
    L, H, P = x_LHP.shape
    C_GQN, a_HQ = C_QGN.transpose(0, 1), a_HL[:, L - Q :]
    # what the state at the chunk's start contributes
    S_GIN = S_HPN.view(G, -1, N)  # I = R · P
    if Q == 1:  # a product of one row reads S at a third of this speed
        y_GQI = (S_GIN * C_GQN).sum(-1).unsqueeze(1)
    else:
        y_GQI = torch.bmm(C_GQN, S_GIN.transpose(1, 2))
    y_QHP = y_GQI.transpose(0, 1).reshape(Q, H, P) * a_HQ.t().float().exp().unsqueeze(-1)
    # what the chunk's own inputs contribute
    scores_GQL = torch.bmm(C_GQN, B_LGN.permute(1, 2, 0))
    lag_HQL = (a_HQ.unsqueeze(2) - a_HL.unsqueeze(1)).float()
    decay_HQL = lag_HQL.clamp(SMALLEST, 0.0).exp()
    if Q > 1:
        decay_HQL = decay_HQL.tril(L - Q)  # the future does not count
    weights_HQL = decay_HQL * dt_LH.t().unsqueeze(1)
    weights_HQL = (weights_HQL.view(G, H // G, Q, L) * scores_GQL.unsqueeze(1)).view(H, Q, L)
    return y_QHP + torch.bmm(weights_HQL, x_LHP.transpose(0, 1)).transpose(0, 1)


def _next_state(x_LHP: Tensor, dt_LH: Tensor, a_HL: Tensor, B_LGN: Tensor, S_HPN: Tensor) -> Tensor:
    """The state after a full chunk: exp(a_L) S + Σ_j exp(a_L − a_j) dt_j x_j ⊗ B_j."""
    H, P, N = S_HPN.shape
    L, G, _ = B_LGN.shape
    last_H1 = a_HL[:, -1:]
    weights_LH = (last_H1 - a_HL).float().exp().t() * dt_LH
    x_LGI = (x_LHP * weights_LH.unsqueeze(-1)).view(L, G, -1)
    added_HPN = (x_LGI.permute(1, 2, 0) @ B_LGN.transpose(0, 1)).view(H, P, N)
    return S_HPN * last_H1.exp().float().unsqueeze(2) + added_HPN


def ssd_reference(
    C_LGN: Tensor, x_LHP: Tensor, dt_LH: Tensor, A_H: Tensor, B_LGN: Tensor, S_HPN: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence, one token at a time, in float64: outputs (L, H, P) and the last state (H, P, N)."""
    R = x_LHP.shape[1] // B_LGN.shape[1]
    S, ys = S_HPN.double(), []
    for C_GN, x_HP, dt_H, B_GN in zip(C_LGN.double(), x_LHP.double(), dt_LH.double(), B_LGN.double(), strict=True):
        B_HN, C_HN = B_GN.repeat_interleave(R, 0), C_GN.repeat_interleave(R, 0)
        decay_H11 = (dt_H * A_H.double()).exp().view(-1, 1, 1)
        S = decay_H11 * S + (dt_H.unsqueeze(1) * x_HP).unsqueeze(2) * B_HN.unsqueeze(1)
        ys.append((S @ C_HN.unsqueeze(2)).squeeze(2))
    return torch.stack(ys), S
