"""Gated short convolution: a mixer whose state is its last K − 1 inputs (LFM2, arXiv 2511.23404).

    [B | C | x] = in_proj(u)
    out_proj( C · conv(B · x) )         causal, depthwise, K taps, no activation

Names agree with transformers `modeling_lfm2.py`.
Letters: T tokens of the whole batch, L of one sequence, D width, C channels (beside the gate C), K taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiercel.mixers.recurrent import RecurrentState
from tiercel.mixers.short_conv.ops import short_conv_op
from tiercel.model.batch import Batch
from tiercel.model.derived import Derived, float32
from tiercel.model.layers import NONE_PRECOMPUTED, Linear, Precomputed
from tiercel.model.varlen import VarlenBatch
from tiercel.ops.conv1d import conv1d, conv1d_reference

if TYPE_CHECKING:
    from tiercel.mixers.short_conv.config import ShortConvConfig


def short_conv_reference(B_LC: Tensor, C_LC: Tensor, x_LC: Tensor, weight_CK: Tensor, bias_C: Tensor | None) -> Tensor:
    """C · conv(B · x) of a whole sequence, (L, C) float64.

    Args:
        B_LC, C_LC, x_LC: the three parts of in_proj's output.
        weight_CK: taps; the last meets the current token.
    """
    Bx_LC = F.pad(B_LC.double() * x_LC.double(), (0, 0, weight_CK.shape[1] - 1, 0))
    return C_LC.double() * conv1d_reference(Bx_LC, weight_CK, bias_C)


class ShortConv(nn.Module):
    def __init__(self, config: ShortConvConfig, width: int, eps: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.in_proj = Linear(width, 3 * config.channels, config.bias)
        self.conv = nn.Parameter(torch.empty(config.channels, config.conv))
        if config.bias:
            self.conv_bias = nn.Parameter(torch.empty(config.channels))
        else:
            self.register_parameter("conv_bias", None)
        self.out_proj = Linear(config.channels, width, config.bias)
        self._derived = Derived()

    def forward(
        self,
        u_TD: Tensor,
        batch: Batch | VarlenBatch,
        states: Sequence[RecurrentState | None],
        precomputed: Precomputed = NONE_PRECOMPUTED,
    ) -> Tensor:
        """u: (T, D) → (T, D); every sequence continues its own state.  precomputed: products with u made elsewhere."""
        BCx = precomputed[self.in_proj] if self.in_proj in precomputed else self.in_proj(u_TD)
        if not isinstance(batch, VarlenBatch) and batch.native:
            state = states[0]
            assert state is not None
            weight_KC, bias_C = self._derived((self.conv, self.conv_bias), self._derive)
            op = short_conv_op(batch.backend)
            return self.out_proj(op(batch.metadata_for(state), BCx, weight_KC, bias_C, chunk=state.chunk))
        B_TC, C_TC, x_TC = BCx.chunk(3, -1)
        Bx_TC = B_TC * x_TC
        if isinstance(batch, VarlenBatch):
            h_TC = batch.conv1d(Bx_TC, self.conv, self.conv_bias, silu=False)
        else:
            rows = [self._convolve(Bx_TC[span], state) for span, state in zip(batch.spans, states, strict=True)]
            h_TC = torch.cat(rows).to(u_TD.dtype)
        return self.out_proj(C_TC * h_TC)

    def _derive(self) -> tuple[Tensor | None, ...]:
        """The small parameters as the kernels read them."""
        return float32(self.conv.t()), None if self.conv_bias is None else float32(self.conv_bias)

    def _convolve(self, Bx_LC: Tensor, state: RecurrentState | None) -> Tensor:
        """One sequence, (L, C) float32."""
        if state is None:
            return conv1d(F.pad(Bx_LC, (0, 0, self.config.conv - 1, 0)), self.conv, self.conv_bias)
        h_LC = conv1d(state.window("conv_state", Bx_LC), self.conv, self.conv_bias)
        state.commit(len(Bx_LC))
        return h_LC
