"""The Mamba-2 scan of rows full of documents, forwards and backwards in matrix form.

The formulas are those of `ops.ssd`, all chunks at once.  A row is cut into chunks of Q tokens; state does not cross a
document's start, which the four masks of `Chunks` say once for all layers and heads:

    y_t = Σ_{j≤t} w_tj u_j + e_t C_t Z      u = dt x;  w_tj = exp(a_t − a_j) C_t · B_j;  e_t = exp(a_t)
    S   = Σ_j B_j ⊗ l_j u_j                 what a chunk leaves;  l_j = exp(a_last − a_j)
    Z_c = Σ_{k<c} g_ck S_k                  the state a chunk begins with;  g: decay of the chunks between

The gradient of a_t is Σ_j x_tj − Σ_j x_jt for x = dw ∘ w, without its diagonal, which would cancel, and what the two
other places add; it would also be dy_t · y_t − du_t · u_t, but for the digits that such large numbers lose.

Letters: B rows, L their length, C chunks of a row, K = B · C, Q tokens of a chunk, and those of `ops.ssd`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tiercel.mixers.mamba2 import cpu_train
from tiercel.mixers.mamba2.cpu_train import Layout
from tiercel.model.varlen import VarlenBatch
from tiercel.ops import triton
from tiercel.ops.conv1d_varlen import at_least_fp32
from tiercel.ops.cpu import training

CHUNK = 64  # a chunk's matrices cost Q for each token, its state N · P: for heads and states of 64 they meet here
MIN_LOG_DECAY = -60.0  # exp of less is no contribution, and its products would be denormal numbers


@dataclass
class Chunks:
    """Which tokens are of one document, as 0 and 1.  count: chunks of a row.  begin_KQ: where in its chunk a token's
    document begins.

    same_KQQ: t and j, j ≤ t;  into_KQ: t and the end of the chunk before;  left_KQ: j and the end of its chunk;
    carried_BCC: the ends of chunk k and of the one before c, k < c.
    """

    count: int
    begin_KQ: Tensor
    same_KQQ: Tensor
    into_KQ: Tensor
    left_KQ: Tensor
    carried_BCC: Tensor

    @classmethod
    def of(cls, document_BL: Tensor, Q: int, dtype: torch.dtype) -> Chunks:
        """document_BL: the number of each token's document; Q divides L."""
        document_BCQ = document_BL.unflatten(1, (-1, Q))
        last_BC = document_BCQ[..., -1]
        before_BC = F.pad(last_BC[:, :-1], (1, 0), value=-1)
        same = (document_BCQ.unsqueeze(3) == document_BCQ.unsqueeze(2)).tril()
        begins = torch.arange(Q, device=document_BL.device).expand_as(document_BCQ)
        begins = torch.where(document_BCQ.diff(dim=2, prepend=document_BCQ[..., :1]) != 0, begins, 0)
        carried = (before_BC.unsqueeze(2) == last_BC.unsqueeze(1)).tril(-1)
        return cls(
            last_BC.shape[1],
            begins.cummax(2).values.flatten(0, 1),
            same.flatten(0, 1).to(dtype),
            (document_BCQ == before_BC.unsqueeze(-1)).flatten(0, 1).to(dtype),
            (document_BCQ == last_BC.unsqueeze(-1)).flatten(0, 1).to(dtype),
            carried.to(dtype),
        )


def ssd_varlen(
    C_TGN: Tensor, x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TGN: Tensor, D_H: Tensor | None, chunks: Chunks
) -> Tensor:
    """y (T, H, P) + D x in the dtype of x; dt, A and D are float32 or float64, and so are x, B and C but for autocast.

    Under autocast the products are rounded like others, and so is what is kept for the backward pass; nothing else is.
    """
    device = x_THP.device.type
    half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    with torch.autocast(device, enabled=False):
        y: Tensor = PackedSSD.apply(C_TGN, x_THP, dt_TH, A_H, B_TGN, D_H, chunks, half)
    return y


