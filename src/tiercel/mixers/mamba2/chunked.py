"""State space duality: the Mamba-2 scan (Dao & Gu 2024, arXiv 2405.21060, §6).

    S_t = exp(dt_t A) S_{t−1} + B_t ⊗ dt_t x_t        S ∈ R^{N×P}, one per head;  A < 0, one number per head
    y_t = C_t S_t                                     B and C are shared by the H / G heads of a group

Inside a chunk that begins with the state S the same y is an attention-like sum over the chunk's own inputs:

    y_t = exp(a_t) C_t S  +  Σ_{j≤t} exp(a_t − a_j) (C_t · B_j) dt_j x_j          a_t = Σ_{k≤t} dt_k A

so the state is needed only where a chunk begins.  A step, a chunk of a prompt and a whole prompt are one
call: L inputs that begin on a chunk boundary, and queries for the last Q of them.

Letters: L inputs, Q queries (the last Q inputs), H heads, P head dim, N state, G groups, R = H / G.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_LOG_DECAY = -87.0  # exp of less is a denormal number: no contribution, and twenty times the time


def ssd(
    C_QGN: Tensor,
    x_LHP: Tensor,
    dt_LH: Tensor,
    A_H: Tensor,
    B_LGN: Tensor,
    S_HNP: Tensor,
    *,
    chunk: int,
    commit: int = 0,
) -> tuple[Tensor, Tensor]:
    """Outputs y (Q, H, P) float32 of the last Q inputs, and the state (H, N, P) after the first `commit` inputs.

    S is the state before input 0, which lies on a chunk boundary; dt is positive (after softplus);
    commit is a multiple of `chunk`, at most L.
    """
    L, Q = x_LHP.shape[0], C_QGN.shape[0]
    outputs, committed = [], S_HNP
    for start in range(0, L, chunk):
        stop = min(start + chunk, L)
        x, B = x_LHP[start:stop].float(), B_LGN[start:stop].float()
        dt = dt_LH[start:stop]
        # log decay from the chunk's start through each input; float64, as differences of long sums are taken
        a_HL = (dt.double() * A_H.double()).cumsum(0).t().contiguous()
        first = max(start, L - Q)
        if first < stop:
            C = C_QGN[first - (L - Q) : stop - (L - Q)].float()
            outputs.append(_outputs(C, x, dt, a_HL, B, S_HNP))
        if stop - start == chunk and (stop < L or stop == commit):
            S_HNP = _next_state(x, dt, a_HL, B, S_HNP)
        if stop == commit:
            committed = S_HNP
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)), committed


def _outputs(C_QGN: Tensor, x_LHP: Tensor, dt_LH: Tensor, a_HL: Tensor, B_LGN: Tensor, S_HNP: Tensor) -> Tensor:
    """The last Q outputs of one chunk (or of what is open of it)."""
    Q, G, N = C_QGN.shape
    L, H, P = x_LHP.shape
    C_GQN, a_HQ = C_QGN.transpose(0, 1), a_HL[:, L - Q :]
    # what the state at the chunk's start contributes
    y_HQP = (C_GQN.unsqueeze(1) @ S_HNP.view(G, -1, N, P)).view(H, Q, P)
    y_HQP = y_HQP * a_HQ.float().exp().unsqueeze(-1)
    # what the chunk's own inputs contribute
    scores_GQL = torch.bmm(C_GQN, B_LGN.permute(1, 2, 0))
    lag_HQL = (a_HQ.unsqueeze(2) - a_HL.unsqueeze(1)).float()
    decay_HQL = lag_HQL.clamp(MIN_LOG_DECAY, 0.0).exp()
    if Q > 1:
        decay_HQL = decay_HQL.tril(L - Q)  # the future does not count
    weights_HQL = decay_HQL * dt_LH.t().unsqueeze(1)
    weights_HQL = (weights_HQL.view(G, H // G, Q, L) * scores_GQL.unsqueeze(1)).view(H, Q, L)
    return (y_HQP + torch.bmm(weights_HQL, x_LHP.transpose(0, 1))).transpose(0, 1)


def _next_state(x_LHP: Tensor, dt_LH: Tensor, a_HL: Tensor, B_LGN: Tensor, S_HNP: Tensor) -> Tensor:
    """The state after a full chunk: exp(a_L) S + Σ_j exp(a_L − a_j) B_j ⊗ dt_j x_j."""
    H, N, P = S_HNP.shape
    L, G, _ = B_LGN.shape
    last_H1 = a_HL[:, -1:]
    weights_LH = (last_H1 - a_HL).float().exp().t() * dt_LH
    x_GRLP = (x_LHP * weights_LH.unsqueeze(-1)).view(L, G, -1, P).permute(1, 2, 0, 3)
    added_HNP = (B_LGN.permute(1, 2, 0).unsqueeze(1) @ x_GRLP).view(H, N, P)
    return S_HNP * last_H1.exp().float().unsqueeze(2) + added_HNP


def ssd_reference(
    C_LGN: Tensor, x_LHP: Tensor, dt_LH: Tensor, A_H: Tensor, B_LGN: Tensor, S_HNP: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence, one token at a time, in float64: outputs (L, H, P) and the last state (H, N, P)."""
    R = x_LHP.shape[1] // B_LGN.shape[1]
    S, ys = S_HNP.double(), []
    for C_GN, x_HP, dt_H, B_GN in zip(C_LGN.double(), x_LHP.double(), dt_LH.double(), B_LGN.double(), strict=True):
        B_HN, C_HN = B_GN.repeat_interleave(R, 0), C_GN.repeat_interleave(R, 0)
        decay_H11 = (dt_H * A_H.double()).exp().view(-1, 1, 1)
        S = decay_H11 * S + B_HN.unsqueeze(2) * (dt_H.unsqueeze(1) * x_HP).unsqueeze(1)
        ys.append((C_HN.unsqueeze(1) @ S).squeeze(1))
    return torch.stack(ys), S
