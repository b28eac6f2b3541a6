"""Native gated short convolution: the causal convolution of ops/cpu/conv.cpp between two gates."""

from __future__ import annotations

from torch import Tensor

from tiercel.ops.cpu import native
from tiercel.ops.cpu.batch import BatchMetadata
from tiercel.ops.cpu.native import address


def short_conv(batch: BatchMetadata, BCx: Tensor, weight_KC: Tensor, bias_C: Tensor | None, *, chunk: int) -> Tensor:
    """As `ShortConvOp`."""
    (K, C), BCx = weight_KC.shape, BCx.float()
    y_TC = native.empty(batch.tokens, C)
    native.extension.short_conv(
        batch, address(BCx), address(weight_KC), address(bias_C), address(y_TC), BCx.stride(0), C, K, chunk
    )
    return y_TC
