"""Rows full of documents, for training: what `model.batch.Batch` is for running.

B rows of L tokens, each row several documents one after another.  Attention, positions, convolution and state begin
anew at each document's first token, so that every document gets what it would get alone.  There is no loop over rows,
documents or heads; all of it is torch with gradients, and runs where the tensors are.

    ssd              Mamba-2 as in `ops.ssd`, all chunks at once: inside a chunk a masked product, between chunks the
                     states, whose decay is zero across a document's start; on a GPU kernels of our own where Triton is
    selective_scan   Mamba-1 as in `ops.scan`; `linear_scan` has its own backward
    conv1d_silu      inside documents, as `ops.conv1d`; attend as `mixers.attention.sdpa`

Inputs of a scan are float32 or wider; on CUDA under autocast its products are rounded like others, its sums of
logarithms are float64.  Letters: B rows, L their length, T = B · L, C chunks, Q tokens of one, and those of `ops.ssd`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiercel.mixers.attention.rope import RopeConfig
from tiercel.mixers.attention.rotary import frequencies_of
from tiercel.mixers.attention.varlen import Documents, attention_varlen
from tiercel.mixers.mamba2.varlen import Chunks, ssd_varlen
from tiercel.ops import triton
from tiercel.ops.conv1d_varlen import PastRows, conv1d_silu_varlen, takes

CHUNK = 64  # a chunk's matrices cost Q for each token, its state N · P: for heads and states of 64 they meet here


class VarlenBatch:
    """starts (B, L) bool: where documents begin; the first column always does."""

    native = False

    step = False  # never one token of each row

    def __init__(self, starts_BL: Tensor, *, recompute: bool = False) -> None:
        """recompute: a block's activations are not kept for the way back but made again (slower, less memory)."""
        B, L = self.shape = starts_BL.shape
        starts_BL = starts_BL.clone()
        starts_BL[:, 0] = True
        self.alone = starts_BL.device.type == "cpu" and int(starts_BL.sum()) == B  # on a device: not read back
        self.starts_BL, self.device, self.recompute = starts_BL, starts_BL.device, recompute
        self.tokens, self.lengths = B * L, [L] * B
        self.document_BL = starts_BL.cumsum(1)
        index_L = torch.arange(L, device=self.device)
        self.position_BL = index_L - torch.where(starts_BL, index_L, 0).cummax(1).values
        self._rotary: dict[tuple[RopeConfig, int], tuple[Tensor, Tensor]] = {}
        self._seen: dict[int | None, Tensor] = {}
        self._pasts: dict[int, PastRows] = {}
        self._chunks: dict[tuple[int, torch.dtype], Chunks] = {}

    def to(self, device: torch.device | str) -> VarlenBatch:
        moved = VarlenBatch(self.starts_BL.to(device), recompute=self.recompute)
        moved.alone = self.alone
        return moved

    def side_by_side(self, runs: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        return [run() for run in runs]

    def rotary(self, rope: RopeConfig, head_dim: int) -> tuple[Tensor, Tensor]:
        """cos and sin (T, R / 2) float32, of positions in documents."""
        key = (rope, head_dim)
        if key not in self._rotary:
            f_R, scale = frequencies_of(rope, head_dim)
            angle_TR = torch.outer(self.position_BL.flatten().float(), f_R.to(self.device))
            self._rotary[key] = (angle_TR.cos() * scale, angle_TR.sin() * scale)
        return self._rotary[key]

    # ── attention

    def seen(self, window: int | None) -> Tensor:
        """Who sees whom, (B, 1, L, L) bool."""
        if window not in self._seen:
            L = self.shape[1]
            lag_LL = torch.arange(L, device=self.device).unsqueeze(1) - torch.arange(L, device=self.device)
            near_LL = lag_LL >= 0 if window is None else (lag_LL >= 0) & (lag_LL < window)
            same_BLL = self.document_BL.unsqueeze(2) == self.document_BL.unsqueeze(1)
            self._seen[window] = (same_BLL & near_LL).unsqueeze(1)
        return self._seen[window]

    def attend(self, q_HTP: Tensor, k_KTP: Tensor, v_KTP: Tensor, scale: float, window: int | None) -> Tensor:
        """Causal grouped-query attention inside documents → (H, T, P).

        On the CPU document by document; on a GPU, where that many small kernels would cost more, by one mask.
        """
        if self.device.type == "cpu":
            q, k, v = (x.transpose(0, 1) for x in (q_HTP, k_KTP, v_KTP))
            return attention_varlen(q, k, v, self._documents, scale=scale, window=window).transpose(0, 1)
        q, k, v = (x.unflatten(1, self.shape).transpose(0, 1) for x in (q_HTP, k_KTP, v_KTP))
        groups = q.shape[1] // k.shape[1]
        if groups > 1:  # the kernels that take a mask want a key head for every query head
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if self.alone and (window is None or window >= self.shape[1]):
            y_BHLP = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            y_BHLP = F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen(window), scale=scale)
        return y_BHLP.transpose(0, 1).flatten(1, 2)

    @cached_property
    def _documents(self) -> Documents:
        return Documents(self.starts_BL)

    # ── convolution

    def conv1d_silu(self, x_TC: Tensor, weight_CK: Tensor, bias_C: Tensor | None) -> Tensor:
        """silu of the causal depthwise convolution, (T, C) → (T, C)."""
        taps = weight_CK.shape[1]
        if taps not in self._pasts:
            self._pasts[taps] = PastRows(self.position_BL, taps)
        weight_CK, bias_C = at_least_fp32(weight_CK), None if bias_C is None else at_least_fp32(bias_C)
        x_TC = x_TC if takes(x_TC, weight_CK) else at_least_fp32(x_TC)
        return conv1d_silu_varlen(x_TC.unflatten(0, self.shape), weight_CK, bias_C, self._pasts[taps]).flatten(0, 1)

    # ── scans

    def selective_scan(self, C_TN: Tensor, x_TI: Tensor, dt_TI: Tensor, A_IN: Tensor, B_TN: Tensor) -> Tensor:
        """Mamba-1 → y (T, I)."""
        C_BLN, x_BLI, dt_BLI, B_BLN = (at_least_fp32(t).unflatten(0, self.shape) for t in (C_TN, x_TI, dt_TI, B_TN))
        log_BLIN = dt_BLI.unsqueeze(-1) * A_IN
        decay_BLIN = log_BLIN.exp() * ~self.starts_BL.unsqueeze(-1).unsqueeze(-1)
        added_BLIN = (dt_BLI * x_BLI).unsqueeze(-1) * B_BLN.unsqueeze(2)
        S_BLIN: Tensor = LinearScan.apply(decay_BLIN, added_BLIN)
        y_BLI: Tensor = (S_BLIN @ C_BLN.unsqueeze(-1)).squeeze(-1)
        return y_BLI.flatten(0, 1)

    def ssd(
        self,
        C_TGN: Tensor,
        x_THP: Tensor,
        dt_TH: Tensor,
        A_H: Tensor,
        B_TGN: Tensor,
        D_H: Tensor | None = None,
        *,
        chunk: int = CHUNK,
    ) -> Tensor:
        """Mamba-2 → y + D x (T, H, P), float32 or wider."""
        if triton.there and x_THP.is_cuda:
            from tiercel.mixers.mamba2 import triton_varlen as kernels

            if kernels.takes(x_THP, dt_TH):
                return kernels.ssd_varlen(C_TGN, x_THP, dt_TH, A_H, B_TGN, D_H, self.document_BL)
        L = self.shape[1]
        Q = min(chunk, L)
        half = self.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        given = [t if half else at_least_fp32(t) for t in (C_TGN, x_THP, at_least_fp32(dt_TH), B_TGN)]
        spare = -L % Q
        if spare:  # zeros after the end add nothing to anything
            given = [
                F.pad(t.unflatten(0, self.shape), (0, 0) * (t.dim() - 1) + (0, spare)).flatten(0, 1) for t in given
            ]
        C, x, dt, Bs = given
        y_THP = ssd_varlen(
            C, x, dt, at_least_fp32(A_H), Bs, None if D_H is None else at_least_fp32(D_H), self.chunks(Q, dt.dtype)
        )
        return y_THP.unflatten(0, (-1, L + spare))[:, :L].flatten(0, 1) if spare else y_THP

    def chunks(self, Q: int, dtype: torch.dtype) -> Chunks:
        """Rows in chunks, the same for all layers."""
        if (Q, dtype) not in self._chunks:
            document_BL = F.pad(self.document_BL, (0, -self.shape[1] % Q), mode="replicate")
            self._chunks[Q, dtype] = Chunks.of(document_BL, Q, dtype)
        return self._chunks[Q, dtype]


