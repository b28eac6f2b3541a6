"""The gated delta rule over rows of several documents, with gradients: the form for training.

As `chunked.py`, all rows and heads at once and chunk after chunk.  A document begins with an empty state: decays across
its first token are zero.  Letters: B rows, L their length, C chunks of Q tokens, and those of `chunked`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tiercel.mixers.gated_delta.reference import for_value_heads, normalized

CHUNK = 64


def gated_delta_varlen(
    q_TGK: Tensor,
    k_TGK: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    document_BL: Tensor,
    *,
    tiled: bool = False,
) -> Tensor:
    """Outputs (T, H, V), T = B · L, in the inputs' float type, float32 at least.

    Args:
        q_TGK, k_TGK, v_THV: as the convolution leaves them.
        g_TH, beta_TH: log decay and write strength.
        document_BL: number of each token's document, rising along a row.
        tiled: which key head a value head reads.
    """
    B, L = document_BL.shape
    H, K = v_THV.shape[1], k_TGK.shape[2]
    pad = -L % CHUNK
    wide = torch.promote_types(v_THV.dtype, torch.float32)

    def rows(x: Tensor) -> Tensor:  # (T, H, …) → (B, H, C, Q, …)
        x = x.unflatten(0, (B, L)).transpose(1, 2)
        x = F.pad(x, (*(0, 0) * (x.ndim - 3), 0, pad))
        chunks: Tensor = x.unflatten(2, (-1, CHUNK))
        return chunks

    q = rows(for_value_heads(normalized(q_TGK.to(wide)) * K**-0.5, H, tiled))
    k = rows(for_value_heads(normalized(k_TGK.to(wide)), H, tiled))
    v, beta, a = rows(v_THV.to(wide)), rows(beta_TH.to(wide)), rows(g_TH.double()).cumsum(3)
    document = F.pad(document_BL, (0, pad), value=-1).unflatten(1, (-1, CHUNK)).unsqueeze(1)  # (B, 1, C, Q)
    same = document.unsqueeze(4) == document.unsqueeze(3)
    lag = (a.unsqueeze(4) - a.unsqueeze(3)).masked_fill(~same, -torch.inf).tril()  # tril: its zeros are masked below
    decay = lag.clamp(max=0.0).exp().to(wide).tril()
    kk = (k @ k.transpose(3, 4)) * decay.tril(-1) * beta.unsqueeze(4)
    identity = torch.eye(CHUNK, device=kk.device, dtype=wide)
    qk = (q @ k.transpose(3, 4)) * decay
    # u = W − Y S for any state S that the chunk begins with
    right = torch.cat((beta.unsqueeze(4) * v, beta.unsqueeze(4) * k * a.exp().to(wide).unsqueeze(4)), 4)
    solved = torch.linalg.solve_triangular(identity + kk, right, upper=False, unitriangular=True)
    W, Y = solved.split((v.shape[4], K), 4)
    to_end = (a[:, :, :, -1:] - a).exp().to(wide) * same[:, :, :, -1].to(wide)
    S = v.new_zeros(B, H, K, v.shape[4], dtype=wide)
    before = document_BL.new_full((B,), -2)  # the document that S belongs to
    outputs = []
    for c in range(a.shape[2]):
        held = (document[:, :, c] == before.view(B, 1, 1)).to(wide)  # tokens that continue it
        u = W[:, :, c] - (Y[:, :, c] * held.unsqueeze(3)) @ S
        inherited = (a[:, :, c].exp().to(wide) * held).unsqueeze(3)
        outputs.append(inherited * (q[:, :, c] @ S) + qk[:, :, c] @ u)
        through = a[:, :, c, -1].exp().to(wide) * held[:, :, -1]
        S = through.view(B, H, 1, 1) * S + (k[:, :, c] * to_end[:, :, c].unsqueeze(3)).transpose(2, 3) @ u
        before = document[:, 0, c, -1]
    return torch.cat(outputs, 2)[:, :, :L].transpose(1, 2).flatten(0, 1)