def ssd_documents(
    C_TGN: Tensor,
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TGN: Tensor,
    D_H: Tensor | None,
    batch: VarlenBatch,
    *,
    chunk: int = CHUNK,
) -> Tensor:
    """y + D x (T, H, P), float32 or wider; on a GPU by kernels of our own where Triton is."""
    if triton.there and x_THP.is_cuda:
        from tiercel.mixers.mamba2 import triton_varlen

        if triton_varlen.takes(x_THP, dt_TH):
            y_kernel: Tensor = triton_varlen.ssd_varlen(C_TGN, x_THP, dt_TH, A_H, B_TGN, D_H, batch.document_BL)
            return y_kernel
    L = batch.shape[1]
    Q = min(chunk, L)
    is_bf16 = batch.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    given = [t if is_bf16 else at_least_fp32(t) for t in (C_TGN, x_THP, at_least_fp32(dt_TH), B_TGN)]
    extra = -L % Q
    if extra:  # zeros after the end add nothing to anything
        given = [F.pad(t.unflatten(0, batch.shape), (0, 0) * (t.dim() - 1) + (0, extra)).flatten(0, 1) for t in given]
    C, x, dt, Bs = given
    y_THP = ssd_varlen(
        C, x, dt, at_least_fp32(A_H), Bs, None if D_H is None else at_least_fp32(D_H), chunks_of(batch, Q, dt.dtype)
    )
    return y_THP.unflatten(0, (-1, L + extra))[:, :L].flatten(0, 1) if extra else y_THP


def chunks_of(batch: VarlenBatch, Q: int, dtype: torch.dtype) -> Chunks:
    """The rows of a batch in chunks, the same for all layers."""

    def make() -> Chunks:
        return Chunks.of(F.pad(batch.document_BL, (0, -batch.shape[1] % Q), mode="replicate"), Q, dtype)

    chunks: Chunks = batch.shared(("chunks", Q, dtype), make)
    return chunks


class PackedSSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        C_TGN: Tensor,
        x_THP: Tensor,
        dt_TH: Tensor,
        A_H: Tensor,
        B_TGN: Tensor,
        D_H: Tensor | None,
        chunks: Chunks,
        half: torch.dtype | None,
    ) -> Tensor:
        (K, Q), (H, P), G = chunks.into_KQ.shape, x_THP.shape[1:], B_TGN.shape[1]
        dtype = dt_TH.dtype
        kept = half or dtype  # what products are given
        layout, x_TI, dt = Layout(K, Q, H, G, P), x_THP.flatten(1), dt_TH.unflatten(0, (K, Q)).contiguous()
        Bs, Cs = _grouped(B_TGN, K).to(kept), _grouped(C_TGN, K).to(kept)
        # log decay from the chunk's or the document's start through each input; float64, as differences are taken
        log_KQH = dt.double() * A_H.double()
        a_KQH = log_KQH.cumsum(1)
        a_KQH = a_KQH - (a_KQH - log_KQH).gather(1, chunks.begin_KQ.unsqueeze(2).expand(-1, -1, H))
        a_KHQ = a_KQH.transpose(1, 2).contiguous()
        high_KHQ = a_KHQ.to(dtype)
        low_KHQ = (a_KHQ - high_KHQ).to(dtype)
        scores_KGQQ = (Cs @ Bs.transpose(1, 2)).to(dtype).view(K, G, Q, Q) * chunks.same_KQQ.unsqueeze(1)
        weights = _decayed(high_KHQ, low_KHQ, scores_KGQQ, kept)
        between: tuple[Tensor, ...] = ()
        left_KQH = into_KQH = before = None
        if chunks.count > 1:
            left_KQH = _exp(a_KQH[:, -1:] - a_KQH, dtype) * chunks.left_KQ.unsqueeze(2)
            into_KQH = _exp(a_KQH, dtype) * chunks.into_KQ.unsqueeze(2)
        u, V, _ = _spread(x_TI, dt, None if left_KQH is None else left_KQH * dt, layout, kept)
        if V is not None:
            assert left_KQH is not None and into_KQH is not None
            g_BHCC = _carry(a_KQH[:, -1], chunks, dtype)
            S = Bs.transpose(1, 2) @ V
            Z = _carried(S, g_BHCC, layout)
            before = Cs @ Z
            between = left_KQH, into_KQH, g_BHCC, S, Z, before
        y_TI = _gather(torch.bmm(weights, u), before, into_KQH, x_TI, D_H, layout)
        ctx.save_for_backward(C_TGN, x_THP, dt, A_H, B_TGN, D_H, high_KHQ, low_KHQ, scores_KGQQ, *between)
        ctx.chunks, ctx.layout, ctx.kept = chunks, layout, kept
        return y_TI.view(x_THP.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_THP: Tensor) -> tuple[Tensor | None, ...]:
        C_TGN, x_THP, dt, A_H, B_TGN, D_H, high_KHQ, low_KHQ, scores_KGQQ, *between = ctx.saved_tensors
        chunks, layout, kept, dtype = ctx.chunks, ctx.layout, ctx.kept, dt.dtype
        K, Q, H, G, _ = layout
        N, x_TI, dy_TI = B_TGN.shape[2], x_THP.flatten(1), training.rows(dy_THP.flatten(1))
        Bs, Cs = _grouped(B_TGN, K).to(kept), _grouped(C_TGN, K).to(kept)
        left_KQH, into_KQH, g_BHCC, S, Z, before = between or [None] * 6

        # inside the chunks
        u, V, _ = _spread(x_TI, dt, None if left_KQH is None else left_KQH * dt, layout, kept)
        dy, E, from_before = _spread(dy_TI, None, into_KQH, layout, kept, before)
        dw = torch.bmm(dy, u.transpose(1, 2))
        ds_KGQQ, da_KHQ = _decayed_back(high_KHQ, low_KHQ, scores_KGQQ, dw)
        du = torch.bmm(_decayed(high_KHQ, low_KHQ, scores_KGQQ, kept).transpose(1, 2), dy)
        da_KQH = da_KHQ.transpose(1, 2).double()
        ds = (ds_KGQQ * chunks.same_KQQ.unsqueeze(1)).view(K * G, Q, Q).to(kept)
        dC, dB, dlu = (ds @ Bs).to(dtype), (ds.transpose(1, 2) @ Cs).to(dtype), None

        # between them
        if between:
            assert V is not None and E is not None
            dC += E @ Z.transpose(1, 2)
            dZ = Cs.transpose(1, 2) @ E
            dS = _carried(dZ, g_BHCC, layout, back=True)
            dg_BHCC = _carried_dots(S, dZ, g_BHCC, layout).mul_(g_BHCC).double()
            dB += V @ dS.transpose(1, 2)
            dlu = Bs @ dS
        dx_TI, dots_KQH, left_dots_KQH = _gather_back(du, dlu, left_KQH, x_TI, dy_TI, dt, D_H, layout)
        if between:
            assert left_dots_KQH is not None and from_before is not None
            # g_ck decays by the chunks after k and before c
            later, earlier = dg_BHCC.sum(3), dg_BHCC.sum(2)
            after = later.flip(2).cumsum(2).flip(2) - later - earlier.flip(2).cumsum(2).flip(2)
            left = (left_dots_KQH * dt).double()
            da_KQH = da_KQH + from_before - left
            da_KQH[:, -1] += left.sum(1) + after.transpose(1, 2).flatten(0, 1)

        dlog_KQH = da_KQH.flip(1).cumsum(1).flip(1)
        dA_H = (dlog_KQH * dt).sum((0, 1)).to(A_H.dtype)
        ddt_KQH = (dlog_KQH * A_H.double()).to(dtype) + dots_KQH
        dD_H = None
        if ctx.needs_input_grad[5]:
            dD_H = (dy_THP.to(dtype) * x_THP.to(dtype)).sum(2).sum(0)
        dB, dC = (t.view(K, G, Q, N).transpose(1, 2).reshape(-1, G, N).to(B_TGN.dtype) for t in (dB, dC))
        return dC, dx_TI.view(x_THP.shape), ddt_KQH.reshape(-1, H), dA_H, dB, dD_H, None, None


# ── between layouts: scales are (K, Q, H)


