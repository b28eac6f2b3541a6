"""Attention inside documents of rows, where a mask over whole rows would be mostly zeros.

Documents of about one length lie side by side, filled up at their ends with other tokens: causal attention never looks
there, and what comes out there is dropped.  Nothing is masked but the future.

Letters: T tokens, M documents of one width L, H heads, K key/value heads, P head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tiercel.mixers.attention import cpu_train
from tiercel.model.varlen import VarlenBatch
from tiercel.ops.cpu import training

STEP = 32  # widths are its multiples
FEW = 512  # tokens up to which two products of bfloat16 and all weights between them beat the fused kernel, threefold


class Documents:
    """index: for each group of documents, the flat position of every token (M · L,), grouped by width.

    back_T: where among all of these, one group after another, each token lies.
    """

    def __init__(self, starts_BL: Tensor) -> None:
        starts = starts_BL.clone()
        starts[:, 0] = True
        first = starts.flatten().nonzero().flatten()
        T = starts.numel()
        lengths = torch.diff(first, append=torch.tensor([T]))
        widths = (lengths + STEP - 1) // STEP * STEP
        self.widths: list[int] = widths.unique().tolist()
        self.counts: list[int] = []
        index: list[Tensor] = []
        self.back_T, at = torch.empty(T, dtype=torch.int64), 0
        for width in self.widths:
            mine = widths == width
            along = torch.arange(width)
            real = along < lengths[mine].unsqueeze(1)
            flat = (first[mine].unsqueeze(1) + along).clamp(max=T - 1)
            self.back_T[flat[real]] = at + real.flatten().nonzero().flatten()
            index.append(flat.flatten())
            self.counts.append(len(flat))
            at += flat.numel()
        self.index = torch.cat(index)


class Laid(torch.autograd.Function):
    """x (T, …) → (sum of M · L, …): documents of one width side by side."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, documents: Documents) -> Tensor:
        ctx.documents = documents
        return x.index_select(0, documents.index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.documents.back_T), None  # what fills up has no gradient: see `Taken`


class Taken(torch.autograd.Function):
    """The backward pass: (sum of M · L, …) → (T, …)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, documents: Documents) -> Tensor:
        ctx.documents, ctx.rows = documents, len(y)
        return y.index_select(0, documents.back_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, ctx.documents.back_T, grad), None


def attention_varlen(
    q_THP: Tensor, k_TKP: Tensor, v_TKP: Tensor, documents: Documents, *, scale: float, window: int | None = None
) -> Tensor:
    """Causal grouped-query attention inside documents → (T, H, P)."""
    H, K, P = q_THP.shape[1], k_TKP.shape[1], q_THP.shape[2]
    laid = Laid.apply(torch.cat((q_THP, k_TKP, v_TKP), 1), documents)
    outputs, sizes = [], [m * width for m, width in zip(documents.counts, documents.widths, strict=True)]
    for part, m, width in zip(laid.split(sizes), documents.counts, documents.widths, strict=True):
        q, k, v = part.view(m, width, -1, P).transpose(1, 2).split((H, K, K), 1)
        if width <= FEW and torch.is_autocast_enabled("cpu"):
            y = _by_products(q, k, v, scale, window)
        elif window is None or window >= width:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=H > K)
        else:
            seen = torch.ones(width, width, dtype=torch.bool).tril().triu(1 - window)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=H > K)
        outputs.append(y.transpose(1, 2).reshape(m * width, H, P))
    y_THP: Tensor = Taken.apply(torch.cat(outputs), documents)
    return y_THP


def _by_products(q_MHLP: Tensor, k_MKLP: Tensor, v_MKLP: Tensor, scale: float, window: int | None) -> Tensor:
    """The formula, in the dtype of autocast, a key head's queries side by side → (M, H, L, P)."""
    M, H, L, P = q_MHLP.shape
    half = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        q, k, v = (x.to(half) for x in (q_MHLP * scale, k_MKLP, v_MKLP))
        y: Tensor = Products.apply(q.reshape(M, k.shape[1], -1, P), k, v, window)
        return y.view(M, H, L, P)


class Products(torch.autograd.Function):
    """softmax(q kᵀ) v over the keys that are seen: q (M, K, H / K · L, P), k and v (M, K, L, P).  Only the weights are
    kept, and the backward pass makes the scores' gradient in their gradient's place."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        weights, ctx.window = q @ k.transpose(2, 3), window
        if training.takes(weights):
            cpu_train.causal_softmax_(weights, window)
        else:
            L = k.shape[2]
            hidden = torch.ones(L, L, dtype=torch.bool)
            hidden = hidden.triu(1) if window is None else hidden.triu(1) | hidden.tril(-window)
            weights.unflatten(2, (-1, L)).masked_fill_(hidden, float("-inf"))
            weights = weights.softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, weights = ctx.saved_tensors
        ds = dy @ v.transpose(2, 3)
        if training.takes(weights):
            cpu_train.causal_softmax_backward_(weights, ds, ctx.window)
        else:
            ds = weights * (ds - (weights * ds).sum(-1, keepdim=True))
        return ds @ k, ds.transpose(2, 3) @ q, weights.transpose(2, 3) @ dy, None


def attend_documents(
    q_HTP: Tensor, k_KTP: Tensor, v_KTP: Tensor, batch: VarlenBatch, *, scale: float, window: int | None
) -> Tensor:
    """Causal grouped-query attention inside documents → (H, T, P).

    On the CPU document by document; on a GPU, where that many small kernels would cost more, by one mask.
    """
    if batch.device.type == "cpu":
        documents = batch.shared("documents", lambda: Documents(batch.starts_BL))
        q, k, v = (x.transpose(0, 1) for x in (q_HTP, k_KTP, v_KTP))
        return attention_varlen(q, k, v, documents, scale=scale, window=window).transpose(0, 1)
    q, k, v = (x.unflatten(1, batch.shape).transpose(0, 1) for x in (q_HTP, k_KTP, v_KTP))
    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # the kernels that take a mask want a key head for every query head
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if batch.single and (window is None or window >= batch.shape[1]):
        y_BHLP = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        y_BHLP = F.scaled_dot_product_attention(q, k, v, attn_mask=_mask(batch, window), scale=scale)
    return y_BHLP.transpose(0, 1).flatten(1, 2)


def _mask(batch: VarlenBatch, window: int | None) -> Tensor:
    """(B, 1, L, L) bool: which keys a query sees."""

    def make() -> Tensor:
        index_L = torch.arange(batch.shape[1], device=batch.device)
        lag_LL = index_L.unsqueeze(1) - index_L
        near_LL = lag_LL >= 0 if window is None else (lag_LL >= 0) & (lag_LL < window)
        same_BLL = batch.document_BL.unsqueeze(2) == batch.document_BL.unsqueeze(1)
        return (same_BLL & near_LL).unsqueeze(1)

    mask: Tensor = batch.shared(("mask", window), make)
    return mask
