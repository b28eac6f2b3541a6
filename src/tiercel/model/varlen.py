"""Rows full of documents, for training: what `model.batch.Batch` is for running.

B rows of L tokens, each row several documents one after another.  Attention, positions, convolution and state begin
anew at each document's first token, so that every document gets what it would get alone.  There is no loop over rows,
documents or heads; all of it is torch with gradients, and runs where the tensors are.  The scans and attention are the
mixers' own (`mixers/*/varlen.py`); here is what several of them share.

Letters: B rows, L their length, T = B · L.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from tiercel.mixers.attention.rope import RopeConfig
from tiercel.mixers.attention.rotary import frequencies_of
from tiercel.ops.conv1d_varlen import PastRows, at_least_fp32, conv1d_varlen, takes


class VarlenBatch:
    """Documents in rows.

    Args:
        starts_BL: bool: where documents begin; the first column always does.
        recompute: a block's activations are computed again in the backward pass (slower, less memory).

    Attributes:
        document_BL: int64: the number of each token's document in its row.
        position_BL: int64: the position of each token in its document.
        single: every row is one document; False on a device, which is not asked.
    """

    native = False
    step = False  # see `state_cache.DeviceBatch`

    def __init__(self, starts_BL: Tensor, *, recompute: bool = False) -> None:
        B, L = self.shape = starts_BL.shape
        starts_BL = starts_BL.clone()
        starts_BL[:, 0] = True
        self.single = starts_BL.device.type == "cpu" and int(starts_BL.sum()) == B
        self.starts_BL, self.device, self.recompute = starts_BL, starts_BL.device, recompute
        self.tokens, self.lengths = B * L, [L] * B
        self.document_BL = starts_BL.cumsum(1)
        index_L = torch.arange(L, device=self.device)
        self.position_BL = index_L - torch.where(starts_BL, index_L, 0).cummax(1).values
        self._shared: dict[Hashable, Any] = {}

    def to(self, device: torch.device | str) -> VarlenBatch:
        """The same documents on another device."""
        moved = VarlenBatch(self.starts_BL.to(device), recompute=self.recompute)
        moved.single = self.single
        return moved

    def shared(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """make(), once for all layers that ask for `key`."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def side_by_side(self, runs: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """The outputs of a layer's mixers."""
        return [run() for run in runs]

    def rotary(self, rope: RopeConfig, head_dim: int) -> tuple[Tensor, Tensor]:
        """cos and sin (T, R / 2) float32, of positions in documents."""

        def make() -> tuple[Tensor, Tensor]:
            f_R, scale = frequencies_of(rope, head_dim)
            angle_TR = torch.outer(self.position_BL.flatten().float(), f_R.to(self.device))
            return angle_TR.cos() * scale, angle_TR.sin() * scale

        pair: tuple[Tensor, Tensor] = self.shared(("rotary", rope, head_dim), make)
        return pair

    def conv1d(self, x_TC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, *, silu: bool = True) -> Tensor:
        """The causal depthwise convolution inside documents, (T, C) → (T, C), or silu of it."""
        taps = weight_CK.shape[1]
        past = self.shared(("past", taps), lambda: PastRows(self.position_BL, taps))
        weight_CK, bias_C = at_least_fp32(weight_CK), None if bias_C is None else at_least_fp32(bias_C)
        x_TC = x_TC if takes(x_TC, weight_CK) else at_least_fp32(x_TC)
        return conv1d_varlen(x_TC.unflatten(0, self.shape), weight_CK, bias_C, past, silu=silu).flatten(0, 1)