def _spread(
    x_TI: Tensor, scale: Tensor | None, other: Tensor | None, layout: Layout, dtype: torch.dtype,
    meets: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """scale · x by head (K · H, Q, P), other · x by group (K · G, Q, R · P), Σ_p of this with `meets`, (K, Q, H)."""
    K, Q, H, G, P = layout
    if training.takes(x_TI) and dtype != torch.float64:
        by_head, by_group, dots = cpu_train.to_heads(x_TI, scale, other, layout, dtype, meets)
        return by_head, by_group, None if dots is None else dots.view(K, Q, H)
    x = at_least_fp32(x_TI).view(K, Q, H, P)
    by_head = _by_head(x if scale is None else x * scale.unsqueeze(3)).flatten(0, 1).to(dtype)
    if other is None:
        return by_head, None, None
    x = x * other.unsqueeze(3)
    dots = None if meets is None else (x * _by_token(at_least_fp32(meets), K, H)).sum(3)
    return by_head, _by_group(x, G).to(dtype), dots


def _gather(
    by_head: Tensor, by_group: Tensor | None, scale: Tensor | None, x_TI: Tensor, D_H: Tensor | None, layout: Layout
) -> Tensor:
    """by_head + scale · by_group + D x, (T, I) in the dtype of x."""
    if training.takes(x_TI, by_head):
        return cpu_train.from_heads(by_head, by_group, scale, x_TI, D_H, layout)
    K, Q, H, _, P = layout
    y = at_least_fp32(by_head).view(K, H, Q, P).transpose(1, 2)
    if by_group is not None and scale is not None:
        y = _by_token(at_least_fp32(by_group), K, H) * scale.unsqueeze(3) + y
    if D_H is not None:
        y = torch.addcmul(y, at_least_fp32(x_TI).view(K, Q, H, P), D_H.unsqueeze(1))
    return y.reshape(x_TI.shape).to(x_TI.dtype)


def _gather_back(
    by_head: Tensor, by_group: Tensor | None, scale: Tensor | None, x_TI: Tensor, dy_TI: Tensor, dt: Tensor,
    D_H: Tensor | None, layout: Layout,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """For du = by_head + scale · by_group: dt · du + D dy, Σ_p x du (K, Q, H), and of this the second part."""
    K, Q, H, _, P = layout
    if training.takes(x_TI, by_head, dy_TI):
        dx_TI, dots, left = cpu_train.from_heads_backward(
            by_head, by_group, scale, x_TI, dy_TI, dt.flatten(0, 1), D_H, layout
        )
        return dx_TI, dots.view(K, Q, H), None if left is None else left.view(K, Q, H)
    x, du, left = at_least_fp32(x_TI).view(K, Q, H, P), at_least_fp32(by_head).view(K, H, Q, P).transpose(1, 2), None
    if by_group is not None and scale is not None:
        dlu = _by_token(at_least_fp32(by_group), K, H).mul_(scale.unsqueeze(3))
        du, left = dlu + du, (x * dlu).sum(3)
    dx = du * dt.unsqueeze(3)
    if D_H is not None:
        dx = dx.addcmul_(at_least_fp32(dy_TI).view(K, Q, H, P), D_H.unsqueeze(1))
    return dx.reshape(x_TI.shape).to(x_TI.dtype), (x * du).sum(3), left


# ── from chunk to chunk: states S (K · G, N, R · P)


def _carried(S: Tensor, g_BHCC: Tensor, layout: Layout, *, back: bool = False) -> Tensor:
    """g S, or gᵀ S."""
    if training.takes(S):
        return cpu_train.state_passing(S, g_BHCC, layout, back=back)
    g = g_BHCC.transpose(2, 3) if back else g_BHCC
    return _per_chunk(g @ _per_row(S, g.shape[3], layout).to(g.dtype), layout).to(S.dtype)


def _carried_dots(S: Tensor, dZ: Tensor, g_BHCC: Tensor, layout: Layout) -> Tensor:
    """The gradient of g, where g is not zero."""
    C = g_BHCC.shape[3]
    if training.takes(S, dZ):
        return cpu_train.state_passing_grad(S, dZ, C, layout)
    return (_per_row(dZ, C, layout) @ _per_row(S, C, layout).transpose(2, 3)).to(g_BHCC.dtype)


def _per_row(S: Tensor, C: int, layout: Layout) -> Tensor:
    """States (K · G, N, R · P) → (B, H, C, N · P)."""
    N, (_, _, H, G, P) = S.shape[1], layout
    return S.view(-1, C, G, N, H // G, P).permute(0, 2, 4, 1, 3, 5).reshape(-1, H, C, N * P)


def _per_chunk(S_BHCX: Tensor, layout: Layout) -> Tensor:
    """The backward pass."""
    (B, H, C, X), G, P = S_BHCX.shape, layout.groups, layout.head_dim
    return S_BHCX.view(B, G, H // G, C, X // P, P).permute(0, 3, 1, 4, 2, 5).reshape(B * C * G, X // P, H // G * P)


# ── layouts: by token (K, Q, H, P), by head (K, H, Q, P), by group (K · G, Q, R · P)


def _by_head(t_KQHP: Tensor) -> Tensor:
    return t_KQHP.transpose(1, 2).contiguous()


def _by_group(t_KQHP: Tensor, G: int) -> Tensor:
    K, Q, _, _ = t_KQHP.shape
    return t_KQHP.reshape(K, Q, G, -1).transpose(1, 2).reshape(K * G, Q, -1)


def _by_token(t: Tensor, K: int, H: int) -> Tensor:
    """By group → by token, contiguous."""
    Q = t.shape[1]
    return t.view(K, -1, Q, t.shape[2]).transpose(1, 2).reshape(K, Q, H, -1)


def _grouped(t_TGN: Tensor, K: int) -> Tensor:
    """(T, G, N) → (K · G, Q, N), without a copy where there is one group."""
    t: Tensor = t_TGN.unflatten(0, (K, -1))
    return t.squeeze(2) if t.shape[2] == 1 else t.transpose(1, 2).flatten(0, 1)


# ── decays


def _exp(log: Tensor, dtype: torch.dtype) -> Tensor:
    return log.to(dtype).clamp(MIN_LOG_DECAY, 0.0).exp_()


def _decayed(high_KHQ: Tensor, low_KHQ: Tensor, scores_KGQQ: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights inside chunks, exp(a_t − a_j) · scores, (K · H, Q, Q).  a comes in two numbers, so that nothing of it
    is lost; scores are zero for j > t."""
    if _natively(high_KHQ):
        return cpu_train.decay_weights(high_KHQ, low_KHQ, scores_KGQQ, dtype)
    G = scores_KGQQ.shape[1]
    decay_KGHQQ: Tensor = _decay(high_KHQ, low_KHQ).unflatten(1, (G, -1))
    return (decay_KGHQQ * scores_KGQQ.unsqueeze(2)).flatten(0, 2).to(dtype)


def _decayed_back(high_KHQ: Tensor, low_KHQ: Tensor, scores_KGQQ: Tensor, dw: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of scores (K, G, Q, Q), not masked, and of a (K, H, Q)."""
    if _natively(high_KHQ):
        return cpu_train.decay_weights_backward(high_KHQ, low_KHQ, scores_KGQQ, dw)
    G = scores_KGQQ.shape[1]
    ds = (dw.view(*high_KHQ.shape, -1) * _decay(high_KHQ, low_KHQ)).unflatten(1, (G, -1))
    x_KHQQ = (ds * scores_KGQQ.unsqueeze(2)).flatten(1, 2)
    x_KHQQ.diagonal(dim1=2, dim2=3).zero_()
    return ds.sum(2), x_KHQQ.sum(3) - x_KHQQ.sum(2)


def _natively(high_KHQ: Tensor) -> bool:
    return high_KHQ.shape[2] % 16 == 0 and training.takes(high_KHQ)


def _decay(high_KHQ: Tensor, low_KHQ: Tensor) -> Tensor:
    """exp(a_t − a_j), (K, H, Q, Q), 1 for j > t."""
    lag = high_KHQ.unsqueeze(3) - high_KHQ.unsqueeze(2)
    lag.add_(low_KHQ.unsqueeze(3)).sub_(low_KHQ.unsqueeze(2))
    return lag.clamp_(MIN_LOG_DECAY, 0.0).exp_()


def _carry(last_KH: Tensor, chunks: Chunks, dtype: torch.dtype) -> Tensor:
    """g, (B, H, C, C)."""
    last_BHC = last_KH.unflatten(0, (-1, chunks.count)).transpose(1, 2)
    through_BHC = last_BHC.cumsum(2)
    lag_BHCC = (through_BHC - last_BHC).unsqueeze(3) - through_BHC.unsqueeze(2)
    return _exp(lag_BHCC, dtype) * chunks.carried_BCC.unsqueeze(1)