def at_least_fp32(t: Tensor) -> Tensor:
    """At least float32."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


class LinearScan(torch.autograd.Function):
    """S_t = decay_t ∘ S_{t−1} + added_t along axis 1, from zero."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, added: Tensor) -> Tensor:
        S = linear_scan(decay, added)
        ctx.save_for_backward(decay, S)
        return S

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        decay, S = ctx.saved_tensors
        # g_t = grad_t + decay_{t+1} g_{t+1}: the same scan, from the other end
        later = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], 1)
        g = linear_scan(later.flip(1), grad.flip(1)).flip(1)
        before = torch.cat([torch.zeros_like(S[:, :1]), S[:, :-1]], 1)
        return g * before, g


def linear_scan(decay: Tensor, added: Tensor) -> Tensor:
    """The recurrence in 2 √L steps: inside all blocks at once, then from block to block."""
    L = added.shape[1]
    Q = max(1, round(L**0.5))
    count = -(-L // Q)
    spare = (0, 0) * (added.dim() - 2) + (0, count * Q - L)
    decay, added = (F.pad(t, spare).unflatten(1, (count, Q)) for t in (decay, added))
    inside, through = torch.empty_like(added), torch.empty_like(added)
    inside[:, :, 0], through[:, :, 0] = added[:, :, 0], decay[:, :, 0]
    for t in range(1, Q):
        torch.addcmul(added[:, :, t], decay[:, :, t], inside[:, :, t - 1], out=inside[:, :, t])
        torch.mul(decay[:, :, t], through[:, :, t - 1], out=through[:, :, t])
    for c in range(1, count):
        inside[:, c] += through[:, c] * inside[:, c - 1, -1:]
    return inside.flatten(1, 2)[:, :L]
