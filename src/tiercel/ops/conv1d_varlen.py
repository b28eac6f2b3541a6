"""The causal depthwise convolution inside documents of rows, and silu of it, forward and backward.

    h_t = b + Σ_k w_k x_{t−k} over the k < K that stay in t's document          w_k: the tap k tokens back
    y_t = h_t or silu(h_t)

On the CPU all tokens are summed as if a row were one document, and the few near a document's start are recomputed; on
a GPU, where their number would need a synchronization, each lag is multiplied with 0 or 1.  Backward recomputes the
sums: keeping them would cost as much memory as x.

Letters: B rows of L tokens, T = B · L, C channels, K taps, E tokens near a document's start.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tiercel.ops.cpu import training


class PastRows:
    """Distance of each token from the start of its document."""

    def __init__(self, position_BL: Tensor, taps: int) -> None:
        self.position_BL, self.taps = position_BL, taps
        self.few = position_BL.device.type == "cpu"

    @cached_property
    def reach_T(self) -> Tensor:
        """Lags that stay in the document."""
        return self.position_BL.flatten().clamp(max=self.taps - 1)

    @cached_property
    def has(self) -> list[Tensor]:
        """(B, L, 1) for each lag."""
        return [(self.position_BL >= lag).unsqueeze(2) for lag in range(self.taps)]

    @cached_property
    def edges(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Tokens with fewer than K − 1 before them in their document, then those with fewer after them, flat (E,);
        of each, for every lag, whether the token so far away is of its document, (K, E, 1)."""
        position_T = self.position_BL.flatten()
        lags_K, T = torch.arange(self.taps), len(position_T)
        token_T = torch.arange(T)
        later_TK = (token_T.unsqueeze(1) + lags_K).clamp(max=T - 1)
        ahead_TK = position_T[later_TK] == position_T.unsqueeze(1) + lags_K
        behind_TK = position_T.unsqueeze(1) >= lags_K
        ahead_TK &= token_T.unsqueeze(1) + lags_K < T
        first_E, last_E = (~flags[:, -1:].flatten() for flags in (behind_TK, ahead_TK))
        return (
            (token_T[first_E], behind_TK[first_E].t().unsqueeze(2)),
            (token_T[last_E], ahead_TK[last_E].t().unsqueeze(2)),
        )


def conv1d_varlen(x_BLC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, pasts: PastRows, *, silu: bool) -> Tensor:
    """(B, L, C) → the same, contiguous; all of one dtype, float32 or float64.

    x may be bfloat16 where there are kernels (`takes`), which return the dtype of autocast.
    """
    if takes(x_BLC, weight_CK):
        native: Tensor = NativeConv1d.apply(x_BLC, weight_CK, bias_C, pasts, silu)
        return native
    y: Tensor = TorchConv1d.apply(x_BLC, weight_CK, bias_C, pasts, silu)
    return y


def takes(x: Tensor, weight_CK: Tensor) -> bool:
    return weight_CK.shape[1] <= training.TAPS and weight_CK.dtype == torch.float32 and training.takes(x)


class NativeConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BLC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, pasts: PastRows, silu: bool
    ) -> Tensor:
        weight_KC = weight_CK.t().flip(0).contiguous()
        ctx.save_for_backward(x_BLC, weight_KC, bias_C)
        ctx.reach_T, ctx.silu = pasts.reach_T, silu
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_BLC.dtype
        return training.conv1d_varlen(training.rows(x_BLC), weight_KC, bias_C, ctx.reach_T, dtype, silu).view(
            x_BLC.shape
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLC: Tensor) -> tuple[Tensor | None, ...]:
        x_BLC, weight_KC, bias_C = ctx.saved_tensors
        dx_TC, dweight_KC, dbias_C = training.conv1d_varlen_backward(
            training.rows(x_BLC), weight_KC, bias_C, ctx.reach_T, training.rows(dy_BLC), ctx.silu
        )
        return dx_TC.view(x_BLC.shape), dweight_KC.flip(0).t(), dbias_C, None, None


class TorchConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BLC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, pasts: PastRows, silu: bool
    ) -> Tensor:
        weight_KC = weight_CK.t().flip(0).contiguous()
        ctx.save_for_backward(x_BLC, weight_KC, bias_C)
        ctx.pasts, ctx.silu = pasts, silu
        h_BLC = _convolution(x_BLC, weight_KC, bias_C, pasts)
        return F.silu(h_BLC) if silu else h_BLC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLC: Tensor) -> tuple[Tensor | None, ...]:
        x_BLC, weight_KC, bias_C = ctx.saved_tensors
        pasts, L = ctx.pasts, x_BLC.shape[1]
        dh_BLC = dy_BLC.contiguous()
        if ctx.silu:
            dh_BLC = torch.ops.aten.silu_backward(dy_BLC, _convolution(x_BLC, weight_KC, bias_C, pasts))
        dx_BLC, dweight_KC = dh_BLC * weight_KC[0], torch.zeros_like(weight_KC)
        dweight_KC[0] = (dh_BLC * x_BLC).sum((0, 1))
        for lag in range(1, min(len(weight_KC), L)):
            later = dh_BLC[:, lag:]
            if not pasts.few:
                later = later * pasts.has[lag][:, lag:]
            dx_BLC[:, : L - lag].addcmul_(later, weight_KC[lag])
            dweight_KC[lag] = (later * x_BLC[:, : L - lag]).sum((0, 1))
        if pasts.few:
            (first_E, has_KE1), (last_F, ahead_KF1) = pasts.edges
            x_TC, dh_TC = x_BLC.flatten(0, 1), dh_BLC.flatten(0, 1)
            dx_BLC.flatten(0, 1)[last_F] = _recompute(dh_TC, last_F, 1, ahead_KF1, weight_KC, None)
            dh_EC, column_E1 = dh_TC[first_E], (first_E % L).unsqueeze(1)
            for lag in range(1, min(len(weight_KC), L)):
                other_E1 = ~has_KE1[lag] & (column_E1 >= lag)
                dweight_KC[lag] -= (dh_EC * x_TC[(first_E - lag).clamp(min=0)] * other_E1).sum(0)
        return dx_BLC, dweight_KC.flip(0).t(), dh_BLC.sum((0, 1)) if bias_C is not None else None, None, None


def _convolution(x_BLC: Tensor, weight_KC: Tensor, bias_C: Tensor | None, pasts: PastRows) -> Tensor:
    h_BLC = x_BLC * weight_KC[0] if bias_C is None else torch.addcmul(bias_C, x_BLC, weight_KC[0])
    L = x_BLC.shape[1]
    for lag in range(1, min(len(weight_KC), L)):
        past = x_BLC[:, : L - lag]
        h_BLC[:, lag:].addcmul_(past if pasts.few else past * pasts.has[lag][:, lag:], weight_KC[lag])
    if pasts.few:
        (first_E, has_KE1), _ = pasts.edges
        h_BLC.flatten(0, 1)[first_E] = _recompute(x_BLC.flatten(0, 1), first_E, -1, has_KE1, weight_KC, bias_C)
    return h_BLC


def _recompute(
    x_TC: Tensor, token_E: Tensor, way: int, has_KE1: Tensor, weight_KC: Tensor, bias_C: Tensor | None
) -> Tensor:
    """Σ_k w_k x_{t + way · k} over the k inside the document, for some tokens."""
    h_EC = x_TC[token_E] * weight_KC[0] if bias_C is None else torch.addcmul(bias_C, x_TC[token_E], weight_KC[0])
    for lag in range(1, len(weight_KC)):
        other_EC = x_TC[(token_E + way * lag).clamp(0, len(x_TC) - 1)]
        h_EC.addcmul_(other_EC * has_KE1[lag], weight_KC[lag])
    return h_EC


def at_least_fp32(t: Tensor) -> Tensor:
    """The tensor, float32 where it is narrower."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t
